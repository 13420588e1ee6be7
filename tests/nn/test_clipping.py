"""Weights that leave the cells' range after calibration, or shrink far below it, are named before a number is reported
as a chip's."""

import copy
import logging
import re
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertForSequenceClassification, TrainingArguments

from hf_reram import (
    ReRAMConfig,
    ReRAMTrainer,
    add_retention_loss,
    calibrate,
    crossbar_layers,
    deploy,
    evaluate_robustness,
    follow_training,
    hold_weights,
    inspect_layers,
    patch_model,
    sampled_drift,
)
from hf_reram.model.patch import initialize_layers
from hf_reram.nn.clipping import clipped_beyond_choice, far_below_scale
from tests.samples.models import bert_batch, tiny_bert


def patched(**changes) -> BertForSequenceClassification:
    return calibrate(patch_model(tiny_bert(), ReRAMConfig(**changes)), [bert_batch()])


@pytest.fixture
def said(caplog, monkeypatch):
    """The layers that a warning names since it was last called, and the shares of their weights [%], or how many times
    their errors are those of a fresh choice."""
    monkeypatch.setattr(logging.getLogger("hf_reram.nn.clipping"), "propagate", True)

    def named() -> dict[str, int]:
        text = " ".join(r.getMessage() for r in caplog.records if "their scales were chosen" in r.getMessage())
        caplog.clear()
        return {name: int(share) for name, share in re.findall(r"([\w.]+) \((\d+)(?:%| times)\)", text)}

    return named


def shares(model) -> dict[str, float]:
    return {layer.name: layer.clipped for layer in inspect_layers(model, "1d")}


def adapted(model, scale: float = 1.0):
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["query"])).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=scale)
    return model


def grow(layer, times: float = 30.0) -> None:
    layer.weight.data.copy_(layer.weight.data * times)


def call(model):
    with torch.no_grad():
        model(**bert_batch())


def chip(model):
    with deploy(model, "1d"):
        pass


def report(model):
    return evaluate_robustness(model, lambda m: float(m(**bert_batch()).loss), ["1d"], seeds=1, progress=False)


@pytest.mark.parametrize("use", [call, chip, report])
@pytest.mark.parametrize("clip", ["auto", None, 2.0])
def test_weights_beyond_their_scale_are_named_with_their_share(said, use, clip):
    model = patched(weight_clip=clip)
    use(model)
    assert said() == {}  # what calibration clips is meant
    names = ["bert.encoder.layer.0.attention.self.key", "classifier"]
    for name in names:
        grow(crossbar_layers(model)[name])
    use(model)
    found, all_shares = said(), shares(model)
    assert found == {name: round(100 * all_shares[name]) for name in names}
    assert min(found.values()) > 40
    use(model)
    assert said() == {}  # once


@pytest.mark.parametrize(("times", "named"), [(1.015, []), (1.03, ["classifier"])])
def test_a_little_growth_of_narrow_rows_is_not_named(said, times, named):
    """Of 16 weights a row the largest is at the edge, 6 % of all."""
    model = patched(weight_clip=None)
    layer = crossbar_layers(model)["classifier"]
    assert layer.weight.shape[1] == 16
    grow(layer, times)
    call(model)
    assert shares(model)["classifier"] >= 1 / 16
    assert list(said()) == named


@pytest.mark.parametrize("merge", [lambda m: m.merge_and_unload(), lambda m: m.merge_adapter() or m])
def test_a_merged_adapter_is_named(said, merge):
    model = merge(copy.deepcopy(adapted(patched())))
    call(model)
    assert sorted(said()) == [f"bert.encoder.layer.{i}.attention.self.query" for i in range(2)]


def test_a_layer_that_is_called_by_itself_is_named_too(said):
    model = patched()
    layer = crossbar_layers(model)["classifier"]
    x = torch.randn(4, 16)
    with torch.no_grad():
        model.eval()
        layer(x)
        layer.weight.data.mul_(8)
        layer(x)
        assert list(said()) == ["classifier"] and not layer.crossbar.changed


def test_an_adapter_that_is_taken_out_again_is_not(said):
    model = adapted(patched())
    call(model)
    assert said() == {}
    model.merge_adapter()
    call(model)
    assert len(said()) == 2
    model.unmerge_adapter()
    call(model)
    assert said() == {}
    model.merge_adapter()
    chip(model)
    assert len(said()) == 2


def test_a_state_dict_of_other_weights_is_named(said):
    model, other = patched(), tiny_bert().state_dict()
    model.load_state_dict({k: 30 * v for k, v in other.items() if k.endswith("weight")}, strict=False)
    call(model)
    assert set(said()) == set(crossbar_layers(model))


def test_weights_that_a_loop_of_ones_own_loads_are_named_before_they_are_cut(said):
    """Not those that its steps move beyond their range."""
    model, other = patched(retention_loss="none").train(), tiny_bert().state_dict()
    larger = {k: 3 * v for k, v in other.items() if k.endswith("weight")}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)

    def step() -> dict[str, int]:
        model(**bert_batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        hold_weights(model)
        return said()

    model.load_state_dict(larger, strict=False)
    assert set(named := step()) == set(crossbar_layers(model)) and min(named.values()) > 40
    assert step() == {}
    with torch.no_grad():
        for layer in crossbar_layers(model).values():
            layer.weight.mul_(1.01)  # what was cut lies at the edge
    hold_weights(model)
    assert said() == {}
    model.load_state_dict(larger, strict=False)
    assert set(step()) == set(crossbar_layers(model))
    assert step() == {}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("optimizer", [partial(torch.optim.SGD, lr=0.1), partial(torch.optim.AdamW, lr=1e-3)])
def test_the_loop_of_the_readme_says_nothing(said, optimizer, compiled):
    """The first step moves weights that lie at the edge of a small layer beyond it."""
    model = patched().train()
    runs, stepper = torch.compile(model, backend="eager") if compiled else model, optimizer(model.parameters())
    beyond = 0
    for _ in range(3):
        with sampled_drift(model):
            output = runs(**bert_batch())
        loss, _ = add_retention_loss(output.loss, model)
        loss.backward()
        stepper.step()
        stepper.zero_grad()
        beyond += len(clipped_beyond_choice(crossbar_layers(model).values()))
        follow_training(model)
        hold_weights(model)
    assert said() == {} and beyond > 0
    call(model)
    assert said() == {}


@pytest.mark.parametrize("follows", [False, True])
def test_weights_that_are_loaded_between_a_forward_and_its_step_are_named(said, follows):
    model, other = patched(retention_loss="none").train(), tiny_bert().state_dict()
    model(**bert_batch()).loss.backward()
    assert said() == {}
    model.load_state_dict({k: 30 * v for k, v in other.items() if k.endswith("weight")}, strict=False)
    if follows:
        follow_training(model)
    hold_weights(model)
    assert set(said()) == set(crossbar_layers(model))


def test_weights_that_were_written_before_the_first_step_are_named_once(said):
    model = patched(retention_loss="none").train()
    grow(model.classifier)
    for named in (["classifier"], []):
        model(**bert_batch()).loss.backward()
        follow_training(model)
        hold_weights(model)
        assert list(said()) == named


def test_a_state_dict_with_its_own_numbers_is_not(said):
    model, other = patched(), patched(weight_clip=1.5)
    grow(other.classifier, 3.0)
    calibrate(other, [bert_batch()])
    model.load_state_dict(other.state_dict())
    call(model)
    assert said() == {}


def test_a_checkpoint_of_weights_and_foreign_numbers_is_named(said, tmp_path):
    model = patched(weight_clip=None)
    model.save_pretrained(tmp_path / "good")
    grow(model.classifier)
    model.save_pretrained(tmp_path / "bad")
    for folder, names in (("good", set()), ("bad", {"classifier"})):
        call(BertForSequenceClassification.from_pretrained(tmp_path / folder).eval())
        assert set(said()) == names


def test_the_report_says_so():
    model = patched()
    assert not any("clipped" in note for note in report(model).notes)
    grow(model.classifier)
    assert any("classifier (" in note and "clipped" in note for note in report(model).notes)


MAPPINGS = [
    {},
    {"weight_clip": None},
    {"weight_clip": 2.0},
    {"weight_scale": "per_tensor"},
    {"weight_scale": "per_tile", "tile_size": 5},
    {"redundancy": 0.5},
    {"redundancy": 1.0, "tile_size": 8},
    {"device": "cmo-hfox-ibm"},
]


@pytest.mark.parametrize("mapping", MAPPINGS, ids=str)
@pytest.mark.parametrize("use", [call, chip, report])
def test_weights_far_below_their_scale_are_named_once(said, mapping, use):
    model = patched(**mapping)
    use(model)
    assert said() == {}  # right after calibration
    grow(model.classifier, 0.8)
    use(model)
    assert said() == {}  # by 1.6 in power
    grow(model.classifier, 0.1)
    use(model)
    named = said()
    assert list(named) == ["classifier"] and named["classifier"] > 8
    use(model)
    assert said() == {}
    calibrate(model, [bert_batch()])
    use(model)
    assert said() == {}


@pytest.mark.parametrize("device", ["cmo-hfox-ibm", "generic", "hfox-neurram"])
@pytest.mark.parametrize("times", [0.05, 0.3])
def test_the_error_of_far_too_large_scales_is_that_of_chips(device, times):
    model = patch_model(torch.nn.Sequential(torch.nn.Linear(64, 48)), ReRAMConfig(device=device))
    layer = calibrate(model, [torch.randn(64, 64)])[0]
    grow(layer, times)
    (found,) = far_below_scale([layer]).values()

    def power() -> float:
        errors = []
        for seed in range(6):
            with deploy(model, "1d", seed=seed):
                errors.append(float((layer.chip.weight - layer.weight).square().sum()))
        return sum(errors)

    large = power()
    initialize_layers(model)
    assert far_below_scale([layer]) == {} and found == pytest.approx(large / power(), rel=0.15)


@pytest.mark.parametrize("mapping", MAPPINGS, ids=str)
@pytest.mark.parametrize("pruned", ["channels", "weights", "dying", "all"])
def test_pruned_weights_are_not_far_below_their_scale(said, mapping, pruned):
    model = patched(**mapping)
    with torch.no_grad():
        for layer in crossbar_layers(model).values():
            if pruned == "channels":
                layer.weight[1:] = 0.0
            elif pruned == "dying":
                layer.weight[1:] *= 1e-5
            elif pruned == "all":
                layer.weight.zero_()
            else:
                layer.weight[layer.weight.abs() < 1.5 * layer.weight.std()] = 0.0
    report(model)
    assert said() == {}


@pytest.mark.parametrize("sharing", ["per_channel", "per_tensor"])
def test_channels_that_were_small_before_are_not_far_below_their_scale(said, sharing):
    model = patch_model(tiny_bert(), ReRAMConfig(weight_scale=sharing))
    with torch.no_grad():
        for layer in crossbar_layers(model).values():
            layer.weight[1:] *= 0.02
    report(calibrate(model, [bert_batch()]))
    assert said() == {}


def test_a_report_names_both(said):
    model = patched()
    grow(model.classifier, 0.02)
    grow(model.bert.pooler.dense)
    notes = [note for note in report(model).notes if note.startswith("of weights that changed after calibration ")]
    assert len(notes) == 2 and set(said()) == {"classifier", "bert.pooler.dense"}
    assert "many of them are clipped to what the cells can hold: bert.pooler.dense (" in notes[0]
    assert "all of them are far below what the cells can hold" in notes[1] and "classifier (" in notes[1]


def test_the_trainer_calibrates_small_weights_anew(tmp_path):
    model = patched()
    grow(model.classifier, 0.02)
    batch = bert_batch(8)
    data = [{key: value[i] for key, value in batch.items()} for i in range(8)]
    args = TrainingArguments(tmp_path, max_steps=1, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True)
    assert list(far_below_scale(crossbar_layers(model).values())) == ["classifier"]
    ReRAMTrainer(model, args, train_dataset=data)
    assert far_below_scale(crossbar_layers(model).values()) == {}
    assert (model.classifier.weight_scale <= model.classifier.weight.abs().amax(1) * (1 + 1e-6)).all()


def test_calibration_maps_them_anew(said):
    model = patched()
    grow(model.classifier)
    calibrate(model, [bert_batch()])
    assert shares(model)["classifier"] < 0.1
    call(model)
    assert said() == {}


def test_the_trainer_calibrates_anew_before_it_trains(said, tmp_path):
    model = adapted(patched()).merge_and_unload()
    before = max(shares(model).values())
    batch = bert_batch(8)
    data = [{key: value[i] for key, value in batch.items()} for i in range(8)]
    args = TrainingArguments(tmp_path, max_steps=1, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True)
    ReRAMTrainer(model, args, train_dataset=data)
    assert before > 0.4 > 0.2 > max(shares(model).values())
