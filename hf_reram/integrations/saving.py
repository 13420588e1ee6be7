"""A state dict that ``save_pretrained`` is given for a patched model is saved with the crossbars' numbers."""

import os
from typing import Any

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
        if quantizer is None:
            return save(self.model, save_directory, is_main_process, state_dict, *args, **kwargs)
        quantizer.given = state_dict
        try:
            return save(self.model, save_directory, is_main_process, state_dict, *args, **kwargs)
        finally:
            quantizer.given = None


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


def attach_saving(model: Any) -> None:
    """Have the model's ``save_pretrained`` heed a state dict that it is given."""
    model.__dict__[SAVE] = Save(model)
