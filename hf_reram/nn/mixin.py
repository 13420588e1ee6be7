"""What a simulated crossbar does, whatever the shape of the layer: drive, hold, read out, account for retention."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..device.iv import LINEAR_B
from .attach import Attach
from .functional import MapWeight, OutputPower, Quantize, ShrunkSinh, WeightVariance, weight_mean
from .sharing import shared_drive
from .state import CrossbarState

# Per-layer results of calibration, kept beside the weight and saved with it. All are float, of one element except
# weight_scale; input_range 0 means not calibrated, each batch then spans its own range.
BUFFERS = ("input_range", "range_shrink", "gain", "adc_range", "weight_scale")


class CrossbarMixin(nn.Module):
    """A layer on a simulated ReRAM crossbar, in place of a digital layer of the same parameters.

    ``y = W phi(x) + bias`` with ``W`` held within ``±weight_scale`` and ``phi`` as in :mod:`hf_reram.device.iv`.
    A subclass says how its weight meets an input: :meth:`_op`, :meth:`_tiles`, :meth:`_input_power`, :meth:`_rows`.

    Buffers:
        input_range: of the DAC, in units of the input.
        range_shrink: share of read_voltage that the DAC uses.
        gain: read-out gain times b, 1 for the small-signal gain.
        adc_range: full scale of the ADC, in currents of one fully-on cell at read_voltage.
        weight_scale: (output channels,) or (1,), the weight that a cell at g_max stands for.
    """

    weight: Any
    bias: Any
    input_range: Tensor
    range_shrink: Tensor
    gain: Tensor
    adc_range: Tensor
    weight_scale: Tensor
    crossbar: CrossbarState
    crossbar_name: str
    deployed: Tensor | None  # the realized weight of a chip, in place of `weight`; see hf_reram.deployment
    sensitivity: Tensor | None  # (output channels,), see hf_reram.sensitivity
    _scalars_of: Any = None
    _white_std: float | None = None
    _spread: Tensor | None = None  # of the forward under way
    term_scale: Tensor  # the gradient that this layer's retention term receives, see hf_reram.nn.attach

    # Set-up

    def init_crossbar(self, state: CrossbarState, name: str, channels: int) -> None:
        """Add the buffers to a digital layer whose class has just been swapped."""
        self.crossbar, self.crossbar_name = state, name
        self.deployed = self.sensitivity = None
        self._scalars_of = self._white_std = None
        self.term_scale = torch.zeros(2, device=self.weight.device)
        weight = self.weight
        width = channels if state.config.weight_scale == "per_channel" else 1
        dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32
        for buffer in BUFFERS:
            size = width if buffer == "weight_scale" else 1
            fill = 1.0 if buffer in ("range_shrink", "gain") else 0.0
            self.register_buffer(buffer, torch.full((size,), fill, dtype=dtype, device=weight.device))

    def remove_crossbar(self) -> None:
        """Take off all that :meth:`init_crossbar` added."""
        for name in BUFFERS:
            self._buffers.pop(name, None)
            self._parameters.pop(name, None)
        own = ("crossbar", "crossbar_name", "deployed", "sensitivity", "term_scale")
        for name in (*own, "_scalars_of", "_white_std", "_spread"):
            self.__dict__.pop(name, None)

    @property
    def calibrated(self) -> bool:
        """Whether the layer has an input range."""
        return self.scalars()[0] > 0

    def scalars(self) -> tuple[float, float, float]:
        """``(input_range, b, gain · b)`` as floats, read again only when a buffer has changed."""
        tensors = (self.input_range, self.range_shrink, self.gain)
        if torch.compiler.is_compiling() and self._scalars_of is not None:
            return self._scalars_of[1]
        key = tuple((id(t), -1 if t.is_inference() else t._version) for t in tensors)
        if self._scalars_of is None or self._scalars_of[0] != key:
            r, shrink, gain = (float(t.detach().item()) for t in tensors)
            self._scalars_of = (key, (r, self.crossbar.config.device.b(shrink), gain))
        return self._scalars_of[1]

    def extra_repr(self) -> str:
        if not hasattr(self, "crossbar"):
            return super().extra_repr()
        device = self.crossbar.config.device
        if self.input_range.device.type == "meta":
            return f"{super().extra_repr()}, crossbar={device.name}"
        r, b, _ = self.scalars()
        span = f"{r:.4g}" if r > 0 else "not calibrated"
        return f"{super().extra_repr()}, crossbar={device.name}, input_range={span}, b={b:.3g}"

    # The parts of a forward

    def _op(self, s: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _tiles(self, s: Tensor, weight: Tensor):
        """Pairs of input and weight, a tile each, whose outputs add up."""
        raise NotImplementedError

    def _input_power(self, s: Tensor) -> Tensor:
        """``sum_n s_n²`` for each crossbar row, (groups, rows)."""
        raise NotImplementedError

    def _rows(self, weight: Tensor) -> Tensor:
        """A weight-shaped tensor as (groups, output channels of a group, crossbar rows)."""
        raise NotImplementedError

    def _channels_last(self, y: Tensor) -> Tensor:
        """An output as (tokens, channels) or (images, channels, pixels)."""
        raise NotImplementedError

    def _broadcast(self, per_channel: Tensor, like: str) -> Tensor:
        """A vector over channels shaped to broadcast against a ``"weight"`` or an ``"output"``."""
        raise NotImplementedError

    def held_scale(self) -> Tensor:
        """weight_scale shaped like the weight, in its dtype."""
        return self._broadcast(self.weight_scale, "weight").to(self.weight.dtype)

    def _drive(self, x: Tensor) -> tuple[Tensor, Tensor | float]:
        """``(s, factor)`` with ``phi(x) = factor · s``."""
        r, b, gain = self.scalars()
        levels = (1 << (bits - 1)) - 1 if (bits := self.crossbar.config.dac_bits) else 0
        if isinstance(self.input_range, nn.Parameter):
            span = self.input_range.clamp(min=1e-12)
            factor = span * (gain if b < LINEAR_B else gain / b)
            return ShrunkSinh.apply(x, span, b, levels), factor
        if r <= 0:
            r = float(x.detach().abs().max()) * (1 + 1e-5) if x.numel() else 1.0
            if math.isnan(r):
                raise ValueError(f"the input of layer {self.crossbar_name!r} contains NaN")
            r = r or 1.0
        s = shared_drive(x, (r, b, levels), lambda: ShrunkSinh.apply(x, r, b, levels))
        return s, r * (gain if b < LINEAR_B else gain / b)

    def _hold(self, factor: Tensor | float) -> Tensor:
        """``factor · W`` as the cells hold it: clipped, and deployed or with sampled drift where that is on."""
        state = self.crossbar
        self._spread = None
        if self.deployed is not None:
            return self.deployed * factor
        scale = self.held_scale()
        if not (self.training and state.sampling):
            if isinstance(factor, float):
                return MapWeight.apply(self.weight, scale, factor)
            return MapWeight.apply(self.weight, scale, 1.0) * factor
        held = MapWeight.apply(self.weight, scale, 1.0)
        noise = state.normal(held, self.crossbar_name)
        if state.drift == "noise":
            return (held + noise.mul_(self._white_noise_std() * scale)) * factor
        error = state.drift_error
        spread = WeightVariance.apply(self.weight, scale, error.variance, error.variance_slope)
        if error is state.error and spread.dtype in (torch.float32, torch.float64):
            self._spread = spread  # the closed-form term of this forward needs it too
        drifted = held + spread.clamp(min=1e-30).sqrt() * noise
        if any(error.means[0]):
            drifted = drifted + weight_mean(self.weight, scale, error.means[0])
        return drifted * factor

    def _white_noise_std(self) -> float:
        """Spread, in units of weight_scale, of white noise with the power of the device's retention error."""
        if self._white_std is None:
            with torch.no_grad():
                scale = self.held_scale().clamp(min=1e-30)
                error = self.crossbar.error
                ratio = WeightVariance.apply(self.weight, scale, error.variance, error.variance_slope) / scale**2
                self._white_std = math.sqrt(max(float(ratio.mean()) + error.mean_square, 0.0))
        return self._white_std

    def _read(self, s: Tensor, weight: Tensor, factor: Tensor | float) -> Tensor:
        """The output before the bias: one matrix product, or one per tile with its ADC and its read noise."""
        config = self.crossbar.config
        noisy = self.deployed is not None and config.device.read_noise > 0
        if not config.adc_bits and not noisy:
            return self._op(s, weight, None)
        # One unit of current, that of a fully-on cell at read_voltage, in units of the output
        # (for a straight curve s is u itself, not b u).
        _, b, _ = self.scalars()
        b_full = config.device.b()
        unit = self._broadcast(self.weight_scale, "output").to(s.dtype) * factor
        unit = unit * (b_full / b if b < LINEAR_B else b_full)
        y: Any = None
        tiles = 0
        for s_tile, weight_tile in self._tiles(s, weight):
            current = self._op(s_tile, weight_tile, None)
            if config.adc_bits:
                levels = (1 << (config.adc_bits - 1)) - 1
                current = Quantize.apply(current, self._adc_span(current, unit) * unit / levels, levels)
            y, tiles = current if y is None else y + current, tiles + 1
        if noisy:
            std = config.device.read_noise / (config.device.g_range * config.device.read_voltage)
            y = y + torch.randn_like(y) * (unit * (std * math.sqrt(tiles)))
        return y

    def _adc_span(self, current: Tensor, unit: Tensor) -> Tensor:
        span = self.adc_range.to(current.dtype)
        dynamic = (current.detach().abs() / unit.detach().clamp(min=1e-30)).amax()
        return torch.where(span > 0, span, dynamic)

    # Forward

    def forward(self, x: Tensor) -> Tensor:
        """The layer's usual shapes and dtypes."""
        state = self.crossbar
        if state.digital:
            return super().forward(x)
        s, factor = self._drive(x)
        weight = self._hold(factor)
        if state.config.adc_bits or self.deployed is not None:
            y = self._read(s, weight, factor)
            if self.bias is not None:
                y = y + self._broadcast(self.bias, "output")
        else:
            y = self._op(s, weight, self.bias)
        if self.training and (state.term or state.measure):
            y = self._account(x, s, y, factor)
        self._spread = None
        return y

    def _account(self, x: Tensor, s: Tensor, y: Tensor, factor: Tensor | float) -> Tensor:
        """Collect the layer's retention term and attach it to ``y``."""
        state = self.crossbar
        with torch.autocast(x.device.type, enabled=False):
            if state.measure and state.term != "output":
                with torch.no_grad():
                    state.collect(state.ratios, self.crossbar_name, self._output_term(_wide(s), _wide(y), factor))
            if state.term is None:
                return y
            term = getattr(self, f"_{state.term}_term")(_wide(s), _wide(y), factor)
            state.collect(state.terms, self.crossbar_name, term)
            if self.term_scale.device != y.device:
                self.term_scale = torch.zeros(2, device=y.device)
            return Attach.apply(y, term, self.term_scale)

    def _variance(self) -> Tensor:
        error, spread = self.crossbar.error, self._spread
        if spread is not None:
            return spread
        scale = self.held_scale()
        return WeightVariance.apply(_wide(self.weight), _wide(scale), error.variance, error.variance_slope)

    def _output_power(self, y: Tensor, bias: Tensor | None, s: Tensor) -> Tensor:
        return OutputPower.apply(self._channels_last(y), bias, self.crossbar.keep(s))

    def _mean_power(self, s: Tensor, y: Tensor, factor: Tensor | float) -> Tensor:
        """``sum_n |m phi_n|²``, averaged over the times; m proportional to W needs no further product."""
        error = self.crossbar.error
        if error.mean_is_linear:
            return error.mean_square * self._output_power(y, self._wide_bias(), s)
        scale = _wide(self.held_scale())
        powers = [
            self._output_power(self._op(s, weight_mean(_wide(self.weight), scale, mean) * factor, None), None, s)
            for mean in error.means
        ]
        return torch.stack(powers).mean(0)

    def _wide_bias(self) -> Tensor | None:
        return None if self.bias is None else _wide(self.bias)

    # Retention terms: pairs (noise, signal), each a sum over the batch, so that the loss is their ratio over all
    # processes' batches together.

    def _output_term(self, s: Tensor, y: Tensor, factor: Tensor | float) -> Tensor:
        """``(E|ΔW phi|², E|W phi|²)`` in closed form (DESIGN §2): their ratio is the layer's noise-to-signal ratio."""
        error = self.crossbar.error
        columns = self._rows(self._variance()).sum(1)
        noise = (columns * self._input_power(s)).sum() * factor**2
        signal = self._output_power(y, self._wide_bias(), s)
        if error.mean_is_linear:
            noise = noise + error.mean_square * signal if error.mean_square else noise
        else:
            noise = noise + self._mean_power(s, y, factor)
        return torch.stack((noise.reshape(()), signal.reshape(())))

    def _weight_term(self, s: Tensor, y: Tensor, factor: Tensor | float) -> Tensor:
        """``(E|ΔW|², |W|²)``: the same without activations."""
        scale = _wide(self.held_scale())
        weight = _wide(self.weight)
        held = MapWeight.apply(weight, scale, 1.0)
        noise = self._variance().sum()
        for mean in self.crossbar.error.means:
            if any(mean):
                noise = noise + weight_mean(weight, scale, mean).square().sum() / len(self.crossbar.error.means)
        return torch.stack((noise, held.square().sum()))

    def _sensitivity_term(self, s: Tensor, y: Tensor, factor: Tensor | float) -> Tensor:
        """``(½ Σ_i h_i Σ_n |Δy_i|², examples)``: their ratio is, to second order, the KL divergence [nats] per example
        that this layer's retention error causes in the model's prediction, with ``h_i`` the Fisher information of
        output channel i (:func:`hf_reram.sensitivity.measure_sensitivity`)."""
        if self.sensitivity is None:
            raise RuntimeError(
                f"layer {self.crossbar_name!r} has no sensitivity: call calibrate(model, batches, sensitivity=True) "
                'before training with retention_loss="sensitivity"'
            )
        error = self.crossbar.error
        variance = self._rows(self._variance())
        h = self.sensitivity.to(variance.device).reshape(variance.shape[:2])
        noise = torch.einsum("go,gor,gr->", h, variance, self._input_power(s)) * factor**2
        if error.mean_square or not error.mean_is_linear:
            noise = noise + h.mean() * self._mean_power(s, y, factor)
        examples = torch.full_like(noise.reshape(()), float(self.crossbar.batch_size))
        return torch.stack((0.5 * noise.reshape(()), examples))


def _wide(t: Tensor) -> Tensor:
    """At least float32: squares of half-precision values would overflow or vanish."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t
