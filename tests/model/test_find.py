"""States are found by walking the model as it is now."""

import copy
import gc
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.parallel import DataParallel
from transformers import AutoModel, BertModel, CLIPConfig, CLIPModel

from hf_reram import (
    ReRAMConfig,
    add_retention_loss,
    calibrate,
    crossbar_layers,
    deploy,
    digital,
    evaluate_robustness,
    hold_weights,
    patch_model,
    sampled_drift,
    summarize,
    unpatch_model,
)
from hf_reram.model.find import chip_names, crossbar_states
from tests.samples.devices import device
from tests.samples.models import FewLayers, bert_batch


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)) for _ in range(2))
        self.b.load_state_dict(self.a.state_dict())

    def forward(self, x):
        return self.a(x) + self.b(x)


def towers(**options) -> tuple[Towers, torch.Tensor]:
    model, x = Towers(), torch.randn(32, 6)
    for tower, name in ((model.a, "hfox-neurram"), (model.b, "cmo-hfox-ibm")):
        patch_model(tower, ReRAMConfig(device=name, **options))
    calibrate(model, [x])
    return model, x


def test_two_towers_on_two_devices():
    digital_model, x = Towers(), torch.randn(8, 6)
    model, x = towers()
    digital_model.load_state_dict(model.state_dict(), strict=False)
    assert list(crossbar_layers(model)) == ["a.0", "a.2", "b.0", "b.2"]
    assert [state.config.device.name for state in crossbar_states(model)] == ["hfox-neurram", "cmo-hfox-ibm"]
    summary = summarize(model)
    assert summary.layers == summary.calibrated == 4 and summary.cells == 2 * 2 * (30 + 20)
    assert summary.device == "hfox-neurram, cmo-hfox-ibm"
    with digital(model):
        assert torch.equal(model(x), digital_model(x))
    with torch.no_grad(), deploy(model, "1d", seed=1):
        chips = [layer.chip.weight.clone() for layer in crossbar_layers(model).values()]
        assert not torch.equal(chips[0], chips[2])  # equal weights, cells of their own
    # Each as on its own device: cells of the second are quieter here.
    errors = [float((c - layer.weight).std()) for c, layer in zip(chips, crossbar_layers(model).values())]
    assert max(errors[2:]) < min(errors[:2])
    report = evaluate_robustness(model, lambda m: float(m(x).mean()), ["1d"], seeds=2, progress=False)
    assert any("cmo-hfox-ibm: b" in note and "hfox-neurram: a" in note for note in report.notes)
    unpatch_model(model)
    assert torch.equal(model(x), digital_model(x)) and not crossbar_layers(model)


def test_two_towers_are_trained_with_noise_of_their_own():
    model, x = towers(retention_loss="output+drift", retention_weight=2.0)
    model.train()
    with sampled_drift(model, seed=1):
        y = model(x)
        drifts = [layer.crossbar.sampling for layer in crossbar_layers(model).values()]
        names = [layer.crossbar.sampling.prefix + layer.crossbar_name for layer in crossbar_layers(model).values()]
    assert len(set(names)) == 4 and all(sampling.kind == "drift" for sampling in drifts)
    with sampled_drift(model.a, seed=1):  # by itself it has other names, and so before as after
        assert model.a[0].crossbar.sampling.prefix == ""
    total, value = add_retention_loss(y.square().mean(), model)
    assert float(total.detach() - y.square().mean().detach()) == pytest.approx(2 * float(value), rel=1e-5)
    total.backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in model.parameters())
    with torch.no_grad():
        for layer in crossbar_layers(model).values():
            layer.weight.mul_(100)
    hold_weights(model)
    for layer in crossbar_layers(model).values():
        assert bool((layer.weight.abs() <= layer.held_scale()).all())


def heads(tiny_bert, **options):
    patch_model(tiny_bert, ReRAMConfig(retention_loss="output+drift", **options))
    calibrate(tiny_bert, [bert_batch()])
    return get_peft_model(tiny_bert, LoraConfig(target_modules=["query"], modules_to_save=["classifier"]))


def test_heads_that_peft_copies(tiny_bert):
    before = copy.deepcopy(tiny_bert)
    expected = before(**bert_batch()).logits
    model = heads(tiny_bert)
    assert list(crossbar_layers(model)) == list(crossbar_layers(tiny_bert))
    layer = crossbar_layers(model)["classifier"]
    assert layer.weight.requires_grad and layer.crossbar is crossbar_layers(model)["bert.pooler.dense"].crossbar
    with digital(model):
        torch.testing.assert_close(model(**bert_batch()).logits, expected)
    model.train()
    with torch.no_grad():
        ideal = model(**bert_batch()).logits
        frozen = {n: p for n, p in crossbar_layers(model).items() if n != "classifier"}
        for other in frozen.values():
            other.eval()  # so that only the head samples
        with sampled_drift(model, seed=1):
            assert not torch.equal(model(**bert_batch()).logits, ideal)
    model.train()
    for _ in range(2):
        with sampled_drift(model, seed=1):
            loss = model(**bert_batch()).loss
        state = layer.crossbar
        assert "classifier" in state.forward.terms
        total, _ = add_retention_loss(loss, model)
        total.backward()
        gone = total.grad_fn
        del total, loss
        assert not state.forward.terms and gone is not None
    gradient = layer.weight.grad.clone()
    assert float(gradient.abs().sum()) > 0
    with torch.no_grad(), deploy(model.eval(), "10y", seed=1):
        assert not torch.equal(model(**bert_batch()).logits, expected)
    original = model.base_model.model.classifier.original_module
    assert original.chip is None  # not in use, so no chip
    with model.disable_adapter():
        assert crossbar_layers(model)["classifier"] is original


def test_graphs_are_not_kept_across_steps(tiny_bert):
    model = heads(tiny_bert).train()
    counts = []
    for _ in range(4):
        loss = model(**bert_batch()).loss
        total, _ = add_retention_loss(loss, model)
        total.backward()
        del loss, total
        gc.collect()
        counts.append(sum(isinstance(o, torch.Tensor) and o.grad_fn is not None for o in gc.get_objects()))
    assert counts[-1] <= counts[-2]


@pytest.mark.parametrize("wrap", [DataParallel, lambda m: torch.compile(m, backend="eager")], ids=["DP", "compile"])
def test_wrapped_before_or_after_patching_it_is_the_same_chip(wrap):
    model = FewLayers().eval()
    other = copy.deepcopy(model)
    config, batch = ReRAMConfig(device=device(read_noise=0.0)), bert_batch()
    before = patch_model(wrap(other), config)
    patch_model(model, config)
    names = list(crossbar_layers(model))
    assert list(crossbar_layers(before)) == names
    after = wrap(model)
    assert list(crossbar_layers(after)) == names
    for one in (before, model):
        calibrate(one, [batch])
    with torch.no_grad(), deploy(before, "1d", seed=3), deploy(after, "1d", seed=3):
        chips = [[layer.chip.weight for layer in crossbar_layers(one).values()] for one in (before, after, model)]
        assert all(torch.equal(*pair) for chip in chips[1:] for pair in zip(chips[0], chip, strict=True))
        torch.testing.assert_close(before(**batch).logits, after(**batch).logits)
    with digital(before):
        found = before(**batch).logits
    with digital(other):
        torch.testing.assert_close(found, other(**batch).logits)
    unpatch_model(before)
    assert not crossbar_layers(before)


def test_an_encoder_alone_is_the_same_chip_as_inside_its_head_model(tiny_bert, tmp_path):
    tiny_bert.save_pretrained(tmp_path)
    alone = AutoModel.from_pretrained(tmp_path, add_pooling_layer=True).eval()
    assert isinstance(alone, BertModel)
    config = ReRAMConfig(modules_to_not_convert=None)
    patch_model(tiny_bert, config)
    patch_model(alone, config)
    with deploy(tiny_bert, "1d", seed=4), deploy(alone, "1d", seed=4):
        inside = chip_names(tiny_bert)
        by_name = {name: layer for layer, name in inside.items()}
        for layer, name in chip_names(alone).items():
            assert torch.equal(by_name[name].chip.weight, layer.chip.weight), name


def test_a_copy_of_a_layer_shares_its_models_state_and_a_copy_of_the_model_does_not(tiny_bert):
    patch_model(tiny_bert, ReRAMConfig())
    calibrate(tiny_bert, [bert_batch()])
    head = copy.deepcopy(tiny_bert.classifier)
    assert head.crossbar is tiny_bert.classifier.crossbar
    other = copy.deepcopy(tiny_bert)
    assert other.classifier.crossbar is not head.crossbar
    assert len(crossbar_states(other)) == 1
    assert copy.deepcopy(other.classifier).crossbar is other.classifier.crossbar
    with digital(other):
        assert not tiny_bert.classifier.crossbar.digital
    encoder = patch_model(copy.deepcopy(unpatch_model(tiny_bert)), ReRAMConfig()).bert
    gc.collect()  # its head model is gone
    copied = copy.deepcopy(encoder)
    assert len(crossbar_states(copied)) == 1 and crossbar_states(copied)[0] is not crossbar_states(encoder)[0]


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_made_inside_deploy_is_no_chip(tiny_bert, clone):
    patch_model(tiny_bert, ReRAMConfig())
    calibrate(tiny_bert, [bert_batch()])
    expected = tiny_bert(**bert_batch()).logits
    with torch.no_grad(), deploy(tiny_bert, "10y", seed=1):
        other = clone(tiny_bert)
        assert torch.equal(other(**bert_batch()).logits, expected)
        assert not torch.equal(tiny_bert(**bert_batch()).logits, expected)
    calibrate(other, [bert_batch()])  # which is refused for chips
    with torch.no_grad(), deploy(other, "10y", seed=1):
        assert not torch.equal(other(**bert_batch()).logits, expected)


def test_towers_of_one_model():
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**shape, "image_size": 8, "patch_size": 4}  # 4 patches and a class: as many tokens as there are words
    config = CLIPConfig(text_config={**shape, "vocab_size": 40}, vision_config=vision, projection_dim=8)
    model = CLIPModel(config).train()
    patch_model(model, ReRAMConfig(retention_loss="output"))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    batch = {"input_ids": torch.randint(1, 40, (2, 5)), "attention_mask": mask, "pixel_values": torch.randn(2, 3, 8, 8)}
    calibrate(model, [batch])
    model(**batch)
    kept = crossbar_states(model)[0].forward.kept
    vision_layers = [name for name in kept if name.startswith("vision_model.encoder")]
    text_layers = [name for name in kept if name.startswith("text_model.encoder")]
    assert vision_layers and all(kept[name] == ([None], [None]) for name in vision_layers)
    assert text_layers and all(torch.equal(kept[name][0][0], mask) for name in text_layers)
