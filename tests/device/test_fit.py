"""Devices that are fitted to tables: synthetic ones, of which the truth is known."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from hf_reram import DeviceConfig
from hf_reram.device.fit import fit_measurements
from hf_reram.device.fit.goodness import distance, probabilities
from hf_reram.device.fit.reads import collect
from hf_reram.device.moments import cell_moments
from hf_reram.device.programming import Draws, program

TIMES = (1.0, 10.0, 100.0, 1e4)


def gaussian(seed: int = 0, cells: int = 6000, times=TIMES, law="log") -> pd.DataFrame:
    """Reads of cells of 2 to 50 µS whose mean shift is linear in log t and whose spread, or variance, is."""
    draw = np.random.default_rng(seed)
    g = draw.uniform(2, 50, cells)
    frames = [pd.DataFrame({"cell": np.arange(cells), "time_s": 0.0, "conductance_uS": g})]
    z = draw.standard_normal(cells)
    for time in times:
        log = math.log(time)
        mean, std = -0.002 * g * log, 0.4 + 0.01 * g + (0.05 + 0.002 * g) * log
        if law == "variance":
            std = np.sqrt((0.2 + 0.01 * g) * (1 + 0.3 * (log + 5)))
        frames.append(pd.DataFrame({"cell": np.arange(cells), "time_s": time, "conductance_uS": g + mean + std * z}))
    return pd.concat(frames, ignore_index=True)


def heavy(seed: int = 0, cells: int = 8000) -> pd.DataFrame:
    """Changes far from Gaussian, of another skew at each conductance; by time and temperature."""
    draw = np.random.default_rng(seed)
    frames = []
    for celsius, size in ((25, 1.0), (100, 1.3)):
        g = draw.uniform(5, 45, cells)
        frames.append(pd.DataFrame({"cell": np.arange(cells), "time_s": 0.0, "g_uS": g, "temp_C": celsius}))
        z = draw.standard_t(4, cells)
        for time in (1.0, 60.0, 3600.0):
            change = (0.2 + 0.03 * (g - 4) * (46 - g) / 10) * size * z * (1 + 0.05 * math.log(time)) - 0.01 * g
            change = np.where(z > 0, change * (0.3 + g / 60), change)
            found = pd.DataFrame({"cell": np.arange(cells), "time_s": time, "g_uS": np.maximum(g + change, 0)})
            frames.append(found.assign(temp_C=celsius))
    return pd.concat(frames, ignore_index=True)


def test_a_formula_is_recovered_within_its_intervals():
    fit = fit_measurements(gaussian(), g_min=2.0, g_max=50.0, model="log")
    log = next(one for one in fit.candidates if one.name == "log")
    assert log.recommended, log.goodness
    cell, g = DeviceConfig.from_dict(fit.fields), torch.tensor([5.0, 25.0, 45.0])
    torch.testing.assert_close(
        cell.retention_std(g, "10y"), 0.4 + 0.01 * g + (0.05 + 0.002 * g) * math.log(3.15576e8), rtol=0.15, atol=0
    )
    truth = {
        "std_offset[0]": 0.4,
        "std_offset[1]": 0.01,
        "std_slope[0]": 0.05,
        "std_slope[1]": 0.002,
        "mean_slope[1]": -0.002,
    }
    for name, value in truth.items():
        _, low, high = log.parameters[name]
        assert low <= value <= high, name


def test_the_generic_formula_is_recovered_within_its_intervals():
    draw = np.random.default_rng(1)
    g = draw.uniform(2, 50, 8000)
    frames = [pd.DataFrame({"cell": np.arange(8000), "time_s": 0.0, "conductance_uS": g})]
    for time in (0.1, 1.0, 30.0, 1e3, 1e5):
        log = math.log1p(time / 2.0)
        change = -0.01 * log * (g - 2) + (0.3 + (0.05 + 0.004 * g) * log) * draw.standard_normal(8000)
        frames.append(pd.DataFrame({"cell": np.arange(8000), "time_s": time, "conductance_uS": g + change}))
    fit = fit_measurements(pd.concat(frames), g_min=2.0, g_max=50.0, model="generic")
    generic = next(one for one in fit.candidates if one.name == "generic")
    assert generic.recommended, generic.goodness
    for name, value in {"A": 0.01, "tau": 2.0, "s0": 0.3, "s1": 0.05, "s2": 0.004}.items():
        found, low, high = generic.parameters[name]
        assert low <= value <= high and found == pytest.approx(value, rel=0.25), name


@pytest.mark.parametrize("model", ["log", "generic"])
def test_a_fitted_formula_knows_its_last_measured_time(model, tmp_path):
    fit = fit_measurements(gaussian(cells=1500), g_min=2.0, g_max=50.0, model=model)
    DeviceConfig.from_dict(fit.fields).to_json(tmp_path / "device.json")
    cell = DeviceConfig.from_json(tmp_path / "device.json")
    assert cell.to_dict()["retention"]["measured_until"] == 1e4
    assert list(cell.unmeasured("10y")) == ["extrapolated"] and not cell.unmeasured(1e4)
    retention = {k: v for k, v in cell.to_dict()["retention"].items() if k != "measured_until"}
    before = DeviceConfig.from_dict({**cell.to_dict(), "retention": retention})  # as written before
    assert not before.unmeasured("10y") and before.to_dict()["retention"] == retention
    assert float(before.retention_std(20.0, "1y")) == float(cell.retention_std(20.0, "1y"))
    with pytest.raises(ValueError, match=r"retention\.measured_until=-1"):
        DeviceConfig.from_dict({**cell.to_dict(), "retention": {**retention, "measured_until": -1}})


def test_formulas_that_miss_the_data_are_not_recommended():
    fit = fit_measurements(heavy(), g_min=5.0, g_max=45.0, model="log")
    verdicts = {one.name: one.recommended for one in fit.candidates}
    assert verdicts == {"empirical": True, "table": False, "log": False, "generic": False}
    assert any("'log' is not recommended" in note for note in fit.notes)
    assert "not recommended" in str(fit)


def test_chips_and_closed_form_of_a_fitted_device_are_the_data():
    data = heavy()
    fit = fit_measurements(bake=data, g_min=5.0, g_max=45.0)
    cell = DeviceConfig.from_dict(fit.fields)
    assert cell.retention.temperatures == (298.15, 373.15) and cell.reference_temperature == 298.15
    for read in fit.reads:
        target = torch.from_numpy(read.g).float()
        found = program(cell, target, Draws(4)).after(cell, read.time, read.temperature) - target
        for part in np.array_split(np.argsort(read.g), 4):
            drawn, measured = np.sort(found.numpy()[part]), np.sort(read.change[part])
            places = np.concatenate((drawn, measured))
            gap = np.searchsorted(drawn, places, side="right") - np.searchsorted(measured, places, side="right")
            assert np.abs(gap).max() / len(part) < 0.015 + 1.36 * (2 / len(part)) ** 0.5
        assert distance(probabilities(cell.relaxation(read.time, read.temperature), read.g, read.change)) < 0.02
    for g in (5.0, 8.0, 20.0):
        found = program(cell, torch.full((100_000,), g), Draws(9)).after(cell, 3600.0, 373.15).double()
        mean, variance = cell_moments(cell, torch.tensor(g), 3600.0, 373.15)
        assert abs(float(found.mean() - g - mean)) < 3 * float(variance / 1e5) ** 0.5
        fourth = float((found - found.mean()).pow(4).mean())
        assert abs(float(found.var() - variance)) < 3 * ((fourth - float(variance) ** 2) / 1e5) ** 0.5


@pytest.mark.parametrize(("law", "chosen"), [("variance", "variance"), ("log", "std")])
def test_the_law_in_time_is_chosen_by_reads_that_are_left_out(law, chosen):
    fit = fit_measurements(gaussian(law=law, cells=16000), g_min=2.0, g_max=50.0)
    assert fit.law is not None and fit.law.law == chosen
    assert fit.law.scores[chosen] == min(fit.law.scores[name] for name in ("variance", "std", "power"))
    cell, g = DeviceConfig.from_dict(fit.fields), torch.tensor([6.0, 25.0, 45.0])
    log = math.log(1e7)
    std = 0.4 + 0.01 * g + (0.05 + 0.002 * g) * log
    if law == "variance":
        std = ((0.2 + 0.01 * g) * (1 + 0.3 * (log + 5))).sqrt()
    torch.testing.assert_close(cell.retention_std(g, 1e7), std, rtol=0.08, atol=0)
    error = np.interp(g, cell.retention.g, cell.retention.spread_error(1e7))
    assert (np.abs(cell.retention_std(g, 1e7).numpy() - std.numpy()) < 3 * error).all()
    torch.testing.assert_close(cell.retention_mean(g, 1e7), (-0.002 * g * log), rtol=0.15, atol=0.1)


def test_a_reference_temperature_that_is_no_rooms_is_told():
    hot = fit_measurements(gaussian(cells=400, times=(1.0, 100.0)).assign(temperature_C=100.0))
    told = "the reference temperature, which cells are at unless another is said, is 373.15 K and not room temperature"
    assert hot.fields["reference_temperature"] == 373.15 and told in str(hot) and any(told in n for n in hot.notes)
    cool = fit_measurements(gaussian(cells=400, times=(1.0, 100.0)).assign(temperature_C=22.0))
    assert "reference temperature" not in str(cool)


def test_as_few_cells_as_are_allowed_are_enough():
    reads = gaussian(cells=100)
    fit = fit_measurements(reads.assign(conductance_uS=reads.conductance_uS.where(reads.cell != 7, 80.0)))
    assert [len(read.g) for read in fit.reads] == [99] * len(TIMES)
    with pytest.raises(ValueError, match=r"99 cells at 298\.15 K: allowed are 100 and more"):
        fit_measurements(gaussian(cells=99))


def test_two_times_are_held():
    fit = fit_measurements(gaussian(times=(1.0, 100.0)), g_min=2.0, g_max=50.0)
    assert fit.law is None and DeviceConfig.from_dict(fit.fields).holds_at("1d")


UNITS = {
    "conductance_S": ("time_s", 1e-6, 1.0),
    "conductance (mS)": ("time [ms]", 1e-3, 1e3),
    "g_µS": ("t_h", 1.0, 1 / 3600),
    "resistance_kOhm": ("time_s", 1e3, 1.0),
    "resistance (MOhm)": ("time_s", 1.0, 1.0),
    "r_k\u2126": ("time_s", 1e3, 1.0),
    "G/nS": ("elapsed_min", 1e3, 1 / 60),
}


@pytest.mark.parametrize("name", UNITS)
@pytest.mark.parametrize("ending", [".csv", ".csv.gz", ".tsv", ".parquet"])
def test_units_and_files(name, ending, tmp_path):
    time, scale, clock = UNITS[name]
    data = gaussian(cells=300, times=(1.0, 100.0))
    values = scale / data.conductance_uS if name.startswith("r") else data.conductance_uS * scale
    table = pd.DataFrame({"cell": data.cell, time: data.time_s * clock, name: values})
    path = tmp_path / f"reads{ending}"
    if ending == ".parquet":
        table.to_parquet(path)
    else:
        table.to_csv(path, index=False, sep="\t" if "tsv" in ending else ",")
    found, wanted = (collect([source], [], 298.15).reads for source in (path, data))
    assert [read.time for read in found] == pytest.approx([1.0, 100.0])
    np.testing.assert_allclose(found[1].change, wanted[1].change, rtol=1e-6, atol=1e-9)


def test_resistances_and_kelvins():
    data = gaussian(cells=300, times=(1.0,))
    table = pd.DataFrame({"cell": data.cell, "time_s": data.time_s, "resistance_kohm": 1e3 / data.conductance_uS})
    read = collect([], [table.assign(temperature_K=358.0)], 298.15).reads[0]
    assert read.temperature == 358.0
    np.testing.assert_allclose(read.g, data.conductance_uS[:300], rtol=1e-9)


def test_a_table_as_excel_writes_it(tmp_path):
    data = gaussian(cells=300, times=(1.0,))
    data.rename(columns={"conductance_uS": "conductance_µS"}).to_csv(tmp_path / "t.csv", index=False, encoding="cp1252")
    assert collect([tmp_path / "t.csv"], [], 298.15).reads[0].g[7] == pytest.approx(data.conductance_uS[7])


@pytest.mark.parametrize("factor", [3e-3, 1.0])
def test_small_conductances_are_doubted(factor):
    reads = changed(conductance_uS=lambda t: t.conductance_uS * factor)
    currents = sweeps().assign(current_A=lambda t: t.current_A * factor)
    told = [note for note in fit_measurements(reads, currents).notes if "units right" in note]
    assert len(told) == (2 if factor < 1 else 0)
    assert [note.partition(" of 0.")[0] for note in told] == ["currents over voltages", "conductances"][: len(told)]


def changed(**columns) -> pd.DataFrame:
    return gaussian(cells=400, times=(1.0, 100.0)).assign(**columns)


def late(data: pd.DataFrame) -> pd.DataFrame:
    return data.drop(columns="time_s").assign(time_s=data.time_s * 1e9)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (changed().rename(columns={"conductance_uS": "conductance"}), "column 'conductance' has no unit"),
        (changed().rename(columns={"conductance_uS": "conductance_mV"}), "'mV' is no unit of conductance"),
        (
            changed().rename(columns={"conductance_uS": "conductance_kohm"}),
            "'kohm' is no unit of a conductance: .*'µS'",
        ),
        (changed().rename(columns={"conductance_uS": "resistance_uS"}), "'uS' is no unit of a resistance: .*'kohm'"),
        (changed().drop(columns="time_s"), "no column 'time'"),
        (changed(g_uS=1.0), "columns .*allowed is one of them"),
        (changed(conductance_uS=lambda t: t.conductance_uS * 1e-6), r"S or mS read as µS"),
        (changed(conductance_uS=lambda t: t.conductance_uS * 1e6), r"µS read as S or mS"),
        (changed(conductance_uS=lambda t: -t.conductance_uS), "99th percentile|hold a negative conductance"),
        (
            changed(conductance_uS=lambda t: t.conductance_uS * (1 - 2 * (t.cell < 20))),
            "60 of 1200 rows hold a negative",
        ),
        (changed(time_s=lambda t: t.time_s - 1), r"time -1 s in row 1: allowed are times from 0 on"),
        (late(changed()), "up to a century"),
        (changed(temperature_K=25.0), "temperature 25 K in row 1"),
        (gaussian(cells=60), "60 cells at 298.15 K: allowed are 100 and more"),
        (changed()[lambda t: t.time_s > 0], "nothing tells what cells were programmed to"),
        (changed()[lambda t: t.time_s == 0], "no read after time 0"),
        (changed(conductance_uS="much"), "holds what is no number"),
        (
            changed(temperature_C=lambda t: 25.0 + 60 * (t.time_s > 0)),
            "no read after time 0 is left.* 800 rows not used, the cell's read at time 0 is at another temperature",
        ),
        (
            changed(temperature_C=lambda t: 25 + 0.2 * np.sin(t.cell)),
            "temperatures of 297.95 and 297.95 K, 400 in all: allowed is the same one",
        ),
    ],
)
def test_bad_tables_are_named(table, message):
    with pytest.raises(ValueError, match=message):
        fit_measurements(table)


def test_files_that_are_none(tmp_path):
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(ValueError, match="cannot be read as a table"):
        DeviceConfig.fit(tmp_path / "empty.csv")
    gaussian(cells=100).to_csv(tmp_path / "semicolons.csv", index=False, sep=";")
    with pytest.raises(ValueError, match=r"';' is between its columns: allowed is ',' in semicolons\.csv"):
        DeviceConfig.fit(tmp_path / "semicolons.csv")
    with pytest.raises(ValueError, match=r"allowed are \.csv, \.tsv and \.parquet"):
        (tmp_path / "reads.xlsx").write_bytes(b"1")
        DeviceConfig.fit(tmp_path / "reads.xlsx")
    with pytest.raises(FileNotFoundError):
        DeviceConfig.fit(tmp_path / "none.csv")
    with pytest.raises(ValueError, match="nothing to fit"):
        DeviceConfig.fit()
    with pytest.raises(ValueError, match="model='best'"):
        DeviceConfig.fit(gaussian(cells=300), model="best")


def test_rows_that_are_skipped_are_counted_and_named():
    data = gaussian(cells=1000, times=(1.0, 100.0, 1e4))
    data.loc[4, "conductance_uS"] = np.nan  # the first read of cell 4
    data.loc[1007, "conductance_uS"] = -0.1
    data = pd.concat([data, data.iloc[[1500]]], ignore_index=True)  # row 4001 is row 1501 again
    data = data[~((data.time_s == 1e4) & (data.cell >= 50))].reset_index(drop=True)
    measured = collect([data], [], 298.15)
    told = {skip.why: skip.rows for skip in measured.skipped}
    assert told["a number is missing"] == (5,) and told["a negative conductance"] == (1008,)
    assert told["the same cell at the same time again"] == (3051,)
    assert set(told["the cell has no read at time 0"]) == {1005, 2005, 3005}
    assert len(told["only 49 of 999 cells were read at 10000 s"]) == 49
    assert [read.time for read in measured.reads] == [1.0, 100.0]
    assert "rows 5)" in str(measured.skipped[0])


def test_a_time_that_only_some_cells_have_is_told():
    data = gaussian(cells=1000)
    fit = fit_measurements(data[(data.time_s < 1e4) | (data.cell < 400)], g_min=2.0, g_max=50.0)
    assert "table: 400 of 1000 cells were read at 10000 s, 298.15 K; that time rests on them" in fit.notes


def test_programming_error_and_window_come_of_targets():
    draw = np.random.default_rng(5)
    target = np.repeat(np.linspace(4, 40, 16), 300)
    first = target + (0.1 + 0.02 * target) * draw.standard_normal(len(target))
    cells = np.arange(len(target))
    frames = [
        pd.DataFrame({"cell": cells, "time_s": time, "target_uS": target, "programmed_uS": first}).assign(
            conductance_uS=first + 0.3 * draw.standard_normal(len(target)) * (time > 0)
        )
        for time in (0.0, 1.0)
    ]
    cell = DeviceConfig.fit(pd.concat(frames))
    assert (cell.g_min, cell.g_max) == (4.0, 40.0) and "programming" not in cell.assumed
    g = torch.tensor([6.0, 20.0, 38.0])
    torch.testing.assert_close(cell.programming_std(g), 0.1 + 0.02 * g, rtol=0.08, atol=0)
    torch.testing.assert_close(cell.retention_std(g, 1.0), torch.full((3,), 0.3), rtol=0.08, atol=0)


@pytest.mark.parametrize("levels", [2, 5, 33])
def test_cells_of_a_few_conductances(levels):
    draw = np.random.default_rng(levels)
    g = np.repeat(np.linspace(5, 40, levels), 4000 // levels)
    frames = [
        pd.DataFrame({"cell": [f"cell {k}" for k in range(len(g))], "time_s": time, "target_uS": g}).assign(
            conductance_uS=g + 0.02 * g * (time > 0) * (1 + math.log1p(time)) ** 0.5 * draw.standard_normal(len(g))
        )
        for time in (0.0, 1.0, 60.0, 3600.0)
    ]
    fit = fit_measurements(pd.concat(frames))
    cell, at = DeviceConfig.from_dict(fit.fields), torch.tensor([5.0, 40.0])
    assert (cell.g_min, cell.g_max) == (5.0, 40.0) and fit.law is not None and not fit.skipped
    torch.testing.assert_close(cell.retention_std(at, 60.0), 0.02 * at * (1 + math.log(61)) ** 0.5, rtol=0.12, atol=0)


def bakes(energy: float | None) -> pd.DataFrame:
    """Times at 25 °C and bakes of an hour, that one Arrhenius shift tells; without energy, a jump at 450 K."""
    draw = np.random.default_rng(3)
    frames = []
    for celsius, times in ((25, (1.0, 100.0, 1e4, 1e6)), (85, (3600.0,)), (125, (3600.0,)), (200, (3600.0,))):
        g = draw.uniform(2, 50, 4000)
        frames.append(pd.DataFrame({"cell": np.arange(4000), "time_s": 0.0, "conductance_uS": g}))
        frames[-1]["temperature_C"] = celsius
        for time in times:
            kelvin = celsius + 273.15
            log = math.log(time) + (energy or 0.5) / 8.617333262e-5 * (1 / 298.15 - 1 / kelvin)
            std = np.sqrt(0.2 + 0.05 * (log + 3)) * (1 + 0.02 * g) * (4 if energy is None and celsius == 200 else 1)
            found = pd.DataFrame({"cell": np.arange(4000), "time_s": time, "temperature_C": celsius})
            frames.append(found.assign(conductance_uS=g + std * draw.standard_normal(4000)))
    return pd.concat(frames, ignore_index=True)


def test_one_activation_energy_is_found_where_there_is_one_and_refused_where_there_is_none():
    fit = fit_measurements(bake=bakes(0.6), g_min=2.0, g_max=50.0)
    assert fit.heat is not None and not fit.heat.misses
    assert fit.fields["activation_energy"] == pytest.approx(0.6, rel=0.2)
    assert "activation_energy" not in fit.fields["assumed"]
    fit = fit_measurements(bake=bakes(None), g_min=2.0, g_max=50.0)
    assert fit.heat is not None and "spread is off" in fit.heat.misses
    assert "activation_energy" in fit.fields["assumed"]
    cell, g = DeviceConfig.from_dict(fit.fields), torch.tensor([25.0])
    hot, cool = (float(cell.retention_std(g, 3600.0, kelvin)) for kelvin in (473.15, 398.15))
    assert hot / cool == pytest.approx(
        4 * ((0.25 + 0.05 * (math.log(3600) + 3 + 7.0)) ** 0.5) / ((0.25 + 0.05 * (math.log(3600) + 3 + 4.9)) ** 0.5),
        rel=0.1,
    )
    assert not cell.holds_at("1mo", 398.15)  # as at 25 °C, relative to its size; assumed
    assert any("which is assumed" in note for note in fit.notes)


def sweeps(v0=lambda g, sign: 0.368, cells: int = 24, noise: float = 0.01) -> pd.DataFrame:
    """a · g · sinh(b V) with b = 1 / v0."""
    draw = np.random.default_rng(2)
    v, frames = np.linspace(-1, 1, 41), []
    for cell in range(cells):
        g = 10 ** draw.uniform(0, 2)
        of = np.where(v > 0, v0(g, 1), v0(g, -1))
        current = g * of * np.sinh(v / of) * (1 + noise * draw.standard_normal(41))
        frames.append(pd.DataFrame({"cell": cell, "voltage_mV": v * 1e3, "current_A": current * 1e-6}))
    return pd.concat(frames, ignore_index=True)


def test_v0_is_recovered_within_its_interval():
    fit = fit_measurements(iv=sweeps())
    v0 = fit.curvature.v0
    assert v0.low <= 0.368 <= v0.high and v0.value == pytest.approx(0.368, rel=0.01) and not fit.curvature.misses
    cell = DeviceConfig.fit(gaussian(cells=400), iv=sweeps())
    assert cell.v0 == pytest.approx(0.368, rel=0.01) and "v0" not in cell.assumed


def test_what_one_odd_sinh_misses_is_told():
    by_state = fit_measurements(iv=sweeps(lambda g, sign: 0.25 + 0.1 * math.log10(g))).curvature
    assert "v0 depends on the state" in by_state.misses
    values = [state.value for state in by_state.states]
    assert values == sorted(values) and values[0] < 0.29 and values[-1] > 0.41
    by_sign = fit_measurements(iv=sweeps(lambda g, sign: 0.3 if sign > 0 else 0.4)).curvature
    assert by_sign.positive.value == pytest.approx(0.3, rel=0.02)
    assert by_sign.negative.value == pytest.approx(0.4, rel=0.02)
    expected = 0.3 * math.sinh(1 / 0.3) / (0.4 * math.sinh(1 / 0.4))
    assert by_sign.asymmetry == pytest.approx(expected, rel=0.03) and "for negative voltages" in by_sign.misses


def test_a_device_says_what_was_skipped_and_what_is_not_recommended(caplog):
    reads = gaussian(cells=900, times=(1.0, 100.0))
    reads.loc[reads.cell < 300, "conductance_uS"] = np.nan
    with caplog.at_level("WARNING", "hf_reram"):
        cell = DeviceConfig.fit(reads, iv=sweeps(lambda g, sign: 0.25 + 0.1 * math.log10(g)), name="mine")
    assert "fit of device 'mine': table: 900 rows not used, a number is missing (rows 1, 2, 3" in caplog.text
    assert "v0 is not recommended for these sweeps, and stays assumed: v0 depends on the state" in caplog.text
    assert "v0" in cell.assumed
    caplog.clear()
    with caplog.at_level("WARNING", "hf_reram"):
        DeviceConfig.fit(gaussian(cells=900).assign(temperature_K=300.0), iv=sweeps())
    assert not caplog.text


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            sweeps().rename(columns={"current_A": "current_mA"}).assign(current_mA=lambda t: t.current_mA * 1e9),
            "a current of",
        ),
        (sweeps().rename(columns={"voltage_mV": "voltage_V"}), "a voltage of 1000 V"),
        (sweeps().rename(columns={"current_A": "current_uA"}), "are the columns' units right"),
        (sweeps().assign(current_A=lambda t: -t.current_A), "is that of one column inverted"),
        (sweeps()[lambda t: t.voltage_mV > 940], "at 4 voltages or more"),
        (sweeps().drop(columns="current_A"), "no column 'current'"),
    ],
)
def test_bad_sweeps_are_named(table, message):
    with pytest.raises(ValueError, match=message):
        fit_measurements(iv=table)
