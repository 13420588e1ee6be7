"""``save_pretrained`` of a patched model: a state dict that it is given is saved with the crossbars' numbers, and
figures of other weights do not stay beside the new ones."""

import os
from pathlib import Path
from typing import Any

from ..model.digest import weights_digest
from ..model.sharding import is_sharded, processes
from ..nn import CrossbarLayer
from ..nn.places import place
from ..nn.scalars import BUFFERS

SAVE = "save_pretrained"


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
        if quantizer is not None:
            quantizer.given = state_dict
        try:
            found = save(self.model, save_directory, is_main_process, state_dict, *args, **kwargs)
        finally:
            if quantizer is not None:
                quantizer.given = None
        if is_main_process:
            forget_foreign(self.model, Path(save_directory))
        return found


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


def forget_foreign(model: Any, folder: Path) -> None:
    """Remove figures of other weights than a model's, which were saved to a folder just now. Not where this process
    does not hold all weights, nor beside a SentenceTransformer's parts, whose report is of all of it."""
    from ..hub.publish import holds_figures, remove_foreign
    from ..hub.report import PARTS

    apart = any(p.is_meta for p in model.parameters()) or (processes() > 1 and is_sharded(model))
    if not apart and not (folder / PARTS).exists() and holds_figures(folder):
        remove_foreign(folder, weights_digest(model))


def attach_saving(model: Any) -> None:
    """Have the model's ``save_pretrained`` heed a state dict that it is given."""
    model.__dict__[SAVE] = Save(model)
