"""Numbers of calibration follow the training."""

import logging
import math
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo.utils
from torch import nn
from torch._dynamo.testing import CompileCounter
from transformers import set_seed

from hf_reram import (
    ReRAMConfig,
    ReRAMTrainer,
    calibrate,
    crossbar_layers,
    digital,
    evaluate_robustness,
    follow_training,
    hold_weights,
    inspect_layers,
    patch_model,
    sampled_drift,
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


def numbers(model):
    return {
        f"{name}.{buffer}": getattr(layer, buffer).detach().clone()
        for name, layer in crossbar_layers(model).items()
        for buffer in BUFFERS
    }


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


def test_frozen_layers_keep_their_numbers():
    model, x = layer_in_training()
    before = numbers(model)
    model.requires_grad_(False)
    follow_training(model)
    model(10 * x)
    follow_training(model)
    assert all(torch.equal(before[name], number) for name, number in numbers(model).items())


@pytest.mark.parametrize("factor", [0.5, 1.2, 10.0])
def test_a_learned_range_is_moved_out_as_a_static_one_is_and_never_in(factor):
    found = []
    for kind in ("static", "learned"):
        model, x = layer_in_training(input_range=kind, dac_bits=8, input_percentile=98.0)
        before = numbers(model)
        follow_training(model)
        model(factor * x)
        follow_training(model)
        found.append(numbers(model))
    outwards = factor > 1
    for name, number in found[0].items():
        if name not in ("0.input_range", "0.input_floor") or outwards:
            assert torch.equal(number, found[1][name]), name
    assert torch.equal(found[0]["0.input_range"], found[1]["0.input_range"]) == outwards
    assert torch.equal(found[1]["0.input_range"], before["0.input_range"]) != outwards


@pytest.mark.parametrize("left_out", [0.005, 0.04])
def test_a_learned_range_may_leave_out_a_hundredth(left_out):
    model, x = layer_in_training(input_range="learned", center_inputs=False)
    model[0].input_range.data.fill_(float(x.abs().flatten().quantile(1 - left_out)))
    before = float(model[0].input_range.detach())
    follow_training(model)
    model(x)
    follow_training(model)
    assert float(clamped_shares(model)["0"]) == pytest.approx(left_out, abs=1.5e-3)
    assert float(model[0].input_range.detach()) == pytest.approx(before if left_out < 0.01 else float(x.abs().max()))


def test_learned_ranges_that_are_frozen_stay_and_are_looked_at():
    model, x = layer_in_training(input_range="learned")
    model[0].input_range.requires_grad_(False)
    before = model[0].input_range.clone()
    follow_training(model)
    model(10 * x)
    follow_training(model)
    assert torch.equal(model[0].input_range, before) and float(clamped_shares(model)["0"]) > 0.5


def test_a_look_at_the_same_input_under_another_learned_range_is_another():
    model, x = layer_in_training(input_range="learned")
    follow_training(model)
    shares = []
    for span in (0.1, 0.2, 100.0):
        begin_following(model, settled=True)
        model[0].input_range.data.fill_(span)
        with torch.no_grad():
            model[0].input_range.mul_(1.0)  # as an optimizer's step
        model(x)
        follow_training(model)
        shares.append(float(clamped_shares(model)["0"]))
    u = (x - model[0].input_offset).abs()
    assert shares == pytest.approx([float((u > span).float().mean()) for span in (0.1, 0.2, 100.0)])


def test_a_learned_range_that_a_step_takes_below_zero_is_the_smallest_in_training_and_after():
    model, x = layer_in_training(input_range="learned", retention_loss="none")
    model[0].input_range.data.fill_(0.01)
    optimizer = torch.optim.SGD([model[0].input_range], lr=1.0)
    model[0].input_range.grad = torch.ones(1)
    optimizer.step()
    expected = model(x).detach()
    for holds in (False, True):
        if holds:
            hold_weights(model)
            assert float(model[0].input_range) == pytest.approx(1e-12)
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(x), expected)
            torch.testing.assert_close(model.train()(x), expected)
        assert model[0].calibrated
    follow_training(model)
    model(x)
    follow_training(model)
    assert float(model[0].input_range) == pytest.approx(float((x - model[0].input_offset).abs().max()), rel=0.2)


def test_what_zero_keeps_of_a_learned_range_is_moved_and_held_too():
    model, x = layer_in_training(input_range="learned")
    span, master = model[0].input_range, torch.full((1,), -3.0)
    address = SimpleNamespace(start=0, numel=1)
    span._hp_mapping = SimpleNamespace(lp_fragment_address=address, get_hp_fragment=lambda: master)
    hold_weights(model)
    assert float(master) == pytest.approx(1e-12) and float(span.detach()) > 1
    follow_training(model)
    model(10 * x)
    follow_training(model)
    assert torch.equal(master, span.detach()) and float(master) > 20


def test_a_learned_range_that_is_not_calibrated_stays_so():
    model = nn.Sequential(nn.Linear(4, 3))
    patch_model(model, ReRAMConfig(input_range="learned", retention_loss="none"))
    hold_weights(model)
    assert float(model[0].input_range) == 0 and not model[0].calibrated


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


def hot(folder, rate=1e-3, steps=40, input_range="static", **options):
    """A small model with random weights at a high learning rate."""
    set_seed(0)
    model = models.tiny_bert(num_hidden_layers=2).train()
    args = arguments(folder, max_steps=steps, learning_rate=rate, logging_steps=10)
    config = ReRAMConfig(retention_loss="none", input_range=input_range)
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


def test_learned_ranges_keep_up_with_a_hot_training(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hf_reram.training.mixin"), "propagate", True)
    logged, losses = {}, {}
    for follows in (True, False):
        caplog.clear()
        trainer = hot(tmp_path, 1e-2, 30, "learned", follow_training=follows)
        lines = [line for line in trainer.state.log_history if "loss" in line]
        logged[follows], losses[follows] = [line["clamped"] for line in lines], lines[-1]["loss"]
        told = any("beyond their input range" in record.getMessage() for record in caplog.records)
        assert told or follows
    assert logged[True][-1] < 0.02 and logged[False][-1] > 0.1
    assert losses[True] < losses[False] - 0.02


@pytest.mark.parametrize(
    ("follows", "advice"), [(True, "Ranges follow the training; "), (False, "Let numbers follow the training (")]
)
def test_where_much_is_clamped_the_advice_is_of_what_is_not_done(tmp_path, caplog, monkeypatch, follows, advice):
    monkeypatch.setattr(logging.getLogger("hf_reram.training.mixin"), "propagate", True)
    trainer = ReRAMTrainer(
        models.tiny_bert(num_hidden_layers=1),
        arguments(tmp_path),
        train_dataset=examples(8),
        reram_config=ReRAMConfig(),
        follow_training=follows,
    )
    begin_following(trainer.model)
    following = crossbar_layers(trainer.model)["classifier"].crossbar.following
    for looked in (following.clamped, following.clamped_before):
        looked["classifier"] = torch.tensor(0.25)
    trainer.state.global_step, logs = 3, {}
    for _ in range(2):
        trainer._log_clamped(logs)
    (text,) = [r.getMessage() for r in caplog.records if "beyond their input range" in r.getMessage()]
    assert f"gets no gradient: classifier (25%). {advice}" in text and text.endswith(" anew")
    assert logs == {"clamped": 0.25}


def test_the_first_process_alone_warns_of_clamped_inputs(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hf_reram.training.mixin"), "propagate", True)
    model = models.tiny_bert(num_hidden_layers=1)
    trainer = ReRAMTrainer(model, arguments(tmp_path), train_dataset=examples(8), reram_config=ReRAMConfig())
    begin_following(trainer.model)
    following = crossbar_layers(trainer.model)["classifier"].crossbar.following
    for looked in (following.clamped, following.clamped_before):
        looked["classifier"] = torch.tensor(0.25)
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    trainer.state.global_step, logs = 3, {}
    trainer._log_clamped(logs)
    assert logs == {"clamped": 0.25} and "beyond their input range" not in caplog.text


def test_much_that_is_clamped_is_told_once(caplog):
    model, x = layer_in_training()
    follow_training(model)
    begin_following(model, settled=True)
    model(20 * x)
    follow_training(model)
    assert float(clamped_shares(model)["0"]) > 0.5


def test_one_batch_beyond_the_range_is_not_much():
    model, x = layer_in_training()
    follow_training(model)
    begin_following(model, settled=True)
    for inputs, once, lasting in ((x, False, False), (20 * x, True, False), (20 * x, True, True)):
        model(inputs)
        follow_training(model)
        assert [float(clamped_shares(model, twice)["0"]) > 0.5 for twice in (False, True)] == [once, lasting]


@pytest.mark.parametrize("trained", [True, False])
def test_frozen_layers_behind_what_is_trained_are_looked_at_and_keep_their_numbers(trained):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), torch.randn(256, 8)
    calibrate_again(patch_model(model, ReRAMConfig(retention_loss="none", weight_clip=None)), [x])
    model.train().requires_grad_(False)
    model[0].weight.requires_grad_(trained)
    follow_training(model)
    before = {name: getattr(model[1], name).clone() for name in BUFFERS}
    with torch.no_grad():
        model[0].weight.mul_(50)
    for _ in range(2):
        model(x)
        follow_training(model)
    assert all(torch.equal(before[name], getattr(model[1], name)) for name in BUFFERS)
    shares = clamped_shares(model)
    assert float(shares["1"]) > 0.5 if trained else shares == {}


@pytest.mark.parametrize("options", [{}, {"dac_bits": 8, "adc_bits": 6}, {"learn_input_range": True}], ids=str)
def test_compiled_layers_follow_without_a_new_graph(options):
    """The first step, in which nobody knows that they are compiled, is not looked at."""
    torch._dynamo.reset()
    counter, found = CompileCounter(), []
    for compiles in (False, True):
        model, x = layer_in_training(**options)
        call = torch.compile(model, backend=counter) if compiles else model
        follow_training(model)
        for step in range(24):
            with sampled_drift(model, seed=step, strength=min((step + 1) / 12, 1.0)):
                call((1 + step / 4) * x + step / 8)
            with torch.no_grad():
                model[0].weight.mul_(1.02)
            follow_training(model)
        found.append(numbers(model))
        frames = counter.frame_count
        with torch.no_grad():
            torch.testing.assert_close(call.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-5)
    assert frames == 1
    for name, number in found[0].items():
        torch.testing.assert_close(found[1][name], number, rtol=0.05, atol=0.05, msg=name)
    span = next(number for name, number in found[0].items() if name.endswith("input_range"))
    assert float(span) > 4 * float(x.abs().max())


def test_compiled_forwards_that_could_not_look_are_told_of(caplog, monkeypatch):
    """Once, and the scales of weights, which nobody needs to look at, follow nevertheless."""
    monkeypatch.setattr(logging.getLogger("hf_reram.training.following"), "propagate", True)
    model, x = layer_in_training(retention_loss="none")
    before = numbers(model)
    compiled = torch.compile(model, backend="eager")
    follow_training(model)
    for _ in range(4):
        compiled(5 * x)
        with torch.no_grad():
            model[0].weight.mul_(1.5)
        follow_training(model)
    (text,) = [r.getMessage() for r in caplog.records if r.name.startswith("hf_reram")]
    assert "torch.compile" in text and "inside hf_reram.sampled_drift(model)" in text
    after = numbers(model)
    torch.testing.assert_close(after.pop("0.weight_scale"), 1.5**4 * before["0.weight_scale"])
    assert all(torch.equal(after[name], before[name]) for name in after)


def test_a_step_that_is_compiled_as_a_whole_is_told_of_too(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hf_reram.training.following"), "propagate", True)
    torch._dynamo.reset()
    model, x = layer_in_training()
    found = []
    for compiles in (True, False):

        def step():
            with sampled_drift(model, seed=3):
                return model(x).square().mean()

        call = torch.compile(step, backend="eager") if compiles else step
        for _ in range(3):
            loss = call()
            follow_training(model) if compiles else None
        found.append(loss.detach())
    torch.testing.assert_close(*found)
    (text,) = [r.getMessage() for r in caplog.records if r.name.startswith("hf_reram")]
    assert "in code that is not compiled itself" in text


@pytest.mark.parametrize("loss", ["drift", "output+drift"])
def test_a_compiled_training_is_followed_and_compiles_once(tmp_path, loss):
    """Through the end of the warm-up, and steps that are logged and measured and others that are not."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    set_seed(0)
    model = models.tiny_bert(num_hidden_layers=1)
    options = {"max_steps": 24, "learning_rate": 2e-2, "logging_steps": 3}
    trainer = ReRAMTrainer(
        model,
        arguments(tmp_path, torch_compile=True, torch_compile_backend="eager", **options),
        train_dataset=examples(),
        reram_config=ReRAMConfig("hfox-neurram", retention_loss=loss, retention_times=["1d"], retention_warmup=0.75),
    )
    trainer.train()
    assert counters["stats"]["unique_graphs"] == 1
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 8 and all(log["clamped"] < 0.1 and log["noise_to_signal"] > 0 for log in logs)
    assert all(log["clamped"] < 0.03 for log in logs[1:])  # after the head's first steps
    with torch.no_grad():
        found = model.eval()(**bert_batch()).logits
        with digital(model):
            wanted = model(**bert_batch()).logits
    assert float((found - wanted).norm() / wanted.norm()) < 0.05


@pytest.mark.parametrize(("warmup", "wanted"), [(0.0, [1.0] * 6), (0.5, [1 / 3, 2 / 3] + [1.0] * 4)])
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
                strengths.append(layer.crossbar.forward.sampling.strength)

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
