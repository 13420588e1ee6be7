"""Retention from tables of quantiles: chips, closed forms, interpolation and extrapolation."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from hf_reram import DeviceConfig, ReRAMConfig
from hf_reram.device.empirical import EmpiricalRetention, Series
from hf_reram.device.moments import cell_moments, weight_error
from hf_reram.device.programming import Draws, program

G = [0.0, 10.0, 25.0, 40.0]
QUANTILES = [0.002, 0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98, 0.998]
Z = torch.special.ndtri(torch.tensor(QUANTILES, dtype=torch.float64)).numpy()


def table(size: float, mean: float = 0.0) -> list[list[float]]:
    """Skewed, with tails; of another shape at each conductance."""
    return [[mean + size * (1 + 0.05 * g) * float(z * (1 + 0.3 * abs(z)) + 0.005 * g * z**2) for z in Z] for g in G]


def retention(**changes) -> dict:
    rates = {"spread_rate": [0.2, 0.3, 0.5, 0.4], "mean_rate": [0.0, -0.01, -0.02, -0.02]}
    series = {"temperature": 298.15, "times": [1.0, 100.0], "change": [table(0.3), table(0.6, -0.5)], **rates}
    return {
        "type": "empirical",
        "g": G,
        "quantiles": QUANTILES,
        "law": "variance",
        "series": [series],
    } | changes


def device(**changes) -> DeviceConfig:
    return DeviceConfig(**{"g_min": 0.0, "g_max": 40.0, "retention": retention(), "name": "measured", **changes})


@pytest.mark.parametrize("time", [0.1, 1.0, 30.0, 1e7])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"floor_at_zero": False},
        {"programming": [0.3, 0.02]},
        {"programming": [0.5], "stuck_at_min": 0.02, "stuck_at_max": 0.01},
    ],
)
@pytest.mark.filterwarnings("ignore:retention was measured")
def test_moments_are_those_of_cells_that_are_drawn(changes, time):
    cell = device(**changes)
    for g in (0.0, 0.7, 17.0, 40.0):
        found = program(cell, torch.full((150_000,), g), Draws(3)).after(cell, time, None).double()
        mean, variance = cell_moments(cell, torch.tensor(g), time)
        off = found - found.mean()
        assert abs(float(found.mean() - g - mean)) < 3.5 * float(off.std()) / len(found) ** 0.5 + 1e-6
        error = (off.pow(4).mean() - off.var() ** 2).sqrt() / len(found) ** 0.5
        assert abs(float(off.var() - variance)) < 3.5 * float(error) + 1e-6


def test_a_table_of_a_normal_distribution_is_the_normal_distribution():
    """Many narrow columns of ``z``: the floor's closed form is that of the Gaussian models."""
    z = np.linspace(-6, 6, 241)
    levels = torch.special.ndtr(torch.from_numpy(z)).tolist()
    rows = [[-0.2 + 0.8 * float(v) for v in z]] * 2
    series = {"temperature": 298.15, "times": [1.0], "change": [rows]}
    cell = device(retention={"type": "empirical", "g": [0.0, 40.0], "quantiles": levels, "series": [series]})
    gauss = device(retention={"type": "log", "std_offset": [0.8], "std_slope": [0.0], "mean_offset": [-0.2]})
    g = torch.linspace(0, 3, 50)
    for of_table, of_formula in zip(cell_moments(cell, g, 1.0), cell_moments(gauss, g, 1.0)):
        torch.testing.assert_close(of_table, of_formula, rtol=1e-5, atol=1e-6)
    chips = [program(c, g, Draws(1)).after(c, 1.0, None) for c in (cell, gauss)]
    torch.testing.assert_close(*chips, rtol=1e-5, atol=1e-5)


def test_a_cell_ages_along_one_quantile_and_quantiles_are_those_of_the_table():
    cell = device(floor_at_zero=False)
    cells = program(cell, torch.full((200_000,), 25.0), Draws(2))
    early, late = (cells.after(cell, time, None) - 25 for time in (1.0, 100.0))
    order = cells.variate.argsort()
    assert (early[order].diff() >= 0).all() and (late[order].diff() >= 0).all()
    found = np.quantile(late.numpy(), QUANTILES[1:-1])
    np.testing.assert_allclose(found, table(0.6, -0.5)[2][1:-1], atol=0.03)
    middle = cells.after(cell, 10.0, None) - 25
    torch.testing.assert_close(middle, (early + late) / 2, rtol=1e-4, atol=1e-4)  # half way in log t


def test_beyond_the_last_time_the_variance_goes_on_in_log_time():
    cell, g = device(), torch.tensor(G)
    last, later = cell.retention_std(g, 100.0), cell.retention_std(g, 1e6)
    grown = torch.tensor([0.2, 0.3, 0.5, 0.4]) * math.log(1e4)
    torch.testing.assert_close(later.square() - last.square(), grown, rtol=1e-4, atol=1e-4)
    shift = cell.retention_mean(g, 1e6) - cell.retention_mean(g, 100.0)
    torch.testing.assert_close(shift, torch.tensor([0.0, -0.01, -0.02, -0.02]) * math.log(1e4), rtol=1e-3, atol=1e-4)
    assert not cell.holds_at("10y") and cell.precedes(0.5)
    assert cell.extrapolates_at("10y") and not cell.extrapolates_at(100.0)
    with pytest.warns(UserWarning, match="measured up to 100 s; later times are extrapolated"):
        cell.retention_std(g, 101.0)
    held = device(retention=retention(law=None))
    assert held.holds_at("10y") and not held.extrapolates_at("10y")
    with pytest.warns(UserWarning, match="up to 100 s; its last value is held"):
        torch.testing.assert_close(held.retention_std(g, "10y"), last)


def test_between_temperatures_the_logarithm_of_the_spread_goes_straight_in_the_reciprocal():
    series = [
        {"temperature": f"{celsius}C", "times": [3600.0], "change": [table(size)]}
        for celsius, size in ((140, 0.7), (100, 0.5))
    ]
    cell = device(retention=retention(series=series, law=None), reference_temperature="100C")
    assert cell.retention.temperatures == (373.15, 413.15)
    middle = 2 / (1 / 373.15 + 1 / 413.15)
    g = torch.tensor([5.0, 25.0])
    low, high, between = (cell.retention_std(g, 3600.0, kelvin) for kelvin in (373.15, 413.15, middle))
    torch.testing.assert_close(between, (low * high).sqrt())
    means = [cell.retention_mean(g, 3600.0, kelvin) for kelvin in (373.15, 413.15, middle)]
    torch.testing.assert_close(means[2], (means[0] + means[1]) / 2)
    torch.testing.assert_close(low * 1.4, high)
    with pytest.warns(UserWarning, match="held"):  # beyond, by Arrhenius from the nearest
        torch.testing.assert_close(cell.retention_std(g, 3600.0, 440.0), high)
    assert cell.holds_at(3600.0, 440.0) and cell.precedes(3600.0, 300.0) and not cell.holds_at(3600.0, 390.0)
    assert cell.shifts_at(440.0) and cell.shifts_at(300.0) and not cell.shifts_at(390.0) and not cell.shifts_at()
    assert replace(cell, reference_temperature=300.0).shifts_at()
    assert list(cell.unmeasured(3600.0, 300.0)) == ["before the first", "other temperature"]


@pytest.mark.parametrize("preset", ["rram-levy-b", "rram-levy-c"])
def test_measured_tables_are_numbers_wherever_tensors_are_made(preset):
    there = DeviceConfig.from_preset(preset)
    with torch.device("meta"):  # as from_pretrained makes configs
        cell = ReRAMConfig(device=preset).device
        found = float(cell.retention_std(20.0, 3.0, 310.0))
    assert found == float(there.retention_std(20.0, 3.0, 310.0)) > 0.1


def test_json_keeps_tables_as_short_texts(tmp_path):
    cell = device()
    cell.to_json(tmp_path / "device.json")
    again = DeviceConfig.from_json(tmp_path / "device.json")
    assert again == cell and hash(again) == hash(cell)
    row = json.loads((tmp_path / "device.json").read_text())["retention"]["series"][0]["change"][0][1]
    assert isinstance(row, str) and len(row.split()) == len(QUANTILES)
    assert weight_error(again, (1.0,), None) is weight_error(cell, (1.0,), None)


def series(**changes) -> dict:
    return {"temperature": 298.15, "times": [1.0], "change": [table(0.3)]} | changes


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"g": [0.0]}, r"retention\.g=.*at least two numbers that ascend"),
        ({"quantiles": [0.0, 0.5]}, "probabilities above 0 and below 1"),
        ({"quantiles": [0.5, 0.1]}, "that ascend"),
        ({"law": "linear"}, r"retention\.law='linear': allowed is None or one of"),
        ({"saturation": 0.1}, "with the law 'saturating', and only there"),
        ({"series": []}, "at least one series"),
        ({"series": [{"temperature": 300.0}]}, "objects with temperature, times and change"),
        ({"series": [series(), series()]}, "one series for each temperature"),
        ({"series": [series(change=[["1 2 x"]])]}, "a text of numbers with spaces"),
        ({"series": [series(change=[["1 0 2"]])]}, "quantiles that ascend"),
        ({"series": [series(change=[["0 1"] * 4])]}, r"has rows and columns \(4, 2\): allowed are \(4, 9\)"),
        ({"series": [series(times=[1.0, 2.0])]}, "one table per time"),
        ({"series": [series(mean_rate=[0.0] * 4)]}, "lacks one of spread_rate and mean_rate"),
        ({"series": [series(mean_rate=[0.0], spread_rate=[0.0])]}, "one number for each of g"),
        ({"series": [series(temperature=25)]}, "write '25C'"),
    ],
)
def test_bad_tables_are_named(bad, message):
    with pytest.raises(ValueError, match=message):
        device(retention=retention(**bad))


def test_errors_beyond_the_window_are_doubted_and_absurd_ones_refused():
    with pytest.raises(ValueError, match=r"device\.retention=.*errors of up to"):
        device(retention=retention(series=[series(change=[table(1e6)])], law=None))


@pytest.mark.parametrize("rate", [{"mean_rate": [1e12] * 4}, {"mean_rate": [-1e12] * 4}, {"spread_rate": [1e12] * 4}])
def test_absurd_rates_are_refused(rate):
    series = {**retention()["series"][0], **rate}
    with pytest.raises(ValueError, match=r"device\.retention=.*errors of up to"):
        device(retention=retention(series=[series]))


def test_series_may_be_objects():
    made = EmpiricalRetention(tuple(G), tuple(QUANTILES), (Series(298.15, (1.0,), (table(0.3),)),))
    assert device(retention=made).retention == made
