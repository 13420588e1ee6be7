"""Passes of the digital model over the calibration data."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..model.deploy import digital_eval
from ..model.find import unwrapped
from ..model.inputs import call_model
from ..nn import CrossbarLayer
from ..nn.tensors import NotFiniteError, tensors_of


class Observation:
    """Passes of the digital model over the calibration data.

    Attributes:
        leaders: of each layer that was seen, the first one that read the same input, by their names.
        changed: layers whose output the model has changed in place.
    """

    def __init__(self, layers: dict[str, CrossbarLayer]):
        self.layers = layers
        self.names = {layer: name for name, layer in layers.items()}
        self.leaders: dict[str, str] = {}
        self._takers: Any = {}  # of inputs, by layer name
        self._of_leaders = False
        self.changed: set[nn.Module] = set()
        self._last: Any = (None, None)  # the input seen last and the layer that saw it first
        self._outputs: list[tuple[nn.Module, Tensor, int]] = []  # of the first batch, with their versions then
        self._holds: list[Any] = []

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """The digital model in eval mode, so that :meth:`run` sees each layer's input."""
        hooks = [layer.register_forward_pre_hook(self._see, with_kwargs=True) for layer in self.names]
        self._holds = [layer.register_forward_hook(self._hold) for layer in self.names]
        try:
            with digital_eval(model), torch.no_grad():
                yield
        finally:
            self.stop_holding()
            for hook in hooks:
                hook.remove()

    def run(self, model: nn.Module, batches: list, takers: dict[str, Any], of_leaders: bool = False) -> None:
        """One pass.

        Args:
            takers: get the inputs, by layer name. of_leaders: only those of layers that read an input first.
        """
        self._takers, self._of_leaders = takers, of_leaders
        for batch in batches:
            try:
                call_model(model, self._shortened(model, batch))
            except (NotFiniteError, torch.OutOfMemoryError):
                raise
            except (TypeError, LookupError, AttributeError, ValueError, RuntimeError) as error:
                given = f" of {list(batch)}" if isinstance(batch, Mapping) else ""
                raise (TypeError if isinstance(error, TypeError) else ValueError)(
                    f"the model cannot be called with a batch of type {type(batch).__name__}{given}: allowed is what "
                    f"its forward takes: a dict of its arguments, a tuple of inputs and labels, or a tensor "
                    f"({error})"
                ) from error
            self.stop_holding()

    def _shortened(self, model: nn.Module, batch: Any) -> Any:
        """The batch, with logits of its last tokens alone where the model can leave out the others and no crossbar
        makes them: over a language model's vocabulary they would be a fifth of the work, and nobody looks at them."""
        whole = unwrapped(model)
        head = whole.get_output_embeddings() if hasattr(whole, "get_output_embeddings") else None
        can = head is not None and "logits_to_keep" in inspect.signature(whole.forward).parameters
        if not can or head in self.names or not isinstance(batch, Mapping) or "labels" in batch:
            return batch
        return {"logits_to_keep": 1, **batch}

    def _see(self, layer, args, kwargs) -> None:
        name, x = self.names[layer], tensors_of((args, kwargs))[0]
        first = self.layers[self._last[1]] if self._last[0] is x else None
        if first is None or first.crossbar is not layer.crossbar or first.channel_dim != layer.channel_dim:
            self._last = (x, name)
        leader = self.leaders.setdefault(name, self._last[1])
        if self._of_leaders and name != leader == self.leaders[leader]:
            return
        keep = layer.crossbar.forward.padding.keep(x) if layer.channel_dim == -1 else None
        self._takers[name].update(x, keep)

    def _hold(self, layer, args, y) -> None:
        self._outputs.append((layer, y, y._version))

    def stop_holding(self) -> None:
        """See which of the outputs so far the model has changed in place, and let go of them."""
        self.changed |= {layer for layer, y, version in self._outputs if y._version != version}
        self._outputs.clear()
        for hook in self._holds:
            hook.remove()


def ordinary(batch: Any) -> Any:
    """The batch without tensors that autograd refuses, as they are made under ``torch.inference_mode``."""
    if isinstance(batch, Tensor):
        return batch.clone() if batch.is_inference() else batch
    if isinstance(batch, Mapping):
        return {key: ordinary(value) for key, value in batch.items()}
    return type(batch)(map(ordinary, batch)) if type(batch) in (list, tuple) else batch
