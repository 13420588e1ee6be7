"""Any model of transformers: patched, calibrated, trained with retention loss, saved, loaded, unpatched."""

from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers.utils import ModelOutput

from hf_reram import (
    ReRAMConfig,
    add_retention_loss,
    calibrate,
    crossbar_layers,
    deploy,
    patch_model,
    sampled_drift,
    unpatch_model,
)
from hf_reram.model.attributes import attributes_of
from hf_reram.model.bypass import left_digital
from hf_reram.model.select import unsupported
from hf_reram.nn import CrossbarLayer
from hf_reram.nn.places import parameter_of
from tests.samples.zoo import DECODER, TIMM, ZOO, Entry, image, table


def _tensors(output) -> list[torch.Tensor]:
    """The floating-point tensors of a model's output, caches left out."""
    values = output.to_tuple() if isinstance(output, ModelOutput) else output
    return [v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point()]


@torch.no_grad()
def _run(model, batch) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return _tensors(model(**batch))


@pytest.mark.parametrize("name", ZOO)
def test_the_whole_path(name, tmp_path):
    _whole_path(ZOO[name], tmp_path)


@pytest.mark.parametrize("name", TIMM)
def test_the_whole_path_of_timm(name, tmp_path):
    pytest.importorskip("timm")
    shape = {"architecture": name, "num_labels": 2, "model_args": TIMM[name]}
    entry = Entry("timm", "TimmWrapperForImageClassification", "TimmWrapperConfig", shape, image)
    _whole_path(entry, tmp_path, all_on_crossbars=True)


def _whole_path(entry, tmp_path, all_on_crossbars=False):
    model, batch = entry.build(), entry.batch()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = _run(model, batch)
    told = attributes_of(model)
    config = ReRAMConfig(device="cmo-hfox-ibm", retention_times=["1d"], retention_loss="output+drift")

    bypassed = {type(model.get_submodule(name)).__name__ for name in left_digital(model)}
    patch_model(model, config)
    layers = crossbar_layers(model)
    assert layers
    weights = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    assert not all_on_crossbars or all(isinstance(m, CrossbarLayer) for m in weights)
    kinds = {found.split("(")[1].rstrip(")") for found in unsupported(model)}
    assert kinds | bypassed == set(entry.digital)
    calibrate(model, [batch])
    model.train()
    with sampled_drift(model):
        output = model(**batch)
    loss = output.loss if getattr(output, "loss", None) is not None else _tensors(output)[0].square().mean()
    total, retention = add_retention_loss(loss, model)
    total.backward()
    assert torch.isfinite(total) and retention > 0
    reached = [layer for layer in layers.values() if parameter_of(layer).grad is not None]
    assert len(reached) >= 0.5 * len(layers)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    model.zero_grad()
    for key, value in model.state_dict().items():
        if "running_" in key or "num_batches" in key:  # training has moved batch norm
            value.copy_(before[key])

    model.eval()
    robust = _run(model, batch)
    assert all(torch.isfinite(value).all() for value in robust)
    with deploy(model, "10y", seed=1):
        aged = _run(model, batch)
    assert any(not torch.equal(a, b) for a, b in zip(aged, robust, strict=True))

    model.save_pretrained(tmp_path)
    again, info = getattr(transformers, entry.model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert list(crossbar_layers(again)) == list(layers)
    assert attributes_of(again) == attributes_of(model) == told
    for one, other in zip(_run(again.eval(), batch), robust, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)

    unpatch_model(model)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    assert all(torch.equal(one, other) for one, other in zip(_run(model, batch), expected, strict=True))


def test_the_table_in_the_readme_is_what_is_tested():
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert len(ZOO) >= 30 and table() in readme


def test_parts_that_stay_digital_are_named(caplog):
    shape = {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 16, "head_dim": 8}
    config = transformers.Llama4TextConfig(**{**DECODER, **shape, "num_hidden_layers": 1})
    with caplog.at_level("WARNING", "hf_reram"):
        patch_model(transformers.Llama4ForCausalLM(config), ReRAMConfig())
    assert "model.layers.0.feed_forward.experts (Llama4TextExperts)" in caplog.text
