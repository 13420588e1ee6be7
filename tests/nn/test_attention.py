"""``nn.MultiheadAttention`` on crossbars."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn
from transformers.utils import logging

from hf_reram import (
    ReRAMConfig,
    add_retention_loss,
    calibrate,
    crossbar_layers,
    deploy,
    digital,
    evaluate_robustness,
    patch_model,
    sampled_drift,
    unpatch_model,
)
from hf_reram.model.find import reset_calls, uncalled
from tests.samples.devices import device, straight

PARTS = ["in_proj_query", "in_proj_key", "in_proj_value", "out_proj"]


def attention(**options) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(16, 4, **options)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def inputs(model: nn.MultiheadAttention, batched: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three tensors, of 5 queries and 7 keys in 3 examples."""
    shapes = [(3, 5, 16), (3, 7, model.kdim), (3, 7, model.vdim)]
    found = [torch.randn(shape) for shape in shapes]
    if not batched:
        return tuple(x[0] for x in found)
    return tuple(x if model.batch_first else x.transpose(0, 1) for x in found)


OPTIONS = [
    {"batch_first": True},
    {"batch_first": False},
    {"batch_first": True, "bias": False},
    {"batch_first": True, "kdim": 8, "vdim": 12},
    {"batch_first": False, "add_bias_kv": True, "add_zero_attn": True},
]
CAUSAL = torch.ones(5, 7, dtype=torch.bool).triu(3)
MASKS = {
    "none": {},
    "padding": {"key_padding_mask": torch.arange(7) >= torch.tensor([[7], [4], [6]])},
    "boolean": {"attn_mask": CAUSAL},
    "floats": {"attn_mask": torch.linspace(-1, 1, 35).view(5, 7)},
    "by head": {"attn_mask": torch.linspace(-1, 1, 12 * 35).view(12, 5, 7)},
    "both": {"attn_mask": CAUSAL, "key_padding_mask": torch.arange(7) >= torch.tensor([[7], [4], [6]])},
}


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_computes_as_pytorch_does(options, masks):
    model = attention(**options)
    keys, given = list(model.state_dict()), inputs(model)
    ways = [{"need_weights": n, "average_attn_weights": a} for n, a in itertools.product((True, False), repeat=2)]
    with torch.no_grad():
        expected = [model(*given, **MASKS[masks], **way) for way in ways]
        patch_model(model, straight())
        assert list(crossbar_layers(model)) == ["out_proj", *PARTS[:3]]
        for way, (out, weights) in zip(ways, expected):
            for found, own in (
                (model(*given, **MASKS[masks], **way), 1e-4),
                (_digitally(model, given, {**MASKS[masks], **way}), 1e-5),
            ):
                torch.testing.assert_close(found[0], out, rtol=own, atol=own)
                assert (found[1] is None) == (weights is None)
                if weights is not None:
                    torch.testing.assert_close(found[1], weights, rtol=own, atol=own)
        unpatch_model(model)
        assert list(model.state_dict()) == keys
        assert torch.equal(model(*given, **MASKS[masks])[0], expected[0][0])


def _digitally(model, given, options):
    with digital(model):
        return model(*given, **options)


@pytest.mark.parametrize("masks", [{}, {"attn_mask": CAUSAL}, {"key_padding_mask": torch.arange(7) > 4}])
def test_of_one_example_without_a_batch(masks):
    model = attention(batch_first=True)
    given = inputs(model, batched=False)
    with torch.no_grad():
        expected = model(*given, **masks)
        patch_model(model, straight())
        for found, own in zip(model(*given, **masks), expected):
            torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-4)


def test_the_hint_of_a_causal_mask():
    model, x = attention(batch_first=True), torch.randn(2, 6, 16)
    mask = nn.Transformer.generate_square_subsequent_mask(6)
    with torch.no_grad():
        expected = model(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]
        patch_model(model, straight())
        found = model(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        with pytest.raises(RuntimeError, match=r"is_causal=True .* needs attn_mask"):
            model(x, x, x, is_causal=True)


def test_gradients_are_pytorchs():
    model = attention(batch_first=True)
    twin, given = copy.deepcopy(model).train(), inputs(model)
    twin(*given)[0].square().sum().backward()
    patch_model(model, straight())
    model.train()(*given)[0].square().sum().backward()
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-4)


def test_each_projection_is_calibrated_on_its_own_input():
    model = attention(batch_first=True)
    given = [x * scale for x, scale in zip(inputs(model), (1, 10, 100))]
    patch_model(model, ReRAMConfig(device=device(), input_percentile=100.0, center_inputs=False, range_shrink=1.0))
    calibrate(model, [tuple(given)])
    for name, x in zip(PARTS, given):
        assert float(model.get_submodule(name).input_range) == pytest.approx(float(x.abs().max()), rel=1e-5)


@pytest.mark.parametrize("make", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_it_is_trained_and_deployed_as_others_are(make):
    model = make(
        patch_model(attention(batch_first=True), ReRAMConfig(device="cmo-hfox-ibm", retention_loss="output+drift"))
    )
    given = inputs(model)
    calibrate(model, [given])
    model.train()
    with sampled_drift(model):
        out = model(*given)[0]
    total, term = add_retention_loss(out.square().mean(), model)
    total.backward()
    assert term > 0 and all(torch.isfinite(p.grad).all() and p.grad.any() for p in model.parameters())
    model.eval()
    reset_calls(model)
    with torch.no_grad(), deploy(model, "10y", seed=1):
        aged = model(*given)[0]
        parts = [model.get_submodule(name).chip.weight for name in PARTS]
    assert not uncalled(model) and not torch.equal(aged, model(*given)[0])
    with torch.no_grad():  # the same with the chip's weights, digitally
        twin = unpatch_model(copy.deepcopy(model))
        twin.in_proj_weight.copy_(torch.cat(parts[:3]))
        twin.out_proj.weight.copy_(parts[3])
        expected = twin(*given)[0]
    assert float((aged - expected).norm() / expected.norm()) < 0.1  # read noise and the curve


def test_in_pytorchs_encoder_and_decoder_layers():
    for layer in (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer):
        torch.manual_seed(0)
        model = layer(16, 2, 32, dropout=0.0, batch_first=True).eval()
        given = (torch.randn(2, 5, 16),) * (1 if layer is nn.TransformerEncoderLayer else 2)
        with torch.no_grad():
            expected = model(*given)
            patch_model(model, straight())
            reset_calls(model)
            torch.testing.assert_close(model(*given), expected, rtol=1e-4, atol=1e-4)
        assert not uncalled(model) and len(crossbar_layers(model)) == 2 + 4 * len(given)


def test_nested_tensors_are_refused():
    model = patch_model(attention(batch_first=True), straight())
    x = torch.nested.nested_tensor([torch.randn(3, 16), torch.randn(2, 16)])
    with pytest.raises(ValueError, match="no nested tensors"):
        model.forward(x, x, x)  # of a part of a model


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.last = attention(batch_first=True), nn.Linear(16, 3)

    def forward(self, x):
        return self.last(self.attention(x, x, x)[0])


def test_under_adapters_it_stays_digital_or_is_no_chip():
    peft = pytest.importorskip("peft")
    adapters, config = peft.LoraConfig(target_modules=["attention"]), ReRAMConfig(device=device(read_noise=0.0))
    before, x = patch_model(peft.get_peft_model(Reader(), adapters), config), torch.randn(2, 5, 16)
    assert list(crossbar_layers(before)) == ["last"]
    model = calibrate(patch_model(Reader(), config), [x])
    after = peft.get_peft_model(model, adapters).eval()
    with pytest.raises(RuntimeError, match=r"'attention\.in_proj_query' has changed since"), deploy(after, "1d"):
        after(x)


@pytest.mark.parametrize("first", ["adapters", "crossbars"])
def test_adapters_on_out_proj_do_not_run_as_in_pytorch(first, caplog):
    """In the digital model, on crossbars, in the report, and trained or not."""
    peft = pytest.importorskip("peft")
    adapters, x = peft.LoraConfig(target_modules=["out_proj", "last"], init_lora_weights=False), torch.randn(3, 5, 16)
    plain = peft.get_peft_model(Reader(), adapters).eval()
    if first == "adapters":
        model = patch_model(copy.deepcopy(plain), straight())
    else:
        model = peft.get_peft_model(patch_model(Reader(), straight()), adapters).eval()
        model.load_state_dict(plain.state_dict(), strict=False)
    assert list(crossbar_layers(model)) == ["attention.out_proj", *(f"attention.{n}" for n in PARTS[:3]), "last"]
    logging.warning_once.cache_clear()
    for trained in (False, True):
        if trained:
            parameters = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.SGD(parameters, lr=0.1)
            for _ in range(2):
                optimizer.zero_grad()
                model.train()(x).square().mean().backward()
                optimizer.step()
            without = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
            assert {name.split(".lora_")[0] for name in without} == {"base_model.model.attention.out_proj"}
            plain.load_state_dict(model.eval().state_dict(), strict=False)
        with torch.no_grad():
            expected = plain(x)
            with caplog.at_level("WARNING", "hf_reram"), digital(model):
                torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-3)
        report = evaluate_robustness(model, lambda m: {"mean": float(m(x).abs().mean())}, ["1d"], seeds=1)
        assert report.digital["mean"] == pytest.approx(float(expected.abs().mean()), rel=1e-5)
    assert caplog.text.count("the adapters on the out_proj of an nn.MultiheadAttention do not run, as in PyTorch") == 1
    model.merge_adapter(), plain.merge_adapter()
    with torch.no_grad(), digital(model):
        torch.testing.assert_close(model(x), plain(x), rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    with torch.no_grad():
        torch.testing.assert_close(unpatch_model(model)(x), expected, rtol=1e-5, atol=1e-5)
