"""A training loop of one's own on crossbars, with accelerate: which of a few labels does a text have?

    accelerate launch recipes/own_loop.py --model_name_or_path MODEL --output_dir FOLDER \\
        --train_file TRAIN.parquet --validation_file VALIDATION.parquet

trains on columns "text" and "label" (from 0), saves the model, and prints its accuracy as chips over time.
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from hf_reram import (
    ReRAMConfig,
    add_retention_loss,
    calibrate,
    evaluate_robustness,
    follow_training,
    hold_weights,
    patch_model,
    sampled_drift,
    stop_following,
)

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
for name in ("model_name_or_path", "train_file", "validation_file", "output_dir"):
    parser.add_argument(f"--{name}", required=True)
for name, default in {"epochs": 3, "batch_size": 16, "accumulation": 2, "chips": 5, "learning_rate": 5e-5}.items():
    parser.add_argument(f"--{name}", type=type(default), default=default)
args = parser.parse_args()

accelerator = Accelerator(cpu=not torch.accelerator.is_available(), gradient_accumulation_steps=args.accumulation)
set_seed(0)
tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
data = load_dataset("parquet", data_files={"train": args.train_file, "test": args.validation_file})
labels = max(data["train"]["label"]) + 1
data = data.map(lambda batch: tokenizer(batch["text"], truncation=True), batched=True, remove_columns="text")
collator = DataCollatorWithPadding(tokenizer)
train = DataLoader(data["train"], args.batch_size, shuffle=True, collate_fn=collator)
test = DataLoader(data["test"], args.batch_size, collate_fn=collator)

model = AutoModelForSequenceClassification.from_pretrained(args.model_name_or_path, num_labels=labels)
patch_model(model, ReRAMConfig(device="hfox-neurram", retention_loss="output+drift"))
calibrate(model, [batch for batch, _ in zip(train, range(32))])  # the same in all processes: before prepare
optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
model, optimizer, train, test = accelerator.prepare(model.train(), optimizer, train, test)

steps, step = args.epochs * -(-len(train) // args.accumulation), 0
follow_training(model)
for batch in (batch for _ in range(args.epochs) for batch in train):
    drift = sampled_drift(model, seed=step, strength=min(1.0, 2 * (step + 1) / steps))  # one chip a step
    with accelerator.accumulate(model), drift:
        loss, retention = add_retention_loss(model(**batch).loss, model)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    if accelerator.sync_gradients:
        step += 1
        if step <= 0.9 * steps:  # then ranges and scales stay, so that the weights settle
            follow_training(model)
        hold_weights(model)
        accelerator.print(f"step {step} of {steps}: loss {loss.item():.3f}, retention loss {retention.item():.4f}")
stop_following(model)


def accuracy(model: torch.nn.Module) -> dict[str, float]:
    """On all processes' parts of the test data."""
    with torch.no_grad():
        pairs = [accelerator.gather_for_metrics((model(**b).logits.argmax(-1), b["labels"])) for b in test]
    found, wanted = map(torch.cat, zip(*pairs))
    return {"accuracy": (found == wanted).float().mean().item()}


together = accelerator.num_processes > 1
report = evaluate_robustness(model, accuracy, seeds=args.chips, progress=False, together=together)
if accelerator.is_main_process:
    accelerator.unwrap_model(model).save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    report.to_json(f"{args.output_dir}/robustness.json")
    print(report.to_markdown())
accelerator.end_training()
