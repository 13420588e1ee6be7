"""Seeds of parts of a whole, each a stream of random numbers of its own."""

import hashlib


def derived_seed(seed: int, name: str) -> int:
    """A seed for the part ``name``: independent of the order and number of parts, the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1
