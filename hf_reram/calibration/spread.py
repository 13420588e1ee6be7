"""How much the spread of each crossbar layer's cells changes what the model predicts."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..model.find import arrays, crossbar_layers
from ..model.inputs import find_predictions
from ..model.sharding import gathered, is_sharded, of_first, processes
from ..nn import CrossbarLayer
from ..nn.array import program
from ..nn.drive import Driven, drive, row_power
from ..nn.terms import variance
from .probe import examples_of, probe

# Predictions, such as tokens, that are probed; and parts that the examples of a batch are probed in, as if they
# were batches: more of them measure better, and cost a pass over the weight each.
PLACES, PARTS = 256, 32


def spread_effects(model: nn.Module, batches: list) -> dict[str, Tensor]:
    """What the spread of each layer's cells changes in the model's predictions, by layer name and input channel: to
    second order the KL divergence ``½ Σ_ir s²(W_ir) E (Σ_n δ_ni φ_nr)²`` [nats], summed over predictions. There n are
    the tokens or pixels of an example, which all meet the same cells, r the rows of the channel, and δ is as in
    :func:`.sensitivity.measure_sensitivity`: the sum over n is the gradient of a cell.

    A layer's own relative error does not tell: measured on SmolLM2-135M (cmo-hfox-ibm, ten years), where these add up
    to 0.2 nats a token and chips lose as much, one of 210 layers has a sixth of it.

    Returns:
        (input channels,), float64, by layer name; of layers that share cells, with the first that was called.

    Raises:
        ValueError: the model's outputs hold nothing that it predicts, or a layer was called without gradients alone.
            One that was called with them and that none reached has no effect: nothing that is predicted reads it.
        RuntimeError: there is no backward through the model.
    """
    effects = measure_spread(model, batches)
    return {name: effects.sums[layer] for name, layer in crossbar_layers(model).items()}


def measure_spread(model: nn.Module, batches: list, wanted: int = PLACES) -> "Effects":
    """The same, and what independent errors would do; arguments and errors of :func:`spread_effects`.

    Args:
        wanted: predictions to probe, at least; of fewer each is probed several times.
    """
    effects, sharded = Effects(crossbar_layers(model)), processes() > 1 and is_sharded(model)
    places = 0

    def enough(outputs: Any) -> bool:
        nonlocal places
        found = find_predictions(outputs, model)
        places += sum(p.logits.numel() // (p.logits.shape[p.class_dim] if p.logits.dim() > 1 else 1) for p in found)
        done = places >= wanted
        return of_first(done) if sharded else done  # all processes have their part in each pass

    again = (batch for _ in range(wanted) for batch in batches)
    if beyond := probe(model, effects.each(again), effects.watch, enough):
        raise ValueError(f"no gradient of the predictions reaches the output of {', '.join(beyond)}")
    effects.settle()
    return effects


class Effects:
    """What backward passes have told so far.

    Attributes:
        sums: effects by layer, those of an array with the first of its layers that was called. array: by layer.
        powers: ``Σ_n φ_nr²``, (groups, crossbar rows), by layer. first: the first layer, by array.
        examples: in the batch. calls: of an array in its forward. gradients: of its cells, of the parts of each call.
    """

    def __init__(self, layers: dict[str, CrossbarLayer]):
        self.sums = {layer: torch.zeros(layer.inputs, dtype=torch.float64) for layer in layers.values()}
        self.array = {layers[name]: i for i, same in enumerate(arrays(layers)) for name in same}
        self.powers: dict[CrossbarLayer, Any] = dict.fromkeys(layers.values(), 0.0)
        self.first: dict[int, CrossbarLayer] = {}
        self.examples = 1
        self.calls: Counter[CrossbarLayer] = Counter()
        self.gradients: dict[CrossbarLayer, list[Tensor]] = {}

    def each(self, batches: Iterable) -> Iterator[Any]:
        """The batches one by one."""
        for batch in batches:
            self.examples = examples_of(batch)
            yield batch
            self.settle()

    def settle(self) -> None:
        """A batch is over: of arrays some of whose calls no gradient reached, the others count."""
        for array in [*self.gradients]:
            self._add(array, self._together(array))
        self.calls.clear()

    @torch.no_grad()
    def watch(self, layer: CrossbarLayer, x: Tensor) -> Callable[[Tensor], None]:
        """For :func:`.probe.probe`."""
        driven = drive(layer, x.detach().float(), layer.scalars())
        array = self.first.setdefault(self.array[layer], layer)
        self.calls[array] += 1

        def collect(grad: Tensor) -> None:
            parts, calls = 1, self.calls[array]
            if len(grad) == len(driven.s) == self.examples:  # which can be told apart, and have independent probes
                parts = max(1, min(self.examples, PARTS // calls))
            self.powers[layer] = self.powers[layer] + row_power(layer, driven)
            pairs = zip(driven.s.tensor_split(parts), grad.tensor_split(parts))
            found = (_of_cells(layer, driven, s, part) for s, part in pairs)
            if calls == 1:
                self._add(array, sum(gradient.square_() for gradient in found))  # type: ignore[arg-type]
                return
            self.gradients.setdefault(array, []).append(torch.stack([*found]))
            if len(self.gradients[array]) == calls:
                self._add(array, self._together(array))

        return collect

    @torch.no_grad()
    def channels(self, layer: CrossbarLayer) -> Tensor:
        """``Σ_nr s²(W_ir) φ_nr²`` of a layer, (output channels,)."""
        with gathered([layer]):
            return (layer.to_rows(_variance(layer)) * self.powers[layer][:, None]).sum(2, dtype=torch.float64).flatten()

    def _together(self, array: CrossbarLayer) -> Tensor:
        """The square of the sum over calls, which meet the same cells; of some that cannot be told apart, as one."""
        found = self.gradients.pop(array)
        if len({len(of_call) for of_call in found}) > 1:
            found = [of_call.sum(0, keepdim=True) for of_call in found]
        return sum(found[1:], found[0]).square().sum(0)

    @torch.no_grad()
    def _add(self, layer: CrossbarLayer, square: Tensor) -> None:
        rows = layer.to_rows(square.mul_(_variance(layer))).sum(1, dtype=torch.float64)
        self.sums[layer] += 0.5 * rows.view(layer.inputs, layer.area).sum(1).cpu()


def _variance(layer: CrossbarLayer) -> Tensor:
    """s² of a layer's weights as its cells hold them, at least in float32."""
    return variance(layer, program(layer, layer.weight.detach()).float(), layer.error)


def _of_cells(layer: CrossbarLayer, driven: Driven, s: Tensor, grad: Tensor) -> Tensor:
    """``Σ_n δ_ni φ_nr``, of the weight's shape."""
    if not layer.reads_windows and layer.groups == 1:  # each token meets the array as it is
        tokens, gradients = s.reshape(-1, layer.inputs), grad.reshape(-1, layer.outputs).to(s.dtype)
        return layer.from_rows((gradients.mT @ tokens)[None])
    with torch.enable_grad():
        cells = s.new_zeros(layer.weight.shape, requires_grad=True)
        y = layer.multiply(s, cells, None, driven.padded)
    return torch.autograd.grad(y, cells, grad.to(y.dtype))[0]
