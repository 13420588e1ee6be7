"""Weights that changed after their scale was chosen: the share of them that the cells cannot hold, and layers of which
all are far below what the cells can hold.

A scale may clip some weights on purpose, which quiets all others. Weights that something else writes later – a merged
adapter, a state dict, ``weight.data`` – may lie beyond it in masses, and would be cut off in silence. Or they are so
small that the cells' errors, which grow with the scale, drown them.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from . import state
from .array import cell_weight, clipped_share
from .layer import CrossbarLayer
from .mapping import CLIPS, expected_error, layer_scales
from .ops.cpu import ELEMENTS
from .tensors import whole

logger = logging.get_logger(__name__)

# How much more of a layer's weights than by choice may be clipped without a word. A weight counts from so far beyond
# the edge on, as a share of it: less is within what cells miss their targets by, and of a short row the largest weight
# alone, which the scale is often of, is more than is tolerated, and grows a little in any training.
TOLERATED = 0.01
NOTABLE = 0.02

# How much further than its largest weights a layer's scale has to reach, which none does by choice, and how many times
# the power of a fresh choice's error its own has to be, for a word. Channels whose weights are this small a part of the
# largest do not count: what is pruned away or has died has no signal left that errors could drown.
FAR = 1.5
NOISY = 4.0
PRUNED = 1e-3


@torch.no_grad()
def clipped_beyond_choice(layers: Iterable[CrossbarLayer]) -> dict[str, float]:
    """The share of the weights that are clipped, by name of the layers where it is more than whatever chose the scale
    meant to clip, and not by a little. A pass over the weights."""
    found = {}
    for layer in layers:
        if layer.weight.is_meta:
            continue
        share = clipped_share(layer)
        if layer.clipped_by_choice is None:
            layer.clipped_by_choice = share
            layer.choice_is_known = False
        if not layer.choice_is_known and share > TOLERATED:  # what no choice of the config would clip is no choice
            layer.clipped_by_choice = min(layer.clipped_by_choice, most_by_choice(layer))
        layer.choice_is_known = True
        most = layer.clipped_by_choice + TOLERATED
        if share > most and clipped_share(layer, (1 + NOTABLE) * layer.weight_scale) > most:
            found[layer.crossbar_name] = share
    return found


def most_by_choice(layer: CrossbarLayer) -> float:
    """The largest share of a layer's weights, as they are, that its config's ``weight_clip`` can clip."""
    clip = layer.crossbar.config.weight_clip
    rows = layer.to_rows(cell_weight(layer, whole(layer.weight)))
    return clipped_share(layer, layer_scales(layer, rows, CLIPS[0] if isinstance(clip, str) else clip))


@torch.no_grad()
def far_below_scale(layers: Iterable[CrossbarLayer]) -> dict[str, float]:
    """By name of the layers whose weights are all far below what their cells can hold, how many times the power of the
    cells' errors is what it would be with scales that are chosen for them. A pass over the weights."""
    found = {}
    for layer in layers:
        if layer.weight.is_meta:
            continue
        rows = layer.to_rows(cell_weight(layer, whole(layer.weight)))
        most = layer_scales(layer, rows, None)
        alive = most > PRUNED * most.max()
        scale = torch.where(alive, layer.weight_scale, 0.0)
        if not scale.square().sum() > FAR**2 * torch.where(alive, most, 0.0).square().sum():
            continue
        fresh = torch.where(alive, layer_scales(layer, rows, layer.crossbar.config.weight_clip), 0.0)
        times = _error_power(layer, rows, scale) / max(_error_power(layer, rows, fresh), 1e-30)
        if times > NOISY:
            found[layer.crossbar_name] = times
    return found


def _error_power(layer: CrossbarLayer, rows: Tensor, scale: Tensor) -> float:
    """Of a copy of each row, with white inputs."""
    rows = rows.float() / layer.copies_of_rows() if layer.copied else rows.float()
    step = max(1, ELEMENTS * rows.shape[1] // rows.numel())  # for memory's sake
    pieces = zip(rows.split(step, 1), layer.along_rows(scale).expand(rows.shape).split(step, 1))
    return sum(float(expected_error(w, s, layer.error, None).sum(dtype=torch.float64)) for w, s in pieces)


def warn_clipped(layers: Iterable[CrossbarLayer]) -> None:
    """Name layers of which more weights are clipped than by choice, once for each set of shares, and those whose
    weights are all far below their scale, once."""
    by_state: dict[Any, list[CrossbarLayer]] = {}
    for layer in layers:
        by_state.setdefault(layer.crossbar, []).append(layer)
    for shared, own in by_state.items():
        clipped = {name: round(share, 2) for name, share in clipped_beyond_choice(own).items()}
        far = far_below_scale(own)
        found = {name: (clipped.get(name), name in far) for name in clipped | far}
        new = [name for name, misfit in found.items() if shared.misfits.get(name) != misfit]
        for layer in own:
            shared.misfits.pop(layer.crossbar_name, None)
        shared.misfits |= found
        if new:
            of_new = [{name: of[name] for name in new if name in of} for of in (clipped, far)]
            logger.warning(
                "the weights of %d crossbar layers have changed since their scales were chosen, and %s; call "
                "hf_reram.calibrate(model, batches)",
                len(new),
                "; ".join(in_words(*of_new)),
            )


def in_words(clipped: dict[str, float], far: dict[str, float]) -> list[str]:
    """What is said of layers, if there are any, by the share of their weights that are clipped, and by how many times
    their errors are those of a fresh choice."""
    shares = ", ".join(f"{name} ({share:.0%})" for name, share in clipped.items())
    times = ", ".join(f"{name} ({number:.0f} times)" for name, number in far.items())
    found = [f"many of them are clipped to what the cells can hold: {shares}"] if clipped else []
    if far:
        found.append(
            "all of them are far below what the cells can hold, so that the power of the cells' errors is many times "
            f"that of a fresh choice: {times}"
        )
    return found


state.on_changed_alone = warn_clipped
