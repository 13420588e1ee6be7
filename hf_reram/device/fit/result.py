"""What a fit has found, for people and for a device."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..empirical import EmpiricalRetention
from ..laws import LAWS
from ..retention import RetentionModel
from ..time import format_time
from .extrapolation import LawFit
from .formulas import Parameters
from .goodness import Goodness
from .heat import Heat
from .iv import Curvature
from .reads import Read, Skip

SHOWN_TIMES = (3600.0, 86400.0, 365.25 * 86400.0, 10 * 365.25 * 86400.0)


@dataclass(frozen=True)
class Candidate:
    """A retention model, fitted.

    Attributes:
        name: its type in a device's JSON form. goodness: against the data. parameters: with intervals of confidence of
            95 %; none of tables.
    """

    name: str
    retention: RetentionModel
    goodness: Goodness
    parameters: Parameters

    @property
    def recommended(self) -> bool:
        """Whether it does not miss the data."""
        return not self.goodness.misses


@dataclass(frozen=True)
class Fit:
    """What :func:`hf_reram.device.fit.fit_measurements` has found.

    Attributes:
        fields: of the :class:`hf_reram.DeviceConfig`.
        candidates: retention models, the measured tables first; the one of ``fields`` may be any.
        law: of the time beyond the last read, None where that is held. heat: what several temperatures tell.
        curvature: of the I–V sweeps. skipped: rows that were not used. notes: what else to know.
        reads: the data of the tables. sweeps: those of v0.
    """

    fields: dict[str, Any]
    candidates: tuple[Candidate, ...] = ()
    law: LawFit | None = None
    heat: Heat | None = None
    curvature: Curvature | None = None
    skipped: tuple[Skip, ...] = ()
    notes: tuple[str, ...] = ()
    reads: tuple[Read, ...] = ()
    sweeps: tuple[tuple[np.ndarray, np.ndarray], ...] = ()

    def __str__(self) -> str:
        """All of it, one finding a line."""
        lines = [f"window: {self.fields['g_min']:g} to {self.fields['g_max']:g} µS"]
        for candidate in self.candidates:
            found = candidate.goodness
            verdict = f"not recommended: {found.misses}" if found.misses else "recommended"
            lines.append(
                f"retention {candidate.name!r}: spread off by {100 * found.spread:.1f} %, mean by {found.mean:.3f} "
                f"spreads, distribution by {found.distance:.3f}; {verdict}"
            )
            for name, (value, low, high) in candidate.parameters.items():
                if "[" not in name:
                    lines.append(f"  {name} = {value:.4g} (95 %: {low:.4g} to {high:.4g})")
        if self.law is not None:
            lines += self._told_by_time()
        elif self.reads:
            lines.append("beyond the last read its value is held: a law in time takes three times at least")
        if self.heat is not None:
            lines += [
                f"heat: tables without {kelvin:g} K tell its spread to {100 * spread:.0f} %, its mean to {mean:.2f} "
                "spreads"
                for kelvin, (spread, mean) in self.heat.left_out.items()
            ]
            energy = "" if self.heat.energy is None else f" of {self.heat.energy:.2f} eV"
            holds = "not contradicted, nor its energy told" if self.heat.energy is None else "recommended"
            verdict = f"not recommended: {self.heat.misses}" if self.heat.misses else holds
            lines.append(f"heat: one Arrhenius shift{energy}: {verdict}")
        if self.curvature is not None:
            lines += _told_by_sweeps(self.curvature)
        return "\n".join([*lines, *map(str, self.skipped), *self.notes])

    def _told_by_time(self) -> list[str]:
        law = self.law
        assert law is not None
        scores = ", ".join(
            f"{name} {100 * score:.1f} % ({100 * law.last[name]:.1f} %)" for name, score in law.scores.items()
        )
        lines = [
            f"law in time: {LAWS[law.law]}; errors of the spread at reads that were left out (at the last one alone): "
            f"{scores}"
        ]
        retention = self.candidates[0].retention
        assert isinstance(retention, EmpiricalRetention)
        one = max(retention.series, key=lambda one: len(one.times))
        middle = len(retention.g) // 2
        for time in SHOWN_TIMES:
            if time > one.times[-1]:
                std = retention.changes(time, one.temperature).moments(torch.from_numpy(np.array(retention.g)))[1]
                error = retention.spread_error(time, one.temperature)
                lines.append(
                    f"  spread after {format_time(time)} at {one.temperature:g} K, extrapolated: {std[middle]:.3g} ± "
                    f"{error[middle]:.2g} µS at {retention.g[middle]:.3g} µS"
                )
        return lines


def _told_by_sweeps(curvature: Curvature) -> list[str]:
    v0 = curvature.v0
    verdict = f"not recommended: {curvature.misses}" if curvature.misses else "recommended"
    lines = [f"v0 = {v0.value:.4g} V (95 %: {v0.low:.4g} to {v0.high:.4g}), one for all {v0.cells} cells; {verdict}"]
    lines += [
        f"  v0 = {state.value:.4g} V (95 %: {state.low:.4g} to {state.high:.4g}) of {state.cells} cells of "
        f"{state.g:.3g} µS"
        for state in curvature.states
    ]
    for name, side in (("positive", curvature.positive), ("negative", curvature.negative)):
        if side is not None:
            lines.append(f"  v0 = {side.value:.4g} V of {name} voltages")
    if curvature.asymmetry is not None:
        lines.append(f"  asymmetry: |I(+v)| / |I(-v)| = {curvature.asymmetry:.3g} at the largest voltage")
    return lines
