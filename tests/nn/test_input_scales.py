"""Input scales: V = W · a meets (x - o) / a."""

import copy

import pytest
import torch
from torch import nn
from transformers import BertForSequenceClassification

from hf_reram import (
    ReRAMConfig,
    add_retention_loss,
    calibrate,
    deploy,
    hold_weights,
    noise_to_signal,
    patch_model,
    unpatch_model,
)
from hf_reram.nn.array import cell_weight
from hf_reram.nn.drive import to_dacs
from tests.samples.devices import straight
from tests.samples.layers import KINDS, layer_of
from tests.samples.models import bert_batch


def uneven(x: torch.Tensor, kind, offset: float = 0.0) -> torch.Tensor:
    """The input with a few large channels."""
    channel = 1 if isinstance(kind, dict) else x.dim() - 1
    shape = [1] * x.dim()
    shape[channel] = -1
    return x * torch.logspace(-1.5, 1.0, x.shape[channel]).view(shape) + offset


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("training", [True, False])
def test_scales_change_nothing_on_ideal_cells(kind, offset, training):
    layer, x = layer_of(kind)
    x = uneven(x, kind, offset).requires_grad_()
    model = nn.Sequential(layer).train(training)
    mark = torch.linspace(-1, 1, model(x).numel())
    expected = model(x)
    (expected.flatten() * mark).sum().backward()
    gradients = {**{name: p.grad.clone() for name, p in model.named_parameters()}, "x": x.grad.clone()}
    model.zero_grad()
    x.grad = None
    patch_model(model, straight(retention_loss="output", input_percentile=100, equalize_inputs=True))
    calibrate(model, [x.detach()])
    with torch.no_grad():  # whatever calibration chose
        layer.input_scale.copy_(torch.logspace(-1, 1, len(layer.input_scale)))
        layer.weight_scale.fill_(1e3)
        layer.input_range.fill_(float(to_dacs(layer, x, layer.scalars()).abs().max()) * 1.01)
        layer.input_floor.fill_(-1.0)
    assert layer.equalized and layer.centered == (offset > 0)
    y = model(x)
    size = float(expected.detach().abs().max())
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5 * size)
    (y.flatten() * mark).sum().backward()
    found = {**{name: p.grad for name, p in model.named_parameters()}, "x": x.grad}
    for name, grad in gradients.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-5 * float(grad.abs().max()))


@pytest.mark.parametrize("kind", ["linear", "conv1d", {"kernel_size": 1}, {"kernel_size": 1, "groups": 2}], ids=str)
def test_chips_err_as_the_closed_form_says_and_less_than_without(kind):
    layer, x = layer_of(kind)
    x = uneven(x, kind)
    errors = {}
    for equalize in (True, False):
        model = nn.Sequential(copy.deepcopy(layer)).train()
        config = {"retention_times": ["1d"], "retention_loss": "output", "weight_clip": None}
        patch_model(model, straight(equalize_inputs=equalize, **config))
        calibrate(model, [x])
        assert model[0].equalized == equalize
        add_retention_loss(model(x).sum(), model)
        (said,) = noise_to_signal(model).values()
        model.eval()
        with torch.no_grad():
            exact, found = model(x), []
            constant = exact - (0 if model[0].bias is None else model[0].over_channels(model[0].bias))
            for seed in range(60):
                with deploy(model, "1d", seed=seed):
                    found.append(float((model(x) - exact).square().sum() / constant.square().sum()))
        # Chips have programming errors and read noise beside retention.
        errors[equalize] = sum(found) / len(found)
        assert 0.8 * said < errors[equalize] < 3 * said
    assert errors[True] < 0.9 * errors[False]


def test_layers_with_one_input_share_scales_and_checkpoints_keep_them(tiny_bert, tmp_path):
    with torch.no_grad():
        tiny_bert.bert.embeddings.LayerNorm.weight[3] = 20
    before = {name: value.clone() for name, value in tiny_bert.state_dict().items()}
    batch = bert_batch()
    patch_model(tiny_bert, ReRAMConfig(device="cmo-hfox-ibm", equalize_inputs=True))
    calibrate(tiny_bert, [batch])
    first = tiny_bert.bert.encoder.layer[0].attention.self
    assert first.query.equalized and float(first.query.input_scale.max()) > 1.5
    assert torch.equal(first.query.input_scale, first.key.input_scale)
    assert torch.equal(first.query.input_scale, first.value.input_scale)
    tiny_bert.save_pretrained(tmp_path)
    again = BertForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(again(**batch).logits, tiny_bert(**batch).logits)
    unpatch_model(tiny_bert)
    assert all(torch.equal(value, before[name]) for name, value in tiny_bert.state_dict().items())


def test_even_inputs_are_driven_as_they_are():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64))
    patch_model(model, ReRAMConfig(equalize_inputs=True))
    calibrate(model, [torch.randn(500, 64)])
    assert not model[0].equalized


def test_weights_are_held_by_what_the_cells_hold():
    model = nn.Sequential(nn.Linear(4, 3))
    patch_model(model, straight(weight_clip=None))
    layer = model[0]
    with torch.no_grad():
        layer.input_scale.copy_(torch.tensor([1.0, 2.0, 4.0, 0.5]))
        layer.weight_scale.fill_(1.0)
        layer.weight.fill_(9.0)
    hold_weights(model)
    assert torch.equal(layer.weight, torch.tensor([1.0, 0.5, 0.25, 2.0]).expand(3, 4))
    assert torch.equal(cell_weight(layer, layer.weight), torch.ones(3, 4))
