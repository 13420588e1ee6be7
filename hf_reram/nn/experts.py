"""Experts of a mixture, whose matrices are stacked in one tensor each, as transformers' experts interface has them:
each matrix of each expert is a crossbar of its own, which its tokens meet."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .forward import Padding, runs_again
from .layer import CrossbarLayer
from .parts import Holder, lent, register_holder
from .places import Part

INTERFACE = "transformers.integrations.moe"  # not imported before a model needs it
PARALLEL = "each process holds a part of the experts (expert parallelism)"


@register_holder
class CrossbarExperts(Holder):
    """Experts that say how their matrices lie by the flags of ``transformers.integrations.moe``: with a gate, and the
    product ``gate_up`` for both, or with ``up`` alone; then ``down``; with biases, and transposed, or not."""

    num_experts: int
    has_gate: bool
    has_bias: bool
    has_post_expert_norm: bool
    is_transposed: bool
    _apply_gate: Any
    act_fn: Any
    post_expert_norm: Any

    @classmethod
    def stands_for(cls, module: nn.Module) -> bool:
        """Its forward is the interface's, which knows no other matrices; one of its own may compute anything."""
        interface, forward = sys.modules.get(INTERFACE), type(module).forward
        return interface is not None and getattr(forward, "__globals__", None) is vars(interface)

    @classmethod
    def why_not(cls, module: Any) -> str:
        """Other processes' experts are not there."""
        return PARALLEL if module._is_expert_parallel else ""

    @classmethod
    def names_of_parts(cls, module: Any) -> list[str]:
        """The experts' numbers."""
        return [str(number) for number in range(module.num_experts)]

    def make_parts(self) -> dict[str, nn.Module]:
        """``{"0": {"gate_up": ..., "down": ...}, ...}``; not by the names of layers that adapters are put beside."""
        return {
            str(number): nn.ModuleDict(
                {
                    name.removesuffix("_proj"): Part(
                        self, name, number, f"{name}_bias" if self.has_bias else None, self.is_transposed
                    )
                    for name in self._stacks()
                }
            )
            for number in range(self.num_experts)
        }

    def _stacks(self) -> tuple[str, str]:
        return "gate_up_proj" if self.has_gate else "up_proj", "down_proj"

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """What the interface's forwards compute, expert by expert.

        Args:
            hidden_states: (tokens, features). top_k_index: (tokens, k), the experts of each token. top_k_weights:
                (tokens, k), what their outputs are multiplied by.
        """
        if self.why_not(self):
            raise RuntimeError(f"experts on crossbars: {PARALLEL}, since the model was patched")
        chosen = top_k_index.reshape(-1)
        order = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=self.num_experts).tolist()  # the one time that the host waits
        tokens = (order // top_k_index.shape[-1]).split(counts)
        up, down = self._stacks()
        columns = [
            [self._modules[str(n)][name.removesuffix("_proj")] for n in range(self.num_experts)]  # type: ignore
            for name in (up, down)
        ]
        outputs = []
        with self._lent(columns[0], up), self._lent(columns[1], down), _routing(columns[0] + columns[1]) as route:
            for rows, first, last in zip(tokens, *columns, strict=True):
                if len(rows):
                    route(rows, len(hidden_states))
                    outputs.append(last(self._gated(first(hidden_states[rows][None]))).squeeze(0))
        found = torch.cat(outputs) if outputs else hidden_states.new_zeros(0, hidden_states.shape[-1])
        if self.has_post_expert_norm:
            found = self.post_expert_norm(found)
        weighted = found * top_k_weights.reshape(-1)[order, None]
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        summed = weighted[back].view(*top_k_index.shape, -1).sum(1)
        return summed.to(hidden_states.dtype)

    def _gated(self, y: Tensor) -> Tensor:
        return self._apply_gate(y) if self.has_gate else self.act_fn(y)

    def _lent(self, parts: list[Any], name: str) -> Any:
        biases = getattr(self, f"{name}_bias").unbind(0) if self.has_bias else None
        return lent(parts, getattr(self, name).unbind(0), biases)


@contextmanager
def _routing(parts: list[Any]) -> Iterator[Any]:
    """A function of an expert's tokens and of how many there are of all, which tells the crossbars which of those are
    padding."""
    states = {part.crossbar: None for part in parts if isinstance(part, CrossbarLayer)}
    before = [(state.forward, state.forward.padding) for state in states]

    def route(rows: Tensor, tokens: int) -> None:
        for forward, padding in before:
            mask = padding.mask
            if mask is not None and mask.numel() == tokens:
                forward.padding = replace(padding, mask=mask.reshape(-1)[rows.to(mask.device)][None])
            else:
                forward.padding = Padding()

    if runs_again():  # which layers remember
        before = []
    try:
        yield route
    finally:
        for forward, padding in before:
            forward.padding = padding
