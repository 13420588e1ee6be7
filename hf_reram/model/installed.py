"""Which modules are of installed packages, and which a script's own."""

import os
import site
import sys
import sysconfig
from pathlib import Path
from typing import Any

_FOLDERS = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
LIBRARIES = tuple(
    str(Path(folder)) + os.sep for folder in (*_FOLDERS, *site.getsitepackages(), site.getusersitepackages())
)
OWN = __name__.partition(".")[0]


def is_installed(module: str | None) -> bool:
    """Whether a module is Python's, of an installed package or of this one: its version says what it does."""
    if module == "__main__" or module not in sys.modules:
        return False
    top = module.partition(".")[0]
    return top == OWN or any(_is_installed(sys.modules[name]) for name in (module, top) if name in sys.modules)


def _is_installed(module: Any) -> bool:
    file = getattr(module, "__file__", None)
    if file is None:
        return getattr(getattr(module, "__spec__", None), "origin", None) in ("built-in", "frozen")
    return file.startswith(LIBRARIES)
