"""White noise for activations and sampled drift at the price of one addition an element."""

from functools import lru_cache

import torch
from torch import Tensor

from ...device.seeds import derived_seed
from .cpu import ELEMENTS, flat, takes

# Two primes: the sum of two tables, each read round and round, repeats only after their product, about 1e12 elements.
LENGTHS = (1048573, 1048571)


@lru_cache(maxsize=1)
def _tables() -> tuple[Tensor, ...]:
    """Standard normal tables of exact mean 0 and variance 1/2, each with its start repeated behind its end, so that
    a piece from any position is contiguous."""
    generator = torch.Generator().manual_seed(0)
    tables = []
    for length in LENGTHS:
        table = torch.randn(length, generator=generator, dtype=torch.float64, device="cpu")
        table = ((table - table.mean()) / table.std(correction=0) * 0.5**0.5).float()
        tables.append(torch.cat((table, table[:ELEMENTS])))
    return tuple(tables)


@torch.no_grad()
def white_noise_like(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard normal variates of the shape, layout, dtype and device of ``like``, from a generator of its device, None
    for PyTorch's global one.

    On CPU, where drawing a normal variate takes 3.4 ns and would be a third of a chip's forward and a fiftieth of a
    training step, each is the sum of one entry from each of two tables of a million variates, started at random
    positions: 0.3 ns. Any one of them is standard normal to the tables' sampling error; two of the same tensor are
    independent unless they lie a multiple of a table's length apart (correlation 1/2).
    """
    if not takes(like):
        return torch.empty_like(like).normal_(generator=generator)
    noise = torch.empty_like(like)
    starts = [int(torch.randint(length, (), generator=generator, device="cpu")) for length in LENGTHS]
    out = flat(noise)
    for first in range(0, out.numel(), ELEMENTS):
        piece = out[first : first + ELEMENTS]
        parts = []
        for table, length, start in zip(_tables(), LENGTHS, starts):
            at = (start + first) % length
            parts.append(table[at : at + len(piece)])
        torch.add(*parts, out=piece)
    return noise


@torch.library.custom_op("hf_reram::seeded_normal", mutates_args=())
def seeded_normal(like: Tensor, seed: Tensor, name: str) -> Tensor:
    """:func:`white_noise_like` for a layer's name and a seed, (), int64 on the CPU; a negative seed draws from
    PyTorch's global generator. An operator, so that the compiler need not look into generators, nor compile anew for
    each seed."""
    number = int(seed)
    generator = None if number < 0 else torch.Generator(like.device).manual_seed(derived_seed(number, name))
    return white_noise_like(like, generator)


@seeded_normal.register_fake
def _(like: Tensor, seed: Tensor, name: str) -> Tensor:
    return torch.empty_like(like)
