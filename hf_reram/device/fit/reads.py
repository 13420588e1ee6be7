"""What was measured of cells, checked: by how much each conductance had changed, read by read."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ..checks import shown
from ..temperature import COLDEST, HOTTEST
from ..time import format_time
from .files import CELL, CONDUCTANCE, ELAPSED, FIRST, TARGET, TEMPERATURE, TIME, Source, find_column, read_table

if TYPE_CHECKING:
    from pandas import DataFrame

FEWEST = 100  # cells of a read, and of a fit
NEGATIVE = 0.01  # share of conductances below 0 beyond which they are no noise
SMALLEST, LARGEST = 1e-2, 1e3  # µS; large conductances outside of this are in another unit
LONGEST = 3.2e9  # s; a century
JITTER = 1.0  # K; temperatures that are no further apart were meant to be the same
TOGETHER = 1.05  # times no further apart than by this factor are one read


@dataclass(frozen=True)
class Skip:
    """Rows that were not used.

    Attributes:
        table: they are of. why: in words. rows: their numbers, from 1, the table's head not counted.
    """

    table: str
    why: str
    rows: tuple[int, ...]

    def __str__(self) -> str:
        several = ", ".join(map(str, self.rows[:8])) + (", …" if len(self.rows) > 8 else "")
        return f"{self.table}: {len(self.rows)} rows not used, {self.why} (rows {several})"


@dataclass(frozen=True)
class Read:
    """All cells that were read at one temperature and time.

    Attributes:
        temperature: K. time: s since programming. g: each cell's target, or else its first conductance [µS]. change:
            of its conductance since [µS]. rows: of the table.
    """

    temperature: float
    time: float
    g: np.ndarray
    change: np.ndarray
    rows: np.ndarray


@dataclass
class Measured:
    """Reads in ascending order of temperature and time, and what was found on the way.

    Attributes:
        target, first: of the cells of which both are known [µS].
        by_target: whether all cells' targets are known. from_target: whether some changes count from targets, since no
            first conductances are known.
    """

    reads: list[Read] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    target: list[np.ndarray] = field(default_factory=list)
    first: list[np.ndarray] = field(default_factory=list)
    by_target: bool = True
    from_target: bool = False


def collect(retention: Sequence[Source], bakes: Sequence[Source], room: float) -> Measured:
    """The reads of all tables.

    Args:
        room: K, for tables of ``retention`` without a column of temperatures.

    Raises:
        ValueError: a table lacks a column or a unit, holds what cannot be in its unit, or too few cells.
    """
    found = Measured()
    for sources, baked in ((retention, False), (bakes, True)):
        for source in sources:
            _add(found, *read_table(source), None if baked else room)
    found.reads.sort(key=lambda read: (read.temperature, read.time))
    for a, b in itertools.pairwise(found.reads):
        if a.temperature == b.temperature and b.time <= a.time * TOGETHER:
            raise ValueError(
                f"two tables hold reads {format_time(a.time)} after programming at {a.temperature:g} K: allowed is one"
            )
    if not found.reads:
        raise ValueError(
            "; ".join(
                [
                    "no read after time 0 is left: allowed are tables with later reads of the same cells",
                    *map(str, found.skipped),
                ]
            )
        )
    return found


def _add(found: Measured, frame: "DataFrame", owner: str, room: float | None) -> None:
    cell = find_column(frame, CELL, owner)
    elapsed = find_column(frame, ELAPSED, owner, required=False)
    time = find_column(frame, TIME, owner, required=elapsed is None)
    time = elapsed if time is None else time
    conductance = find_column(frame, CONDUCTANCE, owner)
    assert cell is not None and time is not None and conductance is not None
    target, first = (find_column(frame, column, owner, required=False) for column in (TARGET, FIRST))
    temperature = find_column(frame, TEMPERATURE, owner, required=room is None)
    if temperature is None:
        temperature = np.full(len(frame), room)
        found.notes.append(f"{owner}: no column of temperatures, taken as {room:g} K")
    elif (bad := (temperature < COLDEST) | (temperature > HOTTEST)).any():
        raise ValueError(
            f"{owner}: temperature {temperature[bad][0]:g} K in row {_first(bad)}: allowed are {COLDEST:g} to "
            f"{HOTTEST:g} K; is the column's unit right?"
        )
    for values, name in ((conductance, "conductance"), (target, "target"), (first, "first conductance")):
        if values is not None:
            _check_unit(values, owner, name)
    if (bad := time < 0).any():
        raise ValueError(f"{owner}: time {time[bad][0]:g} s in row {_first(bad)}: allowed are times from 0 on")
    if (bad := time > LONGEST).any():
        raise ValueError(
            f"{owner}: time {time[bad][0]:g} s in row {_first(bad)}: allowed is up to a century; is the column's unit "
            "right?"
        )
    used = np.ones(len(frame), dtype=bool)

    def skip(rows: np.ndarray, why: str) -> None:
        if (rows := rows & used).any():
            found.skipped.append(Skip(owner, why, tuple((np.flatnonzero(rows) + 1).tolist())))
            used[rows] = False

    given = [values for values in (time, conductance, temperature, target, first) if values is not None]
    skip(~np.all([np.isfinite(values) for values in given], axis=0), "a number is missing")
    skip(np.array([name is None or name != name for name in cell.tolist()], dtype=bool), "the cell has no name")
    for values, name in ((conductance, "conductance"), (first, "first conductance"), (target, "target")):
        if values is None:
            continue
        negative = (values < 0) & used
        if negative.sum() > NEGATIVE * used.sum():
            raise ValueError(
                f"{owner}: {negative.sum()} of {used.sum()} rows hold a negative {name} (the first is row "
                f"{_first(negative)}): allowed are at most {100 * NEGATIVE:g} %, as noise"
            )
        skip(negative, f"a negative {name}")
    _, cells = np.unique(cell.astype(str) if cell.dtype == object else cell, return_inverse=True)
    _, heats = np.unique(temperature, return_inverse=True)
    key = cells.astype(np.int64) * (heats.max(initial=0) + 1) + heats  # cells programmed anew for each temperature
    order = np.lexsort((time, key))
    twice = np.zeros(len(frame), dtype=bool)
    kept = order[used[order]]
    twice[kept[1:][(np.diff(key[kept]) == 0) & (np.diff(time[kept]) == 0)]] = True
    skip(twice, "the same cell at the same time again")

    at_start = used & (time == 0)
    if first is None and at_start.any():
        first = np.full(len(frame), np.nan)
        of_key = np.full(key.max() + 1, np.nan)
        of_key[key[at_start]] = conductance[at_start]
        first = of_key[key]
        apart = np.isnan(first) & np.isin(cells, cells[at_start])
        skip(apart, "the cell's read at time 0 is at another temperature: allowed is a column 'programmed_uS'")
        skip(np.isnan(first), "the cell has no read at time 0")
    if first is None and target is None:
        raise ValueError(
            f"{owner}: nothing tells what cells were programmed to: allowed are a column of targets or of first "
            f"conductances ({list(TARGET.names[:1] + FIRST.names[:2])}), or reads at time 0"
        )
    found.by_target &= target is not None
    if target is not None and first is not None:
        once = np.unique(key[used], return_index=True)[1]
        found.target.append(target[used][once])
        found.first.append(first[used][once])
    if first is None:
        found.from_target = True
        found.notes.append(f"{owner}: no first conductances; changes count from targets, programming error included")
    start = target if first is None else first
    aimed = first if target is None else target
    assert start is not None and aimed is not None
    kelvins = np.unique(temperature[used])
    if len(kelvins) > 1 and (np.diff(kelvins) < JITTER).any():
        near = int(np.argmin(np.diff(kelvins)))
        raise ValueError(
            f"{owner}: temperatures of {kelvins[near]:g} and {kelvins[near + 1]:g} K, {len(kelvins)} in all: allowed "
            "is the same one, as it was set, in all rows that belong together"
        )
    count = dict(zip(*np.unique(temperature[used][np.unique(key[used], return_index=True)[1]], return_counts=True)))
    for kelvin, cells_there in count.items():
        if cells_there < FEWEST:
            raise ValueError(
                f"{owner}: {cells_there} cells at {kelvin:g} K: allowed are {FEWEST} and more, of which quantiles can "
                "be told"
            )
        here = np.flatnonzero(used & (temperature == kelvin) & (time > 0))
        here = here[np.argsort(time[here], kind="stable")]
        breaks = np.flatnonzero(np.diff(np.log(time[here])) > np.log(TOGETHER)) + 1
        for rows in np.split(here, breaks):
            if not len(rows):
                continue
            when = float(np.median(time[rows]))
            if len(rows) < FEWEST:
                of = np.zeros(len(frame), dtype=bool)
                of[rows] = True
                skip(of, f"only {len(rows)} of {cells_there} cells were read at {when:g} s")
                continue
            if len(rows) < 0.9 * cells_there:
                found.notes.append(
                    f"{owner}: {len(rows)} of {cells_there} cells were read at {when:g} s, {kelvin:g} K; that time "
                    "rests on them"
                )
            found.reads.append(Read(float(kelvin), when, aimed[rows], conductance[rows] - start[rows], rows))


def _check_unit(values: np.ndarray, owner: str, name: str) -> None:
    """Refuse conductances that are in another unit than it was said.

    Raises:
        ValueError: large ones are far outside of what cells have.
    """
    finite = values[np.isfinite(values)]
    large = float(np.quantile(finite, 0.99)) if len(finite) else np.nan
    if not SMALLEST <= large <= LARGEST:
        seen = "S or mS read as µS" if large < SMALLEST else "µS read as S or mS"
        raise ValueError(
            f"{owner}: {name} of {shown(large)} µS at its 99th percentile: allowed are {SMALLEST:g} to {LARGEST:g} µS; "
            f"is the column's unit right ({seen})?"
        )


def _first(rows: np.ndarray) -> int:
    return int(np.flatnonzero(rows)[0]) + 1
