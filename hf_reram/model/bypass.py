"""Layers that something bypasses: a crossbar in their place would never run, and the model compute digitally unnoticed.

A parent may read a layer's weight and multiply by it itself, a layer's ``forward`` may be replaced on the instance, and
a weight may be computed from other tensors. Where a parent can be told to call its layers it is told so
(:func:`call_layers`), where a hook has kept a layer's method it gets the new one (:func:`renew_methods`); what is left
stays digital, each layer for a reason (:func:`left_digital`).
"""

import inspect
import re
from functools import cache
from types import FunctionType, MethodType
from typing import Any

from torch import nn

from ..nn import CrossbarLayer
from ..nn.parts import Holder, holder_class
from ..nn.places import place
from ..nn.registry import is_kind, is_registered
from .find import unwrapped, walk
from .hooks import CALLS_KEPT_FORWARD, IS_DISPATCHED

# By the parent's class, as subclasses inherit it; a name, so that the package need not be there. No list of this kind
# is complete, which is why a crossbar counts its calls.

# The attribute, and its value under which the parent calls its layers.
SWITCHES: dict[str, tuple[str, Any]] = {
    # The fast path in evaluation, one kernel for the whole layer, and nested tensors, which only the fast path takes.
    "torch.nn.modules.transformer.TransformerEncoderLayer": ("activation_relu_or_gelu", 0),
    "torch.nn.modules.transformer.TransformerEncoder": ("use_nested_tensor", False),
    # Whether the biases of query, key and value are added after the product.
    "timm.models.beit.Attention": ("qkv_bias_separate", True),
    "timm.models.eva.EvaAttention": ("qkv_bias_separate", True),
    "timm.models.swin_transformer_v2.WindowAttention": ("qkv_bias_separate", True),
    # Products slice by slice, as the pretraining's tensor parallelism rounded them.
    "transformers.models.bloom.modeling_bloom.BloomAttention": ("slow_but_exact", False),
    "transformers.models.bloom.modeling_bloom.BloomMLP": ("slow_but_exact", False),
}

POSITIONS = ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias")

# The layers whose weight the parent reads, with no way to have it call them.
READ_PAST: dict[str, tuple[str, ...]] = {
    "torch.nn.modules.activation.MultiheadAttention": ("out_proj",),
    "torch.nn.modules.loss.LinearCrossEntropyLoss": ("linear",),
    "transformers.models.mamba.modeling_mamba.MambaMixer": ("dt_proj",),
    "transformers.models.falcon_mamba.modeling_falcon_mamba.FalconMambaMixer": ("dt_proj",),
    "transformers.models.jamba.modeling_jamba.JambaMambaMixer": ("dt_proj",),
    "transformers.models.wavlm.modeling_wavlm.WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "transformers.models.wavlm.modeling_wavlm.TDNNLayer": ("kernel",),
    "transformers.models.data2vec.modeling_data2vec_audio.TDNNLayer": ("kernel",),
    "transformers.models.unispeech_sat.modeling_unispeech_sat.TDNNLayer": ("kernel",),
    "transformers.models.wav2vec2.modeling_wav2vec2.TDNNLayer": ("kernel",),
    "transformers.models.wav2vec2_bert.modeling_wav2vec2_bert.TDNNLayer": ("kernel",),
    "transformers.models.wav2vec2_conformer.modeling_wav2vec2_conformer.TDNNLayer": ("kernel",),
    "transformers.models.mobilebert.modeling_mobilebert.MobileBertLMPredictionHead": ("dense", "decoder"),
    "transformers.models.layoutlmv2.modeling_layoutlmv2.LayoutLMv2Encoder": POSITIONS,
    "transformers.models.layoutlmv3.modeling_layoutlmv3.LayoutLMv3Encoder": POSITIONS,
    "transformers.models.pp_doclayout_v2.modeling_pp_doclayout_v2.PPDocLayoutV2ReadingOrderEncoder": POSITIONS[:1],
    "transformers.models.longcat_flash.modeling_longcat_flash.LongcatFlashTopkRouter": ("classifier",),
    "transformers.models.neomme.modeling_neomme.NeoMMEForMaskedLM": ("unembedding_projection",),
    "transformers.models.detr.modeling_detr.DetrMHAttentionMap": ("k_proj",),
    "transformers.models.conditional_detr.modeling_conditional_detr.ConditionalDetrMHAttentionMap": ("k_proj",),
    "transformers.models.dab_detr.modeling_dab_detr.DabDetrMHAttentionMap": ("k_linear",),
    "transformers.models.maskformer.modeling_maskformer.MaskFormerDetrMHAttentionMap": ("k_proj",),
    "transformers.models.reformer.modeling_reformer.LSHSelfAttention": ("query_key", "value"),  # with a cache
    "torchvision.models.swin_transformer.ShiftedWindowAttention": ("qkv", "proj"),
    "torchvision.models.video.swin_transformer.ShiftedWindowAttention3d": ("qkv", "proj"),
    # Adapters that add to the weight, not to the output.
    "peft.tuners.lora.layer.ParamWrapper": ("base_layer",),
    "peft.tuners.lora.layer.MultiheadAttention": ("base_layer",),
    "peft.tuners.frod.layer.Linear": ("base_layer",),
    "peft.tuners.hra.layer.HRALinear": ("base_layer",),
    "peft.tuners.hra.layer.HRAConv2d": ("base_layer",),
    "peft.tuners.shira.layer.Linear": ("base_layer",),
    "peft.tuners.supertuning.layer.Linear": ("base_layer",),
}

# Layers that the parent saves itself, and loads as digital ones.
SAVED_BARE: dict[str, tuple[str, ...]] = {
    "sentence_transformers.base.modules.dense.Dense": ("linear",),
    "sentence_transformers.sentence_transformer.modules.cnn.CNN": ("convs",),
}

SAVED = "{} saves them without the numbers of crossbars"
READ = "{} computes with their weight itself instead of calling them"
COMPUTED = "their weight or bias is computed from other tensors before each forward (weight norm, pruning, ...)"
OFFLOADED = "their weight is offloaded, accelerate brings it back for a forward only"
TAKEN = "they have attributes of their own whose names a crossbar layer needs: {}"
QUANTIZED = "their weights are quantized"
REPLACED = "their forward is replaced on the instance, by one that need not call the layer's own"


def left_digital(model: nn.Module) -> dict[str, str]:
    """The layers that could be on crossbars by their kind, but must not be, by qualified name, and for each the reason
    in words."""
    found: dict[str, str] = {}
    names = {module: name for name, module in walk(model)}
    offloads = any(is_dispatched(model) for is_dispatched in IS_DISPATCHED)
    for module, name in names.items():
        opens = isinstance(module, Holder)
        if (kind := holder_class(module)) is not None:
            if name not in found and (reason := _holder_reason(module, kind, offloads)):
                found[name] = reason
            opens = name not in found
        for table, words in ((READ_PAST, READ), (SAVED_BARE, SAVED)):
            for parent, children in () if opens else _known(module, table):
                for layer in (unwrapped(m) for child in children for m in _parts(getattr(module, child, None))):
                    if layer in names and (is_kind(layer) or holder_class(layer) is not None):
                        found[names[layer]] = words.format(parent.rpartition(".")[2])
        cls: Any = type(module)
        for child, layer in module.named_children():
            if isinstance(layer, nn.Conv1d) and is_kind(layer) and child in _read_in(cls):
                found[names[layer]] = READ.format(cls.__name__)
        if is_kind(module) and "base_layer" not in module._modules and (own := _own_reason(module, offloads)):
            found[name] = own
    return found


def _parts(child: Any) -> list[Any]:
    return list(child) if isinstance(child, nn.ModuleList) else [child]


# A weight that is computed with, not only asked for its dtype and the like.
_WEIGHT = re.compile(r"\bself\.(\w+)\.weight\b(?!\.(?:dtype|device|shape|ndim|dim\b|size\b|requires_grad))")


@cache
def _read_in(parent: type) -> frozenset[str]:
    """The children whose weight a class's own methods read, such as the causal convolutions of Mamba and of linear
    attention, whose kernels take it: there are too many of these to be listed, so their source is asked."""
    found: set[str] = set()
    for cls in parent.__mro__[: parent.__mro__.index(nn.Module)]:
        for name, method in vars(cls).items():
            if isinstance(method, FunctionType) and "init" not in name:
                try:
                    found.update(_WEIGHT.findall(inspect.getsource(inspect.unwrap(method))))
                except OSError:  # made without a file
                    continue
    return frozenset(found)


def _own_reason(module: Any, offloads: bool) -> str:
    """Why a layer itself cannot be on a crossbar; empty where it can."""
    for name in ("weight", "bias"):
        owner, key = place(module, name)
        if getattr(module, name, None) is not None and key not in {**owner._parameters, **owner._buffers}:
            return COMPUTED
    if offloads and module.weight.is_meta:
        return OFFLOADED
    if taken := sorted(names_of_crossbars() & _own_names(module)):
        return TAKEN.format(", ".join(taken))
    return _replaced_reason(module)


def _holder_reason(module: Any, kind: Any, offloads: bool) -> str:
    """Why a module that holds the weights of several layers cannot call them; empty where it can."""
    if "parametrizations" in module._modules:
        return COMPUTED
    if offloads and any(p.is_meta for p in module.parameters(recurse=False)):
        return OFFLOADED
    if not all(p.is_floating_point() for p in module.parameters(recurse=False)):
        return QUANTIZED
    if taken := [name for name in kind.names_of_parts(module) if hasattr(module, name)]:
        return TAKEN.format(", ".join(taken))
    return kind.why_not(module) or _replaced_reason(module)


def _replaced_reason(module: Any) -> str:
    forward = module.__dict__.get("forward")
    called = (forward, *(kept_forward(module, forward) for kept_forward in CALLS_KEPT_FORWARD))
    return "" if forward is None or any(_is_own(module, method) for method in called) else REPLACED


@cache
def names_of_crossbars() -> frozenset[str]:
    """What a crossbar layer has beside a digital one."""
    classes = CrossbarLayer.__mro__[: CrossbarLayer.__mro__.index(nn.Module)]
    names = {name for cls in classes for name in (*vars(cls), *cls.__annotations__)}
    return frozenset(name for name in names if not name.startswith("__") and not hasattr(nn.Module, name)) - {
        *("weight", "bias", "groups")
    }


def _own_names(module: nn.Module) -> set[str]:
    """What a layer has on itself, and its class beside what PyTorch's or another registered class has."""
    own = set(module.__dict__)
    for cls in type(module).__mro__:
        if is_registered(cls):
            break
        own |= set(vars(cls))
    return own


def _is_own(module: nn.Module, method: Any) -> bool:
    """Whether a bound method is the one that the module's class has as its forward."""
    return isinstance(method, MethodType) and method.__self__ is module and method.__func__ is type(module).forward


def renew_methods(module: nn.Module, old: type) -> None:
    """After a layer's class was swapped: let the forwards of the ``old`` class that are kept on the instance, as
    accelerate's hooks keep one, be those of its present class."""
    for name, value in module.__dict__.items():
        if isinstance(value, MethodType) and value.__self__ is module and value.__func__ is old.forward:  # type: ignore
            module.__dict__[name] = MethodType(type(module).forward, module)


def call_layers(model: nn.Module) -> None:
    """Have the parents of crossbars call them where they would read their weights; what they compute then may differ
    in rounding, and PyTorch's encoder no longer sets its output to 0 at padding, as it does not in training."""
    for module in model.modules():
        if "_switched" in module.__dict__ or not any(isinstance(m, CrossbarLayer) for m in module.modules()):
            continue
        for _, (name, value) in _known(module, SWITCHES):
            if hasattr(module, name):
                module._switched = {name: getattr(module, name)}  # type: ignore[assignment]
                setattr(module, name, value)


def read_layers(model: nn.Module) -> None:
    """Undo :func:`call_layers`."""
    for module in model.modules():
        for name, value in module.__dict__.pop("_switched", {}).items():
            setattr(module, name, value)


def _known(module: nn.Module, table: dict[str, Any]) -> list[tuple[str, Any]]:
    """The table's entries for the module's class or one that it inherits from."""
    names = [f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__]
    return [(name, table[name]) for name in names if name in table]
