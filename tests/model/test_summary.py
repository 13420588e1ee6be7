"""What a summary counts."""

import torch
from torch import nn

from hf_reram import ReRAMConfig, deploy, patch_model, summarize


def test_layers_that_share_a_weight_share_its_cells():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    patch_model(model, ReRAMConfig())
    summary = summarize(model)
    assert (summary.layers, summary.weights, summary.cells) == (2, 36, 72) and summary.share == 36 / (36 + 12)
    with deploy(model, "1d", seed=3):
        assert torch.equal(model[0].chip.weight, model[2].chip.weight)
