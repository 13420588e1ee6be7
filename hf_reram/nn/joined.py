"""The class of a layer whose digital class is a subclass of what its kind stands in for: it keeps what it has of its
own, so that parents may go on using it."""

from functools import lru_cache
from typing import Any


@lru_cache(maxsize=1024)
def joined_class(kind: Any, digital: Any) -> Any:
    """``kind``, with the methods and attributes of ``digital`` behind its own."""
    return type(f"Crossbar{digital.__name__}", (kind, digital), {"__doc__": kind.__doc__, "joined": (kind, digital)})


def new_joined(kind: Any, digital: Any) -> Any:
    """An empty layer of :func:`joined_class`, as copies and pickles make it: no module has such a class by name."""
    cls = joined_class(kind, digital)
    return cls.__new__(cls)
