"""What a crossbar costs in training: step time and peak memory against the same digital finetuning step.

    python recipes/benchmark.py --model minilm --pairs 5 --output benchmark.json

Each variant is timed right after a digital step of the same run and reported as the median of the pairs' ratios, so a
machine whose speed drifts does not matter. Peak memory is that of a process of its own per variant. Weights are random
(speed does not depend on them); --model_name_or_path takes a checkpoint's shape instead.
"""

import copy
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import date

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForQuestionAnswering,
    BertConfig,
    DeiTConfig,
    HfArgumentParser,
)

from hf_reram import ReRAMConfig, add_retention_loss, calibrate, hold_weights, patch_model, sampled_drift

VARIANTS: dict[str, dict] = {
    "crossbar, no retention loss": {"retention_loss": "none"},
    "retention loss: output": {"retention_loss": "output"},
    "retention loss: weight": {"retention_loss": "weight"},
    "retention loss: sensitivity": {"retention_loss": "sensitivity"},
    "retention loss: noise": {"retention_loss": "noise"},
    "retention loss: drift": {"retention_loss": "drift"},
    "retention loss: output+drift": {"retention_loss": "output+drift"},
    "retention loss: sensitivity+drift": {"retention_loss": "sensitivity+drift"},
    "learned input ranges": {"retention_loss": "none", "learn_input_range": True},
    "8-bit DAC and ADC": {"retention_loss": "none", "dac_bits": 8, "adc_bits": 8},
}


@dataclass
class Arguments:
    model: str = field(default="minilm", metadata={"help": "minilm (QA) or deit-tiny (images)"})
    model_name_or_path: str | None = field(default=None, metadata={"help": "take this checkpoint's config instead"})
    batch_size: int = 16
    length: int = field(default=192, metadata={"help": "tokens per example (minilm)"})
    pairs: int = field(default=5, metadata={"help": "timed pairs of digital and crossbar step per variant"})
    variants: list[str] = field(default_factory=list, metadata={"help": "parts of variants' names; default all"})
    memory: bool = field(default=True, metadata={"help": "also measure peak memory, one process per variant"})
    threads: int | None = None
    output: str | None = field(default=None, metadata={"help": "JSON file for the table"})
    memory_of: str | None = field(default=None, metadata={"help": "internal: measure this variant, print MiB"})


def build(arguments: Arguments) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A model in training mode and a batch for it."""
    torch.manual_seed(0)
    n = arguments.batch_size
    if arguments.model == "minilm":
        shape = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
        config = BertConfig(**shape)
        if arguments.model_name_or_path:
            config = AutoConfig.from_pretrained(arguments.model_name_or_path)
        model = AutoModelForQuestionAnswering.from_config(config, dtype=torch.float32)
        batch = {
            "input_ids": torch.randint(1000, config.vocab_size, (n, arguments.length)),
            "attention_mask": torch.ones(n, arguments.length, dtype=torch.long),
            "start_positions": torch.randint(arguments.length, (n,)),
            "end_positions": torch.randint(arguments.length, (n,)),
        }
    elif arguments.model == "deit-tiny":
        config = DeiTConfig(hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768)
        if arguments.model_name_or_path:
            config = AutoConfig.from_pretrained(arguments.model_name_or_path)
        config.num_labels = 1000
        model = AutoModelForImageClassification.from_config(config, dtype=torch.float32)
        batch = {"pixel_values": torch.randn(n, 3, 224, 224), "labels": torch.randint(1000, (n,))}
    else:
        raise ValueError(f"--model {arguments.model}: allowed are minilm, deit-tiny")
    return model.train(), batch


def make_step(model, batch, variant: str | None) -> Callable[[], None]:
    """One training step: forward, loss, backward, AdamW; on crossbars if ``variant`` is not None."""
    retention = None
    if variant is not None:
        options = VARIANTS[variant]
        patch_model(model, ReRAMConfig(**options))
        calibrate(model, [batch])
        retention = options["retention_loss"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step() -> None:
        with sampled_drift(model) if retention else nullcontext():
            loss = model(**batch).loss
        if retention:
            loss, _ = add_retention_loss(loss, model)
        loss.backward()
        optimizer.step()
        if retention:
            hold_weights(model)
        optimizer.zero_grad()

    return step


def seconds(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def status_mib(key: str) -> float:
    """A memory figure of this process, from Linux (getrusage's peak is inherited from the parent process)."""
    with open("/proc/self/status", encoding="utf-8") as file:
        line = next(line for line in file if line.startswith(key))
    return int(line.split()[1]) / 1024


def peak_mib(arguments: Arguments, variant: str) -> float:
    """Peak memory above that of the built model, in a fresh process that runs three steps of a variant or "digital"."""
    command = [sys.executable, __file__, "--memory_of", variant, "--model", arguments.model]
    command += ["--batch_size", str(arguments.batch_size), "--length", str(arguments.length)]
    if arguments.model_name_or_path:
        command += ["--model_name_or_path", arguments.model_name_or_path]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    model, batch = build(arguments)
    if arguments.memory_of:
        before = status_mib("VmRSS")
        step = make_step(model, batch, None if arguments.memory_of == "digital" else arguments.memory_of)
        for _ in range(3):
            step()
        print(status_mib("VmHWM") - before)
        return
    chosen = [v for v in VARIANTS if not arguments.variants or any(part in v for part in arguments.variants)]
    digital = make_step(copy.deepcopy(model), batch, None)
    rows = []
    memory = peak_mib(arguments, "digital") if arguments.memory else None
    for variant in chosen:
        step = make_step(copy.deepcopy(model), batch, variant)
        digital(), step()  # warm-up
        pairs = [(seconds(digital), seconds(step)) for _ in range(arguments.pairs)]
        row = {
            "variant": variant,
            "step": statistics.median(b / a for a, b in pairs),
            "digital_seconds": statistics.median(a for a, _ in pairs),
            "memory": peak_mib(arguments, variant) / memory if memory else None,
        }
        rows.append(row)
        peak = f"{row['memory']:.2f}" if memory else "–"
        print(f"| {variant} | {row['step']:.3f} | {peak} |", flush=True)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {date.today()}"
    print(
        f"{arguments.model}, batch {arguments.batch_size}: digital step {rows[0]['digital_seconds']:.2f} s; {machine}"
    )
    if arguments.output:
        with open(arguments.output, "w", encoding="utf-8") as file:
            json.dump({"model": arguments.model, "machine": machine, "rows": rows}, file, indent=2)


if __name__ == "__main__":
    main()
