import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Categorical, kl_divergence
from transformers import BertForTokenClassification
from transformers.modeling_outputs import SemanticSegmenterOutput

from hf_reram import (
    ReRAMConfig,
    add_retention_loss,
    calibrate,
    crossbar_layers,
    deploy,
    hold_weights,
    noise_to_signal,
    patch_model,
    retention_loss,
    sampled_drift,
)
from hf_reram.nn.array import cell_weight
from hf_reram.nn.physics import Physics
from hf_reram.training.distillation import divergence
from tests.samples.devices import device
from tests.samples.models import bert_batch, tiny_bert

GENERIC = {"type": "generic", "A": 0.01, "tau": 1.0, "s0": 0.5, "s1": 0.05, "s2": 0.01}
CURVED = {"type": "table", "g_ref": 40.0, "times": [1.0], "std": [[1.0, 2.0]], "mean": [[0.0, 3.0, -5.0]]}


@pytest.mark.parametrize("retention", [None, GENERIC, CURVED], ids=["neurram", "generic", "curved mean"])
def test_closed_form_is_what_chips_show(retention):
    """R against the mean of 300 chips: the closed form samples nothing."""
    changes = {"read_noise": 0.0} | ({"retention": retention} if retention else {})
    config = ReRAMConfig(device=device(**changes), range_shrink=0.8, weight_clip=2.5, retention_loss="output")
    model = nn.Sequential(nn.Linear(64, 40)).train()
    x = torch.randn(200, 64)
    patch_model(model, config)
    calibrate(model, [x])
    with torch.no_grad():
        clean = model(x)
        found = float(retention_loss(model))
        errors = []
        for seed in range(300):
            with deploy(model, "1d", seed=seed):
                errors.append((model(x) - clean).square().sum())
        signal = (clean - model[0].bias).square().sum()
    assert found == pytest.approx(float(torch.stack(errors).mean() / signal), rel=0.02)


def test_sampled_drift_has_the_moments_of_a_chip():
    config = ReRAMConfig(device=device(retention=GENERIC, read_noise=0.0), weight_clip=2.5, retention_loss="drift")
    model = nn.Sequential(nn.Linear(64, 40, bias=False)).train()
    patch_model(model, config)
    calibrate(model, [torch.randn(200, 64)])
    eye = torch.eye(64) * float(model[0].input_range)
    with torch.no_grad(), sampled_drift(model):
        draws = torch.stack([model(eye) for _ in range(400)])
    chips = []
    with torch.no_grad():
        for seed in range(400):
            with deploy(model, "1d", seed=seed):
                chips.append(model(eye))
    chips = torch.stack(chips)
    assert float(draws.var(0).mean() / chips.var(0).mean()) == pytest.approx(1, rel=0.02)
    torch.testing.assert_close(draws.mean(0), chips.mean(0), atol=float(6 * chips.std(0).max() / 20), rtol=0)


@pytest.mark.parametrize("kind", ["drift", "noise"])
def test_strength_scales_the_sampled_error(kind):
    """Spread and mean shift alike; what is at full strength is what it was without one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 40, bias=False)).train()
    patch_model(model, ReRAMConfig(device=device(retention=GENERIC), weight_clip=2.5, retention_loss="output+drift"))
    calibrate(model, [torch.randn(200, 64)])
    errors, eye = {}, torch.eye(64) * float(model[0].input_range)
    with torch.no_grad():
        clean = model(eye)
        for strength in (None, 1.0, 0.5, 0.0):
            with sampled_drift(model, kind, seed=3, **({} if strength is None else {"strength": strength})):
                errors[strength] = model(eye) - clean
    assert torch.equal(errors[None], errors[1.0]) and float(errors[1.0].abs().max()) > 0.01
    torch.testing.assert_close(errors[0.5], 0.5 * errors[1.0], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(errors[0.0], torch.zeros_like(clean), rtol=0, atol=1e-6)


@pytest.mark.parametrize("bad", [-0.1, 1.1, True, "all", math.nan])
def test_bad_strengths_are_named(tiny_bert, bad):
    patch_model(tiny_bert, ReRAMConfig())
    with pytest.raises(ValueError, match=r"strength=.*from 0 to 1"), sampled_drift(tiny_bert, strength=bad):
        pass


def test_white_noise_has_the_power_of_the_drift():
    """Also once the weights are others."""
    model = nn.Sequential(nn.Linear(64, 40, bias=False)).train()
    patch_model(model, ReRAMConfig(weight_clip=2.5, retention_loss="noise", range_shrink=1.0))
    eye = torch.eye(64)
    with torch.no_grad():
        for size in (1.0, 0.3):
            model[0].weight *= size
            power = {}
            for kind in ("drift", "noise"):
                with sampled_drift(model, kind):
                    power[kind] = torch.stack([model(eye) for _ in range(300)]).var(0).mean()
            assert float(power["noise"] / power["drift"]) == pytest.approx(1, rel=0.03)


@pytest.mark.parametrize("kind", [lambda: nn.Linear(300, 1000), lambda: nn.Conv2d(64, 128, 5)])
def test_a_part_of_many_weights_tells_the_power_of_noise(monkeypatch, kind):
    torch.manual_seed(0)
    model = nn.Sequential(kind())
    with torch.no_grad():
        model[0].weight *= torch.rand(len(model[0].weight)).view(-1, *[1] * (model[0].weight.dim() - 1))
    patch_model(model, ReRAMConfig(retention_loss="noise"))
    found = float(model[0].white_noise_std())
    monkeypatch.setattr("hf_reram.nn.array.MEASURED", model[0].weight.numel())
    model[0].forget_white_noise()
    assert found != float(model[0].white_noise_std()) == pytest.approx(found, rel=0.01)


def grads_of(model, step):
    model.zero_grad()
    loss = step()
    loss.backward()
    return float(loss.detach()), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def prepared(model, **options):
    patch_model(model, ReRAMConfig(**{"retention_loss": "output", "retention_weight": 3.0, **options}))
    calibrate(model, [bert_batch()])
    return model.train()


@pytest.mark.parametrize("kind", ["output", "weight", "sensitivity"])
def test_attached_term_has_the_gradients_of_the_plain_sum(tiny_bert, kind):
    model = prepared(tiny_bert, retention_loss=kind)

    def plain():
        return model(**bert_batch()).loss + 3.0 * retention_loss(model)

    def attached():
        return add_retention_loss(model(**bert_batch()).loss, model)[0]

    loss, grads = grads_of(model, plain)
    again, others = grads_of(model, attached)
    assert again == pytest.approx(loss, rel=1e-6)
    for name, grad in grads.items():
        torch.testing.assert_close(others[name], grad, rtol=1e-4, atol=1e-7)


def test_an_added_loss_leaves_nothing_behind_for_the_next_forward(tiny_bert):
    model = prepared(tiny_bert)
    _, alone = grads_of(model, lambda: model(**bert_batch()).loss)
    grads_of(model, lambda: add_retention_loss(model(**bert_batch()).loss, model)[0])
    _, after = grads_of(model, lambda: model(**bert_batch()).loss)
    for name, grad in alone.items():
        torch.testing.assert_close(after[name], grad)


@pytest.mark.parametrize("kind", ["noise", "drift", "output+drift"])
def test_a_dead_channel_stays_finite(kind):
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)).train()
    with torch.no_grad():
        model[0].weight[2] = 0
    patch_model(model, ReRAMConfig(retention_loss=kind))
    calibrate(model, [torch.randn(16, 8)])
    with sampled_drift(model):
        model(torch.randn(5, 8)).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("kind", ["output", "drift", "output+drift", "noise"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_counts_each_term_once_and_samples_the_same_chip(tiny_bert, reentrant, kind):
    model = prepared(tiny_bert, retention_loss=kind)

    def attached():
        torch.manual_seed(3)
        with sampled_drift(model):
            loss = model(**bert_batch()).loss
        return add_retention_loss(loss, model)[0]

    loss, grads = grads_of(model, attached)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    again, others = grads_of(model, attached)
    assert again == pytest.approx(loss, rel=1e-6)
    for name, grad in grads.items():
        torch.testing.assert_close(others[name], grad, rtol=1e-4, atol=1e-7)


def test_loss_scaling_scales_the_term_too(tiny_bert):
    model = prepared(tiny_bert)
    _, grads = grads_of(model, lambda: add_retention_loss(model(**bert_batch()).loss, model)[0])
    _, scaled = grads_of(model, lambda: 1024 * add_retention_loss(model(**bert_batch()).loss, model)[0])
    for name, grad in grads.items():
        torch.testing.assert_close(scaled[name] / 1024, grad, rtol=1e-4, atol=1e-7)


def test_bf16_autocast_keeps_the_term_in_float32(tiny_bert):
    model = prepared(tiny_bert)
    model(**bert_batch())
    exact = float(retention_loss(model))
    with torch.autocast("cpu", torch.bfloat16):
        model(**bert_batch())
    found = retention_loss(model)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(exact, rel=0.02)


def test_padding_does_not_count(tiny_bert):
    model = prepared(tiny_bert, retention_loss="output", target_modules=["intermediate.dense"])
    batch = bert_batch()
    model(**batch)
    found = float(retention_loss(model))
    batch["input_ids"][batch["attention_mask"] == 0] = 3
    model(**batch)
    assert float(retention_loss(model)) == pytest.approx(found, rel=1e-6)


def test_a_layer_called_twice_counts_over_both_calls():
    inner = nn.Linear(8, 8)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x), self.inner(2 * x)

    model = Twice().train()
    patch_model(model, ReRAMConfig(retention_loss="output", range_shrink=0.01))
    x = torch.randn(6, 8)
    calibrate(model, [3 * x])
    model(x)
    assert len(noise_to_signal(model)) == 1
    assert set(noise_to_signal(model)) == {"inner"}


def test_weights_are_held_in_range(tiny_bert):
    prepared(tiny_bert, weight_clip=1.0)
    hold_weights(tiny_bert)
    for layer in crossbar_layers(tiny_bert).values():
        assert (cell_weight(layer, layer.weight).abs() <= layer.held_scale() * (1 + 1e-6)).all()


def test_float32_masters_of_weights_are_held_too(tiny_bert):
    """As DeepSpeed attaches them (ZeRO 1 and 2): a rank's part of each flat weight; tests/training runs it too."""
    prepared(tiny_bert, weight_clip=1.0)
    layer = crossbar_layers(tiny_bert)["classifier"]
    start, size = 5, layer.weight.numel() - 9
    master = layer.weight.detach().flatten()[start : start + size] * 3
    address = SimpleNamespace(start=start, numel=size)
    layer.weight._hp_mapping = SimpleNamespace(lp_fragment_address=address, get_hp_fragment=lambda: master)
    scale = layer.held_scale().expand(layer.weight.shape).flatten()[start : start + size]
    expected = torch.minimum(torch.maximum(master, -scale), scale)
    assert (master.abs() > scale).any()
    hold_weights(tiny_bert)
    assert torch.equal(master, expected)
    layer.weight.ds_id = 0
    with pytest.raises(NotImplementedError, match="zero_stage=3 is not supported: allowed are 0, 1 and 2"):
        hold_weights(tiny_bert)


def test_errors_say_what_to_do(tiny_bert):
    model = prepared(tiny_bert, retention_loss="drift")
    with pytest.raises(ValueError, match="no closed form"):
        retention_loss(model)
    task_loss = model(**bert_batch()).loss
    assert add_retention_loss(task_loss, model) == (task_loss, 0)
    state = crossbar_layers(model)["classifier"].crossbar
    state.physics = Physics.of(ReRAMConfig(retention_loss="sensitivity"))
    with pytest.raises(RuntimeError, match="training mode"):
        retention_loss(model)
    with pytest.raises(RuntimeError, match="sensitivity=True"):
        model(**bert_batch())


@pytest.mark.parametrize("seed", [-1, 1.5, True, "one", 2**63])
def test_seeds_of_sampled_drift_are_those_of_chips(tiny_bert, seed):
    patch_model(tiny_bert, ReRAMConfig())
    with pytest.raises(ValueError, match="seed="), sampled_drift(tiny_bert, seed=seed):
        pass


@pytest.mark.parametrize("call", [hold_weights, noise_to_signal, retention_loss])
def test_a_digital_model_is_refused(tiny_bert, call):
    with pytest.raises(ValueError, match="no crossbar layers"):
        call(tiny_bert)
    with pytest.raises(TypeError, match=r"model=None: allowed is a torch\.nn\.Module"):
        call(None)


@pytest.mark.parametrize("temperature", [0, -1.0, math.nan, math.inf, "hot"])
def test_a_bad_temperature_of_the_divergence(temperature):
    with pytest.raises(ValueError, match="allowed is a finite number above 0"):
        divergence(torch.zeros(2, 3), torch.zeros(2, 3), temperature)


def test_divergence_at_a_high_temperature_is_that_of_centered_logits():
    """T² KL(p/T ‖ q/T) → ½ mean over classes of the squared difference of centered logits (Hinton et al., eq. 4)."""
    s, t = torch.randn(2, 7, 11, dtype=torch.float64).float()
    centered = (s - s.mean(-1, keepdim=True)) - (t - t.mean(-1, keepdim=True))
    expected = 0.5 * centered.square().mean(-1).mean()
    assert float(divergence(s, t, 300.0)) == pytest.approx(float(expected), rel=0.02)
    assert float(divergence(t, t, 4.0)) == pytest.approx(0.0, abs=1e-5)
    assert float(divergence(s, t)) == pytest.approx(float(divergence(s / 2, t / 2, 0.5) * 4), rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_divergence_is_that_of_what_the_head_predicts(temperature):
    """Against torch.distributions: labels each for itself, classes of pixels, values."""
    s, t = torch.randn(2, 7, 3)
    heads = [tiny_bert(problem_type=kind) for kind in ("multi_label_classification", "regression", None)]
    labels, values, classes = (float(divergence(s, t, temperature, model=head)) for head in heads)
    expected = kl_divergence(Bernoulli(logits=t / temperature), Bernoulli(logits=s / temperature)).sum(1).mean()
    assert labels == pytest.approx(float(expected) * temperature**2, rel=1e-4)
    assert values == pytest.approx(float((s - t).square().mean()), rel=1e-5)
    expected = kl_divergence(Categorical(logits=t / temperature), Categorical(logits=s / temperature)).mean()
    assert classes == pytest.approx(float(expected) * temperature**2, rel=1e-4)

    s, t = torch.randn(2, 2, 4, 6, 5)
    pixels = [(z.movedim(1, -1) / temperature) for z in (t, s)]
    expected = kl_divergence(*(Categorical(logits=z) for z in pixels)).mean() * temperature**2
    found = divergence(SemanticSegmenterOutput(logits=s), SemanticSegmenterOutput(logits=t), temperature)
    assert float(found) == pytest.approx(float(expected), rel=1e-4)


def test_divergence_leaves_out_padding():
    model, batch = BertForTokenClassification(tiny_bert().config).eval(), bert_batch(8)
    patch_model(model, ReRAMConfig())
    s = model(batch["input_ids"], batch["attention_mask"])
    t, keep = torch.randn_like(s.logits), batch["attention_mask"].bool()
    expected = kl_divergence(Categorical(logits=t[keep]), Categorical(logits=s.logits[keep])).mean()
    assert float(divergence(s, t, model=model)) == pytest.approx(float(expected), rel=1e-5)
    t[~keep] += 50 * torch.randn_like(t[~keep])
    assert float(divergence(s, t, model=model)) == pytest.approx(float(expected), rel=1e-5)
