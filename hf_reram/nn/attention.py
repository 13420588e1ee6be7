"""``nn.MultiheadAttention``: the products of query, key and value and of the output are crossbars of their own."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import logging

from .parts import Holder, register_holder
from .places import Part

logger = logging.get_logger(__name__)

NAMES = ("query", "key", "value")


@register_holder
class CrossbarAttention(Holder):
    """``nn.MultiheadAttention``, whose projections are called: ``in_proj_query``, ``in_proj_key`` and
    ``in_proj_value``, each with its own input, and ``out_proj``, without adapters on it. Scores, softmax and their
    product with the values are digital."""

    embed_dim: int
    num_heads: int
    dropout: float
    batch_first: bool
    add_zero_attn: bool
    bias_k: Any
    bias_v: Any
    in_proj_weight: Any
    in_proj_bias: Any
    out_proj: Any
    in_proj_query: Any
    in_proj_key: Any
    in_proj_value: Any

    @classmethod
    def stands_for(cls, module: nn.Module) -> bool:
        """Also of a subclass with the same forward."""
        return isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward

    @classmethod
    def names_of_parts(cls, module: nn.Module) -> list[str]:
        """Not the names of layers that adapters are put beside."""
        return [f"in_proj_{name}" for name in NAMES]

    def make_parts(self) -> dict[str, nn.Module]:
        """Rows of ``in_proj_weight``, or the weights that keys and values of other sizes have."""
        size, bias = self.embed_dim, None if self.in_proj_bias is None else "in_proj_bias"
        rows = [slice(i * size, (i + 1) * size) for i in range(len(NAMES))]
        if self.in_proj_weight is not None:
            found = [Part(self, "in_proj_weight", own, bias) for own in rows]
        else:
            found = [
                Part(self, f"{name[0]}_proj_weight", slice(None), bias, bias_index=own)
                for name, own in zip(NAMES, rows)
            ]
        return dict(zip(self.names_of_parts(self), found))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See :class:`torch.nn.MultiheadAttention`; no nested tensors."""
        if query.is_nested or key.is_nested or value.is_nested:
            raise ValueError("nn.MultiheadAttention on crossbars: allowed are no nested tensors")
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal=True of nn.MultiheadAttention needs attn_mask too")
        batched = query.dim() == 3
        turned: dict[int, Tensor] = {}  # of tensors that are the same, one: its signal is computed once

        def batch_first(x: Tensor) -> Tensor:
            if batched and self.batch_first:
                return x
            return turned.setdefault(id(x), x.transpose(0, 1) if batched else x[None])

        x, y, z = batch_first(query), batch_first(key), batch_first(value)
        q, k, v = self.in_proj_query(x), self.in_proj_key(y), self.in_proj_value(z)
        mask = _float_mask(attn_mask, q.dtype)
        if mask is not None and mask.dim() == 3:
            mask = mask.view(-1, self.num_heads, *mask.shape[1:])
        padding = _float_mask(key_padding_mask, q.dtype)
        if padding is not None:
            padding = padding.view(len(q) if batched else 1, 1, 1, -1)
        added = 0
        if self.bias_k is not None:
            k = torch.cat((k, self.bias_k.expand(len(k), -1, -1)), 1)
            v = torch.cat((v, self.bias_v.expand(len(v), -1, -1)), 1)
            added += 1
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
            added += 1
        mask, padding = (None if m is None else F.pad(m, (0, added)) for m in (mask, padding))
        both = mask if padding is None else padding if mask is None else mask + padding
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
            weights = F.dropout((scores if both is None else scores + both).softmax(-1), dropout)
            heads = weights @ v
        else:
            heads = F.scaled_dot_product_attention(q, k, v, both, dropout)
        out = _below_adapters(self.out_proj)(heads.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights


def _below_adapters(layer: Any) -> Any:
    """The layer whose weight PyTorch's attention reads, without running the adapters that PEFT has put on it: they are
    in no digital model, so that they must not be beside a crossbar."""
    if "base_layer" in layer._modules and not getattr(layer, "merged", False) and not torch.compiler.is_compiling():
        logger.warning_once(
            "the adapters on the out_proj of an nn.MultiheadAttention do not run, as in PyTorch, which reads that "
            "layer's weight: they are not trained, and merging those that are not zero changes the model; leave the "
            "layer out of the adapters, as hf_reram.adapter_target_modules does"
        )
    while "base_layer" in layer._modules:
        layer = layer.base_layer
    return layer


def _float_mask(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask that is added to scores: -inf where a boolean one is True."""
    if mask is None or mask.is_floating_point():
        return mask if mask is None else mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -torch.inf)
