"""From the array's currents to the output: the product tile by tile, the ADCs, read noise, digital scale and bias."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config import converter_levels
from ..device.read_noise import relative_read_noise
from .array import Held
from .drive import Driven
from .observe import looks, observe_conversion
from .ops.functions import Quantize
from .ops.random import white_noise_like
from .ops.reference import total_power
from .scalars import Scalars

if TYPE_CHECKING:
    from .layer import CrossbarLayer


def read(layer: "CrossbarLayer", driven: Driven, held: Held, now: Scalars) -> Tensor:
    """The output: one matrix product, or one per tile with its ADC and its read noise."""
    config = layer.crossbar.config
    weight, bias = held.weight, held.bias
    if bias is not None and layer.training and layer.crossbar.physics.term_reads_output:
        bias = bias.detach()  # its gradient comes from where the output's power is taken, see OutputPower
    noisy = layer.chip is not None and config.device.read_noise > 0
    if not config.adc_bits and not noisy:
        return layer.multiply(driven.s, weight, bias, driven.padded)
    units = current_units(layer, driven, now)
    std = relative_read_noise(config.device, now.pairs) if noisy else 0.0
    if levels := converter_levels(config.adc_bits):
        return _converted(layer, driven, weight, bias, units, levels, now, std)
    y = layer.multiply(driven.s, weight, bias, driven.padded)
    square: Any = sum(unit.square() for unit in units)
    return _with_noise(y, square.sqrt() * std)


def _with_noise(current: Tensor, std: Tensor) -> Tensor:
    """Of its own making, so that it may be written into."""
    return current.addcmul_(white_noise_like(current), std)


def current_units(layer: "CrossbarLayer", driven: Driven, now: Scalars) -> list[Tensor]:
    """One unit of current, that of a fully-on cell at read_voltage, in units of the output, tile by tile; in float32,
    since half precision holds neither its square nor the step of a small shrink."""
    scale = layer.weight_scale
    scales = scale.unbind(1) if scale.dim() == 2 else [scale] * layer.tiles()
    wide = torch.promote_types(driven.s.dtype, torch.float32)
    span = driven.span.to(wide) if isinstance(driven.span, Tensor) else driven.span
    factor = span * (now.gain * layer.crossbar.config.device.b() / now.b)
    return [layer.over_channels(s).to(wide) * factor for s in scales]


def _converted(
    layer: "CrossbarLayer",
    driven: Driven,
    weight: Tensor,
    bias: Tensor | None,
    units: list[Tensor],
    levels: int,
    now: Scalars,
    std: float,
) -> Tensor:
    """The tiles' currents, with their read noise, as their ADCs convert them; ``std`` of the noise in units."""
    y: Any = None
    for (s, part), unit in zip(layer.split(driven.s, weight), units):
        current = layer.multiply(s, part, None, driven.padded)
        current = _with_noise(current, unit * std) if std else current
        if looks(layer):
            observe_conversion(layer, current, unit, levels)
        step = _full_scale(layer, current, unit, now) * unit / levels
        added = layer.over_channels(bias) if y is None and bias is not None else None
        in_place = not torch.compiler.is_compiling() and not current._is_view()  # nothing else refers to it
        converted = Quantize.apply(current, step, levels, added, in_place)
        y = converted if y is None else y + converted
    return y


def _full_scale(layer: "CrossbarLayer", current: Tensor, unit: Tensor, now: Scalars) -> Tensor:
    """Of the ADC, in units of current; the batch's largest where it is not calibrated."""
    if now.adc_calibrated:
        return layer.adc_range.to(unit.dtype)
    found = current.detach().abs() / unit.detach().clamp(min=1e-30)
    return found.amax() if found.numel() else found.new_zeros(())


def readout_errors(layer: "CrossbarLayer", driven: Driven, held: Held, y: Tensor, now: Scalars) -> dict[str, Tensor]:
    """``Σ_n |Δy_n|²`` over all outputs of what read noise adds to them, expected, and of what the ADCs did to ``y``,
    both without dimensions; what the hardware has of them."""
    config = layer.crossbar.config
    found = {}
    if config.device.read_noise > 0:
        square: Any = sum(unit.square() for unit in current_units(layer, driven, now))
        std = square.sqrt() * relative_read_noise(config.device, now.pairs)
        found["read noise"] = total_power(layer.examples(std.expand(y.shape)), None, driven.keep)
    if config.adc_bits:
        exact = layer.multiply(driven.s, held.weight, held.bias, driven.padded)
        found["ADC"] = total_power(layer.examples(y - exact), None, driven.keep)
    return found
