"""Numbers of calibration follow the training."""

import math

import pytest
import torch
from torch import nn
from transformers import set_seed

from hf_reram import (
    ReRAMConfig,
    ReRAMTrainer,
    calibrate,
    crossbar_layers,
    evaluate_robustness,
    follow_training,
    hold_weights,
    inspect_layers,
    patch_model,
    stop_following,
)
from hf_reram.calibration.sensitivity import measure_sensitivity
from hf_reram.calibration.settle import calibrate as calibrate_again
from hf_reram.nn.layer import BUFFERS
from hf_reram.training.following import begin_following, clamped_shares, is_due
from tests.samples import models
from tests.samples.models import bert_batch
from tests.training.test_trainer import arguments, examples


def test_looks_are_many_at_first_and_rare_later():
    looks = [step for step in range(4096) if is_due(step)]
    assert looks[:17] == list(range(17)) and looks[17:19] == [18, 20]
    assert all(b - a == 64 for a, b in zip(looks[-20:], looks[-19:]))
    assert len([step for step in looks if step < 100]) < 40 and len(looks) < 180


def layer_in_training(**options):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 8)), torch.randn(64, 16) + 1.0
    patch_model(model, ReRAMConfig(**options))
    calibrate(model, [x])
    return model.train(), x


@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_numbers_become_those_of_a_calibration_on_what_is_seen(factor):
    model, x = layer_in_training(dac_bits=8, input_percentile=100.0)
    moved = factor * x + 2.0
    follow_training(model)
    for _ in range(60):
        model[0].crossbar.following.looks = True
        model[0].crossbar.following.steps = 0
        model(moved)
        follow_training(model)
    stop_following(model)
    found = {name: getattr(model[0], name).clone() for name in BUFFERS}
    calibrate_again(model, [moved])
    assert bool(found["input_offset"].any())
    for name in ("input_range", "input_floor", "gain"):
        torch.testing.assert_close(found[name], getattr(model[0], name), rtol=0.1, atol=0.02)
    torch.testing.assert_close(found["input_offset"], model[0].input_offset, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("tile", [None, 8])
@pytest.mark.parametrize("rare", [False, True])
def test_the_full_scale_of_the_adc_follows_the_currents(rare, tile):
    """To about where a calibration would put it, up and down, whatever rare tokens do."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 8, bias=False)), torch.randn(512, 16)
    if rare:
        x[::50] *= 30
    patch_model(model, ReRAMConfig(adc_bits=5, tile_size=tile, retention_loss="none", center_inputs=False))
    calibrate(model, [x]).train()
    right = float(model[0].adc_range)
    for start in (0.3, 4.0):
        stop_following(model)
        model[0].adc_range.fill_(start * right)
        follow_training(model)
        for _ in range(60):
            model[0].crossbar.following.looks, model[0].crossbar.following.steps = True, 0
            model(x)
            follow_training(model)
        assert 0.6 < float(model[0].adc_range) / right < 1.6


@pytest.mark.parametrize("outputs", [8, 70_000])
def test_full_scales_stay_where_nothing_is_seen_and_where_they_are_right(outputs):
    """Also of a vocabulary, of which a look takes a part."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, outputs, bias=False)), torch.randn(2, 4)
    patch_model(model, ReRAMConfig(adc_bits=6, retention_loss="none", center_inputs=False))
    calibrate(model, [torch.randn(64, 4)]).train()
    right = float(model[0].adc_range)
    for inputs in (torch.zeros(2, 4), x):
        follow_training(model)
        for _ in range(12):
            model[0].crossbar.following.looks, model[0].crossbar.following.steps = True, 0
            model(inputs)
            follow_training(model)
        stop_following(model)
        found = float(model[0].adc_range) / right
        assert found == 1 if not inputs.any() else 0.6 < found < 1.7
        model[0].adc_range.fill_(right)


def test_weight_scales_grow_with_the_weights():
    model, x = layer_in_training()
    before = model[0].weight_scale.clone()
    follow_training(model)
    model(x)
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    weight = model[0].weight.detach().clone()
    follow_training(model)
    torch.testing.assert_close(model[0].weight_scale, 1.5 * before)
    hold_weights(model)
    held = torch.minimum(weight.abs(), model[0].weight_scale[:, None]) * weight.sign()
    torch.testing.assert_close(model[0].weight.detach(), held)


def test_a_channel_of_zeros_can_be_trained():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4))
    nn.init.zeros_(model[0].weight)
    patch_model(model, ReRAMConfig())
    calibrate(model, [torch.randn(32, 6)]).train()
    follow_training(model)
    with torch.no_grad():
        model[0].weight.normal_(0, 0.1)
    follow_training(model)
    hold_weights(model)
    assert float(model[0].weight.detach().square().mean().sqrt()) > 0.08


def test_frozen_layers_and_learned_ranges_keep_their_numbers():
    for options in ({"learn_input_range": True}, {}):
        model, x = layer_in_training(**options)
        before = {name: getattr(model[0], name).detach().clone() for name in BUFFERS}
        if not options:
            model.requires_grad_(False)
        follow_training(model)
        model(10 * x)
        follow_training(model)
        for name in BUFFERS:
            assert torch.equal(getattr(model[0], name), before[name]), name


def test_padding_does_not_count(tiny_bert):
    patch_model(tiny_bert, ReRAMConfig(retention_loss="none"))
    batch = bert_batch()
    batch["attention_mask"][:, 5:] = 0
    calibrate(tiny_bert, [batch]).train()
    layer = crossbar_layers(tiny_bert)["bert.encoder.layer.0.attention.self.query"]
    seen = []
    for fill in (1, 2):
        batch["input_ids"] = torch.where(batch["attention_mask"] == 0, fill, batch["input_ids"])
        begin_following(tiny_bert)
        torch.manual_seed(0)
        tiny_bert.eval()
        layer.train()
        tiny_bert(**batch)
        seen.append(layer.crossbar.following.seen[layer.crossbar_name])
    torch.testing.assert_close(seen[0].sums, seen[1].sums)
    torch.testing.assert_close(seen[0].largest, seen[1].largest)


def hot(folder, rate=1e-3, steps=40, **options):
    """A small model with random weights at a high learning rate."""
    set_seed(0)
    model = models.tiny_bert(num_hidden_layers=2).train()
    args = arguments(folder, max_steps=steps, learning_rate=rate, logging_steps=10)
    config = ReRAMConfig(retention_loss="none")
    trainer = ReRAMTrainer(model, args, train_dataset=examples(64), reram_config=config, **options)
    trainer.train()
    return trainer


def test_the_trainer_follows_by_default_and_logs_what_is_clamped(tmp_path):
    logged = {}
    for follows in (True, False):
        trainer = hot(tmp_path, follow_training=follows)
        logged[follows] = [line["clamped"] for line in trainer.state.log_history if "clamped" in line]
        assert crossbar_layers(trainer.model)["classifier"].crossbar.following is None
    assert logged[True][-1] < 0.01 and logged[False][-1] > 3 * logged[True][-1]


def test_much_that_is_clamped_is_told_once(caplog):
    model, x = layer_in_training()
    follow_training(model)
    begin_following(model, settled=True)
    model(20 * x)
    follow_training(model)
    assert float(clamped_shares(model)["0"]) > 0.5


def test_compiled_layers_keep_their_numbers():
    model, x = layer_in_training()
    before = {name: getattr(model[0], name).clone() for name in BUFFERS}
    compiled = torch.compile(model, backend="eager")
    follow_training(model)
    for _ in range(3):
        compiled(5 * x)
        with torch.no_grad():
            model[0].weight.mul_(1.5)
        follow_training(model)
    for name in BUFFERS:
        assert torch.equal(getattr(model[0], name), before[name]), name


@pytest.mark.parametrize(("warmup", "wanted"), [(0.0, [None] * 6), (0.5, [1 / 3, 2 / 3] + [None] * 4)])
def test_sampled_drift_warms_up_in_proportion_to_the_steps(tmp_path, warmup, wanted):
    """Also with micro-batches, and from where a training is resumed."""
    found: list = []
    for resumed in (False, True):
        set_seed(0)
        model = models.tiny_bert()
        trainer = ReRAMTrainer(
            model,
            arguments(tmp_path, max_steps=6, save_strategy="steps", save_steps=3, gradient_accumulation_steps=2),
            train_dataset=examples(96),
            reram_config=ReRAMConfig(retention_warmup=warmup),
        )
        layer, strengths = crossbar_layers(model)["classifier"], []

        def look(layer, args, strengths=strengths):
            if layer.training:
                strength = layer.crossbar.forward.sampling.strength
                strengths.append(None if strength is None else float(strength))

        layer.register_forward_pre_hook(look)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3") if resumed else None)
        found.append(strengths)
    both = [strength for strength in wanted for _ in range(2)]
    assert found[0] == pytest.approx(both) and found[1] == pytest.approx(both[6:])


MEASURES = {
    "inspect": lambda model, x: inspect_layers(model, "1d", batches=[x]),
    "sensitivity": lambda model, x: measure_sensitivity(model, [x]),
    "evaluate": lambda model, x: evaluate_robustness(
        model, lambda m: float(m.train()(x).sum()), ["1d"], seeds=1, progress=False
    ),
}


@pytest.mark.parametrize("measure", MEASURES)
def test_what_is_measured_between_a_forward_and_its_step_is_not_followed(measure):
    """Inputs fifty times as large would take the range with them; a chip that is called in training mode, too."""
    found = []
    for measures in (False, True):
        model, x = layer_in_training(adc_bits=6)
        follow_training(model)
        for _ in range(3):
            model(x).square().mean().backward()
            if measures:
                with torch.no_grad():
                    MEASURES[measure](model, 50 * x)
                model.train()
            follow_training(model)
        found.append({name: getattr(model[0], name) for name in BUFFERS})
    assert all(torch.equal(found[0][name], found[1][name]) for name in BUFFERS)


@pytest.mark.parametrize("way", ["calibrate", "load"])
def test_scales_that_are_set_during_a_training_are_those_of_their_weights(way):
    """They are not multiplied once more by what the weights have grown."""
    model, x = layer_in_training()
    other, _ = layer_in_training()
    with torch.no_grad():
        other[0].weight.mul_(3)
    calibrate_again(other, [x])
    follow_training(model)
    if way == "load":
        model.load_state_dict(other.state_dict())
    else:
        with torch.no_grad():
            model[0].weight.mul_(3)
        calibrate_again(model, [x])
    follow_training(model)
    assert torch.equal(model[0].weight_scale, other[0].weight_scale)
    with torch.no_grad():
        model[0].weight.mul_(2)
    follow_training(model)
    torch.testing.assert_close(model[0].weight_scale, 2 * other[0].weight_scale)


def numbers(model):
    return {
        f"{name}.{buffer}": getattr(layer, buffer).detach().clone()
        for name, layer in crossbar_layers(model).items()
        for buffer in BUFFERS
    }


@pytest.mark.parametrize("value", [math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("options", [{}, {"adc_bits": 8, "dac_bits": 8}, {"input_range": "per_token"}])
def test_a_step_that_is_skipped_since_it_is_not_finite_leaves_no_trace(tiny_bert, value, options):
    patch_model(tiny_bert, ReRAMConfig(retention_loss="none", **options))
    batch = bert_batch()
    calibrate(tiny_bert, [batch]).train()
    follow_training(tiny_bert)
    before = numbers(tiny_bert)
    states = tiny_bert.bert.embeddings(batch["input_ids"]).detach()
    states[0, 0, 0] = value
    assert not torch.isfinite(tiny_bert(inputs_embeds=states, labels=batch["labels"]).loss)
    follow_training(tiny_bert)
    after = numbers(tiny_bert)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(math.isnan(share) for share in clamped_shares(tiny_bert).values())
    tiny_bert(**batch)
    follow_training(tiny_bert)
    assert all(0 <= share < 0.5 for share in clamped_shares(tiny_bert).values())
    assert all(bool(torch.isfinite(number).all()) for number in numbers(tiny_bert).values())


def test_of_accumulated_batches_those_that_are_finite_are_followed():
    found = []
    for bad in (False, True):
        model, x = layer_in_training(adc_bits=6, dac_bits=8)
        follow_training(model)
        model(2 * x)
        if bad:
            model(x.index_fill(0, torch.tensor([3]), math.inf))
        follow_training(model)
        found.append(numbers(model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert float(model[0].input_range) > 4


def test_weights_that_are_put_back_after_a_step_that_was_not_finite_keep_their_scales():
    model, _ = layer_in_training()
    before, weight = model[0].weight_scale.clone(), model[0].weight.detach().clone()
    follow_training(model)
    for value in (math.nan, math.inf):
        model[0].weight.data[0, 0] = value
        follow_training(model)
        assert torch.equal(model[0].weight_scale, before)
        model[0].weight.data.copy_(weight)
        follow_training(model)
        torch.testing.assert_close(model[0].weight_scale, before, rtol=1e-6, atol=0)
    model[0].weight.data.mul_(2)
    follow_training(model)
    torch.testing.assert_close(model[0].weight_scale, 2 * before)


def test_steps_that_a_grad_scaler_skips_leave_numbers_finite(tiny_bert):
    patch_model(tiny_bert, ReRAMConfig(retention_loss="none", adc_bits=8))
    batch = bert_batch()
    calibrate(tiny_bert, [batch]).train()
    hold_weights(tiny_bert)
    optimizer, scaler = torch.optim.SGD(tiny_bert.parameters(), lr=1e-2), torch.amp.GradScaler("cpu", 1e38)
    weight = tiny_bert.classifier.weight.detach().clone()
    for _ in range(3):
        scaler.scale(100 * tiny_bert(**batch).loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        follow_training(tiny_bert)
        hold_weights(tiny_bert)
    assert torch.equal(tiny_bert.classifier.weight, weight) and scaler.get_scale() < 1e38
    assert all(bool(torch.isfinite(number).all()) for number in numbers(tiny_bert).values())
