"""A layer on a simulated crossbar: its numbers, and a forward in the order of the signal: drive (:mod:`.drive`), array
(:mod:`.array`), read-out (:mod:`.readout`), account (:mod:`.terms`)."""

from typing import Any

import torch
from torch import Tensor, nn

from ..device.moments import WeightError
from .array import Chip, clipped_share, hold, white_noise_std
from .drive import drive
from .joined import new_joined
from .layout import Layout
from .places import parameter_of
from .readout import read
from .scalars import (
    BUFFERS,
    OF_CHANNELS,
    Scalars,
    check_numbers,
    compiled_scalars,
    read_scalars,
    same_versions,
    to_text,
    versions,
)
from .state import CrossbarState
from .tensors import is_shard
from .terms import account

# What they are before anything is known.
FILLS = dict.fromkeys(BUFFERS, 0.0)
FILLS |= {"range_shrink": 1.0, "gain": 1.0, "input_floor": -1.0}
FILLS |= {"pairs_per_weight": 1.0, "input_scale": 1.0, "row_copies": 1.0}

# Elements of a weight that tell whether it has changed.
FEW = 61

# In place of a weight's count: nothing was beyond its range but by choice when it was looked at, or that was said.
LOOKED = object()

# What copies and pickles start without, and nothing saves.
_PASSING: dict[str, Any] = {
    "chip": None,
    "_chips": None,
    "_scalars_of": None,
    "_offset": None,
    "_white_std": None,
    "_white_of": None,
    "_looked": None,
    "_held": None,
}


# What a crossbar has beside the digital layer that it was.
ADDED = (
    "crossbar",
    "crossbar_name",
    "counter",
    "sensitivity",
    "coherence",
    "copies_output",
    "clipped_by_choice",
    "choice_is_known",
    "calibrated_outputs",
    "_scalars",
    "_constants",
    *_PASSING,
)


class Counter:
    """How often a layer ran, on its cells and digitally: one object for the layer and the replicas that
    nn.DataParallel makes of it."""

    calls = digital_calls = 0


class CrossbarLayer(Layout):
    """A layer on a simulated ReRAM crossbar, in place of a digital layer of the same parameters.

    ``y = V phi((x - o) / a) + (bias + W o)``, ``V = W · a`` held within ``±weight_scale`` and ``phi`` as in
    :mod:`hf_reram.device.iv`. The offset o is subtracted, and ``bias + W o`` added, digitally: the cells' errors act
    only on what varies of the input. The input scales a spread the input's power and the cells' range evenly over the
    rows (as SmoothQuant does for integers, Xiao et al., arXiv 2211.10438).

    A kind of layer is a subclass of this class and of the digital layer, registered by
    :func:`~hf_reram.nn.register_crossbar`. It says how its weight lies on the array (:class:`.layout.Layout`), and
    nothing of devices.

    Buffers:
        input_range: of the DAC, in units of the input, or of each token's largest magnitude where ``per_token`` is 1.
        range_shrink: share of read_voltage that the DAC uses.
        gain: read-out gain times b, 1 for the small-signal gain.
        adc_range: full scale of the ADC, in currents of one fully-on cell at read_voltage.
        input_floor: lowest input that the DAC drives, as a share of input_range: -1, or above for one-sided inputs.
        per_token: 1 where each token's vector (each image of a convolution) is divided by its largest magnitude
            digitally, and its output multiplied by it; else 0.
        pairs_per_weight: cell pairs that hold each weight, side by side in columns whose currents are averaged.
        weight_scale: (output channels,), (1,) or (output channels, tiles), the weight that a cell at g_max stands for.
        input_offset: (input channels,), o, zero where the input is driven as it is.
        input_scale: (input channels,), a, what an input is divided by, one where it is driven as it is.
        row_copies: (input channels,), k, the rows that an input channel drives with as much of it each: the cells of
            all of them together hold its weights, up to k times weight_scale, and their errors average out.

    Attributes:
        chip: the cells of the chip that it is deployed as, None where it is not; see :func:`hf_reram.deploy`.
        sensitivity: (output channels,), Fisher information, see :mod:`hf_reram.calibration.sensitivity`; or None.
        coherence: what spread and mean shift of the weights do to the predictions, over what independent errors of the
            outputs would, see there.
        copies_output: whether the model changes the output in place, which a retention term still needs; None: not
            where calibration looked, and of trainings nobody knows yet.
        clipped_by_choice: share of the weights that its scale clipped when that was chosen or loaded (where nothing
            tells whether by choice: ``choice_is_known``); None where nobody has looked.
        calibrated_outputs: so many output channels, the first, were there when the layer was calibrated; None: all.
    """

    bias: Any
    input_range: Tensor
    range_shrink: Tensor
    gain: Tensor
    adc_range: Tensor
    input_floor: Tensor
    pairs_per_weight: Tensor
    per_token: Tensor
    input_offset: Tensor
    input_scale: Tensor
    row_copies: Tensor
    crossbar_name: str
    counter: "Counter"
    sensitivity: Tensor | None
    coherence: tuple[float, float] = (1.0, 1.0)
    copies_output: bool | None
    clipped_by_choice: float | None = None
    choice_is_known: bool = False
    calibrated_outputs: int | None = None
    chip: Chip | None
    _chips: dict[Any, Chip] | None  # of all contexts
    _digital_class: Any  # that it was made from
    _scalars: Scalars | None = None
    _scalars_of: Any = None  # the buffers and their versions
    _constants: str | None = None  # what of them is constant in compiled code
    _offset: Tensor | None = None  # o / a
    _white_std: Tensor | None = None
    _white_of: Any = None  # the weight and its scale, and their versions
    _looked: Any = None  # some of the weights that were looked at last, and their version
    _held: Any = None  # the weight and its version when it was last held within its range; None: to be looked at

    # The signal

    def forward(self, input: Tensor) -> Tensor:
        """The layer's usual shapes and dtypes."""
        if (now := self.begin(input)) is None:
            return self._digital_class.forward(self, input)
        driven, held = drive(self, input, now), hold(self, now)
        y = read(self, driven, held, now)
        return account(self, driven, held, y)

    def begin(self, input: Tensor) -> Scalars | None:
        """Count the call; what calibration has left, or None where the layer is to be digital."""
        compiled, counter = torch.compiler.is_compiling(), self.counter
        if self.crossbar.digital:
            counter.digital_calls = 1 if compiled else counter.digital_calls + 1
            return None
        counter.calls = 1 if compiled else counter.calls + 1
        if self.training:
            self.crossbar.enter(self.crossbar_name, input.shape[0] if input.dim() else 1)
            if not compiled and self._held is not LOOKED and (self._held is None or self._held != self._count()):
                self._held = LOOKED
                self.crossbar.note_changed(self)
        elif not compiled:
            self.crossbar.note_autocast(input.device.type)
            if self.chip is None and self._has_changed():
                self.crossbar.note_changed(self)
        return self.scalars()

    # Its numbers

    @property
    def calls(self) -> int:
        """How often the layer ran on its cells, and not inside :func:`hf_reram.digital`, since it was last set to 0;
        under ``torch.compile`` 1 if it ran."""
        return self.counter.calls

    @calls.setter
    def calls(self, number: int) -> None:
        self.counter.calls, self.counter.digital_calls = number, 0

    @property
    def calibrated(self) -> bool:
        """Whether the layer has an input range."""
        return self.scalars().calibrated

    @property
    def range_kind(self) -> str:
        """Of its input range: "static", "learned", or "per_token"; with ``input_range="auto"`` calibration chooses
        between the first and the last."""
        if isinstance(self.input_range, nn.Parameter):
            return "learned"
        return "per_token" if self.scalars().per_token else "static"

    @property
    def centered(self) -> bool:
        """Whether the layer subtracts an offset from its input."""
        return self.scalars().centered

    @property
    def equalized(self) -> bool:
        """Whether the layer divides its input's channels by scales."""
        return self.scalars().equalized

    @property
    def copied(self) -> bool:
        """Whether some of the layer's input channels drive several rows."""
        return self.scalars().copied

    @property
    def pairs(self) -> int:
        """Cell pairs in a row that hold each weight."""
        return self.scalars().pairs

    @property
    def cells(self) -> int:
        """ReRAM cells, two a weight, pair and copy of its row; on the meta device, where those are not known, two a
        weight."""
        if self.weight.device.type == "meta":
            return 2 * self.weight.numel()
        rows = int(self.row_copies.sum()) if self.copied else self.inputs
        return 2 * self.pairs * rows * (self.weight.numel() // max(self.inputs, 1))

    @property
    def error(self) -> WeightError:
        """Moments of the retention error of this layer's weights."""
        return self.crossbar.error.averaged(self.pairs)

    def scalars(self) -> Scalars:
        """The buffers' numbers, read again only when a buffer changed; an input range that is being learned is read in
        evaluation mode only."""
        if torch.compiler.is_compiling() and self._constants is not None:
            return compiled_scalars(self, self._constants)  # which calibration or loading left
        key = versions(self)
        if self._scalars is None or not same_versions(self._scalars_of, key):
            self._scalars_of, self._scalars, self._offset = key, read_scalars(self), None
            self._constants = to_text(self._scalars)
        return self._scalars

    def note_choice(self, known: bool = True) -> None:
        """Remember how much of the weights is clipped by scales that were just set, by choice, or where that is not
        ``known``."""
        self.clipped_by_choice, self.choice_is_known = clipped_share(self), known
        if self.crossbar.following is not None:
            self.crossbar.following.forget(self.crossbar_name)

    @property
    def is_held(self) -> bool:
        """Whether nothing but an optimizer's step has written the weight since it was last held within its range, or
        a training forward has looked at it."""
        return self._held is not None

    def note_held(self) -> None:
        """The weight lies within its range now: what a training forward finds changed was no step."""
        self._held = self._count() or LOOKED
        self.crossbar.misfits.pop(self.crossbar_name, None)

    def _count(self) -> Any:
        weight = parameter_of(self)
        if weight is None or is_shard(weight) or weight.is_inference():
            return None
        return id(weight), weight._version

    def _has_changed(self) -> bool:
        """Whether the weight was changed since this was asked last, by PyTorch's count or, on CPUs, in a few of its
        elements: merging an adapter is a change of ``.data``, which nothing counts."""
        weight = None if parameter_of(self) is None else self.weight
        if weight is None or weight.is_meta or is_shard(weight):
            return False
        few = None
        if weight.is_cpu:
            room = weight.untyped_storage().nbytes() // weight.element_size() - weight.storage_offset()
            memory = weight.detach().as_strided((min(weight.numel(), room),), (1,))
            few = memory[:: max(1, weight.numel() // FEW) | 1].tolist()  # an odd step meets all rows and columns
        before, self._looked = self._looked, (-1 if weight.is_inference() else weight._version, weight.data_ptr(), few)
        return self._looked != before

    def look_again(self) -> Scalars:
        """The same read anew, also where ``.data`` of a buffer was written to, of which PyTorch keeps no count."""
        self._scalars_of = None
        return self.scalars()

    def driven_offset(self) -> Tensor:
        """``o / a``, (input channels,)."""
        if torch.compiler.is_compiling():
            return self.input_offset / self.input_scale
        self.scalars()  # forgets it where a buffer has changed
        if self._offset is None:
            with torch.inference_mode(False):  # training may follow
                self._offset = self.input_offset / self.input_scale
        return self._offset

    def white_noise_std(self) -> Tensor:
        """Spread, in units of weight_scale, of white noise with the power of the device's retention error. It is
        measured anew where weights or scales have changed, which compiled code does not see: for that
        :func:`hf_reram.sampled_drift` asks before."""
        if torch.compiler.is_compiling():
            return white_noise_std(self) if self._white_std is None else self._white_std
        scale = -1 if self.weight_scale.is_inference() else self.weight_scale._version
        before, self._white_of = self._white_of, (self._count(), scale)
        if self._white_std is None or self._white_of != before or before[0] is None:
            self._white_std = white_noise_std(self)
        return self._white_std

    def forget_white_noise(self) -> None:
        """Have the power of "noise" measured anew, where something else has changed than the weight and its scale, or
        FSDP2 has gathered other weights, of which nothing keeps count."""
        self._white_std = None

    # On and off

    def init_crossbar(self, state: CrossbarState, name: str) -> None:
        """Add to a digital layer, whose class has just been swapped, what a crossbar has."""
        if missing := [part for part in ("weight", "bias") if not hasattr(self, part)]:
            raise TypeError(f"layer {name!r} of {type(self).__name__} has no {' and no '.join(missing)}")
        self.crossbar, self.crossbar_name = state, name
        self.counter, self.sensitivity, self.copies_output = Counter(), None, True
        self.coherence = (1.0, 1.0)
        self.__dict__.update(_PASSING, _scalars=None, _constants=None)
        shapes = {"per_tensor": (1,), "per_channel": (self.outputs,), "per_tile": (self.outputs, self.tiles())}
        sizes = {"weight_scale": shapes[state.config.weight_scale]}
        sizes |= dict.fromkeys(OF_CHANNELS, (self.inputs,))
        for buffer in BUFFERS:
            fill = torch.full(sizes.get(buffer, (1,)), FILLS[buffer], dtype=torch.float32, device=self.weight.device)
            self.register_buffer(buffer, fill)

    def put(self, context: Any, chip: Chip | None) -> None:
        """Be a chip in a context of :func:`hf_reram.deploy`, or, with None, no longer; of several the last counts."""
        chips = {key: other for key, other in (self._chips or {}).items() if key is not context}
        if chip is not None:
            chips[context] = chip
        self._chips, self.chip = chips or None, list(chips.values())[-1] if chips else None

    def remove_crossbar(self) -> None:
        """Take off all that :meth:`init_crossbar` added, and be the digital layer again."""
        for name in BUFFERS:
            self._buffers.pop(name, None)
            self._parameters.pop(name, None)
        for name in ADDED:
            self.__dict__.pop(name, None)
        self.__class__ = self.__dict__.pop("_digital_class")

    def _apply(self, fn, recurse: bool = True):
        """``.to``, ``.half()`` and the like: numbers of calibration go along to another device, but stay float32."""
        before = {name: t.detach() for name in BUFFERS if (t := getattr(self, name, None)) is not None}
        chips = [(context, chip, chip.source.has_changed(self)) for context, chip in (self._chips or {}).items()]
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            if new.is_inference() and name in self._buffers:  # calibration and training may follow
                with torch.inference_mode(False):
                    new = self._buffers[name] = new.clone()
            if new.dtype == torch.float32:
                continue
            if new.is_meta or old.is_meta:  # there are no numbers
                old = torch.empty_like(old, device=new.device)
            if name in self._parameters:  # the same object, which an optimizer may know
                new.data = old.to(new.device, torch.float32)
            else:
                self._buffers[name] = old.to(new.device, torch.float32)
        for context, chip, stale in chips:  # whose source is the numbers too
            self.put(context, chip.applied(fn, self, stale))
        if getattr(self, "sensitivity", None) is not None and self.weight.device.type != "meta":
            self.sensitivity = self.sensitivity.to(self.weight.device)  # type: ignore[union-attr]
        return self

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        if self.chip is not None:
            raise RuntimeError(
                f"layer {self.crossbar_name!r} is deployed as a chip, whose cells are programmed: load outside of "
                "deploy"
            )
        state, prefix = args[:2]
        given = {name: state.get(prefix + name) for name in BUFFERS}
        check_numbers(self, {name: value for name, value in given.items() if isinstance(value, Tensor)})
        super()._load_from_state_dict(*args, **kwargs)
        for name in BUFFERS:
            tensor = getattr(self, name, None)
            if tensor is not None and tensor.dtype != torch.float32:  # assigned
                tensor.data = tensor.data.float()
        self.forget_white_noise()
        if f"{prefix}weight" in state:
            self._held = None
        if "meta" not in (self.input_range.device.type, self.weight.device.type):
            self.scalars()  # compiled code does not look
            if f"{prefix}weight_scale" in state:
                self.note_choice(known=False)

    def __reduce_ex__(self, protocol):
        joined = type(self).__dict__.get("joined")
        return super().__reduce_ex__(protocol) if joined is None else (new_joined, joined, self.__getstate__())

    def __getstate__(self):
        """Copies and pickles are no chips, and count for themselves."""
        return {**self.__dict__, **_PASSING, "counter": Counter()}

    def extra_repr(self) -> str:
        if not hasattr(self, "crossbar"):
            return super().extra_repr()
        device = self.crossbar.config.device
        if self.input_range.device.type == "meta":
            return f"{super().extra_repr()}, crossbar={device.name}"
        now = read_scalars(self)
        r, b = now.input_range, now.b
        span = "not calibrated" if r <= 0 else "per token" if now.per_token else f"{r:.4g}"
        return f"{super().extra_repr()}, crossbar={device.name}, input_range={span}, b={b:.3g}"
