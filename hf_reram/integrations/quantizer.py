"""``from_pretrained`` and ``save_pretrained`` for models on crossbars, through transformers' quantizer interface.

:mod:`.register` tells transformers of it. Without hf_reram transformers does not know the method "reram" and loads the
checkpoint as the plain digital model that its weights are.
"""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils import CONFIG_NAME, logging

from ..config import ReRAMConfig
from ..device.checks import read_json, some
from ..hub.crossbars import put_on
from ..hub.report import attach_stored_report
from ..hub.whole import MARK
from ..model.find import crossbar_layers, crossbar_states, walk
from ..model.patch import initialize_layers, make_range_trainable, swap_layers, take_layers_off, unpatch_model
from ..nn import CrossbarLayer
from ..nn.layer import BUFFERS, FILLS
from ..nn.parts import Holder
from ..nn.places import parameter_of
from ..nn.registry import is_kind
from ..nn.scalars import check_numbers
from .resizing import SET_HEAD, attach_resizing
from .saving import SAVE, attach_saving
from .sentence_transformers import attach_hooks, detach_hooks
from .upload import UPLOAD, attach_upload

logger = logging.get_logger(__name__)

# Buffers that checkpoints from before do not have.
ADDED_LATER = ("input_floor", "input_offset", "input_scale", "pairs_per_weight", "per_token", "row_copies")


class ReRAMQuantizer(HfQuantizer):
    """Swaps layers before the weights are loaded; what a checkpoint does not bring is set from the weights."""

    requires_calibration = False
    quantization_config: ReRAMConfig
    parts: Sequence[tuple[Any, ReRAMConfig]] = ()  # of the model that were patched by themselves, and their configs
    files: Any = None  # that the weights come from
    asked: ReRAMConfig | None = None  # whose cells the loaded model is to be put on
    given: dict[str, Any] | None = None  # the state dict that save_pretrained is given, while it saves

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        self.files = checkpoint_files if self.pre_quantized else None
        # Encoders and decoders may have copies of the whole model's config, and its ReRAMConfig in it.
        apart = self.pre_quantized and "" not in configs_beside(self.files)
        self.parts = stored_parts(model) if apart else []
        self.asked = getattr(self.quantization_config, "asked", None)
        if self.pre_quantized:
            self._start_from_files(model)
        for part, config in self.parts or [(model, self.quantization_config)]:
            swap_layers(part, config, stored=self.pre_quantized)
        for layer in crossbar_layers(model).values():
            if layer.crossbar.config.input_range == "learned":
                make_range_trainable(layer)
        ignored = list(getattr(model, "_keys_to_ignore_on_load_missing", None) or [])  # what is missing we say below
        model._keys_to_ignore_on_load_missing = ignored + [rf"(^|\.){name}$" for name in BUFFERS]
        return model

    def _start_from_files(self, model):
        """The checkpoint's numbers are those of its own config.json. Another ReRAMConfig in the config that
        ``from_pretrained`` was given is asked for, as its argument ``quantization_config`` is."""
        stored = {name: ReRAMConfig.from_dict(data) for name, data in configs_beside(self.files).items()}
        known = [config.to_dict() for config in stored.values()]
        if not stored or (not self.parts and self.quantization_config.to_dict() in known):
            return
        names = {id(value): name for name, value in vars(model.config).items()}
        foreign = []
        for part, config in self.parts:
            own = stored.get(names.get(id(part.config), ""))
            if config.to_dict() not in (known if own is None else [own.to_dict()]):
                foreign.append(part)
        if foreign:
            raise ValueError(
                f"the quantization_config of {', '.join(type(part).__name__ for part in foreign)} is not the "
                "checkpoint's: allowed is another one for the whole model, as quantization_config of from_pretrained"
            )
        if self.quantization_config.to_dict() not in known:
            self.asked = self.asked or self.quantization_config
        if not self.parts:
            if len(stored) > 1:
                raise ValueError("quantization_config: the checkpoint has several, allowed is one of them")
            self.quantization_config = model.config.quantization_config = next(iter(stored.values()))

    def _process_model_after_weight_loading(self, model, **kwargs):
        needed = [name for name in BUFFERS if name not in ADDED_LATER]
        missing = set()
        if self.pre_quantized:
            self._take_digital_layers_off(model)
            self._name_contradictions(model)
        for name, layer in crossbar_layers(model).items():
            there = layer.weight.is_meta or _was_loaded(parameter_of(layer))  # meta: on the disk, where it stays
            if not (self.pre_quantized and there and all(_was_loaded(getattr(layer, b)) for b in needed)):
                missing.add(name)
                continue
            for buffer in ADDED_LATER:
                if not _was_loaded(getattr(layer, buffer)):
                    getattr(layer, buffer).data.fill_(FILLS[buffer])
            check_numbers(layer, {buffer: getattr(layer, buffer) for buffer in BUFFERS})
        initialize_layers(model, missing)
        if missing and self.pre_quantized:
            self._note_lacking(model, missing, needed)
            logger.warning(
                "%d crossbar layers are not in the checkpoint and so not calibrated, call hf_reram.calibrate: %s",
                len(missing),
                ", ".join(sorted(missing)),
            )
        for name, layer in crossbar_layers(model).items():
            if layer.weight.device.type != "meta":
                layer.scalars()  # compiled code does not look
                layer.note_choice(known=name in missing)
        # transformers refuses .half() and .float() for quantized models; here weights are ordinary parameters.
        model.is_quantized = False
        if crossbar_layers(model) and not self.parts:  # the one whose changes it hears
            model.config.quantization_config = self.quantization_config = crossbar_states(model)[0].config
        for part in [part for part, _ in self.parts] or [model]:
            if self.asked is not None and crossbar_layers(part):
                put_on(part, self.asked)
        if crossbar_layers(model):
            attach_stored_report(model, self.files)
        attach_methods(model)
        if self.parts:  # each has a config of its own
            model.config.__dict__.pop("quantization_config", None)
            for part, config in self.parts:
                attach(part, crossbar_states(part)[0].config if crossbar_layers(part) else config)
        return model

    def _name_contradictions(self, model):
        """Digital layers whose numbers are in the checkpoint, whatever head it was saved with."""
        prefix = f"{model.base_model_prefix}."
        layers = ((name, m) for name, m in walk(model) if is_kind(m) and not isinstance(m, CrossbarLayer))
        digital = {name.removeprefix(prefix): name for name, _ in layers}
        if found := [digital[key] for key in _stored_layers(self.files, prefix) if key in digital]:
            logger.warning(
                "the checkpoint has numbers of calibration of layers that its quantization_config leaves digital: %s",
                some(found),
            )

    def _note_lacking(self, model, missing: Iterable[str], needed: Sequence[str]):
        """Keys of the ``needed`` numbers that are in the checkpoint for other layers, and for these ``missing`` ones
        are not, though their weights are."""
        layers = crossbar_layers(model)
        if not any(_was_loaded(getattr(layer, b)) for layer in layers.values() for b in BUFFERS):
            return  # as where a person has written a config beside a digital model
        for name in missing:
            if _was_loaded(parameter_of(layer := layers[name])):
                layer.crossbar.lacking += [f"{name}.{b}" for b in needed if not _was_loaded(getattr(layer, b))]

    def _take_digital_layers_off(self, model):
        """Layers outside of the part that all crossbars with numbers are in were digital when the checkpoint was saved,
        as where that part of the model was patched alone; so were experts and attention of which none has numbers, in
        versions that did not open them."""
        layers = crossbar_layers(model)
        known = {name for name, layer in layers.items() if any(_was_loaded(getattr(layer, b)) for b in BUFFERS)}
        parts = zip(*(name.split(".") for name in known))
        inside = [same[0] for same in itertools.takewhile(lambda same: len(set(same)) == 1, parts)]
        digital = [
            name
            for name, layer in layers.items()
            if name not in known and _was_loaded(parameter_of(layer)) and name.split(".")[: len(inside)] != inside
        ]
        if digital and known:
            take_layers_off(model, digital)
            logger.warning(
                "%d layers have weights but no crossbar's numbers in the checkpoint, all of whose crossbars are in %s: "
                "they stay digital: %s",
                len(digital),
                ".".join(inside),
                ", ".join(digital),
            )
        older = [name for name in layers.keys() - known if _was_loaded(parameter_of(layers[name]))] if known else []
        closed = [
            name
            for holder, module in walk(model)
            if isinstance(module, Holder) and not any(other.startswith(f"{holder}.") for other in known)
            for name in older
            if name.startswith(f"{holder}.") and name not in digital
        ]
        if closed:
            take_layers_off(model, closed)
            logger.warning(
                "%d layers have weights but no crossbar's numbers in the checkpoint, as of a version that left such "
                "modules digital: they stay digital: %s",
                len(closed),
                ", ".join(sorted(closed)),
            )

    def _dequantize(self, model, dtype=None):
        return unpatch_model(model)

    def get_state_dict_and_metadata(self, model):
        """What ``save_pretrained`` takes in place of the state dict that it is given; None takes the model's own."""
        return self.given, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def merged(stored: Any, asked: ReRAMConfig) -> ReRAMConfig:
    """Of a checkpoint's config and one that ``from_pretrained`` was given, the first, with which its numbers are
    loaded; the model is put on the second's cells afterwards.

    Raises:
        ValueError: the checkpoint's weights are quantized by another method.
    """
    config = ReRAMConfig.from_dict(_ours(stored if isinstance(stored, dict) else stored.to_dict()))
    config.asked = asked  # type: ignore[attr-defined]
    return config


def _ours(data: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's quantization_config, if it is a ReRAMConfig."""
    if data.get("quant_method") != ReRAMConfig.quant_method:
        raise ValueError(
            f"quantization_config=ReRAMConfig(...): the checkpoint is quantized by {data.get('quant_method')!r}; "
            "crossbars hold weights that are not"
        )
    return data


def configs_beside(files: Sequence[str] | None) -> dict[str, dict[str, Any]]:
    """The ReRAMConfigs, in JSON, of the config.json beside a checkpoint's weights: the model's, under the name "", or
    those of its parts, under the parts' names there.

    Raises:
        ValueError: the weights are quantized by another method.
    """
    file = Path(files[0]).parent / CONFIG_NAME if files else None
    data = read_json(file) if file is not None and file.exists() else {}
    whole = data.get("quantization_config")
    if isinstance(whole, dict):
        return {"": _ours(whole)}
    parts = {name: part.get("quantization_config") for name, part in data.items() if isinstance(part, dict)}
    method = ReRAMConfig.quant_method
    return {n: part for n, part in parts.items() if isinstance(part, dict) and part.get("quant_method") == method}


def stored_parts(model: Any) -> list[tuple[Any, ReRAMConfig]]:
    """The models inside a model, outermost, that have a ReRAMConfig in a config of their own, as when they were patched
    by themselves."""
    found: list[tuple[Any, ReRAMConfig]] = []
    inside: set[int] = set()
    for module in model.modules():
        config = getattr(module, "config", None)
        stored = None if config is model.config else getattr(config, "quantization_config", None)
        if stored is None or id(module) in inside:
            continue
        data = stored if isinstance(stored, dict) else stored.to_dict()
        if data.get("quant_method") == ReRAMConfig.quant_method:
            inside |= {id(m) for m in module.modules()}
            found.append((module, ReRAMConfig.from_dict(data)))
    return found


def _stored_layers(files: Sequence[str] | None, prefix: str) -> list[str]:
    """Names, without a prefix, of the crossbar layers whose numbers are in files of safetensors."""
    found = []
    for file in files or ():
        if str(file).endswith(".safetensors"):
            with safe_open(file, framework="pt") as tensors:
                names = (key.removesuffix(MARK) for key in tensors.keys() if key.endswith(MARK))  # noqa: SIM118
                found += [name.removeprefix(prefix) for name in names]
    return found


def _was_loaded(tensor) -> bool:
    return getattr(tensor, "_is_hf_initialized", False)


def attach(model: Any, config: ReRAMConfig) -> None:
    """Let a patched PreTrainedModel's ``save_pretrained`` write the config into config.json, and its ``push_to_hub``
    upload report and card."""
    model.config.quantization_config = config
    model.hf_quantizer = ReRAMQuantizer(config, pre_quantized=False)
    attach_methods(model)


def attach_methods(model: Any) -> None:
    """Have methods of a patched PreTrainedModel know of its crossbars."""
    attach_upload(model)
    attach_saving(model)
    attach_resizing(model)
    attach_hooks(model)


def detach(model: Any) -> None:
    """Undo :func:`attach`, and what ``from_pretrained`` does."""
    detach_hooks(model)
    for name in (UPLOAD, SAVE, SET_HEAD):
        model.__dict__.pop(name, None)
    if not isinstance(getattr(model.config, "quantization_config", None), ReRAMConfig):
        return
    for owner, name in ((model, "hf_quantizer"), (model.config, "quantization_config")):
        owner.__dict__.pop(name, None)


# In place of what stood in for them.
auto.AUTO_QUANTIZATION_CONFIG_MAPPING[ReRAMConfig.quant_method] = ReRAMConfig
auto.AUTO_QUANTIZER_MAPPING[ReRAMConfig.quant_method] = ReRAMQuantizer
