"""Which layers adapters can stand beside."""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_reram import ReRAMConfig, adapter_target_modules, calibrate, crossbar_layers, deploy, digital, patch_model
from tests.samples.experts import mixtral, tokens
from tests.samples.zoo import DECODER

CONFIG = ReRAMConfig(input_range="per_token")
ATTENTION = [f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"]


def deepseek() -> nn.Module:
    """A first layer without experts, and one with a shared expert, whose matrices are named as those of experts."""
    shape = {**DECODER, "num_hidden_layers": 2, "first_k_dense_replace": 1, "moe_intermediate_size": 16}
    routed = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
    heads = {"q_lora_rank": None, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    return transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**shape, **routed, **heads)).eval()


def siglip() -> nn.Module:
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.SiglipVisionConfig(**shape, image_size=16, patch_size=8)
    return transformers.SiglipVisionModel(config).eval()


def test_those_of_most_models_are_all_that_peft_means(tiny_bert):
    with pytest.raises(ValueError, match="has no crossbar layers: call patch_model"):
        adapter_target_modules(tiny_bert)
    assert adapter_target_modules(patch_model(tiny_bert, ReRAMConfig())) == "all-linear"


@pytest.mark.parametrize("make", [mixtral, deepseek])
def test_a_mixture_is_adapted_beside_its_experts(make):
    torch.manual_seed(0)
    model, batch = make(), {"input_ids": tokens()}
    patch_model(model, CONFIG)
    calibrate(model, [batch])
    names, targets = list(crossbar_layers(model)), adapter_target_modules(model)
    if make is mixtral:
        assert targets == ATTENTION
    else:
        last = ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
        assert targets == [f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in last]
        assert any("shared_experts.down_proj" in name for name in names)
    model = get_peft_model(model, LoraConfig(target_modules=targets))
    assert list(crossbar_layers(model)) == names and not model.peft_config["default"].target_parameters
    with torch.no_grad(), digital(model):
        before = model(**batch).logits
    model.train()(**batch, labels=batch["input_ids"]).loss.backward()
    adapters = {name: p for name, p in model.named_parameters() if "lora_B" in name}
    assert len(adapters) == len(targets) and all(p.grad.any() for p in adapters.values())
    torch.optim.SGD(adapters.values(), lr=1.0).step()
    model.eval()
    with torch.no_grad(), digital(model):
        expected = model(**batch).logits
    assert float((expected - before).norm() / before.norm()) > 1e-3
    merged = model.merge_and_unload()
    with torch.no_grad():
        with digital(merged):
            torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-4, atol=1e-5)
        with deploy(merged, "1d"):
            assert torch.isfinite(merged(**batch).logits).all()


def test_what_peft_adds_by_itself_is_refused_with_what_to_give_it_instead():
    model, ids = patch_model(mixtral(), CONFIG), tokens()
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    with pytest.raises(RuntimeError, match=r"adds these by itself .* 'all-linear'.*adapter_target_modules\(model\)"):
        adapted(ids)


def test_the_out_proj_of_pytorchs_attention_is_left_out():
    """Every adapter that is there is trained."""
    model, pixels = siglip(), torch.randn(3, 3, 16, 16)
    patch_model(model, ReRAMConfig())
    targets = adapter_target_modules(model)
    layers = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert set(targets) == layers - {"head.attention.out_proj"} and "encoder.layers.0.self_attn.out_proj" in targets
    calibrate(model, [{"pixel_values": pixels}])
    model = get_peft_model(model, LoraConfig(target_modules=targets)).train()
    model(pixel_values=pixels).pooler_output.square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for name, p in model.named_parameters() if "lora_B" in name)


def test_a_model_of_nothing_else_has_none():
    with pytest.raises(ValueError, match="MultiheadAttention has no linear layers that adapters can stand beside"):
        adapter_target_modules(patch_model(nn.MultiheadAttention(16, 2), ReRAMConfig()))
