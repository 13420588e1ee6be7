"""What one forward of a patched model samples and collects, and which of its tokens are padding."""

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .physics import Sampling


@dataclass
class Padding:
    """Which tokens are padding, where a model or an encoder or decoder inside it runs.

    Attributes:
        mask: (batch, tokens), 0 at padding, of its own tokens; None where unknown.
        other: (batch, tokens, features), states of an encoder that it attends to; other_mask: of their tokens.
        decoded: its own tokens are those of a decoder that ran inside it.
    """

    mask: Tensor | None = None
    other: Tensor | None = None
    other_mask: Tensor | None = None
    decoded: bool = False

    def keep(self, x: Tensor) -> Tensor | None:
        """1 for each row of ``x`` (batch, tokens, features) that is no padding, 0 for the others; None if unknown."""
        return rows_kept(self.mask_of(x), x)

    def mask_of(self, x: Tensor) -> Tensor | None:
        """(batch, tokens), 0 where a row of ``x`` (batch, tokens, features) is padding; None if unknown."""
        mask = self.other_mask if self.other is not None and x is self.other else self.mask
        return None if mask is None or x.dim() != 3 or x.shape[:2] != mask.shape else mask


def rows_kept(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """A mask as 1 and 0 for each row of ``x``."""
    return None if mask is None else mask.reshape(-1).to(device=x.device, dtype=torch.float32)


def same_mask(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two masks, or their absence, say the same."""
    return a is b or (a is not None and b is not None and torch.equal(a, b))


HELD = 8  # outputs, which take memory


class Forward:
    """What one forward of a patched model samples and collects; made anew for each.

    Attributes:
        sampling: see :class:`Sampling`; None outside of training. batch_size: examples, a number or a tensor.
        padding: of the tokens that layers read now; around: what will be so again when an inner module ends.
        ran: names of the layers that ran in it.
        kept: masks that a layer's term was computed with, by its name, and which tokens they keep: one unless it ran
            with several.
        terms: the loss's (noise, signal) by layer name, summed over the calls of a layer. ratios: the same of "output",
            where they are only measured. scales: the gradients that terms will receive, see :mod:`.attach`.
        sources: the same of each source of error alone, by its name and then the layer's, where they are wanted.
        kept_by: a reference to what the model's outputs hold on to. compiled: it ran under torch.compile.
        alone: it is of one layer, called by itself.
        consumed: the terms have joined a loss. attached: they travel attached to the layers' outputs.
        given: layers of which nobody knows yet whether the model changes their outputs in place, with the copies of
            them that it got, and PyTorch's counts of changes then; gone: those that are not held on to any more.
        before: the last forward, where both are compiled: nothing else holds on to it.
        rerun: layers run once without gradients, and again in the backward (reentrant checkpointing).
    """

    def __init__(
        self,
        sampling: Sampling | None = None,
        batch_size: Any = 1,
        padding: Padding | None = None,
        before: "Forward | None" = None,
    ):
        self.sampling, self.batch_size, self.before = sampling, batch_size, before
        self.padding = Padding() if padding is None else padding
        self.around: list[Padding] = []
        self.ran: set[str] = set()
        self.kept: dict[str, tuple[list[Tensor | None], list[Tensor | None]]] = {}
        self.terms: dict[str, Tensor] = {}
        self.ratios: dict[str, Tensor] = {}
        self.sources: dict[str, dict[str, Tensor]] = {}
        self.scales: dict[str, Tensor] = {}
        self.consumed = self.rerun = self.alone = False
        self.attached = True
        self.kept_by: Any = nobody
        self.given: list[tuple[Any, Tensor, int]] = []
        self.gone: list[tuple[Any, weakref.ref[Tensor], int]] = []
        self.compiled = torch.compiler.is_compiling()
        self.grad = torch.is_grad_enabled()

    def note_kept(self, name: str, mask: Tensor | None, keep: Tensor | None) -> None:
        """A layer ran with this mask. Values are compared where it matters only, which would wait for a GPU."""
        masks, keeps = self.kept.setdefault(name, ([], []))
        if not any(mask is known for known in masks):
            masks.append(mask)
            keeps.append(keep)

    def keep_while(self, y: Tensor) -> None:
        """Wait for a loss as long as the graph of ``y`` is there."""
        if y.grad_fn is None:
            return
        if (keeper := self.kept_by()) is None:
            keeper = _Keeper(self)
            self.kept_by = weakref.ref(keeper)
        metadata: Any = y.grad_fn.metadata
        metadata["hf_reram"] = keeper

    def give(self, layer: Any, y: Tensor) -> Tensor:
        """A copy of a layer's output for the model, until it is known whether that changes it in place: soon after, as
        more than a few outputs are not held on to."""
        copy = y.clone()
        self.look_at_given(HELD)
        self.given.append((layer, copy, copy._version))
        return copy

    def look_at_given(self, kept: int = 0) -> None:
        """Learn which layers' outputs the model has changed in place, but for those of the last ones that are kept."""
        while len(self.given) > kept:
            layer, y, version = self.given.pop(0)
            if y._version == version and kept:  # it may change yet, if anyone keeps it
                self.gone.append((layer, weakref.ref(y), version))
            else:
                layer.copies_output = bool(layer.copies_output) or y._version != version
        if not kept:
            for layer, ref, version in self.gone:
                later = ref()
                layer.copies_output = bool(layer.copies_output) or (later is not None and later._version != version)
            self.gone = []

    def scale(self, name: str, device: torch.device) -> Tensor:
        """The gradient, (2,), that a layer's term will receive."""
        if name not in self.scales:
            self.scales[name] = torch.zeros(2, dtype=torch.float32, device=device)
        return self.scales[name]

    def like(self, other: "Forward") -> bool:
        """Whether both sample the same and know of no padding: a layer that runs again may be taken for either's."""
        alone = all(f.padding.mask is None and f.padding.other_mask is None for f in (self, other))
        return alone and self.sampling is other.sampling and not self.rerun and not other.rerun


class _Keeper:
    """What the nodes of a graph hold on to, and so its forward."""

    def __init__(self, forward: Forward):
        self.forward = forward


def nobody() -> None:
    return None


def runs_again() -> bool:
    """Whether this is within a backward: gradient checkpointing runs layers again there."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def add_term(into: dict[str, Tensor], name: str, term: Tensor) -> None:
    """Add a term to those of its layer."""
    into[name] = into[name] + term if name in into else term
