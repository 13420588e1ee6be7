"""The output embeddings that ``resize_token_embeddings`` makes anew stay on their crossbar."""

from typing import Any

from torch import nn

from ..model.resize import put_back
from ..nn import CrossbarLayer

# Through which transformers, and those who replace a head themselves, go.
SET_HEAD = "set_output_embeddings"


class SetHead:
    """What takes the place of ``PreTrainedModel.set_output_embeddings`` on a patched model, and on the models inside
    it; a class, so that the model can be pickled and copied."""

    def __init__(self, model: Any):
        self.model = model

    def __call__(self, new_embeddings: nn.Module) -> None:
        """
        Raises:
            ValueError: the head is deployed as a chip, or the new one cannot be on its crossbar.
        """
        old = self.model.get_output_embeddings()
        if isinstance(old, CrossbarLayer) and not isinstance(new_embeddings, CrossbarLayer):
            if old.chip is not None:
                raise ValueError(
                    f"layer {old.crossbar_name!r} is deployed as a chip, whose cells are programmed: replace it "
                    "outside of hf_reram.deploy"
                )
            put_back(old, new_embeddings)
        getattr(type(self.model), SET_HEAD)(self.model, new_embeddings)


def attach_resizing(model: Any) -> None:
    """Have the heads of a model, and of the models inside it, stay on their crossbars."""
    for module in model.modules():
        if hasattr(module, SET_HEAD) and hasattr(module, "get_output_embeddings") and hasattr(module, "config"):
            module.__dict__[SET_HEAD] = SetHead(module)
