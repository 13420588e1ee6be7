"""Long tables of measurements, one row a reading: columns found by name, their units by the names' endings."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checks import shown, some
from ..temperature import ZERO_CELSIUS
from ..time import UNITS as TIMES

if TYPE_CHECKING:
    from pandas import DataFrame

Source = Any  # a path, a pandas DataFrame, or a mapping of columns

# Units, by how much one of each is in s, µS, MΩ, V and µA.
CONDUCTANCES = {"S": 1e6, "mS": 1e3, "µS": 1.0, "uS": 1.0, "nS": 1e-3}
RESISTANCES = {"Ω": 1e-6, "ohm": 1e-6, "kΩ": 1e-3, "kohm": 1e-3, "MΩ": 1.0, "Mohm": 1.0}
UNITS: dict[str, dict[str, float]] = {
    "time": {**TIMES, "ms": 1e-3, "us": 1e-6, "µs": 1e-6},
    "conductance": CONDUCTANCES,
    "temperature": {"K": 1.0, "C": 1.0, "°C": 1.0, "degC": 1.0},
    "voltage": {"V": 1.0, "mV": 1e-3},
    "current": {"A": 1e6, "mA": 1e3, "µA": 1.0, "uA": 1.0, "nA": 1e-3},
}


@dataclass(frozen=True)
class Column:
    """What a table may hold.

    Attributes:
        names: of the column, without unit, in lower case. quantity: that it is of; None where it has no unit.
    """

    names: tuple[str, ...]
    quantity: str | None = None


CELL = Column(("cell", "cell_id", "device", "id"))
TIME = Column(("time", "t"), "time")
ELAPSED = Column(("elapsed", "elapsed_time"), "time")  # where no nominal time is given
CONDUCTANCE = Column(("conductance", "g", "resistance", "r"), "conductance")
TARGET = Column(("target", "target_conductance", "g_target", "target_resistance", "r_target"), "conductance")
FIRST = Column(
    ("programmed", "first", "programmed_conductance", "first_conductance", "initial", "initial_conductance"),
    "conductance",
)
TEMPERATURE = Column(("temperature", "temp"), "temperature")
VOLTAGE = Column(("voltage", "v"), "voltage")
CURRENT = Column(("current", "i"), "current")

_CONDUCTANCE, _RESISTANCE = re.compile(r"conductance|\bg(\b|_)"), re.compile(r"resistance|\br(\b|_)")
_SPLIT = re.compile(r"(.*?)[\s_]*[_\s(\[/]\s*([^\s_()\[\]/]+)\s*[)\]]?\s*")


def read_table(source: Source) -> tuple["DataFrame", str]:
    """A table and what to call it.

    Args:
        source: a CSV, TSV or parquet file, which may be compressed; a pandas DataFrame, or a mapping of columns.

    Raises:
        FileNotFoundError: no such file. ValueError: no table.
    """
    import pandas as pd

    if isinstance(source, pd.DataFrame):
        return source.reset_index(drop=True), "table"
    if isinstance(source, Mapping):
        return pd.DataFrame(dict(source)), "table"
    if not isinstance(source, (str, Path)):
        raise ValueError(f"{shown(source)} is no table: allowed are a path, a pandas DataFrame, a mapping of columns")
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    kinds = [suffix.lower() for suffix in path.suffixes]
    try:
        if ".parquet" in kinds:
            return pd.read_parquet(path), path.name
        if ".csv" in kinds or ".tsv" in kinds or ".txt" in kinds:
            separator = "," if ".csv" in kinds else "\t"
            try:
                frame = pd.read_csv(path, sep=separator, comment="#")
            except UnicodeDecodeError:  # as Excel writes µ
                frame = pd.read_csv(path, sep=separator, comment="#", encoding="cp1252")
            if len(frame.columns) == 1 and (other := [s for s in ",;\t" if s in str(frame.columns[0])]):
                raise ValueError(f"{other[0]!r} is between its columns: allowed is {separator!r} in {path.name}")
            return frame, path.name
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as a table: {error}") from error
    raise ValueError(f"{path}: allowed are .csv, .tsv and .parquet, as they are or compressed (.gz, .bz2, .xz, .zst)")


def find_column(frame: "DataFrame", column: Column, owner: str, required: bool = True) -> np.ndarray | None:
    """A column's numbers: µS, s, K, V or µA, float64, NaN where there is none; of cells their names as they are.

    Raises:
        ValueError: it is missing though required, there are two, its unit is missing or unknown, or it holds texts.
    """
    named = {str(name): _match(str(name), column) for name in frame.columns}
    matches = [(name, match[0], match[1]) for name, match in named.items() if match is not None]
    if len(matches) > 1:
        raise ValueError(f"{owner} has the columns {[name for name, *_ in matches]}: allowed is one of them")
    if not matches:
        if not required:
            return None
        behind = f", with a unit of {_units(column)} behind it" if column.quantity else ""
        raise ValueError(
            f"{owner} has no column {column.names[0]!r}: allowed are the names {list(column.names)}{behind}; "
            f"it has {some(map(str, frame.columns))}"
        )
    name, word, unit = matches[0]
    values = frame[next(c for c in frame.columns if str(c) == name)]
    if column.quantity is None:
        return values.to_numpy()
    try:
        numbers = values.to_numpy(dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{owner}: column {name!r} holds what is no number: {error}") from error
    if unit is None:
        raise ValueError(
            f"{owner}: column {name!r} has no unit: allowed is a name such as '{word}_{_units(column)[0]}' with one of "
            f"the units {_units(column)}"
        )
    if column.quantity == "temperature":
        return numbers if unit == "K" else numbers + ZERO_CELSIUS
    if unit in RESISTANCES and column.quantity == "conductance":
        with np.errstate(divide="ignore"):
            return 1 / (numbers * RESISTANCES[unit])
    return numbers * UNITS[column.quantity][unit]


def _match(name: str, column: Column) -> tuple[str, str | None] | None:
    """The word and the unit in a column's name, None for no unit; None where it is another column."""
    name = name.strip().replace("\u03bc", "\u00b5").replace("\u2126", "\u03a9")  # mu as micro, the ohm sign as omega
    if name.lower() in column.names:
        return name.lower(), None
    if column.quantity is None or (found := _SPLIT.fullmatch(name)) is None:
        return None
    word = found[1].strip().lower().replace(" ", "_")
    if word not in column.names:
        return None
    units = _units(column)
    exact = [unit for unit in units if unit == found[2].replace("Ohm", "ohm")]
    alike = exact or [u for u in units if u not in RESISTANCES and u.lower() == found[2].lower()]  # mΩ is not MΩ
    if len(alike) != 1:
        raise ValueError(f"column {name!r}: {found[2]!r} is no unit of {column.quantity}: allowed are {units}")
    if column.quantity == "conductance":
        for kind, named, other in (
            ("conductance", _CONDUCTANCE, RESISTANCES),
            ("resistance", _RESISTANCE, CONDUCTANCES),
        ):
            if named.search(word) and alike[0] in other:
                raise ValueError(
                    f"column {name!r}: {alike[0]!r} is no unit of a {kind}: allowed are "
                    f"{[unit for unit in units if unit not in other]}"
                )
    return word, alike[0]


def _units(column: Column) -> list[str]:
    assert column.quantity is not None
    units = list(UNITS[column.quantity])
    return units + list(RESISTANCES) if column.quantity == "conductance" else units
