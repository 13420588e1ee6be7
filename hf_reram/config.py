"""The one config of hf_reram, in the form that transformers keeps in a model's config.json."""

import copy
import math
import weakref
from dataclasses import InitVar, dataclass, field, fields
from pathlib import Path
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from .device import DeviceConfig, parse_time
from .device.checks import is_finite, plain, read_json, refuse_deep, shown
from .device.iv import GAINS
from .device.temperature import parse_temperature

# 1 had cells below 0 µS too (device.floor_at_zero), 2 static input ranges unless they were learned; up to 3 each input
# had one row.
CONFIG_VERSION = 4
SMALLEST_SHRINK = 1e-9  # in units of the output, a current's noise grows with the inverse
INPUT_RANGE = "static"  # by default
INPUT_RANGES = ("static", "per_token", "learned", "auto")
WEIGHT_SCALES = ("per_channel", "per_tensor", "per_tile")
# Fields that can change while a model's weights lie on the cells as they do.
TRAINING_FIELDS = (
    "retention_loss",
    "retention_weight",
    "retention_warmup",
    "retention_times",
    "temperature",
    "calibration_batches",
)
SELECTION_FIELDS = ("target_modules", "modules_to_not_convert")
RETENTION_LOSSES = (
    "output",
    "weight",
    "sensitivity",
    "drift",
    "noise",
    "output+drift",
    "sensitivity+drift",
    "consistency",
    "none",
)


@dataclass(repr=False)
class ReRAMConfig(QuantizationConfigMixin):
    """How a model's layers are put on ReRAM crossbars and made robust to them.

    Args:
        device: preset name, dict of :class:`DeviceConfig` fields, or a :class:`DeviceConfig`.
        range_shrink: share of the device's read voltage that inputs use, from 1e-9 to 1; 1 is the unmitigated device.
            "auto": per layer, the share with the least expected output error on calibration data (non-linearity +
            read noise + ADC).
        gain: read-out gain of the sinh: "calibrated" (least squares on calibration data), "full_scale" (exact at the
            input range), "small_signal" (exact at 0).
        input_range: what the DACs' full scale stands for. "static": one number a layer, from calibration data.
            "learned": the same, as a trainable parameter. "per_token": each token's vector (each image of a
            convolution) is divided by its own largest magnitude digitally, and its output multiplied by that, as
            "noise management" does in other simulators (Gokmen et al., Front. Neurosci. 11, 538, 2017). "auto": per
            layer, static or per token, whichever has the least expected relative error on calibration data.
        input_percentile: of |x| on calibration data, in (0, 100], taken as a static input range. The default was
            measured: lower percentiles clip the few outlier dimensions that transformers depend on
            (recipes/README.md).
        center_inputs: subtract each input channel's mean on calibration data digitally, and add W times it to the bias,
            where that takes at least a tenth off the input's power: the cells' errors act on what is left.
        equalize_inputs: divide each input channel by a number of its own digitally, and let the cells hold the weights
            times that number, where it lowers the expected output error (retention + read noise + DAC).
        weight_scale: "per_channel", "per_tensor" or "per_tile" (a channel's cells within one tile): what shares one
            conductance scale. Smaller parts have smaller largest weights, so the cells' errors mean less in them;
            "per_tile" needs a tile_size, and multiplies each tile's read-out digitally before tiles are added.
        weight_clip: w_scale is at most this many RMS of the channel (tensor); larger weights saturate at g_max.
            None: no clipping. "auto": per channel, the one with the least expected output error on calibration data,
            clipping + retention + read noise; of convolutions what does not average out over pixels and chips, clipping
            and mean shift, counts 8 times; where each token has an input range of its own, the few massive tokens count
            as much as all others.
        tile_size: rows of a crossbar tile; each tile has its own ADC and read noise. None: one tile a layer.
        redundancy: cells on top of two a weight, as a share of those, in [0, 4]; calibration gives them to the input
            channels through which the cells' spread changes the model's predictions most, by their Fisher information.
            Such a channel drives several rows, a part of it each, so that the errors of several cells average out
            (several devices a synapse, Boybat et al., Nat. Commun. 9, 2514, 2018). Few cells do much where few
            channels matter: a language model's massive activations, stems, depthwise convolutions. With a tile_size,
            whole layers get several pairs a weight instead.
        dac_bits, adc_bits: 2 to 16, sign included; None: ideal converters.
        target_modules: names of layers to put on crossbars: a list of names or last parts of names, or a regular
            expression that matches whole names (as in PEFT). None: every Linear, Conv2d and Conv1D.
        modules_to_not_convert: names, or parts of names between dots, of layers that stay digital.
        retention_loss: "output" (closed-form noise-to-signal ratio), "weight" (the same without activations),
            "sensitivity" (output error weighted by the Fisher information of each channel: expected KL in nats),
            "drift" (the device's retention error sampled in each training forward), "noise" (white noise of the same
            power, the usual hardware-aware baseline), "output+drift", "sensitivity+drift", "consistency" (KL
            between the clean forward and one with sampled drift), or "none". The default is the cheapest of those
            that nothing beat in the ablation (recipes/README.md).
        retention_weight: weight of a closed form or of "consistency", >= 0.
        retention_warmup: share of a :class:`hf_reram.ReRAMTrainer`'s steps, from 0 to 1, over which sampled drift and
            noise grow in proportion from nothing to their size.
        retention_times: times since programming to be robust at; the loss is their average.
        temperature: of deployment, from 200 to 2000 K, or a text such as "85C"; None: the device's reference
            temperature.
        calibration_batches: how many batches :func:`hf_reram.calibrate` reads at most.
        learn_input_range: an older way to say ``input_range="learned"``.

    Raises:
        ValueError: a wrong value; names the field, the value and what is allowed.
    """

    quant_method: Any = field(default="reram", init=False)
    device: Any = "hfox-neurram"
    range_shrink: Any = "auto"
    gain: str = "calibrated"
    input_range: str = INPUT_RANGE
    input_percentile: float = 99.999
    center_inputs: bool = True
    equalize_inputs: bool = False
    weight_scale: str = "per_channel"
    weight_clip: Any = "auto"
    tile_size: int | None = None
    redundancy: float = 0.0
    dac_bits: int | None = None
    adc_bits: int | None = None
    target_modules: Any = None
    modules_to_not_convert: Any = None
    retention_loss: str | None = "drift"
    retention_weight: float = 0.3
    retention_warmup: float = 0.5
    retention_times: Any = field(default_factory=lambda: ["1d"])
    temperature: Any = None
    calibration_batches: int = 32
    learn_input_range: InitVar[bool | None] = None

    def __post_init__(self, learn_input_range: bool | None):
        for f in fields(self):
            refuse_deep(f"ReRAMConfig.{f.name}", getattr(self, f.name))
            setattr(self, f.name, plain(getattr(self, f.name)))
        if isinstance(self.device, str):
            self.device = DeviceConfig.from_preset(self.device)
        elif not isinstance(self.device, DeviceConfig):
            self.device = DeviceConfig.from_dict(self.device)
        self._number_or("range_shrink", ("auto",), 0, 1)
        if self.range_shrink != "auto" and self.range_shrink < SMALLEST_SHRINK:
            self._refuse("range_shrink", f"a number in [{SMALLEST_SHRINK:g}, 1] or 'auto'")
        self._one_of("gain", GAINS)
        self._input_range(learn_input_range)
        self._number_or("input_percentile", (), 0, 100)
        self._flag("center_inputs")
        self._flag("equalize_inputs")
        self._one_of("weight_scale", WEIGHT_SCALES)
        self._number_or("weight_clip", ("auto", None), 0, math.inf)
        self._integer("tile_size", 1, 1 << 20)
        if self.weight_scale == "per_tile" and self.tile_size is None:
            self._refuse("weight_scale", "'per_channel' or 'per_tensor' without a tile_size")
        if not is_finite(self.redundancy) or not 0 <= self.redundancy <= 4:
            self._refuse("redundancy", "a number from 0 to 4")
        self._integer("dac_bits", 2, 16)
        self._integer("adc_bits", 2, 16)
        self._names("target_modules", text=True)
        self._names("modules_to_not_convert")
        self.retention_loss = self.retention_loss or "none"
        self._one_of("retention_loss", RETENTION_LOSSES)
        if not is_finite(self.retention_weight) or self.retention_weight < 0:
            self._refuse("retention_weight", "a finite number >= 0")
        if not is_finite(self.retention_warmup) or not 0 <= self.retention_warmup <= 1:
            self._refuse("retention_warmup", "a number from 0 to 1")
        self._times()
        if self.temperature is not None:
            self.temperature = parse_temperature(self.temperature, "ReRAMConfig.temperature")
        self._integer("calibration_batches", 1, 1 << 20, optional=False)
        self._is_checked = True

    # Changes

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self.__dataclass_fields__ or not self.__dict__.get("_is_checked"):
            super().__setattr__(name, value)
            return
        name, value = self._as_constructed(name, value)
        told = list(self.__dict__.get("_told") or ()) if value != getattr(self, name) else []
        if sum(state.hear(self, name, value) for state in told):  # all of them
            return
        super().__setattr__(name, value)

    def _as_constructed(self, name: str, value: Any) -> tuple[str, Any]:
        """A field that is set after construction, and its value, checked and converted as the constructor does it."""
        if name == "quant_method":
            if value != ReRAMConfig.quant_method:
                raise ValueError(f"ReRAMConfig.quant_method={shown(value)}: allowed is {ReRAMConfig.quant_method!r}")
            return name, value
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.init} | {name: value}
        if name == "learn_input_range":
            name = "input_range"
            given[name] = INPUT_RANGE if self.input_range == "learned" else self.input_range
        return name, getattr(type(self)(**given), name)

    def tell(self, state: Any) -> None:
        """Have the state of a model that was patched with the config hear of its changes, while it is there."""
        self.__dict__.setdefault("_told", weakref.WeakSet()).add(state)

    def put(self, name: str, value: Any) -> None:
        """Set a field without telling anyone; the value is known to be right."""
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_told"}  # a copy is nobody's

    # Checks

    def _refuse(self, name: str, allowed: str):
        raise ValueError(f"ReRAMConfig.{name}={shown(getattr(self, name))}: allowed is {allowed}")

    def _one_of(self, name: str, allowed: tuple):
        value = getattr(self, name)
        if not isinstance(value, str) or value not in allowed:
            self._refuse(name, f"one of {list(allowed)}")

    def _number_or(self, name: str, words: tuple, above: float, at_most: float):
        value = getattr(self, name)
        if value is None or isinstance(value, str):
            good = value in words
        else:
            good = is_finite(value) and above < value <= at_most
        if not good:
            bound = f"(0, {at_most:g}]" if math.isfinite(at_most) else "(0, inf)"
            self._refuse(name, f"a number in {bound}" + (f" or one of {list(words)}" if words else ""))

    def _input_range(self, learn: Any):
        if learn not in (None, True, False):
            raise ValueError(f"ReRAMConfig.learn_input_range={shown(learn)}: allowed is True or False")
        if learn and self.input_range not in (INPUT_RANGE, "learned"):
            self._refuse("input_range", "'learned' beside learn_input_range=True")
        self.input_range = "learned" if learn else self.input_range
        self._one_of("input_range", INPUT_RANGES)

    def _flag(self, name: str):
        if not isinstance(getattr(self, name), bool):
            self._refuse(name, "True or False")

    def _integer(self, name: str, low: int, high: int, optional: bool = True):
        value = getattr(self, name)
        if value is None and optional:
            return
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self._refuse(name, f"an integer from {low} to {high}" + (", or None" if optional else ""))

    def _names(self, name: str, text: bool = False):
        value = getattr(self, name)
        if value is None or (text and isinstance(value, str) and value):
            return
        if isinstance(value, (tuple, set)):
            value = sorted(value)
        if isinstance(value, list):
            value = FixedList(value)
            setattr(self, name, value)
        if not isinstance(value, list) or not value or not all(isinstance(v, str) and v for v in value):
            self._refuse(name, "a non-empty list of names" + (" or a regular expression" if text else "") + ", or None")

    def _times(self):
        value = self.retention_times
        if isinstance(value, (str, int, float)):
            value = [value]
        if isinstance(value, (list, tuple)):
            value = [plain(time) for time in value]
        if not isinstance(value, (list, tuple)) or not 0 < len(value) <= 64:
            self._refuse("retention_times", "a list of 1 to 64 times such as ['1d', '10y'] or seconds")
        for time in value:
            try:
                parse_time(time)
            except ValueError as error:
                raise ValueError(f"ReRAMConfig.retention_times={shown(self.retention_times)}: {error}") from error
        self.retention_times = FixedList(value)

    # JSON

    @classmethod
    def from_dict(cls, config_dict, return_unused_kwargs=False, **kwargs):
        """A config from its JSON form, see :meth:`to_dict`.

        Raises:
            ValueError: an unknown field, a wrong value, or a form that a newer hf_reram wrote.
        """
        if not isinstance(config_dict, dict):
            raise ValueError(f"ReRAMConfig from {shown(config_dict)}: allowed is a dict of fields")
        data = {**config_dict, **kwargs}
        refuse_deep("ReRAMConfig", data)
        data.pop("quant_method", None)
        version = data.pop("version", CONFIG_VERSION)
        if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= CONFIG_VERSION:
            raise ValueError(
                f"ReRAMConfig.version={shown(version)}: this hf_reram reads versions 1 to {CONFIG_VERSION}; "
                "a newer checkpoint needs a newer hf_reram"
            )
        if version == 1:
            data["device"] = _of_version_1(data.get("device", "hfox-neurram"))
        if version <= 2:
            data["input_range"] = "learned" if data.pop("learn_input_range", False) else "static"
        known = {f.name for f in fields(cls) if f.init}
        unknown = sorted(set(data) - known)
        if unknown and not return_unused_kwargs:
            raise ValueError(f"ReRAMConfig has no fields {shown(unknown)}: allowed are {sorted(known)}")
        config = cls(**{k: copy.deepcopy(v) for k, v in data.items() if k in known})
        return (config, {k: data[k] for k in unknown}) if return_unused_kwargs else config

    @classmethod
    def from_json_file(cls, path: str | Path) -> "ReRAMConfig":
        """A config from a JSON file that :meth:`to_json_file` wrote."""
        return cls.from_dict(read_json(path))

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain JSON values, the device's numbers in full."""
        data = {f.name: getattr(self, f.name) for f in fields(self) if f.init and f.name != "device"}
        data = {name: list(value) if isinstance(value, list) else value for name, value in data.items()}
        return {"quant_method": "reram", "version": CONFIG_VERSION, "device": self.device.to_dict()} | data

    @property
    def kelvin(self) -> float:
        """What :func:`hf_reram.deploy` takes where it is told none: ``temperature``, or the device's reference [K]."""
        return self.device.reference_temperature if self.temperature is None else self.temperature

    def hardware(self) -> dict[str, Any]:
        """The part of :meth:`to_dict` that says which weights lie on which cells, and how."""
        return {key: value for key, value in self.to_dict().items() if key not in TRAINING_FIELDS}

    def other_hardware(self, other: "ReRAMConfig") -> list[str]:
        """Names of the fields of :meth:`hardware` that another config has otherwise."""
        mine, theirs = self.hardware(), other.hardware()
        return [name for name in mine if mine[name] != theirs[name]]


class FixedList(list):
    """A list that does not change in place, of which nobody would hear; lists that are made of it do."""

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise TypeError(
            f"{list(self)!r}: a ReRAMConfig's list is not changed in place, of which no model would hear: set the "
            "field to a new one"
        )

    append = extend = insert = remove = pop = clear = sort = reverse = _refuse  # type: ignore[assignment]
    __setitem__ = __delitem__ = __iadd__ = __imul__ = _refuse  # type: ignore[assignment]

    def __reduce__(self) -> Any:
        return type(self), (list(self),)


def _of_version_1(device: Any) -> Any:
    """A device as version 1 of the config meant it: cells are found below 0 µS too, and drift beyond all of a
    conductance where a formula says so."""
    if isinstance(device, str):
        device = DeviceConfig.from_preset(device).to_dict() | {"floor_at_zero": False}
    if not isinstance(device, dict):
        return device
    device = {"floor_at_zero": False} | device
    retention = device.get("retention")
    if isinstance(retention, dict) and retention.get("type") == "generic":
        device["retention"] = {"saturates": False} | retention
    return device


def converter_levels(bits: int | None) -> int:
    """Levels per sign of a DAC or ADC, ``2^(bits-1) - 1``; 0 for an ideal one."""
    return (1 << (bits - 1)) - 1 if bits else 0


def dac_grid(bits: int | None, floor: Any) -> tuple[Any, Any]:
    """Levels on the positive side, and the lowest value on their grid, of a DAC for inputs in ``[floor, 1]``.

    A DAC has ``2^bits`` codes. Where inputs are one-sided, as after ReLU, none is spent on the empty side: with
    ``floor`` 0 the step is half that of a symmetric one.

    Args:
        bits: None is an ideal converter. floor: -1 to 0, a float, or a tensor in double precision, which gives tensors.
    """
    if not bits:
        return 0, -1.0
    levels = (((1 << bits) - 2) / (1 - floor) + 1e-9) // 1
    return levels, (floor * levels + 1e-9) // 1 / levels
