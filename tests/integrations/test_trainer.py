"""The mixin beside another trainer than ``Trainer``."""

import numpy as np
import pytest
import torch
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
    set_seed,
)

from hf_reram import ReRAMTrainerMixin, crossbar_layers, deploy
from tests.samples.devices import device, straight


class CrossbarSeq2SeqTrainer(ReRAMTrainerMixin, Seq2SeqTrainer):
    pass


def tiny_t5() -> T5ForConditionalGeneration:
    set_seed(0)
    sizes = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0))


def examples(n: int = 16) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    words, labels = (torch.randint(1, 50, (n, length), generator=generator) for length in (6, 4))
    return [{"input_ids": x, "labels": y} for x, y in zip(words, labels)]


def tiny_whisper() -> WhisperForConditionalGeneration:
    set_seed(0)
    sizes = {"vocab_size": 50, "d_model": 16, "num_mel_bins": 8, "encoder_layers": 1, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    positions = {"max_source_positions": 10, "max_target_positions": 16}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    config = WhisperConfig(**sizes, **heads, **positions, **tokens, dropout=0.0)
    return WhisperForConditionalGeneration(config)


def spectra(n: int = 16) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{**row, "input_features": torch.randn(8, 20, generator=generator)} for row in _labels(n)]


def _labels(n: int) -> list[dict[str, torch.Tensor]]:
    return [{"labels": row["labels"]} for row in examples(n)]


def arguments(folder) -> Seq2SeqTrainingArguments:
    return Seq2SeqTrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=8,
        learning_rate=1e-4,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        predict_with_generate=True,
        generation_max_length=5,
    )


def first_token(prediction) -> dict[str, float]:
    """How often the first generated token is one of the lower half."""
    return {"low": float((prediction.predictions[:, 1] < 25).mean())}


@pytest.fixture
def trainer(tmp_path) -> CrossbarSeq2SeqTrainer:
    config = straight(device=device(v0=1e6, read_noise=0.0))
    return CrossbarSeq2SeqTrainer(
        tiny_t5(),
        arguments(tmp_path),
        train_dataset=examples(),
        eval_dataset=examples(),
        compute_metrics=first_token,
        reram_config=config,
        eval_times=["1d"],
        eval_chips=2,
    )


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_on_an_ideal_crossbar_it_trains_as_the_digital_trainer_does(trainer, tmp_path):
    trainer.train()
    digital = Seq2SeqTrainer(tiny_t5(), arguments(tmp_path), train_dataset=examples())
    digital.train()
    assert len(crossbar_layers(trainer.model)) == 16
    assert losses(trainer) == pytest.approx(losses(digital), rel=1e-4)
    assert all(layer.calibrated for layer in crossbar_layers(trainer.model).values())


def test_robustness_is_that_of_the_chips_by_hand(trainer):
    trainer.train()
    report = trainer.evaluate_robustness(["10y"], seeds=2, progress=False)
    assert report.metrics == ["loss", "low"]
    rows = examples()
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    model = trainer.model.eval()
    for measurement in report.measurements:
        with deploy(model, "10y", seed=measurement.seed), torch.no_grad():
            loss = float(model(**batch).loss)
            tokens = model.generate(batch["input_ids"], max_length=5)
        assert measurement.metrics["loss"] == pytest.approx(loss, rel=1e-5)
        assert measurement.metrics["low"] == np.mean([float(token) < 25 for token in tokens[:, 1]])
    assert report.measurements[0].metrics["loss"] != report.measurements[1].metrics["loss"]
    metrics = trainer.evaluate()
    aged = trainer.evaluate_robustness(["1d"], seeds=2, progress=False, references=False).statistic("loss", "1d")
    assert metrics["eval_1d_loss"] == pytest.approx(aged.mean, rel=1e-6)


@pytest.mark.parametrize(("length", "beams"), [(4, None), (7, 3), (None, 2)])
def test_chips_generate_as_the_arguments_say(trainer, length, beams):
    """Whatever an evaluation before was told."""
    trainer.args.generation_max_length, trainer.args.generation_num_beams = length, beams
    trainer.model.generation_config.max_length = 9
    trainer.eval_times, calls = [], []
    trainer.compute_metrics = lambda prediction: {"sum": float(prediction.predictions.clip(0).sum())}
    trainer.evaluate(max_length=12, num_beams=4, do_sample=True, top_k=3)
    generate = trainer.model.generate

    def watched(*args, **kwargs):
        tokens = generate(*args, **kwargs)
        calls.append((tokens, {key: value for key, value in kwargs.items() if key not in ("input_ids", "labels")}))
        return tokens

    trainer.model.generate = watched
    report = trainer.evaluate_robustness(["1d"], seeds=2, progress=False)
    del trainer.model.generate
    assert len(calls) == 2 * 4  # batches of 8; two references, two chips
    given = {key: value for key, value in (("max_length", length), ("num_beams", beams)) if value is not None}
    for tokens, kwargs in calls:
        assert tokens.shape[1] <= (length or 9)
        assert {key: value for key, value in kwargs.items() if key in ("do_sample", "top_k", *given)} == given
    words = torch.stack([row["input_ids"] for row in examples()])
    for measurement in report.measurements:
        with deploy(trainer.model.eval(), "1d", seed=measurement.seed), torch.no_grad():
            tokens = [generate(part, max_length=length or 9, num_beams=beams or 1) for part in words.split(8)]
        assert measurement.metrics["sum"] == sum(float(part.sum()) for part in tokens)


def test_a_resumed_evaluation_knows_how_it_generates(trainer, tmp_path):
    options = {"times": ["1d"], "seeds": 1, "progress": False, "references": False, "resume": tmp_path / "log.jsonl"}
    first = trainer.evaluate_robustness(**options)
    assert trainer.evaluate_robustness(**options).measurements == first.measurements
    trainer.args.generation_max_length = 3
    with pytest.raises(ValueError, match="another evaluation"):
        trainer.evaluate_robustness(**options)
    trainer.args.generation_max_length = 5
    trainer.model.generation_config.repetition_penalty = 5.0
    with pytest.raises(ValueError, match="another evaluation"):
        trainer.evaluate_robustness(**options)


@pytest.mark.parametrize("model", [tiny_t5, tiny_whisper])
@pytest.mark.parametrize("way", ["teacher", "consistency"])
def test_a_decoder_gets_its_tokens_from_the_labels(tmp_path, model, way):
    """Where a second model or forward is to predict without the loss."""
    student, teacher, data = model(), model(), examples() if model is tiny_t5 else spectra()
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(0.05)
    config = straight(retention_loss="none" if way == "teacher" else "consistency", retention_weight=1.0)
    given = {"teacher": teacher} if way == "teacher" else {}
    trainer = CrossbarSeq2SeqTrainer(student, arguments(tmp_path), train_dataset=data, reram_config=config, **given)
    batch = trainer.data_collator(data[:8])
    with torch.no_grad():
        guide, outputs = teacher(**batch).logits.log_softmax(-1), trainer.model(**batch).logits.log_softmax(-1)
        loss = float(trainer.compute_loss(trainer.model.train(), dict(batch)).detach())
    wanted = (
        float((guide.exp() * (guide - outputs)).sum(-1).mean())
        if way == "teacher"
        else float(torch.nn.functional.nll_loss(outputs.flatten(0, 1), batch["labels"].flatten()))
    )
    assert loss == pytest.approx(wanted, rel=0.02)
    trainer.train()
    assert trainer.state.global_step == 2
