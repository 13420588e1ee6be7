"""Does a pretrained encoder with a new head learn its task on crossbars? Questions of SQuAD by their question word.

    python recipes/new_head.py --model_name_or_path MODEL \\
        --train_file TRAIN.parquet --validation_file VALIDATION.parquet [--digital_epochs 1 --epochs 1]

prints the evaluation loss of the digital base trained alike with the plain Trainer, of the ideal crossbar after a
training with crossbars, and of chips. The first epochs may be digital (--digital_epochs); --retention_loss none trains
without drift, and --retention_warmup says over which share of the steps drift grows. A training as short as this one
loses by early drift, and on this device the mapping alone costs more than training wins: a late start and a tenth more
cells are the defaults here, where ReRAMConfig has 0.5 and none.
"""

import json
import tempfile
from dataclasses import dataclass, field

import torch
from datasets import Dataset, load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_reram import ReRAMConfig, ReRAMTrainer

WORDS = ["what", "who", "when", "how"]


@dataclass
class Arguments:
    model_name_or_path: str
    train_file: str = field(metadata={"help": "parquet with SQuAD's columns"})
    validation_file: str = field(metadata={"help": "the same, for evaluation"})
    device: str = field(default="hfox-neurram", metadata={"help": "preset"})
    retention_loss: str = ReRAMConfig.retention_loss or "none"
    retention_warmup: float = 0.9
    input_range: str = ReRAMConfig.input_range
    redundancy: float = field(default=0.1, metadata={"help": "share of cells on top"})
    tile_size: int | None = field(default=None, metadata={"help": "rows of a tile"})
    weight_scale: str = field(default=ReRAMConfig.weight_scale, metadata={"help": "per_tile needs a tile_size"})
    time: str = field(default="1d", metadata={"help": "trained for and evaluated at"})
    epochs: float = 2.0
    digital_epochs: float = field(default=0.0, metadata={"help": "before these, with the plain Trainer"})
    learning_rate: float = 5e-5
    batch_size: int = 16
    chips: int = 3
    examples: int = field(default=800, metadata={"help": "trained on; a quarter as many are evaluated"})
    plain: bool = field(default=True, metadata={"help": "train the digital base too, to compare with"})
    seed: int = 0


def questions(file: str, count: int, tokenizer) -> Dataset:
    """As many of each question word."""
    rows = load_dataset("parquet", data_files=file, split="train").select_columns(["question"])
    words = [row.split()[0].lower() if row.split() else "" for row in rows["question"]]
    chosen = [[i for i, word in enumerate(words) if word == wanted][: count // len(WORDS)] for wanted in WORDS]
    if not all(chosen):
        raise ValueError(f"{file}, {count} examples: allowed are files and numbers with questions of each of {WORDS}")
    picked = rows.select([i for same in chosen for i in same])
    picked = picked.add_column("label", [k for k, same in enumerate(chosen) for _ in same])
    encoded = picked.map(lambda batch: tokenizer(batch["question"], truncation=True, max_length=64), batched=True)
    return encoded.remove_columns("question").shuffle(seed=0)


def main() -> None:
    """Train and print."""
    args = HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    train = questions(args.train_file, args.examples, tokenizer)
    test = questions(args.validation_file, args.examples // 4, tokenizer)

    def trained(kind: type[Trainer], epochs: float, model: torch.nn.Module | None = None, **options) -> Trainer:
        if model is None:
            set_seed(args.seed)
            model = AutoModelForSequenceClassification.from_pretrained(
                args.model_name_or_path, num_labels=len(WORDS), dtype=torch.float32
            )
        arguments = TrainingArguments(
            folder,
            num_train_epochs=epochs,
            learning_rate=args.learning_rate,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=100,
            save_strategy="no",
            report_to=[],
            seed=args.seed,
        )
        collator = DataCollatorWithPadding(tokenizer)
        trainer = kind(model, arguments, collator, train_dataset=train, eval_dataset=test, **options)
        trainer.train()
        return trainer

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        if args.plain:
            found["plain Trainer"] = trained(Trainer, args.epochs + args.digital_epochs).evaluate()["eval_loss"]
        base = trained(Trainer, args.digital_epochs).model if args.digital_epochs else None
        config = ReRAMConfig(
            device=args.device,
            retention_loss=args.retention_loss,
            retention_warmup=args.retention_warmup,
            input_range=args.input_range,
            redundancy=args.redundancy,
            tile_size=args.tile_size,
            weight_scale=args.weight_scale,
            retention_times=[args.time],
        )
        trainer = trained(ReRAMTrainer, args.epochs, base, reram_config=config)
        report = trainer.evaluate_robustness(times=[args.time], seeds=args.chips, progress=False)
    assert report.ideal is not None
    chips = report.statistic("loss", args.time)
    found |= {"ideal crossbar": report.ideal["loss"], f"chips after {args.time}": chips.mean, "± over chips": chips.std}
    print(json.dumps({name: round(value, 3) for name, value in found.items()}))


if __name__ == "__main__":
    main()
