"""redundancy: inputs that drive several rows, and layers whose weights are held by several cell pairs, whose errors
average out."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_reram import (
    ReRAMConfig,
    add_retention_loss,
    calibrate,
    crossbar_layers,
    deploy,
    noise_to_signal,
    patch_model,
    reconfigure,
    sampled_drift,
    summarize,
)
from hf_reram.calibration.redundancy import MAX_PAIRS, allot
from hf_reram.evaluation.inspect import inspect_layers
from hf_reram.nn.array import cell_weight, hold
from hf_reram.nn.mapping import Inputs, layer_scales
from hf_reram.nn.physics import sampling
from tests.samples.devices import SILENT, device, straight
from tests.samples.models import bert_batch


class DepthwiseNet(nn.Module):
    """A stem and a depthwise convolution of few cells, and two layers of many."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.pointwise = nn.Conv2d(8, 64, 1)
        self.head = nn.Linear(64, 100)

    def forward(self, x):
        x = self.pointwise(self.depthwise(self.stem(x).relu()).relu()).relu()
        return self.head(x.mean((2, 3)))


def with_pairs(layer, pairs):
    layer.pairs_per_weight.fill_(pairs)
    layer.forget_white_noise()
    return layer


@given(st.data())
@settings(deadline=None)
def test_no_other_choice_of_as_many_cells_leaves_less_error(data):
    n = data.draw(st.integers(1, 3))
    errors = data.draw(st.lists(st.floats(0.01, 10), min_size=n, max_size=n))
    cells = data.draw(st.lists(st.integers(1, 9), min_size=n, max_size=n))
    spare = data.draw(st.integers(0, 30))
    pairs = allot(errors, cells, spare)
    used = sum(c * (k - 1) for c, k in zip(cells, pairs))
    assert used <= spare
    assert all(k == MAX_PAIRS or c > spare - used for k, c in zip(pairs, cells))  # nothing fits any more

    def left(choice):
        return sum(e / k for e, k in zip(errors, choice))

    full = min(
        left(choice)
        for choice in itertools.product(range(1, 32), repeat=n)
        if sum(c * (k - 1) for c, k in zip(cells, choice)) <= spare
    )
    # Greedy is the best for the cells that it takes in whole; what it may miss is in the knapsack's last step.
    relaxed = min(left([k + (i == j) for i, k in enumerate(pairs)]) for j in range(n))
    assert relaxed - 1e-9 <= full <= left(pairs) + 1e-9


def test_layers_without_error_or_cells_get_nothing_and_no_weight_more_than_the_most():
    assert allot([0.0, 1.0, 1.0], [5, 0, 10], 100) == [1, 1, 11]
    assert allot([1.0], [1], 1000) == [MAX_PAIRS]
    assert allot([], [], 10) == []


def test_small_layers_get_the_cells_and_the_model_ages_better():
    torch.manual_seed(0)
    model, x = DepthwiseNet().eval(), torch.randn(16, 3, 16, 16)
    plain, logits, errors = copy.deepcopy(model), model(x), {}
    for share, net in ((0.0, plain), (0.1, model)):
        patch_model(net, ReRAMConfig(device="cmo-hfox-ibm", redundancy=share, weight_clip=None))
        calibrate(net, [x])
        with torch.no_grad():
            ideal, found = net(x), []
            for seed in range(40):
                with deploy(net, "10y", seed=seed):
                    found.append(float((net(x) - ideal).square().mean()))
        errors[share] = sum(found) / len(found)
    assert not any(layer.copied for layer in crossbar_layers(plain).values())
    copies = {name: layer.row_copies.clone() for name, layer in crossbar_layers(model).items()}
    assert copies["depthwise"].mean() > copies["stem"].mean() > copies["head"].mean()
    weights = sum(layer.weight.numel() for layer in crossbar_layers(model).values())
    cells = {"stem": 8 * 9, "depthwise": 9, "pointwise": 64, "head": 100}  # of an input channel
    cells = sum(2 * cells[name] * int(k.sum()) for name, k in copies.items())
    assert 2.19 * weights < cells <= 2.2 * weights
    assert summarize(model).cells == cells == sum(layer.cells for layer in inspect_layers(model, "1d"))
    assert errors[0.1] < 0.5 * errors[0.0]
    calibrate(model, [x])  # starts from one row each, and ends where it did
    assert all(torch.equal(k, layer.row_copies) for k, layer in zip(copies.values(), crossbar_layers(model).values()))
    assert logits.shape == model(x).shape


def test_tiles_of_a_size_are_full_and_whole_layers_get_pairs():
    torch.manual_seed(0)
    model, x = DepthwiseNet().eval(), torch.randn(16, 3, 16, 16)
    patch_model(model, ReRAMConfig(device="cmo-hfox-ibm", redundancy=0.1, tile_size=16))
    calibrate(model, [x])
    layers = crossbar_layers(model)
    assert not any(layer.copied for layer in layers.values())
    assert layers["depthwise"].pairs > layers["stem"].pairs > layers["head"].pairs == 1


@pytest.mark.parametrize("pairs", [1, 2, 5])
def test_chips_err_by_the_closed_form_over_the_pairs(pairs):
    torch.manual_seed(0)
    cell = device(read_noise=0.0, programming=[0.0])
    model, x = nn.Sequential(nn.Linear(32, 32)).train(), torch.randn(64, 32)
    patch_model(model, straight(device=cell.to_dict() | {"v0": 1e6}, retention_loss="output", retention_times=["1d"]))
    calibrate(model, [x])
    add_retention_loss(model(x).sum(), model)
    single = noise_to_signal(model)["0"]
    with_pairs(model[0], pairs)
    add_retention_loss(model(x).sum(), model)
    said = noise_to_signal(model)["0"]
    spread = []
    with torch.no_grad():
        for seed in range(200):
            with deploy(model, "1d", seed=seed):
                spread.append(model[0].chip.weight - model[0].weight)
        errors = torch.stack(spread)
        mean = errors.mean(0)
        variance = (errors - mean).square().sum(0) / (len(errors) - 1)
        offset = model[0].input_offset
        noise = (variance @ (x - offset).square().mean(0)).sum()
        signal = ((x - offset) @ model[0].weight.T).square().mean(0).sum()
        systematic = ((x - offset) @ mean.T).square().mean(0).sum() - noise / len(errors)
    assert said == pytest.approx(float((noise + systematic) / signal), rel=0.05)
    assert said <= single


def test_sampled_drift_and_white_noise_have_the_pairs_power():
    torch.manual_seed(0)
    found = {}
    for loss in ("drift", "noise"):
        for pairs in (1, 4):
            model = nn.Sequential(nn.Linear(64, 64)).train()
            patch_model(model, straight(device=device(v0=1e6), retention_loss=loss, retention_times=["1d"]))
            layer = with_pairs(model[0], pairs)
            layer.crossbar.forward.sampling = sampling(layer.crossbar.physics, loss, None)
            with torch.no_grad():
                drifted = torch.stack([hold(layer, layer.scalars()).weight for _ in range(60)])
            found[loss, pairs] = float(drifted.var(0).mean())
        assert found[loss, 4] == pytest.approx(found[loss, 1] / 4, rel=0.1)


def test_read_noise_averages_over_the_columns():
    cell = device(read_noise=0.5, retention=SILENT)
    model = nn.Sequential(nn.Linear(16, 400, bias=False))
    patch_model(model, ReRAMConfig(device=cell, weight_clip=None, range_shrink=0.5))
    x = torch.randn(300, 16)
    calibrate(model, [x])
    stds = []
    for pairs in (1, 4):
        with_pairs(model[0], pairs)
        with torch.no_grad(), deploy(model, "1s"):
            stds.append(float((model(x) - model(x)).std()))
    assert stds[1] == pytest.approx(stds[0] / 2, rel=0.02)


def test_a_pair_more_is_another_cell_and_the_first_is_as_before():
    model = nn.Sequential(nn.Linear(16, 16))
    patch_model(model, ReRAMConfig(device=device(read_noise=0.0)))
    with deploy(model, "1d", seed=3):
        one = model[0].chip.weight.clone()
    with_pairs(model[0], 2)
    with deploy(model, "1d", seed=3):
        two = model[0].chip.weight.clone()
    with deploy(model, "1d", seed=3):
        assert torch.equal(two, model[0].chip.weight)
    second = 2 * two - one
    errors = torch.stack((one - model[0].weight, second - model[0].weight)).detach().flatten(1)
    assert abs(float(torch.corrcoef(errors)[0, 1])) < 0.3 and float(errors[1].std()) > 0


def test_checkpoints_keep_the_pairs(tiny_bert, tmp_path):
    patch_model(tiny_bert, ReRAMConfig(redundancy=0.5))
    calibrate(tiny_bert, [bert_batch()])
    copies = {name: layer.row_copies for name, layer in crossbar_layers(tiny_bert).items()}
    assert max(float(k.max()) for k in copies.values()) > 1
    tiny_bert.save_pretrained(tmp_path)
    again = type(tiny_bert).from_pretrained(tmp_path)
    assert all(torch.equal(copies[name], layer.row_copies) for name, layer in crossbar_layers(again).items())
    with deploy(tiny_bert, "1d", seed=1), deploy(again, "1d", seed=1):
        layers = crossbar_layers(again)
        assert all(
            torch.equal(layers[n].chip.weight, layer.chip.weight) for n, layer in crossbar_layers(tiny_bert).items()
        )


class Branches(nn.Module):
    """Two layers that read one input, one that reads their sum, and one that is asked for by name."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.out, self.other = (nn.Linear(12, n) for n in (12, 12, 5, 5))

    def forward(self, x, other=False):
        if other:
            return self.other(x)
        return self.out((self.query(x) + self.key(x)).tanh())


def branches(redundancy=0.5, **options):
    """Of which one input is far larger than the others."""
    torch.manual_seed(0)
    model, x = Branches().eval(), torch.randn(64, 12)
    x[:, 3] *= 20.0
    options |= {"device": "cmo-hfox-ibm", "redundancy": redundancy, "retention_times": ["10y"]}
    patch_model(model, ReRAMConfig(**options))
    return model, x


def test_layers_that_read_one_input_share_its_rows_and_most_are_the_largest_inputs():
    model, x = branches()
    calibrate(model, [x])
    copies = model.query.row_copies
    assert torch.equal(copies, model.key.row_copies) and not torch.equal(copies, model.out.row_copies)
    assert copies.argmax() == 3 and copies.max() > 3 * copies.median()
    assert torch.equal(model.query.input_scale, copies)
    weights = 2 * 12 * 12 + 2 * 12 * 5
    assert 1.4 * weights < summarize(model).cells / 2 <= 1.5 * weights


def test_a_layer_that_no_data_reach_keeps_its_rows_and_what_it_computes():
    model, x = branches(redundancy=1.0)
    calibrate(model, [{"x": x, "other": True}])
    copies, before = model.other.row_copies.clone(), model(x, other=True)
    assert copies.max() > 1
    calibrate(model, [x])
    assert torch.equal(copies, model.other.row_copies)
    torch.testing.assert_close(model(x, other=True), before)


def test_what_a_layer_keeps_counts_among_the_cells_on_top():
    model, x = branches(redundancy=0.5)
    for other in (True, False):
        calibrate(model, [{"x": x, "other": other}])
    weights = sum(layer.weight.numel() for layer in crossbar_layers(model).values())
    assert model.other.copied and 1.4 * weights < summarize(model).cells / 2 <= 1.5 * weights


@pytest.mark.parametrize("options", [{}, {"equalize_inputs": True}, {"input_range": "auto"}], ids=str)
def test_a_second_calibration_ends_where_the_first_did(options):
    model, x = branches(redundancy=1.0, **options)
    numbers = []
    for _ in range(2):
        calibrate(model, [x])
        numbers.append({n: b.clone() for n, b in model.named_buffers() if b is not None})
    assert model.query.copied
    for name, first in numbers[0].items():
        torch.testing.assert_close(first, numbers[1][name], msg=name)


def test_weights_whose_first_layer_no_data_reach_get_cells_too():
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(8, 8) for name in "ab"})
    model["b"].weight = model["a"].weight
    model.forward = lambda x: model["b"](x)
    patch_model(model, ReRAMConfig(device="cmo-hfox-ibm", redundancy=1.0, retention_times=["10y"]))
    calibrate(model, [torch.randn(32, 8)])
    assert float(model["b"].row_copies.sum()) == 16
    assert summarize(model).cells == model["b"].cells == 2 * 128


def test_inspection_without_data_tells_of_the_weights_as_they_are():
    model, x = branches(redundancy=1.0)
    calibrate(model, [x])
    (said,) = [layer.noise_to_signal for layer in inspect_layers(model, "10y") if layer.name == "query"]
    errors, layer = [], model.query
    for seed in range(100):
        with deploy(model, "10y", seed=seed), torch.no_grad():
            errors.append(layer.chip.weight / layer.input_scale - layer.weight.clamp(-1, 1))
    found = float(torch.stack(errors).square().sum((1, 2)).mean() / layer.weight.detach().square().sum())
    assert layer.row_copies.max() > 4 and said == pytest.approx(found, rel=0.1)


def test_rows_are_more_than_layers_of_as_many_cells():
    """Where few inputs matter: whole layers, as tiles of a size have them, spend their cells on all."""
    errors = []
    for options in ({}, {"tile_size": 1 << 10}):
        model, x = branches(redundancy=1.0, **options)
        calibrate(model, [x])
        with torch.no_grad():
            ideal = model(x)
            errors.append(sum(float((_on_chip(model, x, seed, "10y") - ideal).square().mean()) for seed in range(40)))
    assert errors[0] < 0.7 * errors[1]


COPIES = [1, 3, 2, 5, 1, 8]


def kinds():
    torch.manual_seed(0)
    yield nn.Linear(6, 40), torch.randn(50, 6) + 1, "Linear"
    yield nn.Conv2d(6, 20, 3, padding=1, stride=2), torch.randn(3, 6, 8, 8) + 1, "Conv2d"
    yield nn.Conv1d(6, 20, 3, padding=1), torch.randn(3, 6, 16) + 1, "Conv1d"


@pytest.fixture(params=[pytest.param(kind[:2], id=kind[2]) for kind in kinds()])
def twins(request):
    """A layer whose inputs drive several rows, and one that has as many inputs instead, a kth of each, alike otherwise;
    each with its input."""
    layer, x = (copy.deepcopy(part) for part in request.param)
    k = torch.tensor(COPIES)
    wide = copy.deepcopy(layer)
    wide.weight = nn.Parameter(layer.weight.detach().repeat_interleave(k, 1))
    wide.in_channels = wide.in_features = sum(COPIES)
    if isinstance(layer, nn.Linear):
        del wide.in_channels
    parts = (x.movedim(1, -1) / k).repeat_interleave(k, -1).movedim(-1, 1)
    config = straight(device=device(read_noise=0.3), retention_loss="output+drift", center_inputs=False, adc_bits=12)
    models = []
    for part, inputs in ((layer, x), (wide, parts)):
        models.append((nn.Sequential(part), inputs))
        patch_model(models[-1][0], config)
        calibrate(models[-1][0], [inputs])
    mine, other = models[0][0][0], models[1][0][0]
    mine.row_copies.copy_(k)
    mine.input_scale.copy_(k)
    for name in ("input_range", "range_shrink", "gain", "weight_scale", "adc_range"):
        getattr(mine, name).copy_(getattr(other, name))
    return models


def test_copies_of_rows_are_the_rows_of_a_layer_with_as_many_inputs(twins):
    outputs, chips, drifted, said = [], [], [], []
    for model, x in twins:
        with torch.no_grad():
            model.eval()
            outputs.append(model(x))
            chips.append(torch.stack([_on_chip(model, x, seed) for seed in range(200)]))
            model.train()
            with sampled_drift(model):
                drifted.append(torch.stack([model(x) for _ in range(200)]))
        add_retention_loss(model(x).sum(), model)
        said.append(noise_to_signal(model)["0"])
    assert twins[0][0][0].cells == twins[1][0][0].cells
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=2 * float(twins[0][0][0].weight_scale.max()) / 2048)
    assert said[0] == pytest.approx(said[1], rel=1e-4)
    for found in (chips, drifted):
        mine, other = ((f - f.mean(0)).square().mean() for f in found)
        assert float(mine) == pytest.approx(float(other), rel=0.1)
    shifts = [float((f.mean(0) - y).square().mean()) for f, y in zip(chips, outputs)]
    assert shifts[0] == pytest.approx(shifts[1], rel=0.2)


def test_the_best_clip_is_that_of_a_layer_with_as_many_inputs(twins):
    found = []
    for model, x in twins:
        layer = model[0]
        u = layer.windows(layer.pad(layer.examples(x / layer.over_channels(layer.input_scale))))
        phi = u.view(len(u), 1, -1).transpose(0, 1)
        rows = layer.to_rows(cell_weight(layer, layer.weight.detach()))
        found.append(layer_scales(layer, rows, "auto", Inputs(phi, 0.1 * phi, 0.01)))
    layer = twins[0][0][0]
    assert layer.reads_windows or (found[0] < layer.weight_scale).any()
    torch.testing.assert_close(*found, rtol=0.05, atol=0.0)


def test_white_noise_has_the_power_of_the_copies(twins):
    stds = []
    for model, x in twins:
        reconfigure(model, retention_loss="noise")
        with torch.no_grad(), sampled_drift(model):
            stds.append(float(torch.stack([model(x) for _ in range(200)]).var(0).mean()))
    assert stds[0] > 0 and stds[0] == pytest.approx(stds[1], rel=0.5)  # of rows by their number, not by their inputs


def _on_chip(model, x, seed, time="1d"):
    with deploy(model, time, seed=seed):
        return model(x)


@pytest.mark.parametrize("wrong", [-0.1, 5, True, None, "some", float("nan")])
def test_a_wrong_share_is_named(wrong):
    with pytest.raises(ValueError, match=r"redundancy=.*from 0 to 4"):
        ReRAMConfig(redundancy=wrong)
