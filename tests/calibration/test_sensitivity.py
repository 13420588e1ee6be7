"""The Fisher information of a layer's outputs against its exact value, and what spread changes against chips."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import BertForTokenClassification, GPT2Config, GPT2LMHeadModel

from hf_reram import ReRAMConfig, calibrate, crossbar_layers, deploy, patch_model, retention_loss
from hf_reram.calibration.sensitivity import measure_sensitivity
from hf_reram.calibration.spread import spread_effects
from tests.samples.devices import device, straight
from tests.samples.models import bert_batch, tiny_bert

pytestmark = pytest.mark.many_probes


def exact(model: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    """``Σ_c p_c δ_i²`` of the outputs i of the first layer, a mean over examples."""
    y = model[0](x).detach().requires_grad_()
    log_p = model[1:](y).log_softmax(-1)
    total = torch.zeros(y.shape[1])
    for c in range(log_p.shape[1]):
        (delta,) = torch.autograd.grad(log_p[:, c].sum(), y, retain_graph=True)
        total += (log_p[:, c].exp().detach()[:, None] * delta.square()).sum(0)
    return total / len(x)


@pytest.mark.parametrize("confidence", [1.0, 12.0])
def test_it_is_the_exact_one_of_confident_classifiers_too(confidence):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).eval()
    with torch.no_grad():
        model[2].weight.mul_(confidence)
        model[2].bias.copy_(torch.tensor([confidence, 0.0, 0.0, 0.0]))
    x = torch.randn(16, 6)
    expected = exact(model, x)
    patch_model(model, ReRAMConfig(retention_loss="sensitivity"))
    measure_sensitivity(model, [x[:8], x[8:]])
    found = crossbar_layers(model)["0"].sensitivity
    torch.testing.assert_close(found, expected, rtol=0.25, atol=0.02 * float(expected.max()))
    assert float(found.sum()) == pytest.approx(float(expected.sum()), rel=0.15)


def test_a_regression_has_the_information_of_a_unit_gaussian():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 1)).eval()
    x = torch.randn(32, 6)
    expected = model[1].weight.detach()[0].square()
    patch_model(model, ReRAMConfig(retention_loss="sensitivity"))
    measure_sensitivity(model, [x])
    torch.testing.assert_close(crossbar_layers(model)["0"].sensitivity, expected, rtol=0.2, atol=1e-4)


def last_layer(model: nn.Module, batch) -> torch.Tensor:
    """The sensitivity of the layer whose outputs are the logits."""
    patch_model(model, ReRAMConfig(retention_loss="sensitivity"))
    measure_sensitivity(model, [batch])
    return list(crossbar_layers(model).values())[-1].sensitivity


def test_labels_that_are_predicted_each_for_itself_are_bernoulli():
    model = tiny_bert(problem_type="multi_label_classification")
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([6.0, 0.0, -1.0]))
        p = model(**(batch := {k: v for k, v in bert_batch(32).items() if k != "labels"})).logits.sigmoid()
    torch.testing.assert_close(last_layer(model, batch), (p * (1 - p)).mean(0), rtol=0.2, atol=0)


def test_values_of_a_regression_are_unit_gaussians():
    batch = {k: v for k, v in bert_batch(32).items() if k != "labels"}
    found = last_layer(tiny_bert(problem_type="regression"), batch)
    torch.testing.assert_close(found, torch.ones(3), rtol=0.2, atol=0)


def test_the_classes_of_pixels_are_channels():
    model = nn.Sequential(nn.Conv2d(3, 4, 1)).eval()
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([4.0, 0.0, 1.0, 0.0]))
        p = model(x := torch.randn(8, 3, 6, 5)).softmax(1)
    torch.testing.assert_close(last_layer(model, x), (p * (1 - p)).mean((0, 2, 3)), rtol=0.1, atol=0)


@pytest.mark.parametrize("kind", ["tokens", "causal"])
def test_padding_predicts_nothing(kind):
    """The same examples with padding to their right have the same information."""
    plain = {"input_ids": torch.randint(1, 50, (32, 4))}
    padded = {
        "input_ids": torch.cat([plain["input_ids"], torch.zeros(32, 12, dtype=torch.long)], 1),
        "attention_mask": torch.cat([torch.ones(32, 4), torch.zeros(32, 12)], 1).long(),
    }
    found = []
    for batch in (plain, padded):
        torch.manual_seed(0)
        if kind == "tokens":
            model = BertForTokenClassification(tiny_bert(initializer_range=0.3).config).eval()
        else:
            config = GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=16, initializer_range=0.3)
            model = GPT2LMHeadModel(config).eval()
        patch_model(model, ReRAMConfig(retention_loss="sensitivity"))
        measure_sensitivity(model, [batch])
        found.append({name: float(layer.sensitivity.sum()) for name, layer in crossbar_layers(model).items()})
    assert found[0] and all(found[1][name] == pytest.approx(value, rel=0.25) for name, value in found[0].items())


class Net(nn.Module):
    """A padded convolution and two linear layers, of inputs with a mean."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 3, padding=1, stride=2)
        self.hidden = nn.Linear(128, 32)
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        return self.head(self.hidden(self.conv(x).tanh().flatten(1)).relu())


class Pooled(Net):
    """All pixels, which are much alike, meet the same cells; and a layer that is called twice."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.conv(20.0 * (x - 1.0).mean((2, 3), keepdim=True) + x).tanh().mean((2, 3))
        return self.head(self.hidden(self.hidden(x).tanh() + x).relu())


@pytest.mark.parametrize("equalized", [False, True])
@pytest.mark.parametrize("kind", [Net, Pooled])
@pytest.mark.parametrize("name", ["conv", "hidden", "head"])
def test_the_effect_of_a_layers_spread_is_the_divergence_that_chips_show(name, kind, equalized):
    """Of the digital model's predictions from those with this one layer on chips."""
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(400, 2, 8, 8) + 1.0
    with torch.no_grad():
        model.head.weight.mul_(4)
        x[:, 1] *= 20.0
        model.conv.weight[:, 1] /= 20.0
    config = straight(device=device(v0=1e6, read_noise=0.0), equalize_inputs=equalized, retention_times=["1s"])
    alone, expected = copy.deepcopy(model), model(x).log_softmax(-1).detach()
    patch_model(model, config)
    calibrate(model, [x])
    effects = {name: float(effect.sum()) for name, effect in spread_effects(model, [x]).items()}
    patch_model(alone, ReRAMConfig.from_dict({**config.to_dict(), "target_modules": [name]}))
    calibrate(alone, [x])
    found = []
    with torch.no_grad():
        for seed in range(60):
            with deploy(alone, "1s", seed=seed):
                found.append(F.kl_div(alone(x).log_softmax(-1), expected, log_target=True, reduction="sum"))
    assert effects[name] == pytest.approx(float(torch.stack(found).mean()), rel=0.25)
    assert 1e-6 < effects[name] / len(x) < 0.1  # small enough for a second order


class Branching(nn.Module):
    """A layer of which one call is read by nothing that is predicted."""

    def __init__(self):
        super().__init__()
        self.one, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x, unread=True):
        y = self.head(self.one(x).tanh())
        return (y, self.one(2 * x))[0] if unread else y


def test_a_call_that_nothing_reads_leaves_the_others_their_effect():
    torch.manual_seed(0)
    model, x = Branching(), torch.randn(32, 8)
    patch_model(model, ReRAMConfig(device=device(), retention_times=["1d"]))
    calibrate(model, [x])
    read, unread = (spread_effects(model, [{"x": x, "unread": flag}])["one"] for flag in (False, True))
    assert float(unread.sum()) > 0 and float(unread.sum()) == pytest.approx(float(read.sum()), rel=0.5)


def test_cells_on_top_go_where_spread_changes_the_predictions():
    """Not where a layer's own output has most of it: what follows hardly reads the first layer's, and one of the second
    layer's inputs is always the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Linear(16, 8)).eval()
    with torch.no_grad():
        model[2].weight[:, :15] *= 0.01
        model[0].weight[15] *= 1e-3
        model[0].bias[15] = 2.0
    x = torch.randn(256, 16)
    patch_model(model, ReRAMConfig(device=device(), redundancy=1.0, weight_scale="per_channel", retention_times=["1d"]))
    calibrate(model, [x])
    copies = {name: layer.row_copies for name, layer in crossbar_layers(model).items()}
    assert copies["0"].max() == 1 and copies["2"][:15].min() > 1 == copies["2"][15]


@pytest.mark.parametrize("frozen", [False, True])
def test_it_leaves_no_trace(frozen):
    model = Net().requires_grad_(not frozen)
    patch_model(model, ReRAMConfig())
    x, before = torch.randn(4, 2, 8, 8), {n: p.clone() for n, p in model.named_parameters()}
    state = torch.random.get_rng_state()
    assert min(float(effect.sum()) for effect in spread_effects(model, [x]).values()) > 0
    assert torch.equal(state, torch.random.get_rng_state())
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n]) and p.grad is None and p.requires_grad is not frozen
    assert model.training and torch.is_grad_enabled()


def test_effects_are_of_what_reaches_the_array():
    """An input far beyond its range drives it no more than one at its end."""
    torch.manual_seed(0)
    model = nn.Linear(8, 1)  # a value, whose gradient is the same everywhere
    patch_model(model, ReRAMConfig(device=device(), retention_times=["1d"], center_inputs=False))
    calibrate(model, [torch.randn(64, 8)])
    end = float(model.input_range) * torch.randn(64, 8).sign()
    torch.testing.assert_close(spread_effects(model, [end * 1e4])[""], spread_effects(model, [end])[""])


class Frozen(nn.Module):
    """Two layers without a gradient, then another; or predictions that have none."""

    def __init__(self, decoded: bool):
        super().__init__()
        self.one, self.two, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.decoded = decoded

    def forward(self, x):
        with torch.no_grad():
            x = self.two(self.one(x))
        x = self.head(x)
        return x.argmax(-1) if self.decoded else x


@pytest.mark.parametrize("decoded", [True, False])
def test_where_no_gradient_tells_the_own_error_decides(decoded, caplog):
    torch.manual_seed(0)
    model = Frozen(decoded).requires_grad_(False)
    patch_model(model, ReRAMConfig(device=device(), redundancy=1.0, retention_times=["1d"]))
    with caplog.at_level("WARNING", "hf_reram"):
        calibrate(model, [torch.randn(64, 8)])
    assert "cells on top go where a layer's own relative error is largest" in caplog.text
    layers = crossbar_layers(model)
    assert float(torch.cat((layers["one"].row_copies, layers["two"].row_copies)).max()) > 1
    assert not any(layer._forward_hooks for layer in layers.values())
    assert not any(p.requires_grad for p in model.parameters())


def test_weights_of_inference_mode_are_calibrated_all_the_same(caplog):
    with torch.inference_mode():
        model = Net().eval()
    patch_model(model, ReRAMConfig(device=device(), redundancy=0.5, retention_times=["1d"]))
    with caplog.at_level("WARNING", "hf_reram"):
        calibrate(model, [torch.randn(16, 2, 8, 8)])
    assert not any(layer._forward_hooks for layer in crossbar_layers(model).values())
    assert all(layer.calibrated for layer in crossbar_layers(model).values())


@pytest.mark.parametrize("mean", [0.0, -0.02])
@pytest.mark.parametrize("kind", [Net, Pooled])
@pytest.mark.parametrize("examples", [40, 200])
def test_the_loss_is_the_divergence_that_chips_show(kind, mean, examples):
    """All layers' cells together: pixels that meet the same cells, and shifts that move all layers alike; few examples
    are probed more often."""
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(examples, 2, 8, 8) + 1.0
    with torch.no_grad():
        model.head.weight.mul_(4)
        expected = model(x).log_softmax(-1)
    retention = {"type": "log", "std_offset": [0.1], "std_slope": [0.0], "mean_offset": [0.0, mean]}
    config = straight(
        device=device(v0=1e6, read_noise=0.0, retention=retention),
        retention_times=["1s"],
        retention_loss="sensitivity",
        center_inputs=False,
    )
    calibrate(patch_model(model, config), [x])
    model.train()(x)
    found = float(retention_loss(model))
    divergences = []
    with torch.no_grad():
        for seed in range(60):
            with deploy(model.eval(), "1s", seed=seed):
                divergences.append(F.kl_div(model(x).log_softmax(-1), expected, reduction="batchmean", log_target=True))
    assert found == pytest.approx(float(torch.stack(divergences).mean()), rel=0.2)
