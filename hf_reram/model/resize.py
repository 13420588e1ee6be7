"""A layer that is replaced by one with more or fewer output channels, as a head is when a vocabulary is resized, stays
on its crossbar."""

from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..nn import CrossbarLayer
from ..nn.array import cell_weight
from ..nn.layer import BUFFERS
from ..nn.mapping import layer_scales
from ..nn.registry import crossbar_class
from .bypass import renew_methods
from .patch import make_range_trainable

logger = logging.get_logger(__name__)

# Which depend on nothing but the layer's input and cells.
OF_INPUT = tuple(name for name in BUFFERS if name != "weight_scale")


@torch.no_grad()
@torch.inference_mode(False)  # training may follow
def put_back(old: CrossbarLayer, new: Any) -> None:
    """Put a digital layer that has taken the place of a crossbar on that crossbar, in place.

    Its first output channels are those of ``old``, which keep the numbers of calibration. Of further ones the scales
    are chosen from their weights alone, and there is a warning that says so.

    Raises:
        ValueError: the new layer has other inputs, or is of a kind that no crossbar holds.
    """
    name, state = old.crossbar_name, old.crossbar
    if crossbar_class(new) is None:
        raise ValueError(
            f"layer {name!r} is on a crossbar as {type(old).__name__} and cannot be replaced by {type(new).__name__}: "
            f"allowed is {old._digital_class.__name__}; or take the model off the crossbars first (unpatch_model)"
        )
    digital = type(new)
    new.__class__, new._digital_class = crossbar_class(new), digital
    new.init_crossbar(state, name)
    if new.inputs != old.inputs:
        new.remove_crossbar()
        raise ValueError(f"layer {name!r} is on a crossbar with {old.inputs} inputs and cannot get {new.inputs}")
    renew_methods(new, digital)
    new.training, new.copies_output = old.training, old.copies_output
    for buffer in OF_INPUT:
        getattr(new, buffer).copy_(getattr(old, buffer))
    if isinstance(old.input_range, nn.Parameter):
        make_range_trainable(new)
        new.input_range.requires_grad_(old.input_range.requires_grad)
    kept = min(old.outputs, new.outputs)
    if len(old.weight_scale) == 1:
        new.weight_scale.copy_(old.weight_scale)
    else:
        rows = new.to_rows(cell_weight(new, new.weight))
        scales = layer_scales(new, rows, state.config.weight_clip)
        new.weight_scale.copy_(torch.cat((old.weight_scale[:kept], scales[kept:].to(old.weight_scale))))
    if old.sensitivity is not None and new.outputs <= old.outputs:
        new.sensitivity, new.coherence = old.sensitivity[:kept].clone(), old.coherence
    new.scalars()
    if torch.equal(*(layer.weight.narrow(layer.output_dim, 0, kept) for layer in (old, new))):
        new.note_choice(known=False)
    else:  # another head, for which no scale was chosen
        new.clipped_by_choice, new.choice_is_known = old.clipped_by_choice, old.choice_is_known
    calibrated = old.outputs if old.calibrated_outputs is None else old.calibrated_outputs
    new.calibrated_outputs = calibrated if new.calibrated and calibrated < new.outputs else None
    if new.outputs > old.outputs and new.calibrated:
        lost = " and it has no sensitivity" if old.sensitivity is not None else ""
        logger.warning(
            "layer %r now has %d outputs instead of %d and stays on its crossbar: its range, gain and ADC, and the "
            "scales of the outputs before, are those of calibration, but %d new outputs are not calibrated, their "
            "scales are from their weights alone%s; call hf_reram.calibrate(model, batches)",
            name,
            new.outputs,
            old.outputs,
            new.outputs - old.outputs,
            lost,
        )
