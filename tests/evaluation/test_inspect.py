import pytest
import torch
from torch import nn

from hf_reram import ReRAMConfig, calibrate, crossbar_layers, deploy, digital, patch_model
from hf_reram.evaluation.inspect import inspect_layers
from tests.samples.devices import device
from tests.samples.models import bert_batch


def test_ratios_with_data_are_what_chips_show():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 40)).eval()
    x = torch.randn(200, 64)
    patch_model(model, ReRAMConfig(device=device(v0=1e6, read_noise=0.0), weight_clip=None, retention_times=["1s"]))
    calibrate(model, [x])
    (found,) = inspect_layers(model, "1d", batches=[x[:100], x[100:]])
    with torch.no_grad():
        with digital(model):
            clean = model(x)
        errors = []
        for seed in range(200):
            with deploy(model, "1d", seed=seed):
                errors.append((model(x) - clean).square().sum())
        signal = (clean - model[0].bias).square().sum()
    assert found.noise_to_signal == pytest.approx(float(torch.stack(errors).mean() / signal), rel=0.03)
    assert (found.rows, found.columns, found.cells) == (64, 40, 2 * 64 * 40)


def test_the_worst_layers_come_first_and_nothing_is_left_changed(tiny_bert):
    patch_model(tiny_bert, ReRAMConfig())
    calibrate(tiny_bert, [bert_batch()])
    state = crossbar_layers(tiny_bert)["classifier"].crossbar
    error, before = state.error, tiny_bert(**bert_batch()).logits
    for batches in (None, [bert_batch()]):
        layers = inspect_layers(tiny_bert, "10y", 350.0, batches)
        ratios = [layer.noise_to_signal for layer in layers]
        assert len(layers) == 14 and ratios == sorted(ratios, reverse=True) and ratios[-1] > 0
        assert inspect_layers(tiny_bert, "1s", None, batches)[0].noise_to_signal < ratios[0]
    assert state.error is error and not tiny_bert.training and not state.measure
    assert not any(layer.training for layer in crossbar_layers(tiny_bert).values())
    assert torch.equal(tiny_bert(**bert_batch()).logits, before)


def test_bad_times_and_plain_models_are_refused(tiny_bert):
    with pytest.raises(ValueError, match="no crossbar layers"):
        inspect_layers(tiny_bert, "1d")
    patch_model(tiny_bert, ReRAMConfig())
    with pytest.raises(ValueError, match="is not a time"):
        inspect_layers(tiny_bert, "soon")
