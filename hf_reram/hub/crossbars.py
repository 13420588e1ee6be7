"""The crossbars beside an adapter: PEFT saves only what it has trained, and a digital base brings no crossbars back."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig
from transformers.utils import cached_file, logging

from ..config import ReRAMConfig
from ..device.checks import shown
from ..model import remap
from ..model.find import crossbar_layers, crossbar_states, unwrapped
from ..model.patch import patch_model, take_layers_off, unpatch_model
from ..model.remap import Move
from ..nn import CrossbarLayer
from ..nn.scalars import BUFFERS

logger = logging.get_logger(__name__)

CROSSBARS = "crossbars.safetensors"
ABOUT = "hf_reram"  # in the file's metadata


def save_crossbars(model: Any, folder: str | os.PathLike) -> None:
    """Write config and calibration of a model's crossbars beside its adapters, for :func:`stored_crossbars`, and warn
    where PEFT alone would open the adapters on a digital base.

    Args:
        model: with adapters, and patched. folder: that PEFT has saved the adapters in.
    """
    states, base = crossbar_states(model), unwrapped(model)
    if len(states) > 1:
        logger.warning(
            "parts of the model are on devices of their own, and %s is saved without its crossbars: save the base with "
            "save_pretrained too, and open the adapters on it",
            folder,
        )
        return
    kept = {f"{name}.{b}" for name, m in base.named_modules() if isinstance(m, CrossbarLayer) for b in BUFFERS}
    tensors = {key: value.detach().cpu().clone() for key, value in base.state_dict().items() if key in kept}
    originals = any("original_module" in key.split(".") for key in tensors)
    about = {
        "config": states[0].config.to_dict(),
        "layers": list(crossbar_layers(model)),
        "before_adapters": originals,  # which then have copies of crossbars
    }
    save_file(tensors, Path(folder) / CROSSBARS, metadata={ABOUT: json.dumps(about)})
    name = getattr(base, "name_or_path", "")
    if not _has_crossbars(name) and (key := ("digital base", name)) not in states[0].warned:
        states[0].warned.add(key)
        logger.warning(
            "the adapters' base %r holds no crossbars, so that PEFT alone opens the adapters on a digital model. "
            "Config and calibration of the crossbars are beside them in %s: open both with "
            "hf_reram.load_model(folder), or save the base on its crossbars before adapters are added "
            "(patch_model, calibrate, save_pretrained) and train on that",
            name,
            CROSSBARS,
        )


def put_on(model: Any, asked: ReRAMConfig) -> None:
    """Put a loaded model on the cells that were asked for, as :func:`hf_reram.model.remap.put_on`, or a digital one on
    crossbars, and say what has changed.

    Raises:
        ValueError: see :func:`hf_reram.patch_model`.
    """
    if crossbar_layers(model):
        move = remap.put_on(model, asked)
    else:
        patch_model(model, asked)
        move = Move(["no device"], ["layers"], [], [])
    if not move.differs:
        return
    layers = move.layers("in the checkpoint")
    logger.warning(
        "the checkpoint is of %s, and its calibration with it: put on %s as quantization_config says, which differs in "
        "%s, the model is not calibrated, call hf_reram.calibrate(model, batches)%s",
        ", ".join(move.devices),
        asked.device.name,
        ", ".join(move.differs),
        f"; {layers}" if layers else "",
    )


def stored_crossbars(name: str | os.PathLike, **where: Any) -> "StoredCrossbars | None":
    """The crossbars beside adapters, or None.

    Args:
        name: folder or Hub id. where: as in ``from_pretrained``.

    Raises:
        ValueError: the file there is not one that :func:`save_crossbars` wrote.
    """
    try:
        path = cached_file(name, CROSSBARS, **where)
    except OSError:  # no such file, or no way to it
        return None
    return None if path is None else StoredCrossbars(path)


class StoredCrossbars:
    """A file of :func:`save_crossbars`.

    Attributes:
        config: of the crossbars. layers: their names. before_adapters: whether the model was patched before it got
            adapters.

    Raises:
        ValueError: no such file.
    """

    def __init__(self, path: str):
        self.path = path
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {})[ABOUT])
            self.layers, self.before_adapters = set(about["layers"]), bool(about["before_adapters"])
            config = about["config"]
        except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} holds no crossbars of hf_reram: {error!r}") from error
        self.config = ReRAMConfig.from_dict(config)

    def put_on(self, model: Any) -> None:
        """Put a model's layers on these crossbars, in place; numbers follow with :meth:`load_numbers`.

        Raises:
            ValueError: the model lacks layers of them.
        """
        layers = crossbar_layers(model)
        if layers and any(state.config.hardware() != self.config.hardware() for state in crossbar_states(model)):
            unpatch_model(model)
            layers = {}
        if not layers:
            layers = crossbar_layers(patch_model(model, self.config))
        if missing := sorted(self.layers - layers.keys()):
            raise ValueError(f"{self.path} has crossbars that the model lacks: {', '.join(missing)}")
        take_layers_off(model, layers.keys() - self.layers)

    def load_numbers(self, model: Any) -> None:
        """Give the model's crossbars the numbers of calibration.

        Raises:
            ValueError: they do not fit.
        """
        base = unwrapped(model)
        names = {module: name for name, module in base.named_modules() if isinstance(module, CrossbarLayer)}
        wanted = {f"{name}.{buffer}" for name in names.values() for buffer in BUFFERS}
        found = load_file(self.path)
        if foreign := sorted(found.keys() - wanted):
            raise ValueError(f"{self.path} has numbers of no crossbar of the model: {shown(foreign)}")
        needed = {f"{names[layer]}.input_range" for layer in crossbar_layers(model).values()}
        if lacking := sorted(needed - found.keys()):
            raise ValueError(f"{self.path} lacks numbers of its crossbars: {shown(lacking)}")
        if wrong := sorted(key for key, value in found.items() if not torch.isfinite(value).all()):
            raise ValueError(f"{self.path} has NaN or infinite numbers: {shown(wrong)}")
        try:
            base.load_state_dict(found, strict=False)
        except RuntimeError as error:
            raise ValueError(f"{self.path} does not fit the model: {error}") from error


def _has_crossbars(name: str) -> bool:
    """Whether a checkpoint's config says that it is on crossbars."""
    try:
        stored = PreTrainedConfig.get_config_dict(name, local_files_only=True)[0].get("quantization_config") or {}
    except (OSError, ValueError):  # no such checkpoint here
        return False
    return stored.get("quant_method") == ReRAMConfig.quant_method
