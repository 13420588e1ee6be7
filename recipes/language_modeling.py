"""A causal language model that keeps its perplexity on ReRAM crossbars for ten years.

    accelerate launch recipes/language_modeling.py
    accelerate launch recipes/language_modeling.py --train_file A.parquet --validation_file B.txt --redundancy 0.25
    accelerate launch recipes/language_modeling.py --generate_data 1000 --validation_file B.jsonl
    accelerate launch --config_file recipes/configs/fsdp2.yaml recipes/language_modeling.py --bf16 True --lora True

Compares the digital base, as it is and finetuned, a naive crossbar, the calibrated mapping, and finetuning without
retention loss, with noise injection and with hf_reram's loss, at the same steps and data. The finetuned models follow
the digital one's predictions (``--teacher False``: the next tokens; ``--teacher_weight 0.5``: both), on texts,
conversations, or what the model itself samples. A run that was killed goes on where it stopped when started again.
The finetuned model is in OUTPUT_DIR/hf-reram/model, the comparison in OUTPUT_DIR/report.md.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, HfArgumentParser, default_data_collator, set_seed

from hf_reram import ReRAMConfig, ReRAMTrainer, adapter_target_modules, patch_model, use_fused_kernels
from hf_reram.tasks import (
    OURS,
    Perplexity,
    RecipeTrainingArguments,
    ReRAMArguments,
    draw,
    generate_texts,
    load_rows,
    load_tokenizer,
    name_of_data,
    packed,
    push,
    recipe_about,
    recipe_settings,
    run_protocol,
    texts_of,
    window_length,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Arguments:
    model_name_or_path: str = field(default="HuggingFaceTB/SmolLM2-135M", metadata={"help": "a causal language model"})
    dataset_name: str = field(default="Salesforce/wikitext", metadata={"help": "unless files are given"})
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "of the data set on the Hub; wikitext's is wikitext-2-raw-v1"}
    )
    train_split: str = "train"
    validation_split: str = "validation"
    train_file: str | None = field(default=None, metadata={"help": "parquet, JSON or plain text"})
    validation_file: str | None = field(default=None, metadata={"help": "parquet, JSON or plain text"})
    max_train_samples: int | None = field(default=None, metadata={"help": "texts, drawn by --seed"})
    max_eval_samples: int | None = field(default=None, metadata={"help": "texts, drawn by --seed"})
    generate_data: int | None = field(
        default=None, metadata={"help": "train on so many texts that the model samples, in place of a data set"}
    )
    generate_temperature: float = field(default=1.0, metadata={"help": "of that sampling"})
    max_length: int | None = field(default=None, metadata={"help": "tokens of a window in evaluation; default 1024"})
    train_max_length: int | None = field(default=None, metadata={"help": "the same in training; default 512"})
    dtype: str = field(default="float32", metadata={"help": "of the weights: float32 or bfloat16"})
    lora: bool = field(default=False, metadata={"help": "train LoRA adapters, merged into the weights afterwards"})
    lora_rank: int = 16


@dataclass
class Training(RecipeTrainingArguments):
    output_dir: str | None = "outputs/language-modeling"
    per_device_train_batch_size: int = 4
    per_device_eval_batch_size: int = 4


def parse() -> tuple[Arguments, ReRAMArguments, Training]:
    parser: Any = HfArgumentParser((Arguments, ReRAMArguments, Training))
    # Windows are long: eight batches are enough.
    parser.set_defaults(device="cmo-hfox-ibm", input_range="per_token", calibration_batches=8, teacher=True)
    arguments, reram, training = parser.parse_args_into_dataclasses()
    if arguments.dtype not in DTYPES:
        raise ValueError(f"dtype={arguments.dtype!r}: allowed are {sorted(DTYPES)}")
    for name in ("train_file", "max_train_samples"):
        if arguments.generate_data is not None and getattr(arguments, name) is not None:
            raise ValueError(
                f"{name}={getattr(arguments, name)!r} beside generate_data={arguments.generate_data}: allowed is one "
                "of them, as the model samples the training texts itself"
            )
    if arguments.dataset_name == "Salesforce/wikitext" and arguments.dataset_config_name is None:
        arguments.dataset_config_name = "wikitext-2-raw-v1"
    return arguments, reram, training


def load_model(arguments: Arguments) -> Any:
    model, found = AutoModelForCausalLM.from_pretrained(
        arguments.model_name_or_path, dtype=DTYPES[arguments.dtype], output_loading_info=True
    )
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise ValueError(f"{arguments.model_name_or_path} is no causal model: its checkpoint lacks {missing}")
    return model


def load_texts(arguments: Arguments, which: str, seed: int) -> list:
    """The texts or conversations of "train" or "validation"."""
    file, split = getattr(arguments, f"{which}_file"), getattr(arguments, f"{which}_split")
    if file is None and (arguments.train_file or arguments.validation_file):
        raise ValueError(f"{which}_file is missing: allowed are two files, or none, or --generate_data for training")
    rows = load_rows(arguments.dataset_name, split, file, config_name=arguments.dataset_config_name)
    count = arguments.max_train_samples if which == "train" else arguments.max_eval_samples
    return texts_of(draw(rows, count, seed), f"the {which} data")


def training_windows(texts: list, tokenizer: Any, length: int, labels: bool) -> Dataset:
    """Whole windows of tokens; the rest at the end is left out."""
    windows = [window for window in packed(texts, tokenizer, length, "the training data") if len(window) == length]
    if not windows:
        raise ValueError(f"the training data hold no window of {length} tokens: allowed are longer texts or windows")
    columns = {"input_ids": windows, **({"labels": windows} if labels else {})}
    return Dataset.from_dict({name: [w.tolist() for w in column] for name, column in columns.items()})


def training_data(arguments: Arguments, length: int) -> str:
    """What the training texts are, in words."""
    if arguments.generate_data is None:
        return name_of_data(arguments.dataset_name, arguments.train_split, arguments.train_file)
    count, temperature = arguments.generate_data, arguments.generate_temperature
    return f"{count} texts of at most {length} tokens that the base model sampled at temperature {temperature:g}"


def main() -> None:
    arguments, reram, training = parse()
    config, methods = reram.config(), reram.chosen_methods()
    use_fused_kernels(reram.fused_kernels)
    tokenizer = load_tokenizer(arguments.model_name_or_path)
    model = load_model(arguments)
    length = window_length(model, arguments.max_length)
    train_length = window_length(model, arguments.train_max_length or min(512, window_length(model)))

    with training.main_process_first():
        held = packed(load_texts(arguments, "validation", training.seed), tokenizer, length, "the evaluation data")
        texts = [] if arguments.generate_data is not None else load_texts(arguments, "train", training.seed)
    if arguments.generate_data is not None:
        texts = generate_texts(
            model.to(training.device),
            tokenizer,
            arguments.generate_data,
            train_length,
            Path(training.output_dir or ".") / "generated",
            training.seed,
            training.per_device_eval_batch_size,
            arguments.generate_temperature,
        )
    del model
    train = training_windows(texts, tokenizer, train_length, labels=not reram.label_free)
    evaluate = Perplexity(held, training.per_device_eval_batch_size)

    def make_trainer(method_config: ReRAMConfig, folder: str) -> ReRAMTrainer:
        set_seed(training.seed)
        model = load_model(arguments)
        if arguments.lora:
            patch_model(model, method_config)
            lora = LoraConfig(r=arguments.lora_rank, target_modules=adapter_target_modules(model))
            model = get_peft_model(model, lora)
        return ReRAMTrainer(
            model,
            replace(training, output_dir=folder, push_to_hub=False),
            train_dataset=train,
            data_collator=default_data_collator,
            processing_class=tokenizer,
            reram_config=method_config,
            teacher=load_model(arguments) if reram.teacher else None,
            teacher_weight=reram.teacher_weight,
            teacher_temperature=reram.teacher_temperature,
        )

    local = arguments.validation_file
    tokens = sum(len(window) for window in held)
    about = recipe_about(
        "recipes/language_modeling.py",
        arguments.model_name_or_path,
        training,
        task="text-generation",
        metric="perplexity",
        dataset=Path(local).name if local else arguments.dataset_name,
        dataset_split="" if local else arguments.validation_split,
        examples=len(held),
        label_free=reram.label_free,
        training=[
            f"perplexity of {tokens} tokens in windows of {length}",
            f"trained on {len(train)} windows of {train_length} tokens, of {training_data(arguments, train_length)}",
        ],
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
        title=f"{about.base_model} on {config.device.name}, {reram.chips} chips",
        settings=recipe_settings(training, arguments, reram),
        allow_uncalled=reram.allow_uncalled,
    )
    if training.process_index == 0:
        output = Path(training.output_dir)
        if OURS in methods and training.push_to_hub:
            name = training.hub_model_id or f"{output.name}-reram"
            push(output / OURS.folder / "model", name, training.hub_private_repo)
        print((output / "report.md").read_text())
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main()
