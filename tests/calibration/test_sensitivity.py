"""The Fisher information of a layer's outputs against its exact value."""

import pytest
import torch
from torch import nn

from hf_reram import ReRAMConfig, crossbar_layers, patch_model
from hf_reram.calibration.sensitivity import measure_sensitivity


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
