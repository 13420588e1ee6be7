"""Mixtures of experts from patching to the report."""

import json

import pytest
import torch
import transformers

from hf_reram import (
    ReRAMConfig,
    calibrate,
    crossbar_layers,
    deploy,
    evaluate_robustness,
    inspect_layers,
    patch_model,
    summarize,
)
from hf_reram.hub.crossbars import put_on
from hf_reram.model.deploy import uncalibrated
from hf_reram.model.select import lies_as
from tests.samples.devices import device
from tests.samples.experts import expert_inputs, experts_of, mixtral, tokens

NAME = "model.layers.0.mlp.experts"


class Never(torch.nn.Module):
    """A router that leaves out the last expert."""

    def __init__(self, gate):
        super().__init__()
        self.gate = gate

    def forward(self, hidden_states):
        logits, weights, index = self.gate(hidden_states)
        return logits, weights, index % 3


def test_robustness_of_a_mixture(tmp_path):
    model, ids = mixtral(experts=3), tokens()
    patch_model(model, ReRAMConfig(device=device(read_noise=0.0), input_range="per_token"))
    calibrate(model, [ids])
    assert not uncalibrated(model)

    def loss(model):
        with torch.no_grad():
            return float(model(ids, labels=ids).loss)

    report = evaluate_robustness(model, loss, times=["1s", "1d"], seeds=2, progress=False)
    assert report.uncalled == [] and not any("not calibrated" in note for note in report.notes)
    values = {(m.time, m.seed): m.metrics["metric"] for m in report.measurements}
    with deploy(model, "1d", seed=1):
        assert loss(model) == values[86400.0, 1]
    assert len(set(values.values())) == 4
    layers = crossbar_layers(model)
    found = {layer.name: layer for layer in inspect_layers(model, "1d", batches=[ids])}
    assert found.keys() == layers.keys() and found[f"{NAME}.1.down"].rows == 32
    assert len({found[f"{NAME}.{n}.gate_up"].noise_to_signal for n in range(3)}) == 3
    summary = summarize(model)
    stacks = experts_of(model).gate_up_proj.numel() + experts_of(model).down_proj.numel()
    assert summary.weights - stacks == sum(m.weight.numel() for n, m in layers.items() if NAME not in n)
    assert summary.digital == ("model.embed_tokens (Embedding)", "model.layers.0.mlp.gate (MixtralTopKRouter)")


@pytest.mark.parametrize(
    ("input_range", "instead"),
    [
        ("static", "each batch spans an input range of its own"),
        ("per_token", "their gains and offsets are not set, and each batch spans an ADC's range of its own"),
    ],
)
def test_experts_that_no_token_reaches_are_named(input_range, instead, caplog):
    model, ids = mixtral(), tokens()
    model.model.layers[0].mlp.gate = Never(model.model.layers[0].mlp.gate)
    patch_model(model, ReRAMConfig(device=device(read_noise=0.0), input_range=input_range))
    with caplog.at_level("WARNING", "hf_reram"):
        calibrate(model, [ids])
    silent = [f"{NAME}.3.gate_up", f"{NAME}.3.down"]
    assert f"are not reached by calibration data, and stay as they were: {', '.join(silent)}" in caplog.text
    assert uncalibrated(model) == {instead: silent}

    def loss(model):
        with torch.no_grad():
            return float(model(ids, labels=ids).loss)

    with pytest.raises(RuntimeError, match=rf"2 of 13 .* were not called in an evaluation.*{NAME}.3.down"):
        evaluate_robustness(model, loss, times=["1s"], seeds=1, progress=False)
    report = evaluate_robustness(model, loss, times=["1s"], seeds=1, progress=False, allow_uncalled=True)
    assert report.uncalled == silent
    assert f"2 of 13 crossbar layers are not calibrated, {instead}: {', '.join(silent)}" in report.notes


def test_a_checkpoint_brings_each_experts_numbers_back(tmp_path):
    model, ids = mixtral(layers=2), tokens()
    patch_model(model, ReRAMConfig(device=device(read_noise=0.0), modules_to_not_convert=["experts.2"]))
    calibrate(model, [ids])
    model.save_pretrained(tmp_path)
    again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert list(crossbar_layers(again)) == list(crossbar_layers(model))
    for name, layer in crossbar_layers(model).items():
        twin = again.get_submodule(name)
        assert torch.equal(layer.weight, twin.weight)
        for buffer, value in layer._buffers.items():
            assert torch.equal(value, twin._buffers[buffer])
    with torch.no_grad():
        for time in ("1s", "10y"):
            with deploy(model, time, seed=5), deploy(again.eval(), time, seed=5):
                torch.testing.assert_close(again(ids).logits, model(ids).logits)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "given", state_dict={k: v for k, v in state.items() if "input_" not in k})
    third = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "given")
    name = f"{NAME}.1.down"
    assert torch.equal(third.get_submodule(name).input_range, model.get_submodule(name).input_range)


def test_a_checkpoint_from_when_experts_stayed_digital(tmp_path, caplog):
    """Its config says that all layers are on crossbars, and it has no numbers of experts."""
    model, ids = mixtral(), tokens()
    patch_model(model, ReRAMConfig(device=device(read_noise=0.0), modules_to_not_convert=["experts"]))
    calibrate(model, [ids])
    with torch.no_grad():
        expected = model(ids).logits
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["modules_to_not_convert"] = None
    file.write_text(json.dumps(config))
    with caplog.at_level("WARNING", "hf_reram"):
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert crossbar_layers(again).keys() == crossbar_layers(model).keys()
    assert type(experts_of(again)) is transformers.models.mixtral.modeling_mixtral.MixtralExperts
    assert "8 layers have weights but no crossbar's numbers in the checkpoint, as of a version" in caplog.text
    with torch.no_grad():
        assert torch.equal(again(ids).logits, expected)


def test_the_same_layers_in_other_words():
    model = patch_model(mixtral(), ReRAMConfig(modules_to_not_convert=["experts"]))
    assert lies_as(model, ReRAMConfig(target_modules=r".*(self_attn|lm_head).*"))
    assert not lies_as(model, ReRAMConfig())
    before = set(crossbar_layers(model))
    assert lies_as(patch_model(mixtral(), ReRAMConfig()), ReRAMConfig())
    put_on(model, ReRAMConfig())
    assert {name for name in crossbar_layers(model) if NAME not in name} == before


@pytest.mark.parametrize("experts", ["mixtral", "nothing"])
def test_a_tied_head_stays_digital(experts):
    model, ids = mixtral(tie_word_embeddings=True), tokens()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    excluded = None if experts == "mixtral" else ["experts"]
    patch_model(model, ReRAMConfig(device=device(read_noise=0.0), modules_to_not_convert=excluded))
    assert "lm_head" not in crossbar_layers(model) and type(model.lm_head) is torch.nn.Linear
    assert "lm_head (Linear)" in summarize(model).digital
    calibrate(model, [ids])
    with torch.no_grad(), deploy(model, "1d"):
        hidden = model.model(ids).last_hidden_state
        torch.testing.assert_close(model(ids).logits, hidden @ model.model.embed_tokens.weight.T)


def test_an_experts_tokens_are_bent_by_the_cells_curve():
    model, ids = mixtral(), tokens()
    inputs = expert_inputs(model, {"input_ids": ids})
    config = ReRAMConfig(
        device=device(), target_modules=[f"{NAME}.0.gate_up"], range_shrink=1.0, center_inputs=False, weight_clip=None
    )
    patch_model(model, config)
    calibrate(model, [ids])
    (layer,) = crossbar_layers(model).values()
    _, first, _ = inputs[0]
    span, b = float(layer.input_range), config.device.b(1.0)
    u = (first / span).clamp(-1, 1)
    expected = span * float(layer.gain) / b * torch.sinh(b * u) @ experts_of(model).gate_up_proj[0].T
    torch.testing.assert_close(layer.eval()(first), expected, rtol=1e-4, atol=1e-4)
    caught: list = []
    layer.register_forward_hook(lambda module, args, y: caught.append(y))
    model(ids)
    torch.testing.assert_close(caught[0][0], expected, rtol=1e-4, atol=1e-4)  # in the order of the tokens


def test_adapters_beside_experts_and_of_their_weights(caplog):
    peft = pytest.importorskip("peft")
    usual = peft.LoraConfig(target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"])
    of_weights = peft.LoraConfig(target_modules=[], target_parameters=["mlp.experts.gate_up_proj"])
    model, ids = patch_model(mixtral(), ReRAMConfig(device=device(read_noise=0.0))), tokens()
    calibrate(model, [ids])
    names = list(crossbar_layers(model))
    beside = peft.get_peft_model(model, usual)
    assert list(crossbar_layers(beside)) == names
    with torch.no_grad(), deploy(beside, "1d"):
        assert torch.isfinite(beside(ids).logits).all()
    after = peft.get_peft_model(patch_model(mixtral(), ReRAMConfig()), of_weights)
    with pytest.raises(RuntimeError, match=rf"{NAME}.0.gate_up': its weight is computed from other tensors in each"):
        after(ids)
    before = peft.get_peft_model(mixtral(), of_weights)
    with caplog.at_level("WARNING", "hf_reram"):
        patch_model(before, ReRAMConfig())
    assert not any("experts" in name for name in crossbar_layers(before))
    assert f"{NAME} (ParamWrapper computes with their weight itself" in caplog.text
    assert f"{NAME} (MixtralExperts)" in summarize(before).digital
