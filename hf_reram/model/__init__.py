"""On and off the crossbars: which layers, the patching, the chips that a model becomes, its inputs and outputs."""
