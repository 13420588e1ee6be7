"""Weights that changed after their scale was chosen: the share of them that the cells cannot hold.

A scale may clip some weights on purpose, which quiets all others. Weights that something else writes later – a merged
adapter, a state dict, ``weight.data`` – may lie beyond it in masses, and would be cut off in silence.
"""

from collections.abc import Iterable
from typing import Any

import torch
from transformers.utils import logging

from . import state
from .array import cell_weight, clipped_share
from .layer import CrossbarLayer
from .mapping import CLIPS, layer_scales
from .tensors import whole

logger = logging.get_logger(__name__)

# How much more of a layer's weights than by choice may be clipped without a word. A weight counts from so far beyond
# the edge on, as a share of it: less is within what cells miss their targets by, and of a short row the largest weight
# alone, which the scale is often of, is more than is tolerated, and grows a little in any training.
TOLERATED = 0.01
NOTABLE = 0.02


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


def warn_clipped(layers: Iterable[CrossbarLayer]) -> None:
    """Name layers of which more weights are clipped than by choice, once for each set of shares."""
    by_state: dict[Any, list[CrossbarLayer]] = {}
    for layer in layers:
        by_state.setdefault(layer.crossbar, []).append(layer)
    for shared, own in by_state.items():
        found = {name: round(share, 2) for name, share in clipped_beyond_choice(own).items()}
        new = {name: share for name, share in found.items() if shared.clipped.get(name) != share}
        for layer in own:
            shared.clipped.pop(layer.crossbar_name, None)
        shared.clipped |= found
        if new:
            logger.warning(
                "the weights of %d crossbar layers have changed since their scales were chosen, and many of them are "
                "clipped to what the cells can hold: %s; call hf_reram.calibrate(model, batches)",
                len(new),
                in_words(new),
            )


def in_words(shares: dict[str, float]) -> str:
    """Layers and the share of their weights that are clipped."""
    return ", ".join(f"{name} ({share:.0%})" for name, share in shares.items())


state.on_changed_alone = warn_clipped
