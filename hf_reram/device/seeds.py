"""Seeds of parts of a whole, each a stream of random numbers of its own."""

import hashlib
import operator


def derived_seed(seed: int, name: str) -> int:
    """A seed for the part ``name``: independent of the order and number of parts, the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1


def checked_seed(seed: int) -> int:
    """A seed that was asked for, as Python's integer.

    Raises:
        ValueError: no integer from 0 to 2^63 - 1.
    """
    if not isinstance(seed, bool) and hasattr(seed, "__index__") and 0 <= (number := operator.index(seed)) < 2**63:
        return number
    raise ValueError(f"seed={seed!r}: allowed is an integer from 0 to 2^63 - 1")
