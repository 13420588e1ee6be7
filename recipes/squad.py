"""Extractive question answering on SQuAD v2 that keeps its answers on ReRAM crossbars for ten years.

    accelerate launch recipes/squad.py
    accelerate launch recipes/squad.py --device cmo-hfox-ibm --times 1s 1d 1mo 1y 10y
    accelerate launch recipes/squad.py --model_name_or_path FOLDER --train_file A.parquet --validation_file B.parquet

Compares the digital base, as it is and finetuned, a naive crossbar, the calibrated mapping, and finetuning without
retention loss, with noise injection and with hf_reram's loss, at the same steps and data. A run that was killed goes on
where it stopped when it is started again. The finetuned model is in OUTPUT_DIR/hf-reram/model, the comparison in
OUTPUT_DIR/report.md; its table has HasAns_span_f1, the F1 of answerable questions if the model may not abstain, beside
the official figures.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from accelerate import PartialState
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    set_seed,
)

from hf_reram import ReRAMConfig, ReRAMTrainer, adapter_target_modules, deploy, patch_model, use_fused_kernels
from hf_reram.tasks import (
    OURS,
    QuestionAnswering,
    RecipeTrainingArguments,
    ReRAMArguments,
    draw,
    load_rows,
    name_of_data,
    push,
    recipe_about,
    recipe_settings,
    run_protocol,
    training_features,
)

DETAILS = ("exact", "f1", "AvNA", "HasAns_exact", "HasAns_f1", "HasAns_span_f1", "NoAns_exact", "NoAns_f1", "best_f1")


@dataclass
class Arguments:
    model_name_or_path: str = field(default="deepset/minilm-uncased-squad2", metadata={"help": "a finetuned QA model"})
    dataset_name: str = field(default="rajpurkar/squad_v2", metadata={"help": "unless files are given"})
    train_file: str | None = field(default=None, metadata={"help": "parquet or JSON with SQuAD's columns"})
    validation_file: str | None = field(default=None, metadata={"help": "parquet or JSON with SQuAD's columns"})
    max_train_samples: int | None = field(default=None, metadata={"help": "questions, drawn by --seed"})
    max_eval_samples: int | None = field(default=None, metadata={"help": "questions, drawn by --seed"})
    answerable_only: bool = field(default=False, metadata={"help": "evaluate only questions that have an answer"})
    max_length: int = field(default=384, metadata={"help": "tokens of a window in evaluation"})
    train_max_length: int = field(default=256, metadata={"help": "tokens of a window in training"})
    doc_stride: int = field(default=128, metadata={"help": "tokens that neighbouring windows share"})
    n_best_size: int = 20
    max_answer_length: int = 30
    null_score_diff_threshold: float = 0.0
    lora: bool = field(default=False, metadata={"help": "train LoRA adapters, merged into the weights afterwards"})
    lora_rank: int = 16


@dataclass
class Training(RecipeTrainingArguments):
    output_dir: str | None = "outputs/squad"
    per_device_train_batch_size: int = 16


def load_model(name: str):
    model, found = AutoModelForQuestionAnswering.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    if found["missing_keys"]:
        raise ValueError(f"{name} is no question answering model: its checkpoint lacks {sorted(found['missing_keys'])}")
    return model


def main() -> None:
    parser = HfArgumentParser((Arguments, ReRAMArguments, Training))
    arguments, reram, training = parser.parse_args_into_dataclasses()
    config, methods = reram.config(), reram.chosen_methods()
    use_fused_kernels(reram.fused_kernels)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path)

    def base():
        return load_model(arguments.model_name_or_path)

    base()  # refuses a wrong model before the data are prepared

    with training.main_process_first():
        questions = load_rows(arguments.dataset_name, "train", arguments.train_file)
        stride = min(arguments.doc_stride, arguments.train_max_length // 2)
        train = training_features(
            draw(questions, arguments.max_train_samples, training.seed),
            tokenizer,
            arguments.train_max_length,
            stride,
            labels=not reram.label_free,
        )
        held = load_rows(arguments.dataset_name, "validation", arguments.validation_file)
        if arguments.answerable_only:
            held = held.filter(lambda row: len(row["answers"]["text"]) > 0)
        held = draw(held, arguments.max_eval_samples, training.seed)
    evaluate = QuestionAnswering(
        held,
        tokenizer,
        arguments.max_length,
        arguments.doc_stride,
        arguments.n_best_size,
        arguments.max_answer_length,
        arguments.null_score_diff_threshold,
        training.per_device_eval_batch_size,
    )

    def make_trainer(method_config: ReRAMConfig, folder: str) -> ReRAMTrainer:
        set_seed(training.seed)
        model = base()
        if arguments.lora:
            patch_model(model, method_config)
            lora = LoraConfig(r=arguments.lora_rank, target_modules=adapter_target_modules(model))
            model = get_peft_model(model, lora)
        return ReRAMTrainer(
            model,
            replace(training, output_dir=folder, push_to_hub=False),
            train_dataset=train,
            data_collator=DataCollatorWithPadding(tokenizer),
            processing_class=tokenizer,
            reram_config=method_config,
            teacher=base() if reram.teacher else None,
            teacher_weight=reram.teacher_weight,
            teacher_temperature=reram.teacher_temperature,
        )

    local = arguments.validation_file is not None
    trained_on = name_of_data(arguments.dataset_name, "train", arguments.train_file)
    about = recipe_about(
        "recipes/squad.py",
        arguments.model_name_or_path,
        training,
        task="question-answering",
        metric="HasAns_span_f1",
        dataset=f"SQuAD v2 ({Path(arguments.validation_file).name})" if local else arguments.dataset_name,
        examples=len(held),
        details=[name for name in DETAILS if not (arguments.answerable_only and name.startswith("NoAns"))],
        label_free=reram.label_free,
        training=[f"trained on {len(train)} windows of {trained_on}"],
    )
    run_protocol(
        make_trainer,
        evaluate,
        config,
        training.output_dir,
        reram.times,
        about,
        reram.chips,
        methods,
        title=f"SQuAD v2 on {config.device.name}, {reram.chips} chips",
        settings=recipe_settings(training, arguments, reram),
        allow_uncalled=reram.allow_uncalled,
    )
    if training.process_index == 0:
        if OURS in methods:
            finish(Path(training.output_dir), evaluate, reram.times[-1], training)
        print((Path(training.output_dir) / "report.md").read_text())
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()


def finish(output: Path, evaluate: QuestionAnswering, time: str, training: Training) -> None:
    """Files for the official evaluation script, of chip 0 at the last time, and the upload."""
    model = AutoModelForQuestionAnswering.from_pretrained(output / OURS.folder / "model")
    with deploy(model, time, seed=0):
        predictions = evaluate.predict(model)
    texts = {p["id"]: p["prediction_text"] for p in predictions}
    odds = {p["id"]: p["no_answer_probability"] for p in predictions}
    (output / "predictions.json").write_text(json.dumps(texts, indent=1))
    (output / "null_odds.json").write_text(json.dumps(odds, indent=1))
    if training.push_to_hub:
        push(output / OURS.folder / "model", training.hub_model_id or f"{output.name}-reram", training.hub_private_repo)


if __name__ == "__main__":
    main()
