"""Finished runs of an evaluation, in a file that survives a kill at any moment."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils import logging

from ..device.checks import shown
from ..model.digest import other_settings
from ..version import __version__
from .fields import HEAT, METRICS, NAMED_TEXTS, OBJECT, SEED, TEXT, TEXTS, TIME, fields_of

logger = logging.get_logger(__name__)


def versions() -> dict[str, str]:
    """Of the packages that make a figure, and of Python, whose code is what tells evaluations apart."""
    packages = {"hf_reram": __version__, "torch": str(torch.__version__), "transformers": transformers.__version__}
    return {**packages, "python": ".".join(platform.python_version_tuple()[:2])}


@dataclass(frozen=True)
class Run:
    """One evaluation of a model.

    Attributes:
        kind: "digital", "ideal" or "chip"; of conductances that were read "measured array", or "simulated array" or
            "target array" where nothing was measured. time: s since programming. temperature: K, None for the device's
            reference.
        seed: number of the chip. conductances: a digest of those that were read; empty of a chip.
    """

    kind: str
    time: float = 0.0
    temperature: float | None = None
    seed: int = 0
    conductances: str = ""


class RunLog:
    """One JSON object a line: a run, its metrics and whose they are. Each is appended as a whole line, so that several
    processes may write and a kill loses at most the run under way. Each says of which versions it is.

    Args:
        owner: a fingerprint of the weights and of all else that the metrics depend on.
        parts: short ones of its parts, by what they are of, so that an error can say which is another.
        values: what the metrics depend on too, and agrees only up to last bits, as
            :func:`hf_reram.model.digest.values_of` gives it.
    """

    def __init__(
        self,
        path: str | Path,
        owner: str,
        parts: Mapping[str, str] | None = None,
        values: Mapping[str, Any] | None = None,
    ):
        self.path, self.owner, self.parts, self.values = Path(path), owner, dict(parts or {}), dict(values or {})
        # Of the runs that were read: crossbar layers that did not run in some, and what to know of some.
        self.uncalled: set[str] = set()
        self.notes: set[str] = set()

    def read(self) -> dict[Run, dict[str, float]]:
        """The finished runs of these :func:`versions`: a warning counts others, which stay in the file, whosever they
        are, since of other versions the same model may have another fingerprint.

        Raises:
            ValueError: some of these versions are of another owner.
        """
        lines = self.path.read_bytes().splitlines() if self.path.exists() else []
        try:
            parsed = [entry for line in lines if (entry := _parse(line)) is not None]
            entries = [fields_of(entry, ENTRY, KNOWN) for entry in parsed]
        except ValueError as error:
            raise ValueError(f"{self.path} is no file of finished runs: {error}; delete it or name another") from error
        now = versions()
        if stale := [entry.get("versions", {}) for entry in entries if entry.get("versions") != now]:
            other = ", ".join(f"{name} {stale[-1].get(name)}" for name in now if stale[-1].get(name) != now[name])
            logger.warning("%s holds %d runs of %s: they are run again", self.path, len(stale), other)
        entries = [entry for entry in entries if entry.get("versions") == now]
        if foreign := [
            entry for entry in entries if entry["of"] != self.owner or not self._has(entry.get("values", {}))
        ]:
            raise ValueError(
                f"{self.path} holds runs of other weights, another config or another evaluation "
                f"({self._difference(foreign[0].get('parts'))}): allowed are those of this model and this key; delete "
                "it or name another file. Where it is evaluate itself that changes what differs, as a file that it "
                'writes, say with key="..." what is evaluated; a model that running changes, as where its hooks store '
                "what they see, is another one with a key, too"
            )
        self.uncalled = {name for entry in entries for name in entry.get("uncalled", ())}
        self.notes = {note for entry in entries for note in entry.get("notes", ())}
        casts = {cast for entry in entries for cast in entry.get("autocasts", ())}  # as they were noted before
        self.notes |= {f"evaluated under autocast to {cast}" for cast in casts}
        return {Run(**fields_of(entry["run"], RUN, READ)): entry["metrics"] for entry in entries}

    def _has(self, values: dict[str, Any]) -> bool:
        return values.keys() == self.values.keys() and not other_settings(self.values, values)

    def _difference(self, parts: dict[str, str] | None) -> str:
        """What is another in another owner's run, in words."""
        if not parts or not self.parts:
            return "an earlier hf_reram's, or nothing tells which"
        names = [name for name in {**self.parts, **parts} if self.parts.get(name) != parts.get(name)]
        return f"what differs: {', '.join(map(shown, names))}"

    def append(
        self, run: Run, metrics: dict[str, float], uncalled: Sequence[str] = (), notes: Sequence[str] = ()
    ) -> None:
        """Write one finished run, the crossbar layers that were not called for it, and what to know of it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        said = {name: value for name, value in asdict(run).items() if name in RUN or value}
        entry = {"of": self.owner, "run": said, "metrics": metrics, "versions": versions()}
        entry |= {"uncalled": list(uncalled)} if uncalled else {}
        entry |= {"notes": list(notes)} if notes else {}
        entry |= {"parts": self.parts} if self.parts else {}
        entry |= {"values": self.values} if self.values else {}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("\n" + json.dumps(entry) + "\n")  # the first line break ends a line that a kill has cut off
            file.flush()
            os.fsync(file.fileno())


RUN = {"kind": TEXT, "time": TIME, "temperature": HEAT, "seed": SEED}
READ = {"conductances": TEXT}
KNOWN = {
    "uncalled": TEXTS,
    "notes": TEXTS,
    "autocasts": TEXTS,
    "parts": NAMED_TEXTS,
    "values": OBJECT,
    "versions": NAMED_TEXTS,
}
ENTRY = {"of": TEXT, "run": OBJECT, "metrics": METRICS}


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None  # blank, or cut off by a kill
    return entry if isinstance(entry, dict) else None
