"""Data that are told by the names of their files: what is in these."""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath
from typing import Any

MOST_FILES = 200_000  # that are looked at in a folder
LONGEST = 1024  # characters of a path
_PATH = re.compile(r"[\\/]|\.\w{1,12}$")  # up to .safetensors
_PINNED = re.compile(r"hf://[^@]*@[0-9a-f]{40}/")


def file_content(path: str | os.PathLike) -> str:
    """SHA-256 of a file.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"the file {path} that it names cannot be read: {error}") from error


def content_under(text: str | PurePath) -> str | None:
    """What is in the file or, by names, sizes and times of their last change, in the folder that a path names, or a
    text that looks like one; None where it names none, or is nothing but dots and slashes, which may be anything.

    Raises:
        ValueError: the folder holds more than 200,000 files.
    """
    if isinstance(text, str) and not (len(text) <= LONGEST and text.isprintable() and _PATH.search(text)):
        return None
    if not (text := str(text)).strip("./\\ "):
        return None
    if os.path.isdir(text):
        return _folder_content(text)
    return file_content(text) if os.path.isfile(text) else None


def _folder_content(folder: str) -> str:
    digest, count = hashlib.sha256(), 0
    for root, folders, files in os.walk(folder):
        folders.sort()
        count += len(files)
        if count > MOST_FILES:
            raise ValueError(f"the folder {folder} that it names holds more than {MOST_FILES:,} files")
        for name in sorted(files):
            path = os.path.join(root, name)
            try:
                found = os.stat(path)
            except OSError:  # a link to nothing
                continue
            digest.update(f"{os.path.relpath(path, folder)} {found.st_size} {found.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def files_of(table: Any) -> Iterator[str]:
    """Paths of the files that rows of an arrow table stand for: of images, sounds and the like that are not in the
    table itself, and of texts that are paths of files."""
    for column in table.columns:
        for chunk in column.chunks:
            yield from _files_of(chunk)


def _files_of(array: Any) -> Iterable[str]:
    import pyarrow as pa

    kind = array.type
    if pa.types.is_struct(kind):
        names = {kind.field(i).name for i in range(kind.num_fields)}
        if names == {"bytes", "path"}:
            rows = zip(array.field("bytes").is_null().to_pylist(), array.field("path").to_pylist())
            return [path for absent, path in rows if absent and path is not None]
        return [path for part in array.flatten() for path in _files_of(part)]
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _files_of(array.flatten())
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return [
            text
            for text in array.to_pylist()
            if text and len(text) < LONGEST and _PATH.search(text) and os.path.isfile(text)
        ]
    return []


def row_content(path: str) -> str:
    """What is in a file that a row of a data set stands for. Of one within an archive, what is in the archive.

    Raises:
        ValueError: it cannot be read, or is elsewhere, where it may change.
    """
    place = path.rpartition("::")[2]
    if "://" not in place:
        return file_content(place)
    if _PINNED.match(place):  # a commit
        return ""
    raise ValueError(f"its row is a file elsewhere, which may change: {Path(place).name}")
