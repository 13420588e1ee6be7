"""The tabulated white noise against what white noise is."""

import pytest
import torch
from scipy import stats

from hf_reram.nn.ops.random import LENGTHS, white_noise_like


def test_moments_and_distribution():
    torch.manual_seed(1)
    x = white_noise_like(torch.empty(3, 1000, 1000)).flatten()
    assert float(x.mean()) == pytest.approx(0, abs=4 / len(x) ** 0.5)
    assert float(x.var()) == pytest.approx(1, abs=4 * (2 / len(x)) ** 0.5)
    assert stats.kstest(x[:: len(x) // 20_000].numpy(), "norm").pvalue > 1e-3


@pytest.mark.parametrize("lag", [1, 2, LENGTHS[0] - LENGTHS[1], 1536, 384 * 64])
def test_white(lag):
    torch.manual_seed(2)
    x = white_noise_like(torch.empty(1 << 21))
    correlation = float((x[:-lag] * x[lag:]).mean())
    assert correlation == pytest.approx(0, abs=5 / len(x) ** 0.5)


def test_two_draws_are_independent_and_seeded():
    like = torch.empty(700, 1000)
    torch.manual_seed(3)
    first, second = white_noise_like(like), white_noise_like(like)
    torch.manual_seed(3)
    torch.testing.assert_close(white_noise_like(like), first, rtol=0, atol=0)
    assert float((first * second).mean()) == pytest.approx(0, abs=5 / like.numel() ** 0.5)


@pytest.mark.parametrize(
    "like",
    [
        torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.empty(8, 6).t(),
        torch.empty(5, dtype=torch.bfloat16),
        torch.empty(0, 3),
        torch.tensor(1.0),
    ],
)
def test_any_layout(like):
    noise = white_noise_like(like)
    assert noise.shape == like.shape and noise.dtype == like.dtype and bool(torch.isfinite(noise).all())


def test_more_elements_than_a_table_wrap_around_it():
    x = white_noise_like(torch.empty(2 * LENGTHS[0] + 5))
    assert float(x[-5:].abs().sum()) > 0
    assert len(torch.unique(x)) > 0.8 * len(x)
