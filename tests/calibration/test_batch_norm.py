import copy

import pytest
import torch
from torch import nn
from transformers import (
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

from hf_reram import ReRAMConfig, crossbar_layers, patch_model
from hf_reram.calibration.batch_norm import batch_norms, fold_batch_norm, freeze_batch_norm, reestimate_batch_norm

SHAPES = {
    "resnet": lambda: ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5)
    ),
    "mobilenet": lambda: MobileNetV2ForImageClassification(
        MobileNetV2Config(depth_multiplier=0.1, min_depth=8, depth_divisible_by=8, image_size=32, num_labels=5)
    ),
}


def trained_like(model: nn.Module) -> nn.Module:
    """With batch norms as training leaves them: neither mean nor variance nor scale at their initial values."""
    torch.manual_seed(0)
    for norm in batch_norms(model).values():
        nn.init.normal_(norm.running_mean, std=0.3)
        nn.init.uniform_(norm.running_var, 0.3, 3.0)
        nn.init.uniform_(norm.weight, 0.3, 2.0)
        nn.init.normal_(norm.bias, std=0.3)
    return model.eval()


@pytest.mark.parametrize("shape", SHAPES)
def test_folding_changes_no_output_and_leaves_unit_scales(shape, tmp_path):
    model = trained_like(SHAPES[shape]())
    x = torch.randn(3, 3, 32, 32)
    before = model(x).logits
    folded = fold_batch_norm(model, x)
    assert set(folded) == set(batch_norms(model))
    torch.testing.assert_close(model(x).logits, before, rtol=1e-4, atol=1e-4)
    for norm in batch_norms(model).values():
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        torch.testing.assert_close(scale, torch.ones_like(scale), rtol=1e-6, atol=0)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(again(x).logits, model(x).logits)


def test_folding_twice_is_folding_once():
    model = trained_like(SHAPES["resnet"]())
    x = torch.randn(2, 3, 32, 32)
    fold_batch_norm(model, x)
    before = copy.deepcopy(model.state_dict())
    fold_batch_norm(model, x)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=1e-6, atol=1e-7)


def test_a_batch_norm_that_shares_its_input_is_not_folded():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.one, self.two = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.conv(x)
            return self.one(y) + self.two(y)

    assert fold_batch_norm(Shared(), torch.randn(2, 3, 4, 4)) == []


def test_reestimated_statistics_are_the_batches_own():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5))
    model.eval()
    batches = [torch.randn(8, 3, 5, 5) * 3 + 1 for _ in range(4)]
    reestimate_batch_norm(model, batches)
    outputs = [model[0](x).transpose(0, 1).flatten(1) for x in batches]
    torch.testing.assert_close(model[1].running_mean, torch.stack([y.mean(1) for y in outputs]).mean(0))
    torch.testing.assert_close(model[1].running_var, torch.stack([y.var(1) for y in outputs]).mean(0))
    assert not any(m.training for m in model.modules()) and model[1].momentum == 0.1
    with pytest.raises(ValueError, match="batches is empty"):
        reestimate_batch_norm(model, [])


def test_reestimation_on_a_crossbar_sees_the_crossbar():
    torch.manual_seed(0)
    model = SHAPES["resnet"]()
    digital = copy.deepcopy(model)
    patch_model(model, ReRAMConfig(device="cmo-hfox-ibm", range_shrink=1.0, weight_clip=1.0))
    x = torch.randn(8, 3, 32, 32)
    for one in (model, digital):
        reestimate_batch_norm(one, [x])
    assert crossbar_layers(model)
    norm = next(iter(batch_norms(model)))
    assert not torch.allclose(model.get_submodule(norm).running_var, digital.get_submodule(norm).running_var)


def test_frozen_statistics_stay():
    model = SHAPES["resnet"]().train()
    before = copy.deepcopy(model.state_dict())
    freeze_batch_norm(model)
    model(torch.randn(4, 3, 32, 32))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
