"""Which modules are of installed packages, and which a script's own."""

import os
import site
import sys
import sysconfig
from functools import lru_cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

_NAMES = ("stdlib", "platstdlib", "purelib", "platlib")
_FOLDERS = [*map(sysconfig.get_path, _NAMES), *site.getsitepackages(), site.getusersitepackages()]
LIBRARIES = tuple(str(Path(folder)) + os.sep for folder in _FOLDERS)
OWN = __name__.partition(".")[0]


def is_installed(module: str | None) -> bool:
    """Whether a module is Python's, of an installed package or of this one: its version says what it does."""
    if module == "__main__" or module not in sys.modules:
        return False
    top = module.partition(".")[0]
    return top == OWN or any(_is_installed(sys.modules[name]) for name in (module, top) if name in sys.modules)


def of_library(file: str) -> bool:
    """Whether a module's file, or its folder, is Python's or of an installed package: in a folder for these, or of
    those that an installer has noted in another folder of the path (``pip install --target``, ``PYTHONPATH``)."""
    return f"{file}{os.sep}".startswith(LIBRARIES + _noted(tuple(sys.path)))


@lru_cache(maxsize=8)
def _noted(path: tuple[str, ...]) -> tuple[str, ...]:
    """Folders and files of packages that installers have noted (RECORD) in folders of the path that scripts too may be
    in. An editable package's files are none of them."""
    found = set()
    for folder in {str(Path(entry or os.curdir).absolute()) for entry in path}:
        if f"{folder}{os.sep}".startswith(LIBRARIES):
            continue
        for noted in distributions(path=[folder]):
            if noted.read_text("RECORD") is not None:  # of a source folder, setuptools lists the files elsewhere
                found |= {os.path.join(folder, file.parts[0]) + os.sep for file in noted.files or ()}
    return tuple(sorted(found))


def _is_installed(module: Any) -> bool:
    file = getattr(module, "__file__", None)
    if file is None:
        return getattr(getattr(module, "__spec__", None), "origin", None) in ("built-in", "frozen")
    return of_library(file)
