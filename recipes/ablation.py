"""Which retention loss? All of them at the same budget, data, mapping and chips, on one task.

    python recipes/ablation.py --task digits
    python recipes/ablation.py --task squad --model_name_or_path MODEL \\
        --train_file TRAIN.parquet --validation_file VALIDATION.parquet
    python recipes/ablation.py --task images --model_name_or_path MODEL --validation_file IMAGES.parquet

Rows that were finished are kept in --output and not run again.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import (
    AutoModelForImageClassification,
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    TrainingArguments,
    set_seed,
)

from hf_reram import DeviceConfig, ReRAMConfig, ReRAMTrainer, evaluate_robustness
from hf_reram.tasks import CORNER, Digits, number_or_word, token_f1, train_base


@dataclass
class Arguments:
    task: str = field(metadata={"help": "digits, squad or images"})
    model_name_or_path: str | None = None
    train_file: str | None = field(default=None, metadata={"help": "parquet with SQuAD's columns (squad)"})
    validation_file: str | None = field(default=None, metadata={"help": "parquet with SQuAD's or image, label columns"})
    device: str = field(default="hfox-neurram", metadata={"help": "preset; the demo's corner for digits"})
    losses: list[str] = field(
        default_factory=lambda: ["none", "noise", "output", "drift", "output+drift", "sensitivity+drift"]
    )
    weights: list[float] = field(
        default_factory=list, metadata={"help": "retention_weight for each of --losses; default 1"}
    )
    weight_clip: str = field(default="auto", metadata={"help": "auto, none or RMS multiples"})
    time: str = field(default="1d", metadata={"help": "trained for and evaluated at"})
    max_steps: int = 50
    learning_rate: float = 5e-5
    batch_size: int = 16
    chips: int = 5
    examples: int = field(default=120, metadata={"help": "evaluated examples"})
    seed: int = 0
    output: str = "outputs/ablation.json"


@dataclass
class Task:
    """A digital base, what to train it on, and how to score it."""

    base: torch.nn.Module
    data: list
    score: Callable[[torch.nn.Module], dict[str, float]]
    collator: Callable | None = None
    teacher: torch.nn.Module | None = None
    device: DeviceConfig | str = "hfox-neurram"


def digits_task(arguments: Arguments) -> Task:
    digits = Digits.load()
    base = train_base(digits, Path(arguments.output).parent, 25, arguments.seed)
    return Task(base, digits.dataset(), digits.accuracy, device=CORNER)


def images_task(arguments: Arguments) -> Task:
    """Half of the labels to distil the digital base on, without labels, the other half to evaluate on."""
    from timm.data import create_transform, resolve_data_config
    from timm.layers import freeze_batch_norm_2d

    model = AutoModelForImageClassification.from_pretrained(arguments.model_name_or_path, dtype=torch.float32)
    freeze_batch_norm_2d(model)  # batches of 16 would spoil its statistics
    wanted = resolve_data_config(model=model.timm_model)
    transform = create_transform(**wanted)
    rows = load_dataset("parquet", data_files=arguments.validation_file, split="train").shuffle(seed=arguments.seed)
    middle = len(rows) // 2
    train = [{"pixel_values": transform(row["image"].convert("RGB"))} for row in rows.select(range(middle))]
    held = rows.select(range(middle, min(len(rows), middle + arguments.examples)))
    pixels = torch.stack([transform(row["image"].convert("RGB")) for row in held])
    labels = torch.tensor(held["label"])

    def score(model) -> dict[str, float]:
        model.eval()
        with torch.inference_mode():
            right = [model(p).logits.argmax(-1) == y for p, y in zip(pixels.split(40), labels.split(40))]
        return {"accuracy": 100 * float(torch.cat(right).float().mean())}

    return Task(model, train, score, teacher=copy.deepcopy(model), device=arguments.device)


def squad_task(arguments: Arguments) -> Task:
    """F1 on answerable questions, the best span of each, contexts cut to one window."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path)
    model = AutoModelForQuestionAnswering.from_pretrained(arguments.model_name_or_path, dtype=torch.float32)

    def load(file: str, count: int):
        rows = load_dataset("parquet", data_files=file, split="train").shuffle(seed=arguments.seed)
        rows = [row for row in rows.select(range(min(len(rows), 4 * count))) if row["answers"]["text"]][:count]
        options = {"truncation": "only_second", "max_length": 256, "return_offsets_mapping": True}
        return rows, [tokenizer(row["question"], row["context"], **options) for row in rows]

    rows, encodings = load(arguments.train_file, max(arguments.max_steps, 32) * arguments.batch_size)  # 32: calibration
    train = []
    for row, encoding in zip(rows, encodings):
        first = row["answers"]["answer_start"][0]
        last = first + len(row["answers"]["text"][0]) - 1
        start, end = (encoding.char_to_token(c, sequence_index=1) for c in (first, last))
        if start is not None and end is not None:
            kept = {k: v for k, v in encoding.items() if k != "offset_mapping"}
            train.append({**kept, "start_positions": start, "end_positions": end})
    held, questions = load(arguments.validation_file, arguments.examples)
    collator = DataCollatorWithPadding(tokenizer)

    def score(model) -> dict[str, float]:
        model.eval()
        total = 0.0
        for i in range(0, len(held), 24):
            part = questions[i : i + 24]
            batch = collator([{k: v for k, v in q.items() if k != "offset_mapping"} for q in part])
            with torch.inference_mode():
                output = model(**batch)
            for j, encoding in enumerate(part):
                inside = torch.tensor([s == 1 for s in encoding.sequence_ids()])
                n = len(inside)
                scores = output.start_logits[j, :n, None] + output.end_logits[j, None, :n]
                allowed = torch.ones(n, n, dtype=torch.bool).triu().tril(29) & inside & inside[:, None]
                start, end = divmod(int(scores.masked_fill(~allowed, -1e9).argmax()), n)
                span = (encoding["offset_mapping"][start][0], encoding["offset_mapping"][end][1])
                answer = held[i + j]["context"][slice(*span)]
                total += max(token_f1(answer, gold) for gold in held[i + j]["answers"]["text"])
        return {"HasAns_f1": 100 * total / len(held)}

    return Task(model, train, score, collator=collator, device=arguments.device)


def run(task: Task, loss: str, weight: float, arguments: Arguments) -> dict:
    """Finetune a copy of the base with one loss and evaluate it as chips."""
    set_seed(arguments.seed)
    config = ReRAMConfig(
        device=task.device,
        weight_clip=number_or_word(arguments.weight_clip, "weight_clip", {"auto": "auto", "none": None}),
        retention_loss=loss,
        retention_weight=weight,
        retention_times=[arguments.time],
    )
    training = TrainingArguments(
        output_dir=str(Path(arguments.output).parent / "run"),
        max_steps=arguments.max_steps,
        learning_rate=arguments.learning_rate,
        per_device_train_batch_size=arguments.batch_size,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        seed=arguments.seed,
        report_to=[],
        save_strategy="no",
        logging_steps=max(1, arguments.max_steps // 5),
        disable_tqdm=True,
    )
    model = copy.deepcopy(task.base)
    teacher = copy.deepcopy(task.teacher)
    options = {"data_collator": task.collator} if task.collator else {}
    trainer = ReRAMTrainer(model, training, train_dataset=task.data, reram_config=config, teacher=teacher, **options)
    row = {"loss": loss, "weight": weight, "steps": arguments.max_steps}
    if arguments.max_steps > 0:
        trainer.train()
        row["noise_to_signal"] = [e for e in trainer.state.log_history if "loss" in e][-1].get("noise_to_signal")
    report = evaluate_robustness(model, task.score, times=[arguments.time], seeds=arguments.chips, progress=False)
    metric = report.metrics[0]
    aged = report.statistic(metric, arguments.time)
    row |= {"metric": metric, "digital": report.digital[metric], "ideal": report.ideal[metric]}
    return row | {"aged": aged.mean, "std": aged.std, "chips": aged.chips}


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    tasks = {"digits": digits_task, "squad": squad_task, "images": images_task}
    if arguments.task not in tasks:
        raise ValueError(f"--task {arguments.task}: allowed are {sorted(tasks)}")
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    rows = json.loads(output.read_text()) if output.exists() else {}
    weights = arguments.weights or [1.0] * len(arguments.losses)
    task = tasks[arguments.task](arguments)
    for loss, weight in zip(arguments.losses, weights, strict=True):
        key = f"{arguments.task}, {loss}, weight {weight:g}, clip {arguments.weight_clip}, {arguments.max_steps} steps"
        if key not in rows:
            rows[key] = run(task, loss, weight, arguments)
            output.write_text(json.dumps(rows, indent=2) + "\n")
        row = rows[key]
        spread = f" ± {row['std']:.1f}" if row["chips"] > 1 else ""
        print(f"| {key} | {row['ideal']:.1f} | {row['aged']:.1f}{spread} |", flush=True)
    print(f"digital {row['digital']:.1f}; {arguments.chips} chips at {arguments.time}; {arguments.examples} examples")


if __name__ == "__main__":
    main()
