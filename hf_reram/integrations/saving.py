"""``save_pretrained`` of a patched model: a state dict that it is given is saved with the crossbars' numbers, and
figures of other weights do not stay beside the new ones."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from ..model.digest import weights_digest
from ..model.sharding import processes
from ..nn import CrossbarLayer
from ..nn.places import place
from ..nn.scalars import BUFFERS
from ..nn.tensors import is_shard

SAVE = "save_pretrained"
logger = logging.get_logger(__name__)


class Save:
    """What takes the place of ``PreTrainedModel.save_pretrained`` on a patched model, where transformers would put the
    given state aside for what the quantizer names; a class, so that the model can be pickled and copied."""

    def __init__(self, model: Any):
        self.model = model

    def __call__(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        *args,
        **kwargs,
    ) -> Any:
        save, quantizer = getattr(type(self.model), SAVE), getattr(self.model, "hf_quantizer", None)
        if state_dict is not None:
            state_dict = with_numbers(self.model, state_dict)
        newer = [f"{name} (from output {n})" for name, n in newer_outputs(self.model).items()]
        if newer and is_main_process:
            logger.warning(
                "outputs that are newer than their layers' calibration are saved as if they were calibrated, which "
                "nobody can tell later: call hf_reram.calibrate(model, batches) before: %s",
                ", ".join(newer),
            )
        folder, variant = Path(save_directory), kwargs.get("variant")
        # Figures are then of the weights that are loaded by default, and those stay.
        beside = bool(variant) and any(
            (folder / name).exists() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
        )
        if quantizer is not None:
            quantizer.given = state_dict
        try:
            with nullcontext() if state_dict is None else standing_in(self.model, state_dict):
                found = save(self.model, save_directory, is_main_process, state_dict, *args, **kwargs)
                if is_main_process and not beside:
                    forget_foreign(self.model, folder)
        finally:
            if quantizer is not None:
                quantizer.given = None
        return found


def newer_outputs(model: Any) -> dict[str, int]:
    """By name of the layers that were resized after calibration, the first of the outputs that are newer."""
    found = {name: m.calibrated_outputs for name, m in model.named_modules() if isinstance(m, CrossbarLayer)}
    return {name: outputs for name, outputs in found.items() if outputs is not None}


def with_numbers(model: Any, state: dict[str, Any]) -> dict[str, Any]:
    """A state dict, and of the crossbars whose weights are in it the buffers that are not, as the model has them."""
    found = dict(state)
    names = {module: f"{name}." if name else "" for name, module in model.named_modules()}
    for module, prefix in names.items():
        if not isinstance(module, CrossbarLayer):
            continue
        owner, key = place(module)
        if f"{names[owner]}{key}" in state:
            for buffer in BUFFERS:
                found.setdefault(prefix + buffer, getattr(module, buffer).detach())
    return found


@contextmanager
def standing_in(model: Any, state: Mapping[str, Any], adapters: bool | None = None) -> Iterator[None]:
    """Within this, ``model.state_dict()`` is what a model has that is loaded from a folder with this state, so that
    figures are compared with that, and a card and an upload are of it.

    Args:
        state: that is saved in place of the model's own. What is tied may be in it once; what else it lacks the loaded
            model lacks, too.
        adapters: alone are saved, and what the state lacks is the model's; None asks the model.
    """
    state = dict(state)  # saving takes tensors out
    if adapters is None:
        adapters = getattr(model, "_hf_peft_config_loaded", False)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tied = {parameters[name]: tensor for name, tensor in state.items() if name in parameters}
    unsaved = getattr(model, "_keys_to_ignore_on_save", None) or ()

    def replace(_: Any, own: dict[str, Any], *__: Any) -> None:
        for name in list(own):
            if name in state:
                own[name] = state[name]
            elif parameters.get(name) in tied:
                own[name] = tied[parameters[name]]
            elif not adapters and name not in unsaved:
                del own[name]

    handle = model.register_state_dict_post_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def forget_foreign(model: Any, folder: Path) -> None:
    """Remove figures of other weights than ``model.state_dict()``, which was saved to a folder just now. Not where this
    process does not hold all of it, nor beside a SentenceTransformer's parts, whose report is of all of it."""
    from ..hub.publish import holds_figures, remove_foreign
    from ..hub.report import PARTS

    if (folder / PARTS).exists() or not holds_figures(folder):
        return
    tensors = [tensor for tensor in model.state_dict().values() if isinstance(tensor, Tensor)]
    if not any(t.is_meta or (is_shard(t) and processes() > 1) for t in tensors):
        remove_foreign(folder, weights_digest(model))


def forget_beside_adapters(model: Any, folder: Path, state: Mapping[str, Any] | None) -> None:
    """The same where PEFT has saved a model's adapters, of its own state dict or of another. The crossbars' numbers
    beside them are always the model's."""
    if state is None:
        return forget_foreign(model, folder)
    layers = [name for name, module in model.named_modules() if isinstance(module, CrossbarLayer)]
    numbers = {f"{name}.{buffer}" for name in layers for buffer in BUFFERS}
    with standing_in(model, {name: t for name, t in state.items() if name not in numbers}, adapters=True):
        forget_foreign(model, folder)


def attach_saving(model: Any) -> None:
    """Have the model's ``save_pretrained`` heed a state dict that it is given."""
    model.__dict__[SAVE] = Save(model)
