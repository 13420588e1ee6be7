"""A tiny mixture of experts, and what it computes written out for one layer."""

import torch
import transformers
from torch import nn

from .zoo import DECODER, ZOO, tokens

__all__ = ["ZOO", "expert_inputs", "experts_of", "mixtral", "tokens"]


def mixtral(experts: int = 4, chosen: int = 2, layers: int = 1, **more) -> nn.Module:
    """With weights large enough that the experts differ."""
    torch.manual_seed(0)
    shape = {**DECODER, "num_local_experts": experts, "num_experts_per_tok": chosen, "num_hidden_layers": layers}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**{**shape, **more})).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model


def experts_of(model: nn.Module, layer: int = 0) -> nn.Module:
    return model.model.layers[layer].mlp.experts


@torch.no_grad()
def expert_inputs(model: nn.Module, batch: dict) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Of each expert of the first layer of a digital model: the indices of its tokens, and what its two matrices meet,
    in the order of the tokens."""
    caught: list = []
    hook = experts_of(model).register_forward_pre_hook(lambda module, args: caught.append(args))
    model(**batch)
    hook.remove()
    states, index, _ = caught[0]
    module, found = experts_of(model), []
    for number in range(module.num_experts):
        rows = (index == number).any(1).nonzero().flatten()
        gate, up = (states[rows] @ module.gate_up_proj[number].T).chunk(2, -1)
        found.append((rows, states[rows], nn.functional.silu(gate) * up))
    return found
