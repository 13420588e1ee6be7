"""What a person does with the Hub, in a process of its own: ``python -m tests.hub.client ACTION [then ACTION]``. Each
action prints one line of JSON."""

import itertools
import json
import os
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForQuestionAnswering, TrainingArguments, pipeline

import hf_reram
from hf_reram import ReRAMConfig, ReRAMTrainer, calibrate, evaluate_robustness, patch_model
from hf_reram.hub.load import load_model
from hf_reram.model.digest import weights_digest
from hf_reram.tasks.question_answering import QuestionAnswering, training_features
from tests.samples import squad as squad_sample

REPO, ADAPTER = "ann/robust", "ann/adapter"


def robust(base: str, scale: float = 1.0):
    """A patched, calibrated and evaluated model of the checkpoint in the folder ``base``."""
    model = AutoModelForQuestionAnswering.from_pretrained(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    evaluate = _questions()
    patch_model(model, ReRAMConfig(device="cmo-hfox-ibm"))
    calibrate(model, [dict(batch) for _, batch in evaluate.batches])
    evaluate_robustness(model, evaluate, ["1s", "10y"], seeds=2, progress=False)
    return model


def _questions() -> QuestionAnswering:
    return QuestionAnswering(squad_sample.dataset(6), squad_sample.tokenizer(), 32, 8)


def push_model(base: str, scale: str = "1", *flags: str) -> None:
    model = robust(base, float(scale))
    if "stale" in flags:
        with torch.no_grad():
            next(model.parameters()).add_(1)
    model.push_to_hub(REPO, private="private" in flags)
    print(json.dumps(weights_digest(model)))


def push_trainer(base: str, output: str) -> None:
    trainer = _trained(AutoModelForQuestionAnswering.from_pretrained(base), REPO, output)
    trainer.evaluate_robustness(["1s", "10y"], seeds=2, progress=False)
    trainer.push_to_hub(dataset="rajpurkar/squad_v2", license="mit")
    print(json.dumps(weights_digest(trainer.model)))


def push_adapter(output: str) -> None:
    """LoRA beside the crossbars of the model on the Hub."""
    model = AutoModelForQuestionAnswering.from_pretrained(REPO)
    lora = LoraConfig(target_modules=["query", "value"], init_lora_weights=False)
    trainer = _trained(get_peft_model(model, lora), ADAPTER, output)
    evaluate_robustness(trainer.model, _questions(), ["1s", "10y"], seeds=2, progress=False)
    trainer.push_to_hub()
    print(json.dumps(weights_digest(trainer.model)))


def push_adapter_to(repo: str, output: str) -> None:
    """LoRA that was not evaluated, into a repository."""
    model = AutoModelForQuestionAnswering.from_pretrained(REPO)
    lora = LoraConfig(target_modules=["query", "value"], init_lora_weights=False)
    _trained(get_peft_model(model, lora), repo, output).push_to_hub()


def push_while_training(base: str, output: str, strategy: str) -> None:
    """What ``push_to_hub=True`` uploads by itself."""
    model = AutoModelForQuestionAnswering.from_pretrained(base)
    wanted = {"push_to_hub": True, "hub_strategy": strategy, "save_strategy": "steps", "save_steps": 1}
    trainer = _trained(model, REPO, output, hub_always_push=True, save_total_limit=1, **wanted)
    trainer.wait_for_push()
    trainer.save_model()
    print(json.dumps(weights_digest(trainer.model)))


def _trained(model, repo: str, output: str, **more) -> ReRAMTrainer:
    tokenizer = squad_sample.tokenizer()
    train = training_features(squad_sample.dataset(), tokenizer, 32, 8)
    common = {"max_steps": 2, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    args = TrainingArguments(output, hub_model_id=repo, **common, **more)
    trainer = ReRAMTrainer(
        model,
        args,
        train_dataset=train,
        eval_dataset=train,
        processing_class=tokenizer,
        data_collator=squad_sample.collator(tokenizer),
        reram_config=None if hf_reram.crossbar_layers(model) else ReRAMConfig(device="cmo-hfox-ibm"),
    )
    trainer.train()
    return trainer


def load(name: str = REPO) -> None:
    model, info = AutoModelForQuestionAnswering.from_pretrained(name, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    _print_loaded(model)


def load_adapter() -> None:
    _print_loaded(load_model(ADAPTER))


def ask(name: str = REPO) -> None:
    """The checkpoint as a pipeline."""
    pipe = pipeline("question-answering", model=name)
    row = squad_sample.rows()[1]
    answer = pipe(question=row["question"], context=row["context"])
    assert answer["answer"] == row["context"][answer["start"] : answer["end"]]
    print(json.dumps({"answer": answer["answer"], "layers": len(hf_reram.crossbar_layers(pipe.model))}))


def _print_loaded(model) -> None:
    report = hf_reram.report_of(model)
    found = {"digest": weights_digest(model), "layers": len(hf_reram.crossbar_layers(model)), "report": None}
    if report is not None:
        again = evaluate_robustness(model, _questions(), report.times, seeds=2, progress=False)
        pairs = zip(again.measurements, report.measurements, strict=True)
        found["report"] = all(  # thresholds are logits, which differ in their last bits on some processors
            (a.time, a.seed) == (b.time, b.seed) and a.metrics == pytest.approx(b.metrics, rel=1e-5) for a, b in pairs
        )
    print(json.dumps(found))


def refused(token: str, action: str, *arguments: str) -> None:
    """What another token gets for an action."""
    mine = os.environ.pop("HF_TOKEN")
    os.environ |= {"HF_TOKEN": token} if token != "none" else {}
    try:
        ACTIONS[action](*arguments)
    except (OSError, ValueError) as error:
        print(json.dumps(f"{type(error).__name__}: {error}"))
    finally:
        os.environ["HF_TOKEN"] = mine


ACTIONS = {"model": push_model, "trainer": push_trainer, "adapter": push_adapter, "load": load, "ask": ask}
ACTIONS |= {"load_adapter": load_adapter, "refused": refused, "adapter_to": push_adapter_to}
ACTIONS |= {"training": push_while_training}

if __name__ == "__main__":
    for then, words in itertools.groupby(sys.argv[1:], key=lambda word: word == "then"):
        if not then:
            action, *arguments = words
            ACTIONS[action](*arguments)
