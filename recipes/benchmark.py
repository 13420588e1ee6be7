"""What a crossbar costs: step time and peak memory in training, inference, conversion, and a chip; tables, and JSON in
the last line.

    python recipes/benchmark.py --model minilm --output benchmark.json

Each variant is timed right after the digital one in the same mode (gradient checkpointing, bfloat16, torch.compile,
LoRA), turn by turn in one run, and reported as the median of the pairs' ratios, so that a machine whose speed drifts
does not matter. Peak memory is that of a process of its own per variant, on a GPU that of PyTorch's allocator. Weights
are random (speed does not depend on them); --model_name_or_path takes a checkpoint's shape instead. IBM's
aihwkit-lightning is timed beside it where it is installed (pip install --no-deps aihwkit-lightning==2.1.0).

A GPU is used where there is one. It needs batches that keep it busy, or the time of launching kernels is all that is
measured: --batch_size 256 for minilm, 512 for deit-tiny and 32 with --length 512 for smollm2 do on an 80 GB card.
"""

import copy
import gc
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import date
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForQuestionAnswering,
    BertConfig,
    DeiTConfig,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    TimmWrapperConfig,
)

from hf_reram import (
    ReRAMConfig,
    add_retention_loss,
    calibrate,
    deploy,
    divergence,
    hold_weights,
    patch_model,
    sampled_drift,
    use_fused_kernels,
)


@dataclass(frozen=True)
class Variant:
    """One way to run the model.

    Attributes:
        options: of ReRAMConfig; None is the digital model. mode: how both are run; "" as they are. fused: with
            fused kernels.
        peer: settings of aihwkit-lightning instead of a crossbar of ours. chip: deployed, for inference.
    """

    options: dict[str, Any] | None = field(default=None, hash=False)
    mode: str = ""
    peer: str | None = None
    chip: bool = False
    fused: bool = False


MODES = {
    "checkpointing": "gradient checkpointing",
    "bf16": "bfloat16",
    "compile": "torch.compile",
    "bf16, compile": "bfloat16 and torch.compile",
    "lora": "LoRA",
}
NONE, DRIFT = {"retention_loss": "none"}, {"retention_loss": "drift"}
CONVERTERS, PER_TOKEN = {"dac_bits": 8, "adc_bits": 8}, {"input_range": "per_token"}
FUSED = {
    "crossbar": NONE,
    "drift": DRIFT,
    "8-bit DAC and ADC": {**NONE, **CONVERTERS},
    "drift, 8-bit DAC and ADC": {**DRIFT, **CONVERTERS},
}
PEERS = {
    "ranges": "aihwkit-lightning: input ranges",
    "noise": "aihwkit-lightning: input ranges, weight noise",
    "converters": "aihwkit-lightning: input ranges, weight noise, 8-bit DAC and ADC",
}

TRAINING: dict[str, Variant] = {
    "crossbar, no retention loss": Variant(NONE),
    "retention loss: drift (default)": Variant(DRIFT),
    **{
        f"retention loss: {loss}": Variant({"retention_loss": loss})
        for loss in ("noise", "weight", "sensitivity", "sensitivity+drift", "output", "output+drift", "consistency")
    },
    "learned input ranges": Variant({**NONE, "input_range": "learned"}),
    "per token: no retention loss": Variant({**NONE, **PER_TOKEN}),
    "per token: drift": Variant({**DRIFT, **PER_TOKEN}),
    "per token: drift, 8-bit DAC and ADC": Variant({**DRIFT, **PER_TOKEN, **CONVERTERS}),
    "8-bit DAC and ADC": Variant({**NONE, **CONVERTERS}),
    "drift, 8-bit DAC and ADC": Variant({**DRIFT, **CONVERTERS}),
    **{
        f"{label}: {'digital' if o is None else 'drift'}": Variant(o, m)
        for m, label in MODES.items()
        for o in (None, DRIFT)
    },
    **{f"{MODES[m]}: drift, 8-bit DAC and ADC": Variant({**DRIFT, **CONVERTERS}, m) for m in ("bf16", "compile")},
    **{f"fused kernels: {label}": Variant(options, fused=True) for label, options in FUSED.items()},
    **{f"bfloat16, fused kernels: {label}": Variant(options, "bf16", fused=True) for label, options in FUSED.items()},
    **{label: Variant(peer=peer) for peer, label in PEERS.items()},
    f"torch.compile: {PEERS['converters']}": Variant(peer="converters", mode="compile"),
}
INFERENCE: dict[str, Variant] = {
    "crossbar": Variant(NONE),
    "8-bit DAC and ADC": Variant({**NONE, **CONVERTERS}),
    "chip": Variant(NONE, chip=True),
    "per token: crossbar": Variant({**NONE, **PER_TOKEN}),
    "per token: 8-bit DAC and ADC": Variant({**NONE, **PER_TOKEN, **CONVERTERS}),
    "per token: chip": Variant({**NONE, **PER_TOKEN}, chip=True),
    **{
        f"{label}: {'digital' if o is None else 'crossbar'}": Variant(o, m)
        for m, label in list(MODES.items())[1:4]
        for o in (None, NONE)
    },
    "torch.compile: 8-bit DAC and ADC": Variant({**NONE, **CONVERTERS}, "compile"),
    **{f"fused kernels: {label}": Variant(FUSED[label], fused=True) for label in ("crossbar", "8-bit DAC and ADC")},
    **{label: Variant(peer=peer) for peer, label in PEERS.items() if peer != "noise"},
    f"torch.compile: {PEERS['converters']}": Variant(peer="converters", mode="compile"),
}


@dataclass
class Arguments:
    model: str = field(default="minilm", metadata={"help": "minilm, smollm2, deit-tiny or mobilenetv3"})
    model_name_or_path: str | None = field(default=None, metadata={"help": "take this checkpoint's config instead"})
    batch_size: int = 16
    length: int = field(default=192, metadata={"help": "tokens per example (minilm, smollm2)"})
    pairs: int = field(default=5, metadata={"help": "timed pairs of digital and other step per variant"})
    parts: list[str] = field(
        default_factory=lambda: ["training", "inference", "chip", "conversion"],
        metadata={"help": "of training, inference, chip, conversion, size"},
    )
    variants: list[str] = field(
        default_factory=list, metadata={"help": "variants' names, or parts of them; default all"}
    )
    memory: bool = field(default=True, metadata={"help": "also measure peak memory, one process per variant"})
    threads: int | None = None
    output: str | None = field(default=None, metadata={"help": "JSON file for the tables"})
    memory_of: str | None = field(default=None, metadata={"help": "internal: measure this variant, print MiB"})


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def build(arguments: Arguments) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A model in training mode and a batch for it."""
    torch.manual_seed(0)
    n, config = arguments.batch_size, None
    if arguments.model_name_or_path:
        config = AutoConfig.from_pretrained(arguments.model_name_or_path)
    if arguments.model == "minilm":
        shape = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
        config = config or BertConfig(**shape)
        model = AutoModelForQuestionAnswering.from_config(config, dtype=torch.float32)
        batch = {
            "input_ids": torch.randint(1000, config.vocab_size, (n, arguments.length)),
            "attention_mask": torch.ones(n, arguments.length, dtype=torch.long),
            "start_positions": torch.randint(arguments.length, (n,)),
            "end_positions": torch.randint(arguments.length, (n,)),
        }
    elif arguments.model == "smollm2":
        shape = {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "intermediate_size": 1536}
        more = {"num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True}
        config = config or LlamaConfig(**shape, **more)
        config.use_cache = False
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        ids = torch.randint(config.vocab_size, (n, arguments.length))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    elif arguments.model in ("deit-tiny", "mobilenetv3"):
        if config is None and arguments.model == "deit-tiny":
            shape = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}
            config = DeiTConfig(architectures=["DeiTForImageClassification"], **shape)
        elif config is None:
            config = TimmWrapperConfig(architecture="mobilenetv3_large_100")
        config.num_labels = 1000
        model = AutoModelForImageClassification.from_config(config, dtype=torch.float32)
        batch = {"pixel_values": torch.randn(n, 3, 224, 224), "labels": torch.randint(1000, (n,))}
    else:
        raise ValueError(f"model={arguments.model!r}: allowed are minilm, smollm2, deit-tiny and mobilenetv3")
    return model.train().to(DEVICE), {key: value.to(DEVICE) for key, value in batch.items()}


def prepared(model: Any, batch: dict[str, torch.Tensor], variant: Variant) -> tuple[Any, Any]:
    """The model as the variant has it, and what calls it."""
    use_fused_kernels(variant.fused)  # which the digital model beside it has none of
    if variant.options is not None:
        patch_model(model, ReRAMConfig(**variant.options))
        calibrate(model, [batch])
    if variant.peer:
        model = analog(model, variant.peer)
    if variant.mode == "checkpointing":
        if hasattr(model, "timm_model"):
            model.timm_model.set_grad_checkpointing()
        else:
            model.gradient_checkpointing_enable({"use_reentrant": False})
    if variant.mode == "lora":
        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    return model, torch.compile(model) if "compile" in variant.mode else model


def analog(model: Any, peer: str) -> Any:
    """The model in aihwkit-lightning."""
    from aihwkit_lightning.nn.conversion import convert_to_analog
    from aihwkit_lightning.simulator.configs import TorchInferenceRPUConfig
    from aihwkit_lightning.simulator.parameters import WeightClipType, WeightNoiseInjectionType

    config = TorchInferenceRPUConfig()
    config.pre_post.input_range.enable = True
    config.clip.type, config.clip.sigma = WeightClipType.LAYER_GAUSSIAN_PER_CHANNEL, 2.5
    if peer != "ranges":
        config.modifier.noise_type = WeightNoiseInjectionType.ADD_NORMAL_PER_CHANNEL
        config.modifier.std_dev = 0.03
    if peer == "converters":
        config.forward.inp_res = config.forward.out_res = 2**8 - 2
        config.forward.out_bound = 12.0
    # A head that is tied to the embeddings stays digital, as ours does.
    return convert_to_analog(model, config, exclude_modules=["lm_head"], inplace=True)


def autocast(variant: Variant) -> Any:
    return torch.autocast(DEVICE, torch.bfloat16) if "bf16" in variant.mode else nullcontext()


def make_step(model: Any, batch: dict[str, torch.Tensor], variant: Variant) -> Callable[[], None]:
    """One training step: forward, loss, backward, AdamW."""
    model, call = prepared(model, batch, variant)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer: Any
    if variant.peer:
        from aihwkit_lightning.optim import AnalogOptimizer

        optimizer = AnalogOptimizer(torch.optim.AdamW, model.analog_layers, trained, lr=1e-5)
    else:
        optimizer = torch.optim.AdamW(trained, lr=1e-5)
    crossbars = variant.options is not None
    if crossbars:
        hold_weights(model)  # as ReRAMTrainer does before its first step
    consistency = crossbars and variant.options.get("retention_loss") == "consistency"

    def step() -> None:
        with sampled_drift(model) if crossbars else nullcontext(), autocast(variant):
            output = call(**batch)
        loss = output.loss
        if consistency:
            with sampled_drift(model, "drift"):
                loss = loss + divergence(call(**batch), output)
        elif crossbars:
            loss, _ = add_retention_loss(loss, model)
        loss.backward()
        optimizer.step()
        if crossbars:
            hold_weights(model)
        optimizer.zero_grad()

    return step


def make_inference(model: Any, batch: dict[str, torch.Tensor], variant: Variant) -> Callable[[], None]:
    """One forward in evaluation mode."""
    model, call = prepared(model.eval(), batch, variant)
    if variant.chip:
        deploy(model, "1d", seed=0).__enter__()  # for as long as the process runs
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "pixel_values") if key in batch}

    @torch.no_grad()
    def step() -> None:
        with autocast(variant):
            call(**inputs)

    return step


def seconds(step: Callable[[], Any]) -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def status_mib(key: str) -> float:
    """A memory figure of this process, from Linux (getrusage's peak is inherited from the parent process)."""
    with open("/proc/self/status", encoding="utf-8") as file:
        line = next(line for line in file if line.startswith(key))
    return int(line.split()[1]) / 1024


def peak_mib(arguments: Arguments, name: str) -> float:
    """Peak memory above that of the built model, in a fresh process that runs three steps. What it frees goes back to
    the system at once: fragments of glibc's heap would add up to a tenth, by chance."""
    command = [sys.executable, __file__, "--memory_of", name, "--model", arguments.model]
    command += ["--batch_size", str(arguments.batch_size), "--length", str(arguments.length)]
    if arguments.model_name_or_path:
        command += ["--model_name_or_path", arguments.model_name_or_path]
    tight = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    return float(subprocess.run(command, check=True, capture_output=True, text=True, env=tight).stdout.split()[-1])


def measure_memory(arguments: Arguments) -> float:
    model, batch = build(arguments)
    variant = TRAINING.get(str(arguments.memory_of), Variant())
    use_fused_kernels(variant.fused)  # the compiler's own memory is not the step's
    before = status_mib("VmRSS")
    step = make_step(model, batch, variant)
    for _ in range(3):
        step()
    return status_mib("VmHWM") - before


def peak_gpu_mib(model: Any, batch: dict[str, torch.Tensor], variant: Variant) -> float:
    """Peak memory of a step above that of the model, a copy of which is trained; other models may lie beside it."""
    model = copy.deepcopy(model)
    gc.collect()  # what is freed later would be counted off
    before = torch.cuda.memory_allocated()
    step = make_step(model, batch, variant)
    step()  # makes the optimizer's state
    torch.cuda.reset_peak_memory_stats()  # calibration has had its own peak
    for _ in range(2):
        step()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def why_not(arguments: Arguments, variant: Variant) -> str | None:
    """What keeps a variant from being run."""
    if variant.peer and importlib.util.find_spec("aihwkit_lightning") is None:
        return "pip install --no-deps aihwkit-lightning==2.1.0"
    if variant.peer and arguments.model == "mobilenetv3":
        return "aihwkit-lightning refuses depthwise convolutions"
    if variant.fused:
        try:
            use_fused_kernels()
        except RuntimeError as error:
            return str(error).splitlines()[0]
    if variant.mode == "lora" and arguments.model == "mobilenetv3":
        return "the model has one linear layer"
    return None


def compare(arguments: Arguments, model: Any, batch: Any, variants: dict[str, Variant], make: Callable) -> list[dict]:
    """A row for each variant: its time over that of the digital model in the same mode."""
    rows: list[dict] = []
    digital = {"": make(copy.deepcopy(model), batch, Variant())}

    def peak(name: str, variant: Variant) -> float:
        return peak_gpu_mib(model, batch, variant) if DEVICE == "cuda" else peak_mib(arguments, name)

    memory = arguments.memory and make is make_step
    base = peak("digital", Variant()) if memory else None
    print("\n| | time | peak memory |\n| --- | --- | --- |\n| digital | 1.00 | 1.00 |", flush=True)
    for name, variant in variants.items():
        if arguments.variants and not any(
            part == name or (part in name and part not in variants) for part in arguments.variants
        ):
            continue
        if reason := why_not(arguments, variant):
            print(f"| {name} | skipped: {reason} | |", flush=True)
            continue
        if variant.mode not in digital:
            digital[variant.mode] = make(copy.deepcopy(model), batch, Variant(mode=variant.mode))
        # A digital model in another mode against the plain one; all else against the digital model in the same mode.
        against = digital["" if variant.options is None else variant.mode]
        step = (
            digital[variant.mode]
            if variant.options is None and not variant.peer
            else make(copy.deepcopy(model), batch, variant)
        )
        for _ in range(2):  # warm-up; torch.compile
            against(), step()
        pairs = [(seconds(against), seconds(step)) for _ in range(arguments.pairs)]
        row = {
            "variant": name,
            "time": statistics.median(b / a for a, b in pairs),
            "digital_seconds": statistics.median(a for a, _ in pairs),
            "memory": peak(name, variant) / base if base else None,
        }
        rows.append(row)
        ratio = f"{row['memory']:.2f}" if row["memory"] else "–"
        print(f"| {name} | {row['time']:.2f} | {ratio} |", flush=True)
    return rows


def chip(arguments: Arguments, model: Any, batch: Any) -> dict[str, float]:
    """Seconds that programming and ageing a chip takes, and those of evaluating 1,000 examples."""
    crossbar, _ = prepared(copy.deepcopy(model).eval(), batch, Variant(NONE))

    def program() -> None:
        with deploy(crossbar, "10y", seed=1):
            pass

    forward = make_inference(copy.deepcopy(model), batch, Variant())
    program(), forward()
    rounds = [(seconds(program), seconds(forward)) for _ in range(arguments.pairs)]
    one, evaluation = (statistics.median(times) for times in zip(*rounds))
    evaluation *= 1000 / arguments.batch_size
    print(f"\na chip takes {one:.2f} s, an evaluation of 1,000 examples {evaluation:.1f} s: {one / evaluation:.1%}")
    return {"chip_seconds": one, "evaluation_seconds": evaluation}


def large() -> torch.nn.Module:
    """A language model of 1.1 billion parameters in bfloat16."""
    shape = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32}
    return LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=4)).to(torch.bfloat16)


def conversion() -> dict[str, float]:
    """Patching 1.1 billion parameters, without data and with: seconds, and bytes of weights that were copied."""
    found: dict[str, float] = {}
    for where in ("meta", "cpu"):
        with torch.device("meta"):
            model: Any = large()
        if where == "cpu":
            model.to_empty(device="cpu")
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.02)
        before = {name: (p, p.data_ptr()) for name, p in model.named_parameters()}  # on meta, the object itself counts
        took = seconds(lambda model=model: patch_model(model, ReRAMConfig()))
        copied = sum(
            p.nbytes for n, p in model.named_parameters() if before[n][0] is not p or before[n][1] != p.data_ptr()
        )
        parameters = sum(p.numel() for p in model.parameters())
        print(f"{parameters:,} parameters on {where}: patched in {took:.1f} s, {copied} bytes of weights copied")
        found |= {f"{where}_seconds": took, f"{where}_copied_bytes": copied, "parameters": parameters}
    return found


def size(path: str | None = None) -> dict[str, float]:
    """Seconds that a language model in bfloat16 takes on crossbars: to be patched, calibrated on 1,024 tokens, and
    programmed and aged as one chip; and the process's peak memory.

    Args:
        path: of the checkpoint whose config it has; one of 1.1 billion parameters where it is None.
    """
    config = None if path is None else AutoConfig.from_pretrained(path)
    model: Any = large() if config is None else AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = model.to(DEVICE).eval()
    tokens = {"input_ids": torch.randint(model.config.vocab_size, (2, 512), device=DEVICE)}

    def program() -> None:
        with deploy(model, "10y", seed=1):
            pass

    found = {"patch_seconds": seconds(lambda: patch_model(model, ReRAMConfig(**PER_TOKEN)))}
    found["calibrate_seconds"] = seconds(lambda: calibrate(model, [tokens]))
    found["chip_seconds"] = seconds(program)
    found["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    told = ", ".join(f"{name.replace('_', ' ')} {value:.1f}" for name, value in found.items())
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters: {told}")
    return found


def main() -> None:
    arguments: Arguments = HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]  # type: ignore[arg-type]
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch._dynamo.config.recompile_limit = 64  # each variant compiles the same forward anew
    if arguments.memory_of:
        print(measure_memory(arguments))
        return
    known = ("training", "inference", "chip", "conversion", "size")
    if wrong := set(arguments.parts) - set(known):
        raise ValueError(f"parts={sorted(wrong)}: allowed are {known}")
    hardware = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{torch.get_num_threads()} threads"
    machine = f"{platform.machine()}, {hardware}, torch {torch.__version__}, {date.today()}"
    found: dict[str, Any] = {"model": arguments.model, "batch_size": arguments.batch_size, "machine": machine}
    print(f"{arguments.model}, batch {arguments.batch_size}; {machine}")
    model, batch = build(arguments)
    for part in arguments.parts:
        if part == "training":
            found[part] = compare(arguments, model, batch, TRAINING, make_step)
        elif part == "inference":
            found[part] = compare(arguments, copy.deepcopy(model), batch, INFERENCE, make_inference)
        elif part == "chip":
            found[part] = chip(arguments, model, batch)
        else:
            found[part] = conversion() if part == "conversion" else size(arguments.model_name_or_path)
        if arguments.output:
            with open(arguments.output, "w", encoding="utf-8") as file:
                json.dump(found, file, indent=2)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
