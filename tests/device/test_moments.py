"""The moments of a weight's error against integrals and cells that are drawn."""

import math

import numpy as np
import pytest
import torch

from hf_reram import DeviceConfig, ReRAMConfig
from hf_reram.device.moments import Curve, cell_moments, weight_error
from hf_reram.device.programming import Draws, program
from hf_reram.nn.ops.reference import looked_up
from tests.samples.devices import device


def random_device(seed: int) -> DeviceConfig:
    """With every error switched on."""
    draw = np.random.default_rng(seed).uniform
    window, g_min = float(draw(10, 100)), float([0.0, 1.0, 9.0][seed % 3])
    line = {
        "std_offset": [draw(-0.05, 0.1) * window, draw(-0.1, 0.1)],
        "std_slope": [draw(0, 0.01) * window],
        "mean_offset": [0.0],
        "mean_slope": [draw(-0.01, 0.01) * window, draw(-0.05, 0)],
    }
    return DeviceConfig(
        g_min=g_min,
        g_max=g_min + window,
        retention={"type": "log"} | {name: [float(c) for c in row] for name, row in line.items()},
        programming=[float(draw(-0.5, 1) * 0.05 * window / window**k) for k in range(3)],
        stuck_at_min=float(draw(0, 0.05)),
        stuck_at_max=float(draw(0, 0.02)),
        floor_at_zero=seed % 4 > 0,
        name=f"random {seed}",
    )


def drawn_cells(cell: DeviceConfig, g: float, time: float | None, count: int = 400_000) -> torch.Tensor:
    """What cells aimed at ``g`` are found at."""
    return program(cell, torch.full((count,), g), Draws(7)).after(cell, time, None).double()


@pytest.mark.parametrize("time", [None, 3600.0, 1e8])
@pytest.mark.parametrize("seed", range(8))
def test_moments_are_those_of_cells_that_are_drawn(seed, time):
    cell = random_device(seed)
    for share in (0.0, 0.03, 0.5, 1.0):
        g = cell.g_min + share * cell.g_range
        found = drawn_cells(cell, g, time)
        mean, variance = cell_moments(cell, torch.tensor(g), time)
        off = found - found.mean()
        error = off.std() / len(found) ** 0.5
        assert abs(float(found.mean() - g - mean)) < 4 * float(error) + 1e-5
        error = (off.pow(4).mean() - off.var() ** 2).sqrt() / len(found) ** 0.5
        assert abs(float(off.var() - variance)) < 4 * float(error) + 1e-5


@pytest.mark.parametrize("seed", range(12))
def test_a_weights_error_is_that_of_its_pair_to_a_thousandth(seed):
    """At places between those where the curves are kept, in float32, against float64."""
    cell, times = random_device(seed), (1.0, 1e7)
    error = weight_error(cell, times, None)
    a = torch.rand(20_000)
    moments = [cell_moments(cell, cell.g_min + cell.g_range * torch.cat((torch.zeros(1), a)), t) for t in times]
    variance = sum(v[1:] + v[0] for _, v in moments) / len(times) / cell.g_range**2
    std, _ = looked_up(error.std.table(a), a)
    assert std.dtype == torch.float32 and (std >= 0).all()
    assert (std.double().square() - variance).abs().max() < 1e-3 * variance.max()
    for curve, (mean, _) in zip(error.means, moments):
        exact = (mean[1:] - mean[0]) / cell.g_range
        assert (looked_up(curve.table(a), a)[0] - exact).abs().max() < 1e-3 * exact.abs().max()


def test_a_spread_that_is_clamped_at_zero():
    cell = device(retention={"type": "log", "std_offset": [1.0, -0.05], "std_slope": [0.0]}, floor_at_zero=False)
    a = torch.linspace(0, 1, 333)
    std, _ = looked_up(weight_error(cell, (1.0,), None).std.table(a), a)
    exact = ((1 - 0.05 * 40 * a.double()).clamp(min=0).square() + 1) / 1600
    torch.testing.assert_close(std.double().square(), exact, rtol=1e-4, atol=0.0)


def test_a_polynomial_whose_terms_cancel():
    """(g - 80)⁴ in powers of g: of its terms, 4e7 µS each, float32 leaves nothing."""
    powers = np.polynomial.Polynomial([-80.0, 1.0]) ** 4 * 1e-3
    retention = {"type": "log", "std_offset": list(powers.coef), "std_slope": [0.0]}
    cell = DeviceConfig(g_min=75.0, g_max=85.0, retention=retention)
    found = cell.retention_std(torch.tensor([75.0, 78.0, 80.0]), 1.0)
    torch.testing.assert_close(found, torch.tensor([0.625, 0.016, 0.0]), rtol=1e-5, atol=1e-7)


def test_the_floor_is_that_of_a_gaussian_cut_off_at_zero():
    """Half of the cells at g_min = 0 would be below: their mean rises by σ/√(2π), their variance is σ²(½ - 1/2π)."""
    cell = device(retention={"type": "log", "std_offset": [0.7], "std_slope": [0.0]})
    mean, variance = cell_moments(cell, torch.zeros(1), 1.0)
    assert float(mean) == pytest.approx(0.7 / math.sqrt(2 * math.pi))
    assert float(variance) == pytest.approx(0.49 * (0.5 - 1 / (2 * math.pi)))
    assert float(drawn_cells(cell, 0.0, 1.0).min()) == 0.0
    below = device(floor_at_zero=False)
    assert float(drawn_cells(below, 0.0, 86400.0).min()) < -1.0


def test_no_weight_turns_its_sign_where_all_of_a_conductance_is_gone():
    cell = DeviceConfig(g_min=2.0, g_max=42.0, retention={"type": "generic", "A": 0.3, "tau": 1.0})
    late = cell.retention_mean(torch.tensor([2.0, 22.0, 42.0]), "10y")
    torch.testing.assert_close(late, torch.tensor([0.0, -20.0, -40.0]))
    error = weight_error(cell, (1e9,), None)
    assert float(error.means[0].values[-1]) == pytest.approx(-1.0) and error.mean_is_linear


def test_averaged_pairs_have_their_share_of_the_variance():
    error = weight_error(device(stuck_at_min=0.01), (86400.0,), None)
    like = torch.zeros(1)
    torch.testing.assert_close(error.averaged(4).spread(like) * 2, error.spread(like))
    assert error.averaged(1) is error and error.averaged(4).means is error.means


def test_curves_that_need_no_table():
    assert Curve(torch.full((9,), 0.3)).is_constant and not Curve(torch.full((9,), 0.3)).is_zero
    assert Curve(torch.zeros(9)).is_zero
    flat = {"type": "log", "std_offset": [0.5], "std_slope": [0.0]}
    error = weight_error(device(retention=flat, g_min=9.0), (1.0,), None)
    assert error.std.is_constant and not error.shifts


def test_version_1_of_a_config_keeps_its_numbers():
    old = ReRAMConfig().to_dict() | {"version": 1}
    del old["device"]["floor_at_zero"], old["device"]["levels"]
    assert not ReRAMConfig.from_dict(old).device.floor_at_zero
    assert ReRAMConfig.from_dict(old | {"version": 2}).device.floor_at_zero
    again = ReRAMConfig.from_dict(ReRAMConfig.from_dict(old).to_dict())
    assert not again.device.floor_at_zero


@pytest.mark.parametrize("bad", [1, 2.5, True, "16", 1 << 20])
def test_bad_levels_are_named(bad):
    with pytest.raises(ValueError, match=r"device\.levels=.*2 to 65536"):
        device(levels=bad)
