"""The mixin beside trl's trainers."""

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM, Trainer

from hf_reram import ReRAMTrainer, ReRAMTrainerMixin, calibrate, crossbar_layers, deploy, digital, patch_model
from hf_reram.integrations.trl import call_head
from tests.samples.devices import device, straight
from tests.samples.texts import TEXTS, llama, tokenizer

trl = pytest.importorskip("trl")


class CrossbarSFT(ReRAMTrainerMixin, trl.SFTTrainer):
    pass


class CrossbarDPO(ReRAMTrainerMixin, trl.DPOTrainer):
    pass


COMMON = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "max_length": 16,
}
PAIRS = {
    "prompt": ["the cell", "a weight"] * 4,
    "chosen": [" holds .", " drifts for years ."] * 4,
    "rejected": [" and a .", " the ."] * 4,
}


def fresh(**changes):
    torch.manual_seed(0)
    return llama(**changes)


def sft(folder, kind=CrossbarSFT, model=None, arguments=None, **options):
    data = Dataset.from_dict({"text": TEXTS})
    args = trl.SFTConfig(str(folder), **{**COMMON, **(arguments or {})})
    return kind(model or fresh(), args, train_dataset=data, eval_dataset=data, processing_class=tokenizer(), **options)


def dpo(folder, model=None, arguments=None, **options):
    args = trl.DPOConfig(str(folder), **{**COMMON, **(arguments or {})})
    data = Dataset.from_dict(PAIRS)
    return CrossbarDPO(
        model or fresh(), args=args, train_dataset=data, eval_dataset=data, processing_class=tokenizer(), **options
    )


def steps(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def noisy(**fields):
    """Drift and nothing else: what is read has no noise, and all of it is there from the first step."""
    still = device(v0=1e6, read_noise=0.0)
    return straight(**{"device": still, "retention_loss": "drift", "retention_warmup": 0.0, **fields})


@pytest.mark.parametrize("checkpointing", [True, False])  # which is trl's default
def test_sft_trains_as_the_digital_trainer_does_with_one_forward_a_step(tmp_path, checkpointing):
    arguments = {"gradient_checkpointing": checkpointing, "gradient_accumulation_steps": 2}
    crossbars = sft(tmp_path, arguments=arguments, reram_config=straight())
    plain = sft(tmp_path, trl.SFTTrainer, arguments=arguments)
    for trainer in (crossbars, plain):
        calls = []
        trainer.model.model.embed_tokens.register_forward_hook(lambda *_, seen=calls: seen.append(1))
        trainer.train()
        assert len(calls) == 3  # batches, of which the first step accumulates two
    for one, other in zip(steps(crossbars), steps(plain), strict=True):
        for name in ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens"):
            assert one[name] == pytest.approx(other[name], rel=2e-3), name


def test_sft_trains_the_head_on_its_cells(tmp_path, caplog):
    trainer = sft(tmp_path, reram_config=noisy(retention_loss="output+drift", retention_weight=2.0))
    head = crossbar_layers(trainer.model)["lm_head"]
    assert head.calibrated
    head.calls = 0
    with caplog.at_level("WARNING", "hf_reram"):
        trainer.train()
    assert head.calls == 2 and "not called" not in caplog.text
    for entry in steps(trainer):
        assert entry["loss"] == pytest.approx(entry["task_loss"] + 2.0 * entry["retention_loss"], rel=1e-4)


def test_sft_evaluates_chips_whole(tmp_path):
    """Against the cross entropy of each chip's own logits."""
    trainer = sft(tmp_path, reram_config=noisy())
    report = trainer.evaluate_robustness(["10y"], seeds=2, progress=False)
    losses, weights = [], []
    for measurement in report.measurements:
        with deploy(trainer.model.eval(), "10y", seed=measurement.seed), torch.no_grad():
            found = [trainer.model(**batch) for batch in map(dict, trainer.get_eval_dataloader())]
        losses.append([float(outputs.loss) for outputs in found])
    weights = [len(batch["input_ids"]) for batch in trainer.get_eval_dataloader()]
    for measurement, each in zip(report.measurements, losses, strict=True):
        expected = sum(loss * n for loss, n in zip(each, weights)) / sum(weights)
        assert measurement.metrics["loss"] == pytest.approx(expected, rel=1e-4)
    assert report.measurements[0].metrics["loss"] != report.measurements[1].metrics["loss"]


def test_texts_calibrate_and_are_evaluated_as_the_trainers_own(tmp_path):
    data = Dataset.from_dict({"text": TEXTS})
    trainer = sft(tmp_path, reram_config=noisy())
    given = sft(tmp_path, reram_config=noisy(), calibration_dataset=data)
    for one, other in zip(*(crossbar_layers(t.model).values() for t in (trainer, given)), strict=True):
        assert torch.equal(one.input_range, other.input_range)
    options = {"times": ["1d"], "seeds": 1, "progress": False}
    report, of_texts = trainer.evaluate_robustness(**options), given.evaluate_robustness(eval_dataset=data, **options)
    assert of_texts.measurements == report.measurements
    pairs = Dataset.from_dict(PAIRS)
    preferences = dpo(tmp_path, reram_config=noisy(), ref_model=fresh())
    own, other = (preferences.evaluate_robustness(eval_dataset=d, **options) for d in (None, pairs))
    assert own.measurements == other.measurements


def test_sft_saves_and_resumes(tmp_path):
    arguments = {"save_strategy": "steps", "save_steps": 1}
    whole = sft(tmp_path, arguments=arguments, reram_config=noisy())
    whole.train()
    again = sft(tmp_path, arguments=arguments, reram_config=noisy())
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    one, two = whole.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    stored = LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert crossbar_layers(stored).keys() == crossbar_layers(whole.model).keys()
    whole.create_model_card(dataset_name="somebody/texts")  # as trl's scripts do
    assert "somebody/texts" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("padding_free", [True, False])
def test_packed_batches_calibrate_as_their_texts_alone(tmp_path, padding_free):
    """trl packs whole texts, up to as many tokens as fit."""
    arguments = {"packing": padding_free, "padding_free": padding_free, "per_device_train_batch_size": 12}
    trainer = sft(tmp_path, arguments=arguments, reram_config=straight())
    batch = next(iter(trainer.get_train_dataloader()))
    assert ("attention_mask" in batch) is not padding_free
    alone = calibrate(patch_model(fresh(), straight()), [tokenizer()(f"{t} <end>", return_tensors="pt") for t in TEXTS])
    for name, layer in crossbar_layers(alone).items():
        other = crossbar_layers(trainer.model)[name]
        assert float(other.input_range) == pytest.approx(float(layer.input_range), rel=1e-4)
        torch.testing.assert_close(other.input_offset, layer.input_offset, rtol=1e-3, atol=1e-5)
    trainer.train()
    assert all(entry["loss"] == pytest.approx(entry["task_loss"]) for entry in steps(trainer))


def test_a_head_on_crossbars_gives_what_trls_fused_head_gives():
    from trl.trainer.utils import add_fused_lm_head

    fields = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    plain, crossbars = fresh(), patch_model(fresh(), straight())
    tokens = torch.randint(1, 12, (3, 7))
    labels = tokens.masked_fill(torch.rand(3, 7) < 0.3, -100)
    for model in (plain, crossbars):
        add_fused_lm_head(model, temperature=0.7, outputs=fields)
    call_head(crossbars)
    for given in ({"labels": labels}, {"shift_labels": labels}, {"labels": labels, "num_items_in_batch": 5}):
        with digital(crossbars):
            one, other = (model(tokens, fused_lm_head=True, **given) for model in (plain, crossbars))
        assert one.keys() == other.keys()
        for name in one:
            torch.testing.assert_close(one[name], other[name], msg=name)
        pairs = ((one, plain), (other, crossbars))
        torch.testing.assert_close(*(torch.autograd.grad(o.loss, m.lm_head.weight)[0] for o, m in pairs))
    head = crossbar_layers(crossbars)["lm_head"]
    assert not head.calls
    crossbars(tokens, fused_lm_head=True, labels=labels)
    assert head.calls == 1
    assert crossbars(tokens, labels=labels).logits.shape == (3, 7, 12)


def test_a_teacher_mixed_with_the_labels_of_sft_teaches(tmp_path):
    teacher = fresh()
    with torch.no_grad():
        teacher.lm_head.weight.mul_(-20)
    arguments = {"gradient_checkpointing": False}
    trainer = sft(tmp_path, arguments=arguments, reram_config=straight(), teacher=teacher, teacher_weight=0.25)
    batch = next(iter(trainer.get_train_dataloader()))
    model = trainer.model.train()
    loss = trainer.compute_loss(model, dict(batch))
    outputs = model(**batch)
    guide, own = teacher(**batch).logits.log_softmax(-1), outputs.logits.log_softmax(-1)
    keep = batch["attention_mask"].bool()
    guided = F.kl_div(own, guide, reduction="none", log_target=True).sum(-1)[keep].mean()
    expected = 0.75 * outputs.loss + 0.25 * guided
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    weight = model.model.embed_tokens.weight
    found, wanted = (torch.autograd.grad(value, weight)[0] for value in (loss, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-4)


def logps(model, batch):
    """Of each row's completion, from the model's own logits."""
    logs = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].log_softmax(-1)
    found = logs.gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    return (found * batch["completion_mask"][:, 1:]).sum(1)


def dpo_loss(trainer, batch, policy, reference):
    (chosen, rejected), (ref_chosen, ref_rejected) = policy.chunk(2), reference.chunk(2)
    return -F.logsigmoid(trainer.beta * (chosen - ref_chosen - rejected + ref_rejected)).mean()


@pytest.mark.parametrize("way", ["adapters", "trained adapters", "crossbars", "digital"])
def test_dpo_compares_the_drifting_policy_with_the_digital_model(tmp_path, way):
    model, options = fresh(), {}
    lora = LoraConfig(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    if way == "adapters":
        options["peft_config"] = lora
    elif way == "trained adapters":  # trl keeps a copy of them as the reference
        model = get_peft_model(model, lora)
    else:
        options["ref_model"] = fresh()
        if way == "crossbars":
            calibrate(patch_model(options["ref_model"], noisy()), [{"input_ids": torch.randint(1, 12, (4, 8))}])
    arguments = {"gradient_checkpointing": False, "beta": 5.0}
    trainer = dpo(tmp_path, model, arguments, reram_config=noisy(weight_clip=0.9), **options)
    batch = next(iter(trainer.get_train_dataloader()))
    model = trainer.model.train()
    with torch.no_grad():
        loss = float(trainer.compute_loss(model, dict(batch)))
        with trainer._sampled_drift():
            policy = logps(model, batch)
        with digital(model):
            if way == "adapters":
                with model.disable_adapter():
                    reference = logps(model, batch)
            elif way == "trained adapters":
                model.set_adapter("ref")
                reference = logps(model, batch)
                model.set_adapter("default")
            else:
                reference = logps(fresh(), batch)
            undrifted = logps(model, batch)
    expected = float(dpo_loss(trainer, batch, policy, reference))
    assert loss == pytest.approx(expected, rel=1e-3)
    assert abs(loss - float(dpo_loss(trainer, batch, undrifted, reference))) > 1e-3
    trainer.train()
    assert all("noise_to_signal" in entry for entry in steps(trainer))  # of the policy, whatever ran after it
    if way == "adapters":  # elsewhere a model without its adapters is on crossbars as it is with them
        with model.disable_adapter(), trainer._sampled_drift(), torch.no_grad():
            drifted = logps(model.train(), batch)
        assert not torch.allclose(drifted, reference, atol=1e-3)


def test_dpo_evaluates_chips_against_the_digital_reference(tmp_path):
    lora = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    trainer = dpo(tmp_path, arguments={"beta": 5.0}, reram_config=noisy(), peft_config=lora)
    report = trainer.evaluate_robustness(["10y"], seeds=2, progress=False)
    (batch,) = trainer.get_eval_dataloader()
    model = trainer.model.eval()
    with digital(model), model.disable_adapter(), torch.no_grad():
        reference = logps(model, batch)
    for measurement in report.measurements:
        with deploy(model, "10y", seed=measurement.seed), torch.no_grad():
            expected = dpo_loss(trainer, batch, logps(model, batch), reference)
        assert measurement.metrics["loss"] == pytest.approx(float(expected), rel=1e-3)


def test_dpo_reckons_its_reference_ahead_with_the_digital_model(tmp_path):
    model = calibrate(patch_model(fresh(), noisy(weight_clip=0.5)), [{"input_ids": torch.randint(1, 12, (4, 8))}])
    trainer = dpo(tmp_path, model, {"precompute_ref_log_probs": True})
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        with digital(model):
            expected = logps(model, batch)
        assert not torch.allclose(logps(model, batch), expected, atol=1e-3)
    found = torch.cat((batch["ref_chosen_logps"], batch["ref_rejected_logps"]))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_order_of_base_classes_is_said():
    with pytest.raises(
        TypeError,
        match=r"class Wrong\(SFTTrainer, ReRAMTrainerMixin\): allowed .* class "
        r"Wrong\(ReRAMTrainerMixin, SFTTrainer\)",
    ):
        type("Wrong", (trl.SFTTrainer, ReRAMTrainerMixin), {})
    with pytest.raises(TypeError, match=r"class Wrong\(ReRAMTrainer, SFTTrainer\)"):
        type("Wrong", (trl.SFTTrainer, ReRAMTrainer), {})
    own = type("Own", (), {"compute_loss": None})
    right = type("Right", (own, ReRAMTrainerMixin, trl.SFTTrainer), {})
    assert issubclass(type("Sub", (right,), {}), Trainer)


def test_a_resumed_evaluation_knows_a_preference_trainer_s_settings(tmp_path):
    options = {"times": ["1d"], "seeds": 1, "progress": False, "references": False, "resume": tmp_path / "log.jsonl"}
    model = calibrate(patch_model(fresh(), noisy()), [{"input_ids": torch.randint(1, 12, (4, 8))}])

    def run(reference=0.0, **arguments):
        torch.manual_seed(0)
        other = fresh()
        with torch.no_grad():
            other.lm_head.weight.add_(reference)
        return dpo(tmp_path, model, arguments, ref_model=other).evaluate_robustness(**options)

    assert run().measurements == run().measurements
    with pytest.raises(ValueError, match=r"what differs: 'trainer', 'trainer\.beta', 'trainer\.args\.beta'\)"):
        run(beta=0.5)
    with pytest.raises(ValueError, match=r"what differs: 'trainer', 'trainer\.ref_model'\)"):
        run(reference=0.5)
