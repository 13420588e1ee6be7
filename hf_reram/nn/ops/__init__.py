"""What a layer does element by element: the definitions, and their twins in pieces that fit in a CPU's cache."""
