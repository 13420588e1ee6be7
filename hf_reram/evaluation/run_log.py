"""Finished runs of an evaluation, in a file that survives a kill at any moment."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Run:
    """One evaluation of a model.

    Attributes:
        kind: "digital", "ideal" or "chip". time: s since programming. temperature: K, None for the device's reference.
        seed: number of the chip.
    """

    kind: str
    time: float = 0.0
    temperature: float | None = None
    seed: int = 0


class RunLog:
    """One JSON object a line: a run, its metrics and whose they are. Each is appended as a whole line, so that several
    processes may write and a kill loses at most the run under way.

    Args:
        owner: a fingerprint of the weights and of all else that the metrics depend on.
    """

    def __init__(self, path: str | Path, owner: str):
        self.path, self.owner = Path(path), owner
        self.uncalled: set[str] = set()  # crossbar layers that did not run in some of the runs that were read

    def read(self) -> dict[Run, dict[str, float]]:
        """The finished runs.

        Raises:
            ValueError: some are of another owner.
        """
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        entries = [entry for line in lines if (entry := _parse(line)) is not None]
        if any(entry.get("of") != self.owner for entry in entries):
            raise ValueError(
                f"{self.path} holds runs of other weights, another config or another evaluation: allowed are those of "
                "this model and this key; delete it or name another file"
            )
        self.uncalled = {name for entry in entries for name in entry.get("uncalled", ())}
        return {Run(**entry["run"]): entry["metrics"] for entry in entries}

    def append(self, run: Run, metrics: dict[str, float], uncalled: Sequence[str] = ()) -> None:
        """Write one finished run, and the crossbar layers that were not called for it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        entry = {"of": self.owner, "run": asdict(run), "metrics": metrics}
        entry |= {"uncalled": list(uncalled)} if uncalled else {}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("\n" + json.dumps(entry) + "\n")  # the first line break ends a line that a kill has cut off
            file.flush()
            os.fsync(file.fileno())


def _parse(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError:
        return None  # blank, or cut off by a kill
    return entry if isinstance(entry, dict) else None
