"""Seeds of parts of a whole, each a stream of random numbers of its own."""

import hashlib


def derived_seed(seed: int, name: str) -> int:
    """A seed for the part ``name``: independent of the order and number of parts, the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1


def check_seed(seed: int) -> None:
    """
    Raises:
        ValueError: a seed that torch's generators do not take.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed!r}: allowed is an integer from 0 to 2^63 - 1")
