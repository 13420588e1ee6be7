"""How much the model's predictions depend on each crossbar layer's output: the Fisher information of its channels, and
how much more, or less, than independent errors the errors of its cells do."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..model.find import arrays, crossbar_layers
from ..nn import CrossbarLayer
from ..nn.array import program
from ..nn.drive import drive
from ..nn.ops.reference import weight_mean
from .probe import examples_of, probe
from .spread import measure_spread

# Probes of the model's predictions, over all examples and passes over them.
DRAWN = 1024


def measure_sensitivity(model: nn.Module, batches: list) -> None:
    """Set ``layer.sensitivity``, (output channels,): the Fisher information ``h_i = E δ_i²`` of output channel i, where
    δ is the gradient, at one token or pixel, of an example's log-likelihood of labels drawn from the model itself
    (:func:`.probe.fisher_probe`); and ``layer.coherence``.

    To second order independent errors Δy of a layer's outputs change the prediction by ``KL ≈ ½ Σ_i h_i Δy_i²`` nats.
    Those of cells are not independent: all tokens and pixels meet the same cells, so that before a pooling the
    divergence is many times as large, and a mean shift moves all channels of all layers together. Coherence is what
    they do over what independent errors of their power would do, as weights and inputs are now:

    - of the spread, of each layer, ``E Σ_ir s²(W_ir) (Σ_n δ_ni φ_nr)² / Σ_nir h_i s²(W_ir) φ_nr²`` (:mod:`.spread`);
    - of the mean shift, ``E d² / Σ_ni h_i (m(W) φ_n)_i²`` with ``d = Σ_n δ_n · m(W) φ_n``, times one number for all
      layers that were patched together, ``E (Σ d)² / Σ E d²``, so that their terms add up to what all shifts do at
      once.
    """
    layers, draws = crossbar_layers(model), max(1, -(-DRAWN // max(sum(map(examples_of, batches)), 1)))
    sums: dict[CrossbarLayer, list] = {
        layer: [torch.zeros(layer.outputs, dtype=torch.float32), 0] for layer in layers.values()
    }
    shifts = _Shifts()

    def watch(layer: CrossbarLayer, x: Tensor) -> Callable[[Tensor], None]:
        keep = layer.crossbar.forward.padding.keep(x) if layer.channel_dim == -1 else None
        moved = shifts.of(layer, x)

        def collect(grad: Tensor) -> None:
            total, count = _power(layer, grad, keep)
            sums[layer] = [sums[layer][0].to(total) + total, sums[layer][1] + count]
            shifts.add(layer, moved, grad.float(), keep)

        return collect

    probe(model, shifts.each(batch for _ in range(draws) for batch in batches), watch)
    shifts.settle()
    information = {layer: total / max(count, 1) for layer, (total, count) in sums.items()}
    for layer, h in information.items():
        layer.sensitivity, layer.coherence = h, (1.0, shifts.coherence(layer, h))
    try:
        spread = measure_spread(model, batches, DRAWN // 2)
    except ValueError:  # some layers have no gradient, and so no effect that is known
        return
    for same in arrays(layers):  # whose effects are with the first that was called
        shared = [layers[name] for name in same]
        together = sum(float(spread.sums[layer].sum()) for layer in shared)
        met = [layer for layer in shared if isinstance(spread.powers[layer], Tensor)]
        apart = sum(0.5 * float(information[layer].double().cpu() @ spread.channels(layer).cpu()) for layer in met)
        for layer in shared if apart > 0 else ():
            layer.coherence = together / apart, layer.coherence[1]


def _power(layer: CrossbarLayer, y: Tensor, keep: Tensor | None) -> tuple[Tensor, float]:
    """``Σ_n k_n y_n²`` of an output or its gradient over tokens or pixels n, (output channels,), and ``Σ_n k_n``."""
    examples = layer.examples(y.detach().float())
    if layer.reads_windows:
        pixels = examples.flatten(2)
        return pixels.square().sum((0, 2)), len(pixels) * pixels.shape[2]
    square = examples.square()
    return (square.sum(0), len(square)) if keep is None else (keep.to(square) @ square, float(keep.sum()))


class _Shifts:
    """What the mean shifts of layers' weights do to the predictions, alone and together; sums over probes and times.

    Attributes:
        examples: of the batch. moved: ``d`` of its examples at each time, (times, examples), by layer.
        alone: Σ d², by layer. together: Σ (Σ d)², by the layers' state. powers: ``Σ_n (m(W) φ_n)_i²``,
            (output channels,), by layer.
    """

    def __init__(self) -> None:
        self.examples = 1
        self.moved: dict[CrossbarLayer, Tensor] = {}
        self.alone: dict[CrossbarLayer, float] = {}
        self.together: dict[Any, float] = {}
        self.powers: dict[CrossbarLayer, Any] = {}

    def each(self, batches: Iterable) -> Iterator[Any]:
        """The batches one by one."""
        for batch in batches:
            self.examples = examples_of(batch)
            yield batch
            self.settle()

    @torch.no_grad()
    def of(self, layer: CrossbarLayer, x: Tensor) -> list[Tensor]:
        """``m(W) φ`` at each time; none where there is no shift."""
        if not layer.error.shifts:
            return []
        driven, held = drive(layer, x.detach().float(), layer.scalars()), program(layer, layer.weight.detach()).float()
        scale, means = layer.held_scale(held.dtype), layer.error.shifts
        shifted = (weight_mean(held, scale, mean.table(held)) for mean in means)
        return [layer.multiply(driven.s, weight, None, driven.padded) for weight in shifted]

    @torch.no_grad()
    def add(self, layer: CrossbarLayer, moved: list[Tensor], grad: Tensor, keep: Tensor | None) -> None:
        """A call of a layer: how its output moves, and the gradient of a probe there."""
        if not moved:
            return
        self.powers[layer] = self.powers.get(layer, 0.0) + sum(_power(layer, one, keep)[0] for one in moved)
        d = torch.stack([(one * grad).reshape(len(grad), -1).sum(1, dtype=torch.float64) for one in moved])
        d = d if len(grad) == self.examples else d.sum(1, keepdim=True)  # of all, which cannot be told apart
        self.moved[layer] = _added(self.moved[layer], d) if layer in self.moved else d

    def settle(self) -> None:
        """A batch is over."""
        sums: dict[Any, Tensor] = {}
        for layer, d in self.moved.items():
            state = layer.crossbar
            sums[state] = _added(sums[state], d) if state in sums else d
            self.alone[layer] = self.alone.get(layer, 0.0) + float(d.square().sum())
        for state, d in sums.items():
            self.together[state] = self.together.get(state, 0.0) + float(d.square().sum())
        self.moved.clear()

    def coherence(self, layer: CrossbarLayer, h: Tensor) -> float:
        """Of a layer's shift, with the Fisher information of its outputs."""
        if not self.alone.get(layer):
            return 1.0
        alone = sum(square for other, square in self.alone.items() if other.crossbar is layer.crossbar)
        independent = float(h.double() @ self.powers[layer].double())
        return self.alone[layer] / independent * self.together[layer.crossbar] / alone


def _added(a: Tensor, b: Tensor) -> Tensor:
    """Sums over layers of what is of each example, or of a batch where examples cannot be told apart somewhere."""
    return a + b if a.shape == b.shape else a.sum(1, keepdim=True) + b.sum(1, keepdim=True)
