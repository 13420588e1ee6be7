"""What a simulated crossbar does, whatever the shape of the layer: drive, hold, read out, account for retention."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..config import converter_levels, dac_grid
from ..device.iv import LINEAR_B, sinh_coefficients
from ..device.moments import WeightError, white_error
from .attach import Attach
from .ops import reference as compiled
from .ops.cells import DriftedWeight, OffsetOutput, WeightVariance, map_weight
from .ops.functional import POLYNOMIAL_B, Quantize, ShrunkSinh
from .ops.power import Pull
from .ops.random import white_noise_like
from .scalars import Scalars, read_scalars, versions
from .sharing import shared_drive
from .state import CrossbarState
from .terms import TERMS, Reading, output_term, tap_output, taps_output, wide

# Per-layer results of calibration, kept beside the weight and saved with it. All are float, of one element except
# weight_scale, input_offset and input_scale; input_range 0 means not calibrated, each batch then spans its own range.
BUFFERS = (
    "input_range",
    "range_shrink",
    "gain",
    "adc_range",
    "weight_scale",
    "input_floor",
    "pairs_per_weight",
    "input_offset",
    "input_scale",
)

# What they are before anything is known.
FILLS = dict.fromkeys(BUFFERS, 0.0)
FILLS |= {"range_shrink": 1.0, "gain": 1.0, "input_floor": -1.0, "pairs_per_weight": 1.0, "input_scale": 1.0}


class CrossbarMixin(nn.Module):
    """A layer on a simulated ReRAM crossbar, in place of a digital layer of the same parameters.

    ``y = V phi((x - o) / a) + (bias + W o)``, ``V = W · a`` held within ``±weight_scale`` and ``phi`` as in
    :mod:`hf_reram.device.iv`. The offset o is subtracted, and ``bias + W o`` added, digitally: the cells' errors act
    only on what varies of the input. The input scales a spread the input's power and the cells' range evenly over the
    rows (as SmoothQuant does for integers, Xiao et al., arXiv 2211.10438).

    A subclass says how its weight meets an input: :meth:`_op`, :meth:`_tiles`, :meth:`_input_power`, :meth:`_rows`.

    Buffers:
        input_range: of the DAC, in units of the input.
        range_shrink: share of read_voltage that the DAC uses.
        gain: read-out gain times b, 1 for the small-signal gain.
        adc_range: full scale of the ADC, in currents of one fully-on cell at read_voltage.
        input_floor: lowest input that the DAC drives, as a share of input_range: -1, or above for one-sided inputs.
        pairs_per_weight: cell pairs that hold each weight, side by side in columns whose currents are averaged.
        weight_scale: (output channels,), (1,) or (output channels, tiles), the weight that a cell at g_max stands for.
        input_offset: (input channels,), o, zero where the input is driven as it is.
        input_scale: (input channels,), a, one where it is.
    """

    weight: Any
    bias: Any
    input_range: Tensor
    range_shrink: Tensor
    gain: Tensor
    adc_range: Tensor
    input_floor: Tensor
    pairs_per_weight: Tensor
    weight_scale: Tensor
    input_offset: Tensor
    input_scale: Tensor
    crossbar: CrossbarState
    crossbar_name: str
    _digital_class: Any  # that it was made from
    deployed: Tensor | None  # the realized weight of a chip, in place of `weight`; see hf_reram.model.deploy
    deployed_offset: Tensor | None  # W o of what the chip was programmed with, where the layer is centered
    sensitivity: Tensor | None  # (output channels,), see hf_reram.calibration.sensitivity
    copies_output: bool  # whether the model may change the output in place, which a retention term still needs
    _scalars: Scalars | None = None
    _scalars_of: Any = None  # the buffers and their versions
    _coefficients: tuple[float, ...] = ()
    _offset: Tensor | None = None  # o / a
    _white_std: float | None = None
    fuses_offset = False  # whether the sinh can subtract the offset, along the input's last dimension
    term_scale: Tensor  # the gradient that this layer's retention term receives, see hf_reram.nn.attach

    # Set-up

    def init_crossbar(self, state: CrossbarState, name: str, channels: int, inputs: int) -> None:
        """Add the buffers to a digital layer whose class has just been swapped.

        Args:
            channels, inputs: of the output and of the input.
        """
        self.crossbar, self.crossbar_name = state, name
        self.deployed = self.deployed_offset = self.sensitivity = None
        self._scalars = self._scalars_of = self._offset = self._white_std = None
        self.copies_output = True
        self.term_scale = torch.zeros(2, device=self.weight.device)
        weight = self.weight
        shapes = {"per_tensor": (1,), "per_channel": (channels,), "per_tile": (channels, self.tiles())}
        sizes = {"weight_scale": shapes[state.config.weight_scale], "input_offset": (inputs,), "input_scale": (inputs,)}
        dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32
        for buffer in BUFFERS:
            fill = torch.full(sizes.get(buffer, (1,)), FILLS[buffer], dtype=dtype, device=weight.device)
            self.register_buffer(buffer, fill)

    def remove_crossbar(self) -> None:
        """Take off all that :meth:`init_crossbar` added."""
        for name in BUFFERS:
            self._buffers.pop(name, None)
            self._parameters.pop(name, None)
        own = ("crossbar", "crossbar_name", "deployed", "deployed_offset", "sensitivity", "term_scale", "copies_output")
        for name in (*own, "_scalars", "_scalars_of", "_coefficients", "_offset", "_white_std"):
            self.__dict__.pop(name, None)

    @property
    def calibrated(self) -> bool:
        """Whether the layer has an input range."""
        return self.scalars().input_range > 0

    @property
    def centered(self) -> bool:
        """Whether the layer subtracts an offset from its input."""
        return self.scalars().centered

    @property
    def equalized(self) -> bool:
        """Whether the layer divides its input's channels by scales."""
        return self.scalars().equalized

    @property
    def pairs(self) -> int:
        """Cell pairs that hold each weight."""
        return self.scalars().pairs

    @property
    def cells(self) -> int:
        """ReRAM cells, two a weight and pair; on the meta device, where pairs are not known, two a weight."""
        return 2 * self.weight.numel() * (1 if self.weight.device.type == "meta" else self.pairs)

    @property
    def error(self) -> WeightError:
        """Moments of the retention error of this layer's weights."""
        return self.crossbar.error.averaged(self.pairs)

    def scalars(self) -> Scalars:
        """The buffers' numbers, read again only when a buffer changed; an input range that is being learned is read in
        evaluation mode only."""
        if torch.compiler.is_compiling() and self._scalars is not None:
            return self._scalars  # as calibration or loading left them
        key = versions(self)
        if self._scalars is None or self._scalars_of != key:
            self._scalars_of, self._scalars, self._offset = key, read_scalars(self), None
            b = self._scalars.b
            self._coefficients = sinh_coefficients(b) if LINEAR_B <= b <= POLYNOMIAL_B else ()
        return self._scalars

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.input_range.device.type != "meta":
            self.scalars()  # compiled code does not look

    def extra_repr(self) -> str:
        if not hasattr(self, "crossbar"):
            return super().extra_repr()
        device = self.crossbar.config.device
        if self.input_range.device.type == "meta":
            return f"{super().extra_repr()}, crossbar={device.name}"
        r, b, *_ = read_scalars(self)
        span = f"{r:.4g}" if r > 0 else "not calibrated"
        return f"{super().extra_repr()}, crossbar={device.name}, input_range={span}, b={b:.3g}"

    # The parts of a forward. `now` is what scalars() found at its beginning: to look for changes takes 10 µs.

    def pad(self, x: Tensor) -> Tensor:
        """The input with what the layer pads it with."""
        return x

    def _shape_key(self) -> tuple:
        """What the padded input depends on beside the input."""
        return ()

    def center(self, x: Tensor, offset: Tensor) -> Tensor:
        """``x - o``, padded. Padding is part of the input, so it is centered too."""
        return self.pad(x) - self._broadcast(offset, "output").to(x.dtype)

    def equalize(self, x: Tensor, scale: Tensor) -> Tensor:
        """``x / a``."""
        return x / self._broadcast(scale, "output").to(x.dtype)

    def _driven(self, x: Tensor, now: Scalars) -> Tensor:
        """``(x - o) / a``, as the DACs get it."""
        if not now.equalized:
            return self.center(x, self.input_offset) if now.centered else x
        factor = self._broadcast(1 / self.input_scale, "output").to(x.dtype)
        if not now.centered:
            return x * factor
        shift = self._broadcast(-self._driven_offset(), "output").to(x.dtype)
        return torch.addcmul(shift, self.pad(x), factor)  # one pass

    def _driven_offset(self) -> Tensor:
        """``o / a``, (input channels,)."""
        if torch.compiler.is_compiling():
            return self.input_offset / self.input_scale
        self.scalars()  # forgets it where a buffer has changed
        if self._offset is None:
            with torch.inference_mode(False):  # training may follow
                self._offset = self.input_offset / self.input_scale
        return self._offset

    def cell_weight(self, weight: Tensor | None = None) -> Tensor:
        """``V = W · a``, what the cells are to hold, of W or another weight of its shape."""
        weight = self.weight if weight is None else weight
        return weight * self._along_inputs(self.input_scale).to(weight.dtype) if self.equalized else weight

    def offset_output(self, held: Tensor) -> Tensor:
        """``W o``, (output channels,), of weights as they were programmed."""
        rows = self._rows(held)
        offset = self._driven_offset().to(rows.dtype)
        if len(rows) == 1 and len(offset) == rows.shape[-1]:  # one row for each input channel
            return torch.mv(rows[0], offset)
        offset = offset.view(rows.shape[0], -1, 1)
        offset = offset.expand(-1, -1, rows.shape[2] // offset.shape[1]).reshape(rows.shape[0], -1, 1)
        return torch.bmm(rows, offset).view(-1)

    def offset_outer(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Two factors, broadcastable to the weight, of the gradient of :meth:`offset_output`."""
        offset = self._along_inputs(self._driven_offset())
        return self._broadcast(grad, "weight"), offset.to(grad.dtype)

    def _programmed(self, cells: Tensor, now: Scalars) -> tuple[Tensor, Tensor | None]:
        """What is to be held, clipped where the layer is centered and not compiled, and what is added digitally."""
        if not now.centered:
            return cells, self.bias
        held: Any = cells
        if self.deployed is not None:
            offset: Any = self.deployed_offset
        elif torch.compiler.is_compiling():
            offset = self.offset_output(map_weight(cells, self.held_scale()))  # clipped once, and never saved
        else:
            held, offset = OffsetOutput.apply(map_weight(cells, self.held_scale()), self)
        return held, offset if self.bias is None else self.bias + offset

    def _op(self, s: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _tiles(self, s: Tensor, weight: Tensor):
        """Pairs of input and weight, a tile each, whose outputs add up."""
        raise NotImplementedError

    def _input_power(self, s: Tensor, pull: Pull | None) -> Tensor:
        """``sum_n s_n²`` for each crossbar row, (groups, rows)."""
        raise NotImplementedError

    def _rows(self, weight: Tensor) -> Tensor:
        """A weight-shaped tensor as (groups, output channels of a group, crossbar rows)."""
        raise NotImplementedError

    def _output_rows(self, y: Tensor) -> Tensor:
        """An output as (tokens, channels) or (images, channels, height, width)."""
        raise NotImplementedError

    def _broadcast(self, per_channel: Tensor, like: str) -> Tensor:
        """A vector over channels shaped to broadcast against a ``"weight"`` or an ``"output"``; against an input as
        against an output."""
        raise NotImplementedError

    def _along_inputs(self, per_channel: Tensor) -> Tensor:
        """A vector over input channels shaped to broadcast against the weight."""
        raise NotImplementedError

    def _from_rows(self, rows: Tensor) -> Tensor:
        """What is for each output channel and crossbar row, (output channels, rows), shaped like the weight."""
        raise NotImplementedError

    def _width(self) -> int:
        """Crossbar rows that an output channel has."""
        raise NotImplementedError

    def tile_rows(self) -> int:
        """Crossbar rows of a tile."""
        return max(1, min(self.crossbar.config.tile_size or self._width(), self._width()))

    def tiles(self) -> int:
        """Tiles that an output channel's rows are spread over."""
        return -(-self._width() // self.tile_rows())

    def along_rows(self, scale: Tensor) -> Tensor:
        """A tensor of weight_scale's shape so that it broadcasts against (groups, channels, crossbar rows)."""
        if scale.dim() == 2:
            scale = scale.repeat_interleave(self.tile_rows(), 1)[:, : self._width()]
        groups = getattr(self, "groups", 1) if len(scale) > 1 else 1
        return scale.view(groups, len(scale) // groups, -1)

    def held_scale(self) -> Tensor:
        """weight_scale so that it broadcasts against the weight, in its dtype."""
        scale = self.weight_scale.to(self.weight.dtype)
        if scale.dim() == 1:
            return self._broadcast(scale, "weight")
        return self._from_rows(self.along_rows(scale).flatten(0, 1))

    def _drive(self, x: Tensor, span: Any, now: Scalars) -> tuple[Tensor, Tensor | float, Pull | None]:
        """``(s, factor, pull)`` with ``phi(x) = factor · s``, and where powers of s leave their gradients. The factor
        is 1, folded into s, unless the input range is learned."""
        state = self.crossbar
        b, gain, mark = now.b, now.gain, now.mark
        levels, floor = dac_grid(state.config.dac_bits, now.input_floor)
        factor: Any = span * (gain if b < LINEAR_B else gain / b)
        if isinstance(span, Tensor):
            return self._sinh(x, span, levels, 1.0, None, floor, now), factor, None
        if torch.compiler.is_compiling():
            return self._sinh(x, span, levels, factor, None, floor, now), 1.0, None

        def compute() -> tuple[Tensor, Pull | None]:
            pull = Pull() if self.training and state.term else None
            return self._sinh(x, span, levels, factor, pull, floor, now), pull

        shape = self._shape_key() if mark else ()
        s, pull = shared_drive(x, (span, b, levels, floor, factor, self.training, mark, shape), compute)
        return s, 1.0, pull

    def _sinh(
        self, x: Tensor, span: Any, levels: int, gain: float, pull: Pull | None, floor: float, now: Scalars
    ) -> Tensor:
        offset = None
        if self.fuses_offset and now.centered and not now.equalized and not torch.compiler.is_compiling():
            offset = self.input_offset.to(x.dtype)
        else:
            x = self._driven(x, now)
        if torch.compiler.is_compiling():
            return compiled.shrunk_sinh(x, span, now.b, levels, gain, floor, self._coefficients)
        keep_input = not self.weight.requires_grad
        return ShrunkSinh.apply(x, span, now.b, levels, gain, pull, floor, offset, True, keep_input)

    def _span(self, x: Tensor, now: Scalars) -> Any:
        """The input range, a float, or a tensor where it is learned; that of the batch where not calibrated.

        Raises:
            ValueError: not calibrated and ``x`` holds NaN.
        """
        if isinstance(self.input_range, nn.Parameter):
            return self.input_range.clamp(min=1e-12)
        span = now.input_range
        if span <= 0:
            span = float(x.detach().abs().max()) * (1 + 1e-5) if x.numel() else 1.0
            if math.isnan(span):
                raise ValueError(f"the input of layer {self.crossbar_name!r} contains NaN")
        return span or 1.0

    def _hold(self, weight: Tensor, now: Scalars) -> tuple[Tensor, Tensor | None]:
        """V as the cells hold it: clipped, which :meth:`_programmed` may have done, and deployed or with sampled drift
        where that is on; and the weights' retention variance where that came with it."""
        state = self.crossbar
        if self.deployed is not None:
            return self.deployed, None
        if not self.training or state.drift is None:
            clipped = now.centered and not torch.compiler.is_compiling()
            return weight if clipped else map_weight(weight, self.held_scale()), None
        dtype, weight = weight.dtype, wide(weight)
        noise = state.normal(weight, self.crossbar_name)
        drifts = state.drift == "drift"
        error = state.drift_error.averaged(now.pairs) if drifts else white_error(self.white_noise_std())
        needed = state.term is not None and drifts and state.drift_error is state.error
        scale = wide(self.held_scale())
        if torch.compiler.is_compiling():
            held, variance = compiled.drifted_weight(weight, scale, noise, error)
            return held.to(dtype), variance if needed else None
        held, variance = DriftedWeight.apply(weight, scale, noise, error, needed)
        return held.to(dtype), variance

    def forget_white_noise(self) -> None:
        """Have the power of "noise" measured anew, after weight_scale has changed."""
        self._white_std = None

    def white_noise_std(self) -> float:
        """Spread, in units of weight_scale, of white noise with the power of the device's retention error."""
        if self._white_std is None:
            with torch.no_grad():
                # In units of w_scale, so that the result is right where a whole channel is zero.
                ratio = wide(self.cell_weight()) / wide(self.held_scale()).clamp(min=1e-30)
                error = self.error
                power = WeightVariance.apply(ratio, torch.ones_like(ratio[:1]), error)
                self._white_std = math.sqrt(max(float(power.mean()) + error.mean_square, 0.0))
        return self._white_std

    def _read(self, s: Tensor, weight: Tensor, bias: Tensor | None, span: Tensor | float, now: Scalars) -> Tensor:
        """The output: one matrix product, or one per tile with its ADC and its read noise; for an input range of
        ``span``."""
        config = self.crossbar.config
        noisy = self.deployed is not None and config.device.read_noise > 0
        if not config.adc_bits and not noisy:
            return self._op(s, weight, bias)
        # One unit of current, that of a fully-on cell at read_voltage, in units of the output, tile by tile.
        scales = self.weight_scale.unbind(1) if self.weight_scale.dim() == 2 else [self.weight_scale] * self.tiles()
        factor = span * (now.gain * config.device.b() / now.b)
        units = [self._broadcast(scale, "output").to(s.dtype) * factor for scale in scales]
        if levels := converter_levels(config.adc_bits):
            y: Any = None
            added = None if bias is None else self._broadcast(bias, "output")
            for (s_tile, weight_tile), unit in zip(self._tiles(s, weight), units):
                current = self._op(s_tile, weight_tile, None)
                step = self._adc_span(current, unit, now) * unit / levels
                y = _quantize(current, step, levels, added) if y is None else y + _quantize(current, step, levels)
        else:
            y = self._op(s, weight, bias)
        if noisy:
            std = config.device.relative_read_noise(now.pairs)
            square = sum(unit.square() for unit in units)
            y = y.addcmul_(white_noise_like(y), square.sqrt() * std)  # of its own making
        return y

    def _adc_span(self, current: Tensor, unit: Tensor, now: Scalars) -> Tensor:
        if now.adc_range > 0:
            return self.adc_range.to(current.dtype)
        return (current.detach().abs() / unit.detach().clamp(min=1e-30)).amax()

    # Forward

    def forward(self, x: Tensor) -> Tensor:
        """The layer's usual shapes and dtypes."""
        state = self.crossbar
        if state.digital:
            return self._digital_class.forward(self, x)
        now = self.scalars()
        span = self._span(x, now)
        s, factor, pull = self._drive(x, span, now)
        cells = self.cell_weight()
        programmed, full_bias = self._programmed(cells, now)
        weight, variance = self._hold(programmed, now)
        if isinstance(factor, Tensor):
            weight = weight * factor
        tapped = taps_output(self)
        bias = full_bias.detach() if tapped and full_bias is not None else full_bias
        if state.config.adc_bits or self.deployed is not None:
            y = self._read(s, weight, bias, span, now)
        else:
            y = self._op(s, weight, bias)
        if self.training and (state.term or state.measure):
            y = self._account(Reading(s, y, factor, pull, full_bias, weight=cells, variance=variance), tapped)
        return y

    def _account(self, reading: Reading, tapped: bool) -> Tensor:
        """Collect the layer's retention term and attach it to the output."""
        state = self.crossbar
        with torch.autocast(reading.y.device.type, enabled=False):
            if state.measure and state.term != "output":
                with torch.no_grad():
                    state.collect(state.ratios, self.crossbar_name, output_term(self, reading))
            if state.term is None:
                return reading.y
            if tapped:
                tap_output(self, reading)
            term = TERMS[state.term](self, reading)
            state.collect(state.terms, self.crossbar_name, term)
            state.attached = not torch.compiler.is_compiling()
            if not state.attached:
                return reading.y
            if self.term_scale.device != reading.y.device:
                self.term_scale = torch.zeros(2, device=reading.y.device)
            y = Attach.apply(reading.y, term, self.term_scale)
            return y.clone() if self.copies_output else y


def _quantize(current: Tensor, step: Tensor, levels: int, bias: Tensor | None = None) -> Tensor:
    """:class:`.functional.Quantize` of a matrix product's result, which nothing else refers to."""
    if torch.compiler.is_compiling():
        return compiled.quantize(current, step, levels, bias)
    return Quantize.apply(current, step, levels, bias, not current._is_view())
