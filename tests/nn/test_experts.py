"""Experts stacked in one tensor, each on crossbars of its own."""

import copy
import pickle

import pytest
import torch
import transformers
from torch import nn

from hf_reram import (
    ReRAMConfig,
    add_retention_loss,
    calibrate,
    crossbar_layers,
    deploy,
    digital,
    follow_training,
    hold_weights,
    patch_model,
    sampled_drift,
    unpatch_model,
)
from hf_reram.nn import CrossbarLayer
from tests.samples.devices import device, straight
from tests.samples.experts import expert_inputs, experts_of, mixtral, tokens
from tests.samples.zoo import DECODER

NAME = "model.layers.0.mlp.experts"
E = {"num_experts": 4, "num_experts_per_tok": 2}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}
MODELS = {
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen2Moe": {**E, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "decoder_sparse_step": 1},
    "Qwen3Moe": {**E, "moe_intermediate_size": 16, "head_dim": 8},
    "Olmoe": E,
    # Transposed, with biases, gates and products interleaved.
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    # Without a gate.
    "NemotronH": {
        **ROUTED,
        "layers_block_type": ["moe", "attention"],
        "head_dim": 8,
        "moe_shared_expert_intermediate_size": 16,
    },
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**DECODER, **MODELS[name]})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2) if parameter.dim() > 1 else None
    return model


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", MODELS)
def test_an_ideal_crossbar_computes_as_transformers_does(name, implementation):
    model, ids = build(name), tokens()
    model.config._experts_implementation = implementation
    keys = list(model.state_dict())
    with torch.no_grad():
        expected = model(ids).logits
        patch_model(model, straight())
        names = [key for key in crossbar_layers(model) if "experts." in key and "shared" not in key]
        layers = sum(type(m).__name__.startswith("Crossbar") and hasattr(m, "num_experts") for m in model.modules())
        assert len(names) == 8 * layers > 0
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
        with digital(model):
            torch.testing.assert_close(model(ids).logits, expected, rtol=1e-6, atol=1e-6)
        unpatch_model(model)
        assert list(model.state_dict()) == keys and torch.equal(model(ids).logits, expected)


def test_each_expert_is_calibrated_on_its_own_tokens():
    model, ids = mixtral(), tokens(length=12)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0  # padding counts nowhere
    batch = {"input_ids": ids, "attention_mask": mask}
    inputs = expert_inputs(model, batch)
    patch_model(model, ReRAMConfig(device=device(), input_percentile=100.0, center_inputs=False, range_shrink=1.0))
    calibrate(model, [batch])
    layers, seen = crossbar_layers(model), set()
    for number, (rows, first, last) in enumerate(inputs):
        kept = mask.reshape(-1)[rows].bool()
        for part, x in (("gate_up", first[kept]), ("down", last[kept])):
            layer = layers[f"{NAME}.{number}.{part}"]
            assert float(layer.input_range) == pytest.approx(float(x.abs().max()), rel=1e-5)
            seen.add(float(layer.input_range))
    assert len(seen) >= 7  # two experts may share the largest token


def test_gradients_of_the_stacked_tensors_are_the_digital_models():
    model, ids = mixtral(layers=2), tokens()
    twin = copy.deepcopy(model).train()
    twin(ids, labels=ids).loss.backward()
    patch_model(model, straight())
    model.train()
    model(ids, labels=ids).loss.backward()
    found = dict(model.named_parameters())
    assert found.keys() == dict(twin.named_parameters()).keys()
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(found[name].grad, parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
def test_retention_terms_under_checkpointing_are_those_without(reentrant):
    ids, mask = tokens(length=10), torch.ones(2, 10, dtype=torch.long)
    mask[0, 6:] = 0
    found = []
    for checkpointing in (False, True):
        model = mixtral(layers=2)
        patch_model(model, ReRAMConfig(device="cmo-hfox-ibm", retention_loss="output+drift", retention_weight=30.0))
        calibrate(model, [{"input_ids": ids, "attention_mask": mask}])
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
        with sampled_drift(model, seed=3):
            output = model(input_ids=ids, attention_mask=mask, labels=ids)
        total, _ = add_retention_loss(output.loss, model)
        total.backward()
        found.append((total.detach(), experts_of(model).gate_up_proj.grad, experts_of(model).down_proj.grad))
    for plain, again in zip(*found):
        torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-6)


def test_the_retention_term_of_an_expert_is_that_of_a_layer_with_its_tokens():
    model, ids = mixtral(), tokens()
    inputs = expert_inputs(model, {"input_ids": ids})
    config = ReRAMConfig(device=device(read_noise=0.0), retention_loss="output", target_modules=r".*experts\.\d+\..*")
    patch_model(model, config)
    calibrate(model, [ids])
    parts = crossbar_layers(model)
    model.train()
    model(ids)
    terms = experts_of(model).parts()[0].crossbar.forward.terms
    for number, (_, first, _) in enumerate(inputs):
        part = parts[f"{NAME}.{number}.gate_up"]
        alone = nn.Linear(16, 64, bias=False)
        alone.weight.data = part.weight.detach().clone()
        patch_model(alone, ReRAMConfig.from_dict({**config.to_dict(), "target_modules": None}))
        for buffer, value in part._buffers.items():
            getattr(alone, buffer).copy_(value)
        alone.train()(first)
        torch.testing.assert_close(
            terms[f"{NAME}.{number}.gate_up"], alone.crossbar.forward.terms[""], rtol=1e-4, atol=0
        )


def test_what_ages_of_one_expert_is_its_closed_form():
    """Chips of one expert, the others digital."""
    model, ids = mixtral(), tokens()
    (rows, first, _) = expert_inputs(model, {"input_ids": ids})[1]
    config = ReRAMConfig(
        device=device(read_noise=0.0, v0=1e6),
        retention_loss="output",
        target_modules=[f"{NAME}.1.gate_up"],
        center_inputs=False,
        weight_clip=None,
    )
    patch_model(model, config)
    ((name, layer),) = crossbar_layers(model).items()
    assert name == f"{NAME}.1.gate_up" and len(rows)
    calibrate(model, [ids])
    model.train()
    _, expected = add_retention_loss(model(ids, labels=ids).loss, model)
    model.eval()
    clean, found = first @ layer.weight.detach().T, []
    for seed in range(60):
        with deploy(model, "1d", seed=seed), torch.no_grad():
            error = first @ layer.chip.weight.T - clean
            found.append(float(error.square().sum() / clean.square().sum()))
            torch.testing.assert_close(layer(first), first @ layer.chip.weight.T, rtol=1e-4, atol=1e-5)
    assert sum(found) / len(found) == pytest.approx(float(expected), rel=0.1)


def test_chips_of_experts_are_their_own_and_are_seen_to_change():
    model, ids = mixtral(), tokens()
    with torch.no_grad():
        experts_of(model).gate_up_proj[1] = experts_of(model).gate_up_proj[0]
    patch_model(model, ReRAMConfig(device=device(read_noise=0.0)))
    calibrate(model, [ids])
    one, other = (experts_of(model).get_submodule(f"{number}.gate_up") for number in (0, 1))
    with deploy(model, "1d", seed=1), torch.no_grad():
        assert not torch.equal(one.chip.weight, other.chip.weight)
        first = model(ids).logits
        assert torch.equal(model(ids).logits, first)
    with deploy(model, "1d", seed=1), torch.no_grad():
        assert torch.equal(model(ids).logits, first)
        before = one.chip.weight
        model.to(torch.float64).to(torch.float32)
        assert one.chip.weight is not before and torch.equal(model(ids).logits, first)
    with pytest.raises(RuntimeError, match=rf"{NAME}.0.gate_up"), deploy(model, "1d"):
        experts_of(model).gate_up_proj.data[0] += 1
    with pytest.raises(RuntimeError, match="has changed since it was programmed"), deploy(model, "1d"), torch.no_grad():
        experts_of(model).down_proj[0] += 1
        model(ids)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_weights_of_their_own(make):
    model, ids = mixtral(), tokens()
    patch_model(model, ReRAMConfig(device=device(read_noise=0.0)))
    calibrate(model, [ids])
    twin = make(model)
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(twin(ids).logits, expected)
        experts_of(model).gate_up_proj.zero_()
        assert torch.equal(twin(ids).logits, expected)
        assert list(unpatch_model(twin).state_dict()) == list(mixtral().state_dict())


def test_training_follows_and_holds_each_expert():
    model, ids = mixtral(), tokens()
    patch_model(model, ReRAMConfig(device="cmo-hfox-ibm", weight_clip=2.0))
    calibrate(model, [ids])
    layers = {name: layer for name, layer in crossbar_layers(model).items() if NAME in name}
    model.train()
    follow_training(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(2):
        with sampled_drift(model):
            loss, _ = add_retention_loss(model(ids, labels=ids).loss, model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        follow_training(model)
        hold_weights(model)
    assert all(name in layer.crossbar.following.clamped for name, layer in layers.items() if layer.calls)
    for layer in layers.values():
        assert float((layer.weight.abs() / layer.held_scale()).max()) <= 1 + 1e-6


@pytest.mark.parametrize("options", [{"sensitivity": True}, {"tile_size": 8}, {"redundancy": 2.0}, {"per_token": True}])
def test_options_of_layers_are_options_of_experts(options):
    model, ids = mixtral(experts=2, chosen=1), tokens()
    sensitivity = options.pop("sensitivity", False)
    if options.pop("per_token", False):
        options["input_range"] = "per_token"
    patch_model(model, ReRAMConfig(device="cmo-hfox-ibm", **options))
    calibrate(model, [ids], sensitivity=sensitivity)
    layers = [layer for name, layer in crossbar_layers(model).items() if NAME in name]
    if sensitivity:
        assert all(float(layer.sensitivity.min()) > 0 for layer in layers)
    if "tile_size" in options:
        assert all(layer.tiles() == layer.width // 8 for layer in layers)
    if "redundancy" in options:
        assert max(float(layer.row_copies.max()) for layer in layers) > 1
    with torch.no_grad(), deploy(model, "1s"):
        assert torch.isfinite(model(ids).logits).all()


# What stays digital


def _left(model, caplog, **options):
    with caplog.at_level("WARNING", "hf_reram"):
        patch_model(model, ReRAMConfig(**options))
    assert not any(isinstance(m, CrossbarLayer) for m in experts_of(model).modules())
    return caplog.text


def test_experts_with_a_forward_of_their_own_are_named(caplog):
    model = mixtral()

    class Own(type(experts_of(model))):
        def forward(self, *args):
            return super().forward(*args)

    experts_of(model).__class__ = Own
    assert f"{NAME} (Own) multiply by weights of kinds that are not put on crossbars" in _left(model, caplog)


def test_experts_that_something_stands_in_the_way_of_are_named_with_the_reason(caplog):
    model = mixtral()
    experts_of(model).forward = lambda *args: args[0]
    assert f"{NAME} (their forward is replaced on the instance" in _left(model, caplog)
    model = mixtral()
    experts_of(model)._is_expert_parallel = True
    assert f"{NAME} (each process holds a part of the experts" in _left(model, caplog)
    model = mixtral()
    experts_of(model).add_module("1", nn.Identity())
    assert f"{NAME} (they have attributes of their own whose names a crossbar layer needs: 1)" in _left(model, caplog)


def test_excluded_experts_are_what_they_were(caplog):
    model = mixtral()
    before, names = type(experts_of(model)), set(vars(experts_of(model)))
    assert NAME not in _left(model, caplog, modules_to_not_convert=["experts"])
    assert type(experts_of(model)) is before and set(vars(experts_of(model))) == names


def test_one_expert_may_stay_digital():
    model, ids = mixtral(), tokens()
    with torch.no_grad():
        expected = model(ids).logits
        patch_model(model, straight(modules_to_not_convert=["experts.2"]))
        numbers = {name.split(".")[5] for name in crossbar_layers(model) if NAME in name}
        assert numbers == {"0", "1", "3"}
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_parametrized_stacks_are_refused_where_they_would_be_a_chip():
    model, ids = mixtral(), tokens()
    patch_model(model, ReRAMConfig(device="cmo-hfox-ibm"))
    calibrate(model, [ids])

    class Shifted(nn.Module):
        def forward(self, weight):
            return weight + 1

    nn.utils.parametrize.register_parametrization(experts_of(model), "gate_up_proj", Shifted())
    with pytest.raises(ValueError, match=rf"are computed .*{NAME}.0.gate_up"), deploy(model):
        pass
    with pytest.raises(ValueError, match=rf"unpatch_model: parametrizations .*{NAME}.0.gate_up"):
        unpatch_model(model)
