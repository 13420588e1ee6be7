"""Hooks that tell a state when its model runs, and which tokens are padding in it."""

import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from . import state as states
from .clipping import warn_clipped
from .forward import Padding, runs_again
from .sharing import forget_shared
from .state import CrossbarState, reference
from .tensors import NotFiniteError, tensors_of
from .untrained import refuse_backward

# Arguments with which a model, or an encoder or decoder inside it, is given its tokens.
INPUTS = frozenset(
    ("input_ids", "inputs_embeds", "decoder_inputs_embeds", "pixel_values", "input_values", "input_features")
)


# What the names of a decoder's tokens begin with, beside which the padding mask is that of an encoder's.
DECODED = ("decoder_", "tgt", "target")


class BeginForward:
    """Forward pre-hook of a patched model, and of what in it is given tokens of its own: notes padding, and begins a
    new :class:`Forward` for the model itself (``root``), and for a part that is called by itself; ``names`` are those
    of the module's arguments."""

    def __init__(self, state: CrossbarState, module: nn.Module, root: bool, names: tuple[str, ...]):
        self.state, self.module, self.root, self.names = state, reference(module), root, names

    def __getstate__(self):
        return {**self.__dict__, "module": self.module()}

    def __setstate__(self, saved):
        self.__dict__.update(saved, module=reference(saved["module"]))
        if self.root:
            self.state.adopt(saved["module"])

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        given = self._by_name(args, kwargs)
        inner = not self.root and (self.state.running is not None or runs_again())
        forward = self.state.current() if inner and module.training else self.state.forward
        around = forward.padding if inner else Padding()
        decodes = self.root and any(name.startswith(DECODED) for name in self.names)
        padding = Padding(
            None if decodes else _by_token(given.get("attention_mask"), around.mask),
            given.get("encoder_hidden_states"),
            _by_token(given.get("encoder_attention_mask"), around.other_mask),
        )
        if inner:
            forward.around.append(forward.padding)
            forward.padding = padding
            return
        tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)] or tensors_of((args, kwargs))
        if self.root and not torch.compiler.is_compiling():
            _refuse_nan(tensors)
            if module.training and self.state.term is not None and getattr(module, "_is_replica", False):
                raise RuntimeError(
                    "nn.DataParallel trains copies of the model in threads, where its retention terms are lost: start "
                    "a process for each GPU instead, as accelerate launch does"
                )
            trains = module.training and torch.is_grad_enabled() and not self.state.digital
            if trains and states.on_untended is not None and self.state.is_untended:
                states.on_untended(self.state)
        if self.root:
            self.state.calls = 1 if torch.compiler.is_compiling() else self.state.calls + 1
        self.state.running = self
        size: Any = tensors[0].shape[0] if tensors and tensors[0].dim() else 1
        if self.state.term == "sensitivity":
            size = _sequences(given, size)
        self.state.begin(module.training, size, padding)

    def _by_name(self, args: tuple, kwargs: dict) -> dict[str, Any]:
        return {**dict(zip(self.names, args)), **kwargs} if args else kwargs


class EndForward:
    """Forward hook with the same: what it read before goes on, or its outputs are held on to."""

    def __init__(self, begin: BeginForward):
        self.begin = begin

    def __call__(self, module: nn.Module, args: tuple, outputs: Any) -> None:
        state = self.begin.state
        if state.running is not self.begin:
            forward, inside = state.forward, state.forward.padding
            if forward.around:
                forward.padding = forward.around.pop()
            if inside.decoded or inside.other is not None:  # what follows a decoder reads its tokens
                forward.padding = replace(forward.padding, mask=inside.mask, decoded=True)
            return
        state.running = None
        if not torch.compiler.is_compiling():
            forget_shared()
            if state.changed:
                changed, state.changed = state.changed, []
                if not _is_sharded(module):  # whose weights are other tensors in each forward
                    warn_clipped(changed)
            if module.training:
                state.end(outputs)
                if state.chips:
                    refuse_backward(outputs)


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of a module's forward, in their order."""
    try:
        return tuple(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):  # a forward without a signature, such as a compiled one
        return ()


def _is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 has put its class before the module's own; by name, since its import takes a while."""
    return any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__)


def is_given_tokens(module: nn.Module) -> bool:
    """Whether a module inside the model is given tokens of its own."""
    return not INPUTS.isdisjoint(argument_names(module))


def _by_token(mask: Any, around: Tensor | None) -> Tensor | None:
    """An attention mask by token; one that is by pair of tokens already was made of the mask around."""
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask
    return None if mask is None else around


def _sequences(given: dict[str, Any], rows: int) -> Any:
    """How many sequences a batch holds: as many as rows, unless they are packed, each beginning at position 0."""
    starts, positions = given.get("cu_seq_lens_q"), given.get("position_ids")
    if isinstance(starts, Tensor):
        return starts.numel() - 1
    if not isinstance(positions, Tensor) or positions.dim() != 2 or given.get("attention_mask") is not None:
        return rows
    return (positions == 0).sum().clamp(min=rows)  # where it is: nothing waits for a GPU


def _refuse_nan(tensors: list[Tensor]) -> None:
    for tensor in tensors:
        if not tensor.is_floating_point() or tensor.device.type != "cpu" or not torch.isnan(tensor.detach().sum()):
            continue
        if torch.isnan(tensor).any():  # the sum of infinite or huge values is none either
            raise NotFiniteError("an input of the model contains NaN: a crossbar cannot be driven with it")
