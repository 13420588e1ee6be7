import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_reram import DeviceConfig
from hf_reram.device import format_time, parse_time
from tests.samples.devices import device

# Wan et al., Nature 608, 504 (2022): coefficients in g/g_max of the spread [µS].
WAN = {
    "1s": (0.348, 16.030, -43.853, 45.393, -16.815),
    "1d": (0.701, 22.086, -50.773, 47.095, -16.458),
    "2d": (0.782, 20.274, -43.507, 37.062, -11.934),
}


@pytest.mark.parametrize("time", WAN)
def test_neurram_spread_is_the_published_one(time):
    g = torch.linspace(0, 40, 9, dtype=torch.float64)
    published = np.polyval(WAN[time][::-1], g.numpy() / 40)
    found = DeviceConfig.from_preset("hfox-neurram").retention_std(g, time)
    np.testing.assert_allclose(found.numpy(), published, rtol=1e-12)


@pytest.mark.parametrize(("time", "seconds"), [("1s", 1.0), ("1d", 86400.0), ("10y", 10 * 365.25 * 86400)])
def test_ibm_mean_and_spread_are_the_published_ones(time, seconds):
    cmo = DeviceConfig.from_preset("cmo-hfox-ibm")
    assert float(cmo.retention_mean(50.0, time)) == pytest.approx(-0.08900206 * math.log(seconds))
    assert float(cmo.retention_std(50.0, time)) == pytest.approx(0.04201137 * math.log(seconds) + 0.41183342)
    assert float(cmo.programming_std(50.0)) == pytest.approx(0.00081107 + 0.00106879 * 50)


def test_spread_is_interpolated_linearly_in_log_time():
    neurram = DeviceConfig.from_preset("hfox-neurram")
    middle = neurram.retention_std(20.0, math.sqrt(86400.0))
    expected = (neurram.retention_std(20.0, "1s") + neurram.retention_std(20.0, "1d")) / 2
    assert float(middle) == pytest.approx(float(expected))


@pytest.mark.parametrize("preset", ["hfox-neurram", "cmo-hfox-ibm"])
def test_before_the_first_fit_its_value_is_taken_with_a_warning(preset):
    cell = DeviceConfig.from_preset(preset)
    with pytest.warns(UserWarning, match="measured from 1 s on"):
        early = cell.retention_std(20.0, 0.01)
    assert float(early) == float(cell.retention_std(20.0, "1s"))
    assert cell.precedes(0.01) and not cell.precedes("1s") and not cell.precedes("1d")
    assert cell.precedes("1s", cell.reference_temperature - 20) == (cell.activation_energy > 0)


def test_past_the_last_fit_the_value_is_held_with_a_warning_and_extrapolated_only_on_request():
    held = DeviceConfig.from_preset("hfox-neurram")
    with pytest.warns(UserWarning, match="held"):
        assert float(held.retention_std(20.0, "10y")) == pytest.approx(float(held.retention_std(20.0, "2d")))
    assert held.holds_at("10y") and not held.extrapolates_at("10y")
    retention = {**held.to_dict()["retention"], "extrapolate": True}
    free = device(retention=retention)
    assert free.extrapolates_at("10y") and not free.holds_at("10y") and not free.extrapolates_at("2d")
    with pytest.warns(UserWarning, match="measured up to 172800 s; later times are extrapolated"):
        free.relaxation("10y")
    slope = float(free.retention_std(20.0, "2d") - free.retention_std(20.0, "1d"))
    assert float(free.retention_std(20.0, "4d") - free.retention_std(20.0, "2d")) == pytest.approx(slope, rel=1e-4)


def test_generic_model_follows_its_formula():
    generic = DeviceConfig(
        g_min=2.0, g_max=40.0, retention={"type": "generic", "A": 0.01, "tau": 3.0, "s0": 0.1, "s1": 0.02, "s2": 0.003}
    )
    log = math.log1p(100 / 3.0)
    assert float(generic.retention_mean(10.0, 100)) == pytest.approx(-0.01 * 8 * log)
    assert float(generic.retention_std(10.0, 100)) == pytest.approx(0.1 + (0.02 + 0.03) * log)


def test_temperature_is_equivalent_time():
    cmo = DeviceConfig.from_preset("cmo-hfox-ibm")
    factor = math.exp(1.0 / 8.617333262e-5 * (1 / 298.15 - 1 / 358.15))
    assert cmo.equivalent_time("1h", 358.15) == pytest.approx(3600 * factor)
    assert cmo.equivalent_time("1h", 298.15) == pytest.approx(3600)


@given(st.sampled_from(["s", "min", "h", "d", "w", "mo", "y"]), st.integers(1, 99))
def test_times_survive_formatting(unit, count):
    seconds = parse_time(f"{count}{unit}")
    assert parse_time(format_time(seconds)) == pytest.approx(seconds, rel=1e-5)


@pytest.mark.parametrize("bad", ["", "ten years", "1 fortnight", "-1s", -1, float("nan"), float("inf"), None, True])
def test_bad_times_are_named(bad):
    with pytest.raises(ValueError, match="is not a time"):
        parse_time(bad)
