"""Under ``torch.compile``: one graph, with the losses and gradients of eager mode."""

import copy
from functools import partial

import pytest
import torch
import torch._dynamo.testing
from torch import nn

from hf_reram import (
    ReRAMConfig,
    add_retention_loss,
    calibrate,
    crossbar_layers,
    deploy,
    noise_to_signal,
    patch_model,
    sampled_drift,
)
from hf_reram.config import RETENTION_LOSSES
from hf_reram.nn.ops.functions import Quantize, ShrunkSinh
from tests.samples.devices import device
from tests.samples.models import FewLayers, bert_batch, tiny_bert

LOSSES = [loss for loss in RETENTION_LOSSES if loss not in ("consistency", "output+drift")]  # two forwards; see below


@pytest.fixture(autouse=True)
def _forget_graphs():
    torch._dynamo.reset()


def train_step(model, call, batch):
    with sampled_drift(model, seed=5):
        loss = call(**batch).loss
    total, retention = add_retention_loss(loss, model)
    total.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return float(total.detach()), float(retention), grads


CONVERTERS = {"dac_bits": 6, "adc_bits": 8, "tile_size": 8}
BERT = partial(tiny_bert, num_hidden_layers=1), "output+drift", {"target_modules": ["query", "key", "classifier"]}


@pytest.mark.parametrize(
    ("make", "loss", "options"),
    [
        *(pytest.param(FewLayers, loss, {}, marks=pytest.mark.slow) for loss in LOSSES if loss != "sensitivity+drift"),
        (FewLayers, "sensitivity+drift", {}),
        pytest.param(FewLayers, "output", CONVERTERS, marks=pytest.mark.slow),
        (FewLayers, "output+drift", {"weight_scale": "per_tile", "tile_size": 8, "redundancy": 1.0}),
        pytest.param(FewLayers, "output", {"learn_input_range": True}, marks=pytest.mark.slow),
        (FewLayers, "output+drift", {"input_range": "per_token", **CONVERTERS}),
        pytest.param(FewLayers, "output", {"input_range": "per_token"}, marks=pytest.mark.slow),
        pytest.param(*BERT, id="BERT"),
    ],
)
def test_one_graph_with_the_gradients_of_eager_mode(make, loss, options):
    model, batch = make(), bert_batch()
    config = ReRAMConfig(device="hfox-neurram", retention_loss=loss, retention_times=["1s", "1d"], **options)
    patch_model(model.train(), config)
    calibrate(model, [batch])
    twin = copy.deepcopy(model)
    expected = train_step(model, model, batch)
    found = train_step(twin, torch.compile(twin, fullgraph=True, backend="aot_eager"), batch)
    assert found[:2] == pytest.approx(expected[:2], rel=1e-4)
    assert found[2].keys() == expected[2].keys()
    scale = max(float(grad.abs().max()) for grad in expected[2].values())
    for name, grad in expected[2].items():
        torch.testing.assert_close(
            found[2][name], grad, rtol=2e-3, atol=1e-4 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )
    if loss == "output":
        assert noise_to_signal(twin) == pytest.approx(noise_to_signal(model), rel=1e-4)


def test_later_models_and_calibrations_of_a_process():
    """Whose numbers differ from those that a graph was made for."""
    x = torch.randn(6, 4)

    def step(model, call):
        with sampled_drift(model, seed=5):
            y = call(x)
        add_retention_loss(y.square().mean(), model)[0].backward()
        return model.weight.grad

    for loss, options in (
        ("output+drift", {}),
        ("output+drift", CONVERTERS),
        ("noise", {}),
        ("drift", {"redundancy": 1.0}),
    ):
        for name in ("hfox-neurram", "cmo-hfox-ibm"):
            model = patch_model(nn.Linear(4, 3).train(), ReRAMConfig(device=name, retention_loss=loss, **options))
            calibrate(model, [x])
            twin = copy.deepcopy(model)
            found = step(twin, torch.compile(twin, fullgraph=True, backend="aot_eager"))
            torch.testing.assert_close(found, step(model, model), rtol=1e-3, atol=1e-5)


def test_chips_need_no_new_graph():
    model, batch = FewLayers().eval(), bert_batch()
    patch_model(model, ReRAMConfig(device=device(read_noise=0.0)))
    calibrate(model, [batch])
    counter = torch._dynamo.testing.CompileCounter()
    call = torch.compile(model, fullgraph=True, backend=counter)
    for seed in range(3):
        with deploy(model, "1d", seed=seed), torch.no_grad():
            torch.testing.assert_close(call(**batch).logits, model(**batch).logits)
    assert counter.frame_count == 1


def test_new_powers_of_noise_need_no_new_graph():
    """It is that of the weights as they are."""
    model, batch = FewLayers().train(), bert_batch()
    patch_model(model, ReRAMConfig(retention_loss="noise"))
    calibrate(model, [batch])
    counter = torch._dynamo.testing.CompileCounter()
    call = torch.compile(model, fullgraph=True, backend=counter)
    for size in (1.0, 0.3, 0.3):
        with torch.no_grad():
            for layer in crossbar_layers(model).values():
                layer.weight *= size
        with sampled_drift(model, seed=1):
            torch.testing.assert_close(call(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


def test_new_seeds_need_no_new_graph():
    model, batch = FewLayers().train(), bert_batch()
    patch_model(model, ReRAMConfig(retention_loss="drift"))
    calibrate(model, [batch])
    counter = torch._dynamo.testing.CompileCounter()
    call = torch.compile(model, fullgraph=True, backend=counter)
    losses = set()
    for seed in range(4):
        with sampled_drift(model, seed=seed):
            losses.add(round(float(call(**batch).loss), 6))
    assert counter.frame_count == 1 and len(losses) == 4
    for strength in (0.1, 0.2, 0.7):  # while they warm up: one graph for all
        with sampled_drift(model, seed=0, strength=strength):
            found = call(**batch).loss
            torch.testing.assert_close(found, model(**batch).loss)
            losses.add(round(float(found), 6))
    assert counter.frame_count == 1 and len(losses) == 7


def test_convolutions(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten()).train()
    x = torch.rand(4, 3, 6, 6) + 0.5  # one-sided, so that it is centered
    patch_model(model, ReRAMConfig(retention_loss="output"))
    calibrate(model, [x])
    assert model[0].centered
    grads = []
    for call in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        add_retention_loss(call(x).square().mean(), model)[0].backward()
        grads.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_what_is_loaded_is_what_compiled_code_uses():
    model, batch = FewLayers().eval(), bert_batch()
    patch_model(model, ReRAMConfig())
    state = copy.deepcopy(model.state_dict())
    calibrate(model, [batch])
    calibrated = copy.deepcopy(model.state_dict())
    for saved in (calibrated, state, calibrated):
        model.load_state_dict(saved)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(**batch).loss, model(**batch).loss)


def test_chips():
    model, batch = FewLayers().eval(), bert_batch()
    patch_model(model, ReRAMConfig(device=device(read_noise=0.0)))
    calibrate(model, [batch])
    call = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), deploy(model, "1d", seed=3):
        torch.testing.assert_close(call(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-5)
    assert len(crossbar_layers(model)) == 3


@pytest.mark.parametrize("b", [1e-6, 0.3, 2.0, 6.0])
@pytest.mark.parametrize("levels", [0, 7])
@pytest.mark.parametrize("floor", [-1.0, 0.0])
def test_the_curve(b, levels, floor):
    x = torch.randn(50, requires_grad=True)

    def curve(x):
        return ShrunkSinh.apply(x, 1.3, b, levels, 0.7, floor)

    results = []
    for call in (curve, torch.compile(curve, fullgraph=True, backend="aot_eager")):
        y = call(x)
        (grad,) = torch.autograd.grad(y.sum(), x)
        results.append((y, grad))
    torch.testing.assert_close(*[y for y, _ in results], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*[grad for _, grad in results], rtol=1e-4, atol=1e-5)


def test_the_converter():
    y, step = torch.randn(40, requires_grad=True), torch.tensor(0.1)
    call = torch.compile(lambda y: Quantize.apply(y, step, 8), fullgraph=True, backend="aot_eager")
    one, other = Quantize.apply(y, step, 8), call(y)
    torch.testing.assert_close(one, other)
    assert torch.equal(*(torch.autograd.grad(z.sum(), y)[0] for z in (one, other)))


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["none", "drift", "output+drift"])
def test_inductor(loss):
    model, batch = tiny_bert(), bert_batch()
    patch_model(model.train(), ReRAMConfig(retention_loss=loss))
    calibrate(model, [batch])
    twin = copy.deepcopy(model)
    expected = train_step(model, model, batch)
    found = train_step(twin, torch.compile(twin, fullgraph=True), batch)
    assert found[:2] == pytest.approx(expected[:2], rel=1e-4)


@pytest.mark.parametrize("options", [{}, CONVERTERS, {"retention_loss": "output"}], ids=str)
def test_a_model_that_is_not_calibrated(options):
    """Each batch spans an input range of its own, which is no constant of the graph."""
    torch.manual_seed(0)
    model = patch_model(nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3)), ReRAMConfig(**options))
    call = torch.compile(model, fullgraph=True, backend="aot_eager")
    for x in (torch.randn(4, 6), 5 * torch.randn(4, 6), torch.zeros(4, 6)):
        with torch.no_grad():
            torch.testing.assert_close(call.eval()(x), model.eval()(x), rtol=1e-5, atol=1e-6)
        grads = []
        for way in (model.train(), call.train()):
            with sampled_drift(model, seed=0):
                loss = way(x).square().mean()
                loss = add_retention_loss(loss, model)[0] if options.get("retention_loss") else loss
                grads.append(torch.autograd.grad(loss, list(model.parameters())))
        for one, other in zip(*grads, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("way", ["compile", "export"])
@pytest.mark.parametrize("options", [{}, CONVERTERS, {"center_inputs": False, "learn_input_range": True}], ids=str)
def test_a_checkpoint_that_was_just_loaded(tmp_path, options, way):
    """Before any forward in eager mode."""
    model = tiny_bert(num_hidden_layers=1)
    patch_model(model, ReRAMConfig(**options))
    calibrate(model, [bert_batch()])
    model.save_pretrained(tmp_path)
    batch = {name: value for name, value in bert_batch().items() if name != "labels"}
    loaded = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        if way == "compile":
            found = torch.compile(loaded, fullgraph=True, backend="eager")(**batch).logits
        else:
            found = torch.export.export(loaded, (), batch, strict=False).module()(**batch).logits
        torch.testing.assert_close(found, loaded(**batch).logits)
        torch.testing.assert_close(found, model.eval()(**batch).logits)
