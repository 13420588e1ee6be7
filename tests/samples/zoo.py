"""One tiny model of each of many architectures of transformers, with random weights, and a batch for it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

TEXT = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}
DECODER = {**TEXT, "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IMAGE = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
ENCODER_DECODER = {
    "vocab_size": 60,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
SPEECH = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "conv_dim": (8, 8),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "mask_time_prob": 0.0,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Entry:
    """An architecture.

    Attributes:
        kind: in the documentation's table. model: class in transformers. config: of it, with ``shape``.
        batch: makes model inputs.
        digital: classes of modules that stay digital although they multiply by weights.
    """

    kind: str
    model: str
    config: str
    shape: dict[str, Any] = field(hash=False)
    batch: Callable[[], dict[str, Any]]
    digital: tuple[str, ...] = ()

    def build(self) -> Any:
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**self.shape)
        return getattr(transformers, self.model)(config).eval()


def tokens(words: int = 60, length: int = 8) -> torch.Tensor:
    return torch.randint(3, words, (2, length), generator=torch.Generator().manual_seed(1))


def text() -> dict[str, Any]:
    ids = tokens()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def classified() -> dict[str, Any]:
    return {**text(), "labels": torch.tensor([0, 1])}


def continued() -> dict[str, Any]:
    return {**text(), "labels": tokens()}


def translated() -> dict[str, Any]:
    return {**text(), "labels": tokens(length=5)}


def image(size: int = 32, labels: bool = True) -> dict[str, Any]:
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    return {"pixel_values": pixels, **({"labels": torch.tensor([0, 1])} if labels else {})}


def pictures(labels: bool = False, size: int = 32) -> Callable[[], dict[str, Any]]:
    return lambda: image(size, labels)


def segmented() -> dict[str, Any]:
    return {**image(labels=False), "labels": torch.randint(2, (2, 32, 32))}


def wave(**more: Any) -> dict[str, Any]:
    sound = torch.randn(2, 800, generator=torch.Generator().manual_seed(1))
    return {"input_values": sound, "labels": torch.tensor([[5, 6], [7, 8]]), **more}


def spectrum() -> dict[str, Any]:
    features = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(1))
    return {"input_features": features, "labels": tokens(length=5)}


def captioned() -> dict[str, Any]:
    return {**text(), **image(labels=False), "return_loss": True}


def asked() -> dict[str, Any]:
    return {**text(), **image(labels=False), "labels": torch.eye(2)}


def described() -> dict[str, Any]:
    ids = tokens()
    ids[:, :16] = 3
    ids = torch.cat([torch.full((2, 16), 59), ids[:, :4].clamp(max=58)], 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **image(labels=False), "labels": ids}


CLIP_TEXT = {**TEXT, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
LLAVA = {
    "vision_config": transformers.CLIPVisionConfig(**IMAGE, projection_dim=16),
    "text_config": transformers.LlamaConfig(**DECODER),
    "image_token_index": 59,
    "vision_feature_select_strategy": "default",
    "vision_feature_layer": -1,
}

ZOO = {
    # Text encoders
    "bert": Entry("text", "BertForSequenceClassification", "BertConfig", TEXT, classified),
    "roberta": Entry("text", "RobertaForSequenceClassification", "RobertaConfig", TEXT, classified),
    "electra": Entry(
        "text", "ElectraForSequenceClassification", "ElectraConfig", {**TEXT, "embedding_size": 16}, classified
    ),
    "albert": Entry(
        "text", "AlbertForSequenceClassification", "AlbertConfig", {**TEXT, "embedding_size": 8}, classified
    ),
    "distilbert": Entry(
        "text",
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"vocab_size": 60, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 32},
        classified,
    ),
    "deberta-v2": Entry(
        "text",
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
        classified,
    ),
    "mpnet": Entry("text", "MPNetForSequenceClassification", "MPNetConfig", TEXT, classified),
    "modernbert": Entry(
        "text",
        "ModernBertForSequenceClassification",
        "ModernBertConfig",
        {**TEXT, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
        classified,
    ),
    "xlm-roberta": Entry("text", "XLMRobertaForMaskedLM", "XLMRobertaConfig", TEXT, continued),
    "funnel": Entry(
        "text",
        "FunnelForSequenceClassification",
        "FunnelConfig",
        {"vocab_size": 60, "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 32, "block_sizes": [1, 1]},
        classified,
        ("FunnelRelMultiheadAttention",),
    ),
    # Causal language models
    "gpt2": Entry(
        "causal",
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 60, "n_embd": 16, "n_layer": 2, "n_head": 2},
        continued,
    ),
    "llama": Entry("causal", "LlamaForCausalLM", "LlamaConfig", DECODER, continued),
    "qwen2": Entry("causal", "Qwen2ForCausalLM", "Qwen2Config", DECODER, continued),
    "qwen3": Entry("causal", "Qwen3ForCausalLM", "Qwen3Config", {**DECODER, "head_dim": 8}, continued),
    "mistral": Entry("causal", "MistralForCausalLM", "MistralConfig", DECODER, continued),
    "gemma2": Entry("causal", "Gemma2ForCausalLM", "Gemma2Config", {**DECODER, "head_dim": 8}, continued),
    "phi3": Entry("causal", "Phi3ForCausalLM", "Phi3Config", DECODER, continued),
    "opt": Entry(
        "causal",
        "OPTForCausalLM",
        "OPTConfig",
        {**DECODER, "ffn_dim": 32, "word_embed_proj_dim": 16},
        continued,
    ),
    "gpt-neox": Entry("causal", "GPTNeoXForCausalLM", "GPTNeoXConfig", TEXT, continued),
    "bloom": Entry(
        "causal",
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": 60, "n_layer": 2, "n_head": 2, "hidden_size": 16},
        continued,
    ),
    "falcon": Entry("causal", "FalconForCausalLM", "FalconConfig", DECODER, continued),
    "mamba": Entry(
        "causal",
        "MambaForCausalLM",
        "MambaConfig",
        {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
        continued,
        ("Conv1d", "Linear"),
    ),
    "mixtral": Entry(
        "causal",
        "MixtralForCausalLM",
        "MixtralConfig",
        {**DECODER, "num_local_experts": 2, "num_experts_per_tok": 1},
        continued,
    ),
    "qwen3-moe": Entry(
        "causal",
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**DECODER, "head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16},
        continued,
    ),
    # Encoder-decoders
    "t5": Entry(
        "encoder-decoder",
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": 60,
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 32,
            "num_layers": 1,
            "num_heads": 2,
            "decoder_start_token_id": 0,
        },
        translated,
    ),
    "bart": Entry("encoder-decoder", "BartForConditionalGeneration", "BartConfig", ENCODER_DECODER, translated),
    "marian": Entry("encoder-decoder", "MarianMTModel", "MarianConfig", ENCODER_DECODER, translated),
    "pegasus": Entry(
        "encoder-decoder", "PegasusForConditionalGeneration", "PegasusConfig", ENCODER_DECODER, translated
    ),
    # Vision
    "vit": Entry("vision", "ViTForImageClassification", "ViTConfig", IMAGE, image),
    "deit": Entry("vision", "DeiTForImageClassification", "DeiTConfig", IMAGE, image),
    "beit": Entry("vision", "BeitForImageClassification", "BeitConfig", IMAGE, image),
    "dinov2": Entry("vision", "Dinov2ForImageClassification", "Dinov2Config", IMAGE, image),
    "swin": Entry(
        "vision",
        "SwinForImageClassification",
        "SwinConfig",
        {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4},
        image,
    ),
    "convnext": Entry(
        "vision",
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
        image,
    ),
    "resnet": Entry(
        "vision",
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
        image,
    ),
    "regnet": Entry(
        "vision",
        "RegNetForImageClassification",
        "RegNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 8},
        image,
    ),
    "mobilenet-v2": Entry(
        "vision",
        "MobileNetV2ForImageClassification",
        "MobileNetV2Config",
        {"depth_multiplier": 0.25, "image_size": 32},
        image,
    ),
    "mobilevit": Entry(
        "vision",
        "MobileViTForImageClassification",
        "MobileViTConfig",
        {
            "image_size": 32,
            "hidden_sizes": [16, 16, 16],
            "neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 16],
            "num_attention_heads": 2,
        },
        pictures(True, 64),
    ),
    "efficientnet": Entry(
        "vision",
        "EfficientNetForImageClassification",
        "EfficientNetConfig",
        {"width_coefficient": 0.25, "depth_coefficient": 0.3, "image_size": 32, "hidden_dim": 320},
        image,
    ),
    "segformer": Entry(
        "vision",
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [8, 16],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "num_attention_heads": [1, 2],
            "mlp_ratios": [2, 2],
            "decoder_hidden_size": 16,
        },
        segmented,
    ),
    "yolos": Entry(
        "vision",
        "YolosForObjectDetection",
        "YolosConfig",
        {**IMAGE, "image_size": [32, 32], "num_detection_tokens": 4},
        pictures(),
    ),
    # Audio
    "wav2vec2": Entry("audio", "Wav2Vec2ForCTC", "Wav2Vec2Config", SPEECH, wave, ("ParametrizedConv1d",)),
    "hubert": Entry("audio", "HubertForCTC", "HubertConfig", SPEECH, wave, ("ParametrizedConv1d",)),
    "whisper": Entry(
        "audio",
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {**ENCODER_DECODER, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 32},
        spectrum,
    ),
    "audio-spectrogram-transformer": Entry(
        "audio",
        "ASTForAudioClassification",
        "ASTConfig",
        {**IMAGE, "max_length": 32, "num_mel_bins": 16, "time_stride": 8, "frequency_stride": 8},
        lambda: {"input_values": torch.randn(2, 32, 16), "labels": torch.tensor([0, 1])},
    ),
    # Several kinds of input
    "clip": Entry(
        "multimodal",
        "CLIPModel",
        "CLIPConfig",
        {
            "text_config": transformers.CLIPTextConfig(**CLIP_TEXT, projection_dim=16),
            "vision_config": transformers.CLIPVisionConfig(**IMAGE, projection_dim=16),
            "projection_dim": 16,
        },
        captioned,
    ),
    "siglip": Entry(
        "multimodal",
        "SiglipModel",
        "SiglipConfig",
        {
            "text_config": transformers.SiglipTextConfig(**CLIP_TEXT, projection_size=16),
            "vision_config": transformers.SiglipVisionConfig(**IMAGE),
        },
        captioned,
    ),
    "vilt": Entry("multimodal", "ViltForQuestionAnswering", "ViltConfig", {**TEXT, **IMAGE}, asked),
    "blip": Entry(
        "multimodal",
        "BlipForConditionalGeneration",
        "BlipConfig",
        {
            "text_config": transformers.BlipTextConfig(
                **CLIP_TEXT, encoder_hidden_size=16, projection_dim=16
            ).to_dict(),
            "vision_config": transformers.BlipVisionConfig(**IMAGE).to_dict(),
            "projection_dim": 16,
        },
        lambda: {**continued(), **image(labels=False)},
    ),
    "llava": Entry("multimodal", "LlavaForConditionalGeneration", "LlavaConfig", LLAVA, described),
}

# Architectures of timm, and what makes them smaller.
TIMM: dict[str, dict[str, Any]] = {
    "resnet18": {"channels": [16, 16, 32, 32]},
    "mobilenetv3_small_100": {},
    "mobilenetv3_large_100": {},
    "efficientnet_lite0": {},
    "convnext_atto": {"depths": [1, 1, 2, 1], "dims": [16, 16, 32, 32]},
    "regnetx_002": {},
}


def table() -> str:
    """The documentation's table, in Markdown."""
    lines = ["| | patched, trained with retention loss, saved, loaded, unpatched bit for bit |", "| --- | --- |"]
    for kind in dict.fromkeys(entry.kind for entry in ZOO.values()):
        names = [
            name + (f" ({', '.join(entry.digital)} stay digital)" if entry.digital else "")
            for name, entry in ZOO.items()
            if entry.kind == kind
        ]
        lines.append(f"| {kind} | {', '.join(names)} |")
    lines.append(f"| timm | {', '.join(TIMM)} |")
    return "\n".join(lines)
