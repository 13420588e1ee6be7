import copy
import math

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTForImageClassification

from hf_reram import (
    ReRAMConfig,
    add_retention_loss,
    calibrate,
    crossbar_layers,
    deploy,
    digital,
    patch_model,
    unpatch_model,
)
from hf_reram.calibration import observation, ranges, settle
from hf_reram.calibration.statistics import Channels, LayerStatistics
from hf_reram.device.moments import weight_error
from hf_reram.nn.layer import BUFFERS
from hf_reram.nn.mapping import CLIPS, Inputs, expected_error, weight_scales
from tests.samples.devices import device, straight
from tests.samples.models import bert_batch
from tests.samples.texts import llama


@pytest.mark.parametrize("percent", [50, 99, 99.9, 100])
def test_percentiles_stream(percent):
    layer = nn.Sequential(nn.Linear(32, 4))
    patch_model(layer, straight())
    statistics = LayerStatistics(layer[0], "0", 0)
    batches = [torch.randn(500, 32) * (1 + i) for i in range(6)]
    for batch in batches:
        statistics.update(batch, None)
    exact = torch.quantile(torch.cat(batches).abs().flatten(), percent / 100)
    assert statistics.percentile(percent) == pytest.approx(float(exact), rel=0.01)
    assert len(statistics.samples) == 256


def test_samples_are_uniform_over_batches():
    layer = nn.Sequential(nn.Linear(4, 4))
    patch_model(layer, straight())
    statistics = LayerStatistics(layer[0], "0", 0)
    for i in range(8):
        statistics.update(torch.full((1000, 4), float(i)), None)
    shares = torch.bincount(statistics.samples[:, 0].long(), minlength=8)
    assert shares.min() > 10  # of 32 expected; 5 standard deviations are 26
    assert shares.sum() == 256


def test_padding_is_left_out(tiny_bert):
    patch_model(tiny_bert, straight())
    batch = bert_batch()
    real = batch["attention_mask"].bool()
    batch["input_ids"][batch["input_ids"] == 49] = 7
    with torch.no_grad():
        tiny_bert.bert.embeddings.word_embeddings.weight[49] *= 1000
    calibrate(tiny_bert, [batch])
    before = [layer.weight_scale.clone() for layer in crossbar_layers(tiny_bert).values()]
    ranges = [float(layer.input_range) for layer in crossbar_layers(tiny_bert).values()]
    batch["input_ids"][~real] = 49
    calibrate(tiny_bert, [batch])
    assert [float(layer.input_range) for layer in crossbar_layers(tiny_bert).values()] == pytest.approx(ranges)
    assert all(torch.equal(a, layer.weight_scale) for a, layer in zip(before, crossbar_layers(tiny_bert).values()))


def test_calibration_leaves_modes_weights_and_rng_of_the_model_alone(tiny_bert):
    patch_model(tiny_bert, ReRAMConfig())
    tiny_bert.train()
    tiny_bert.bert.eval()
    before = {n: p.clone() for n, p in tiny_bert.named_parameters()}
    calibrate(tiny_bert, [bert_batch()], sensitivity=True)
    assert tiny_bert.training
    assert not tiny_bert.bert.training
    assert all(torch.equal(p, before[n]) for n, p in tiny_bert.named_parameters())
    assert all(p.grad is None for p in tiny_bert.parameters())


@pytest.mark.parametrize("batches", [[], [torch.zeros(0, 4)]])
def test_empty_sets_are_refused(batches):
    model = nn.Sequential(nn.Linear(4, 4))
    patch_model(model, ReRAMConfig())
    with pytest.raises(ValueError, match="calibration set is empty"):
        calibrate(model, batches)


@pytest.mark.parametrize("batches", [None, 5, torch.zeros(3, 4), {"input": torch.zeros(3, 4)}, [None], [5]])
def test_what_is_no_batch_is_refused(batches):
    model = patch_model(nn.Sequential(nn.Linear(4, 4)), ReRAMConfig())
    with pytest.raises(TypeError, match="allowed"):
        calibrate(model, batches)
    assert not model[0].calibrated


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (math.nan, "^an input of the model contains NaN"),
        (math.inf, "^calibration data drive layer '0' with NaN or infinite values$"),
    ],
)
def test_what_is_not_finite_is_refused_as_what_it_is(value, told):
    model = patch_model(nn.Sequential(nn.Linear(4, 4)), ReRAMConfig())
    with pytest.raises(ValueError, match=told):
        calibrate(model, [torch.tensor([[value, -value, 0.0, 1.0]])])
    assert not model[0].calibrated


def test_auto_clip_is_the_minimum_of_the_expected_error():
    rows = torch.randn(1, 5, 64)
    error = weight_error(device(), (86400.0,), None)
    inputs = Inputs(torch.randn(1, 200, 64))
    best = weight_scales(rows, "auto", True, error, inputs)
    rms = rows.square().mean(2, keepdim=True).sqrt()
    largest = rows.abs().amax(2, keepdim=True)
    chosen = expected_error(rows, best.view(1, 5, 1), error, inputs)
    for clip in (*CLIPS, 1e9):
        assert (chosen <= expected_error(rows, torch.minimum(largest, clip * rms), error, inputs) * 1.00001).all()


def test_one_sided_inputs_are_centered_and_chips_err_less():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8)).eval()
    x = torch.randn(16, 3, 12, 12) + 2
    exact, errors = model(x).detach(), {}
    for center in (True, False):
        patch_model(model, ReRAMConfig(device="cmo-hfox-ibm", weight_clip=None, center_inputs=center))
        calibrate(model, [x])
        assert all(layer.centered == center for layer in crossbar_layers(model).values())
        with torch.no_grad():
            per_chip = []
            for seed in range(20):
                with deploy(model, "10y", seed=seed):
                    per_chip.append((model(x) - exact).square().mean())
        errors[center] = float(torch.stack(per_chip).mean())
        unpatch_model(model)
    assert errors[True] < 0.6 * errors[False]


def test_inputs_around_zero_are_driven_as_they_are():
    model = nn.Sequential(nn.Linear(16, 4))
    patch_model(model, ReRAMConfig())
    calibrate(model, [torch.randn(500, 16)])
    assert not model[0].centered


def test_padding_does_not_count_in_the_offset():
    model = nn.Sequential(nn.Linear(4, 4))
    patch_model(model, ReRAMConfig())
    channels, statistics = Channels(model[0], "0", 0), LayerStatistics(model[0], "0", 0)
    x = torch.full((2, 6, 4), 3.0)
    x[:, 3:] = 100.0
    mask = torch.tensor([[1, 1, 1, 0, 0, 0]] * 2)
    channels.update(x, mask.reshape(-1))
    channels.give(statistics)
    torch.testing.assert_close(statistics.offset, torch.full((4,), 3.0))


@pytest.mark.parametrize("shape", [(6,), (3, 5, 5)], ids=str)
def test_the_offset_is_that_of_all_batches(shape):
    """Also of batches of one, whose means are all over the place, and of batches of different sizes. Tokens count by
    the inverse of their size, pixels alike."""
    torch.manual_seed(0)
    data = torch.randn(60, *shape) + torch.linspace(1, 3, shape[0]).view(-1, *[1] * (len(shape) - 1))
    kind = nn.Linear(6, 4) if len(shape) == 1 else nn.Conv2d(3, 4, 3)
    for sizes in ([1] * 30 + [30], [60]):
        model = nn.Sequential(copy.deepcopy(kind))
        patch_model(model, ReRAMConfig(calibration_batches=64))
        calibrate(model, list(data.split(sizes)))
        weights = 1 / data.norm(dim=1, keepdim=True)
        exact = (data * weights).sum(0) / weights.sum() if len(shape) == 1 else data.mean((0, 2, 3))
        torch.testing.assert_close(model[0].input_offset, exact)


def test_rare_huge_tokens_do_not_decide_for_the_offset():
    torch.manual_seed(0)
    data = torch.randn(200, 16) + 2
    data[7, 3] = 5000.0
    model = nn.Sequential(nn.Linear(16, 4))
    patch_model(model, ReRAMConfig())
    calibrate(model, [data])
    assert model[0].centered
    assert float((model[0].input_offset - 2).abs().max()) < 0.4


def test_input_scales_are_those_of_all_batches():
    torch.manual_seed(0)
    data = torch.randn(512, 24) * torch.linspace(0.05, 5, 24)
    weight = torch.randn(8, 24)
    scales = []
    for batches in ([data[:1], data[1:]], [data]):
        model = nn.Sequential(nn.Linear(24, 8))
        with torch.no_grad():
            model[0].weight.copy_(weight)
        patch_model(model, ReRAMConfig(equalize_inputs=True))
        calibrate(model, batches)
        scales.append(model[0].input_scale.clone())
    assert model[0].equalized
    torch.testing.assert_close(*scales, rtol=1e-4, atol=0.0)


def test_expected_error_is_what_chips_show():
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(48, 20, bias=False)).eval()
    patch_model(model, ReRAMConfig(device=device(v0=1e6, read_noise=0.0), weight_clip=1.0))
    x = torch.randn(400, 48)
    calibrate(model, [x])
    with torch.no_grad():
        with digital(model):
            clean = model(x)
        found = []
        for seed in range(60):
            with deploy(model, "1d", seed=seed):
                found.append((model(x) - clean).square().mean(0).sum())
    error = weight_error(device(), (86400.0,), None)
    expected = expected_error(model[0].weight[None], model[0].weight_scale.view(1, -1, 1), error, Inputs(x[None])).sum()
    assert float(torch.stack(found).mean()) == pytest.approx(float(expected), rel=0.02)


def test_auto_shrink_trades_curvature_for_noise():
    def shrink_of(noise):
        model = nn.Sequential(nn.Linear(64, 32))
        patch_model(model, ReRAMConfig(device=device(read_noise=noise, read_voltage=0.5)))
        torch.manual_seed(0)
        calibrate(model, [torch.randn(300, 64)])
        return float(model[0].range_shrink)

    assert shrink_of(0.0) < shrink_of(0.05) < shrink_of(5.0) == 1.0


def test_shared_inputs_share_range_and_shrink(tiny_bert):
    patch_model(tiny_bert, ReRAMConfig())
    calibrate(tiny_bert, [bert_batch()])
    attention = tiny_bert.bert.encoder.layer[0].attention.self
    for name in ("input_range", "range_shrink", "gain"):
        assert getattr(attention.query, name) == getattr(attention.key, name) == getattr(attention.value, name)


@pytest.mark.parametrize("gain", ["calibrated", "full_scale", "small_signal"])
def test_gains_are_exact_where_they_promise(gain):
    model = nn.Sequential(nn.Linear(1, 1, bias=False)).eval()
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    options = {"device": device(v0=0.1), "range_shrink": 1.0, "input_percentile": 100.0, "weight_clip": None}
    patch_model(model, ReRAMConfig(gain=gain, **options))
    x = torch.linspace(-2, 2, 401)[:, None]
    calibrate(model, [x])
    with torch.no_grad():
        y = model(x)
    if gain == "full_scale":
        assert float(y[-1]) == pytest.approx(2, rel=1e-4)
    elif gain == "small_signal":
        assert float(y[201] / x[201]) == pytest.approx(1, rel=1e-3)
    else:
        assert float((y * (y - x)).sum() / y.square().sum()) == pytest.approx(0, abs=2e-3)


def test_one_sided_inputs_get_the_whole_dac():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.Hardswish(), nn.Linear(32, 4)).eval()
    x = torch.randn(256, 8) * 3
    exact = model(x).detach()
    patch_model(model, ReRAMConfig(device="cmo-hfox-ibm", dac_bits=5, weight_clip=None, center_inputs=False))
    calibrate(model, [x])
    floors = [float(layer.input_floor) for layer in crossbar_layers(model).values()]
    assert floors[0] < -0.5 and floors[1] == 0 and -0.5 < floors[2] < 0
    one_sided = float((model(x).detach() - exact).square().mean())
    for layer in crossbar_layers(model).values():
        layer.input_floor.fill_(-1.0)
    assert one_sided < 0.5 * float((model(x).detach() - exact).square().mean())


def test_a_chip_is_not_calibrated(tiny_bert):
    patch_model(tiny_bert, ReRAMConfig())
    calibrate(tiny_bert, [bert_batch()])
    with deploy(tiny_bert, "1d"), pytest.raises(ValueError, match="calibrate it outside of deploy"):
        calibrate(tiny_bert, [bert_batch()])
    calibrate(tiny_bert, [bert_batch()])


def numbers(model) -> dict[str, torch.Tensor]:
    return {f"{n}.{b}": getattr(layer, b).clone() for n, layer in crossbar_layers(model).items() for b in BUFFERS}


@pytest.mark.parametrize("where", ["in the data", "in the choice", "in sensitivity"])
def test_a_failed_calibration_changes_nothing(tiny_bert, monkeypatch, where):
    patch_model(tiny_bert, ReRAMConfig(redundancy=0.5))
    calibrate(tiny_bert, [bert_batch()], sensitivity=True)
    expected, logits = numbers(tiny_bert), tiny_bert(**bert_batch()).logits
    found = {name: layer.sensitivity for name, layer in crossbar_layers(tiny_bert).items()}
    assert any(layer.copied for layer in crossbar_layers(tiny_bert).values())
    calls = []

    def fail(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return chosen(*args, **kwargs)

    module, name = {
        "in the data": (observation, "call_model"),
        "in the choice": (ranges, "_gain"),
        "in sensitivity": (settle, "measure_sensitivity"),
    }[where]
    chosen = getattr(module, name)
    monkeypatch.setattr(module, name, fail)
    calls += [1, 1] if where == "in sensitivity" else []
    other = [bert_batch(seed=seed) for seed in range(5)]
    with pytest.raises(KeyboardInterrupt):
        calibrate(tiny_bert, other, sensitivity=True)
    after = numbers(tiny_bert)
    assert all(torch.equal(after[key], value) for key, value in expected.items())
    assert all(torch.equal(layer.sensitivity, found[n]) for n, layer in crossbar_layers(tiny_bert).items())
    assert torch.equal(tiny_bert(**bert_batch()).logits, logits)
    monkeypatch.undo()
    calibrate(tiny_bert, other, sensitivity=True)
    assert any(not torch.equal(numbers(tiny_bert)[key], value) for key, value in expected.items())


@pytest.mark.parametrize("sensitivity", [False, True])
def test_calibration_works_under_inference_mode(tiny_bert, sensitivity):
    with torch.inference_mode():
        patch_model(tiny_bert, ReRAMConfig(retention_loss="output"))
        batch = {key: value.clone() for key, value in bert_batch().items()}
        calibrate(tiny_bert, [batch], sensitivity=sensitivity)
    found = numbers(tiny_bert)
    calibrate(tiny_bert, [bert_batch()], sensitivity=sensitivity)
    assert all(torch.equal(value, found[key]) for key, value in numbers(tiny_bert).items())
    loss = add_retention_loss(tiny_bert.train()(**bert_batch()).loss, tiny_bert)[0]
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in tiny_bert.parameters() if p.grad is not None)


class Labelled(nn.Module):
    """Takes labels by keyword, as models of transformers do."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, pixel_values=None, labels=None, mask=None):
        assert labels is None or labels.shape == pixel_values.shape[:1]
        return self.layer(pixel_values)


@pytest.mark.parametrize("model", [Labelled(), nn.Sequential(nn.Linear(6, 3))], ids=["labels", "input alone"])
def test_batches_of_a_data_loader(model):
    x, labels = torch.randn(32, 6), torch.randint(3, (32,))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, labels), 8)
    patch_model(model, ReRAMConfig())
    calibrate(model, loader)
    found = crossbar_layers(model).popitem()[1].input_range.clone()
    calibrate(model, [x[i : i + 8] for i in range(0, 32, 8)])
    assert torch.equal(crossbar_layers(model).popitem()[1].input_range, found)


IDS, MASK = torch.arange(1, 33).reshape(4, 8) % 29 + 1, torch.ones(4, 8, dtype=torch.long)
CLASSES, TOKENS = torch.tensor([0, 1, 2, 1]), torch.arange(32).reshape(4, 8) % 2


@pytest.mark.parametrize(
    "labels",
    [CLASSES, CLASSES[:, None], nn.functional.one_hot(CLASSES, 3).float(), ["a", "b", "c", "b"]],
    ids=["classes", "a column", "one hot", "texts"],
)
def test_labels_in_a_tuple_are_no_masks_of_a_hugging_face_model(tiny_bert, labels):
    patch_model(tiny_bert, ReRAMConfig())
    calibrate(tiny_bert, [(IDS, labels)])
    found = numbers(tiny_bert)
    calibrate(tiny_bert, [{"input_ids": IDS}])
    assert all(torch.equal(value, found[key]) for key, value in numbers(tiny_bert).items())


@pytest.mark.parametrize("wrap", [tuple, list])
@pytest.mark.parametrize("others", [(TOKENS,), (MASK, TOKENS), (MASK, CLASSES)], ids=["tokens", "both", "a mask"])
def test_what_may_be_masks_or_labels_is_refused(tiny_bert, others, wrap):
    patch_model(tiny_bert, ReRAMConfig())
    with pytest.raises(TypeError, match=r"value 1 of the tuple.*'attention_mask'.*a dict of the model's arguments"):
        calibrate(tiny_bert, [wrap((IDS, *others))])
    assert not any(layer.calibrated for layer in crossbar_layers(tiny_bert).values())


def test_token_ids_and_labels_of_a_language_model_are_refused():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=16))
    patch_model(model, ReRAMConfig())
    with pytest.raises(TypeError, match="allowed is a dict of the model's arguments"):
        calibrate(model, [(IDS, IDS)])
    calibrate(model, [(IDS,)])
    assert all(layer.calibrated for layer in crossbar_layers(model).values())


@pytest.mark.parametrize("labels", [CLASSES, torch.rand(4, 3)], ids=["classes", "soft"])
def test_images_and_labels_go_on_working(labels):
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = ViTForImageClassification(ViTConfig(**shape, image_size=16, patch_size=8, num_labels=3))
    patch_model(model, ReRAMConfig())
    images = torch.randn(4, 3, 16, 16)
    calibrate(model, [(images, labels)])
    found = numbers(model)
    calibrate(model, [images])
    assert all(torch.equal(value, found[key]) for key, value in numbers(model).items())


def test_a_batch_that_does_not_fit_is_named():
    model = patch_model(nn.Sequential(nn.Linear(4, 4)), ReRAMConfig())
    with pytest.raises(ValueError, match="the model cannot be called with a batch of type Tensor"):
        calibrate(model, [torch.zeros(3, 5)])


class Timed(nn.Module):
    """Needs a vector beside its input."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, sample, timestep, scale=1.0):
        return self.layer(sample * timestep[:, None] * scale)


def test_a_vector_that_the_model_needs_is_passed():
    x = torch.randn(32, 6)
    model = patch_model(Timed(), ReRAMConfig(center_inputs=False, input_percentile=100.0))
    calibrate(model, [(x, torch.full((32,), 3.0), torch.zeros(32))])
    assert float(model.layer.input_range) == pytest.approx(3 * float(x.abs().max()), rel=1e-5)
    with pytest.raises(TypeError, match=r"a batch of \[\(32, 6\)\]: Timed needs \['sample', 'timestep'\]"):
        calibrate(model, [(x,)])


@pytest.mark.parametrize("seconds", [3600.0, 86400.0])
@pytest.mark.parametrize("mean", [(0.0, 5.0), (0.3, 2.0, 3.0)])
def test_noise_has_the_power_of_the_devices_error(mean, seconds):
    torch.manual_seed(0)
    table = {"type": "table", "g_ref": 50.0, "times": [1.0, 1e5], "std": [[0.5, 1.0]] * 2, "mean": [list(mean)] * 2}
    cell = {"g_min": 1.0, "g_max": 50.0, "retention": table}
    model = nn.Sequential(nn.Linear(64, 64))
    patch_model(model, ReRAMConfig(device=cell, retention_loss="noise", retention_times=[seconds]))
    layer = model[0]
    power = []
    for seed in range(60):
        with deploy(model, seconds, seed=seed):
            ideal = torch.minimum(layer.weight.abs(), layer.held_scale()) * layer.weight.sign()
            power.append(float(((layer.chip.weight - ideal) / layer.held_scale()).square().mean()))
    assert float(layer.white_noise_std()) ** 2 == pytest.approx(sum(power) / len(power), rel=0.03)


@pytest.mark.parametrize("tied", [True, False])
def test_logits_that_nobody_reads_are_not_computed(tied):
    model = llama(tie_word_embeddings=tied)
    widths = []
    model.lm_head.register_forward_hook(lambda head, args, logits: widths.append(logits.shape[1]))
    patch_model(model, ReRAMConfig())
    batch = {"input_ids": torch.arange(12).view(2, 6)}
    calibrate(model, [batch])
    assert set(widths) == ({1} if tied else {6})  # an untied head is a crossbar, and sees all tokens
    numbers = {name: value.clone() for name, value in model.state_dict().items()}
    calibrate(model, [{**batch, "labels": batch["input_ids"]}])
    assert widths[-1] == 6
    assert all(torch.equal(value, numbers[name]) for name, value in model.state_dict().items())
