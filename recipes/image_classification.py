"""Image classification that keeps its accuracy on ReRAM crossbars for ten years.

    accelerate launch recipes/image_classification.py --preset deit-tiny
    accelerate launch recipes/image_classification.py --preset mobilenetv3-small --train_dir A --validation_dir B
    accelerate launch recipes/image_classification.py --preset resnet18 --dataset_name uoft-cs/cifar10 \\
        --validation_split test --base_steps 2000
    accelerate launch recipes/image_classification.py --model_name_or_path FOLDER --train_file A.parquet \\
        --split_labels 0.5 --teacher True

Compares the digital base, as it is and finetuned, a naive crossbar, the calibrated mapping, and finetuning without
retention loss, with noise injection and with hf_reram's loss, at the same steps and data. A run that was killed goes on
where it stopped when it is started again. The finetuned model is in OUTPUT_DIR/hf-reram/model, the comparison in
OUTPUT_DIR/report.md.
"""

from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForImageClassification,
    DeiTConfig,
    HfArgumentParser,
    TimmWrapperConfig,
    Trainer,
    TrainerCallback,
    set_seed,
)

from hf_reram import ReRAMConfig, ReRAMTrainer, use_fused_kernels
from hf_reram.tasks import (
    OURS,
    ImageClassification,
    ImageDataset,
    MixUp,
    RecipeTrainingArguments,
    ReRAMArguments,
    batch_norms,
    check_labels,
    claim_folder,
    draw,
    find_columns,
    fold_batch_norm,
    image_processor,
    image_transforms,
    keep_preprocessing,
    last_checkpoint,
    load_rows,
    name_of_data,
    push,
    recipe_about,
    recipe_settings,
    reestimate_batch_norm,
    run_protocol,
)

# A stem and depthwise convolutions are few cells that disturb the model most: recipes/README.md.
MOBILENET = {"learning_rate": 3e-4, "redundancy": 0.05}

# Flags of each preset, and the shape of a new model of its kind for --from_scratch.
PRESETS: dict[str, dict[str, Any]] = {
    "deit-tiny": {"model_name_or_path": "facebook/deit-tiny-patch16-224", "learning_rate": 5e-5},
    "resnet18": {"model_name_or_path": "timm/resnet18.a1_in1k", "learning_rate": 2e-4},
    "mobilenetv3-small": {"model_name_or_path": "timm/mobilenetv3_small_100.lamb_in1k", **MOBILENET},
    "mobilenetv3-large": {"model_name_or_path": "timm/mobilenetv3_large_100.ra_in1k", **MOBILENET},
    # Measured on the real weights, recipes/README.md.
    "efficientnet-lite0": {
        "model_name_or_path": "timm/efficientnet_lite0.ra_in1k",
        "learning_rate": 2e-5,
        "teacher_temperature": 4.0,
        "weight_clip": "none",
        "equalize_inputs": True,
        "tile_size": 64,
        "weight_scale": "per_tile",
        "redundancy": 0.05,
    },
}
SHAPES = {
    "deit-tiny": lambda: DeiTConfig(
        architectures=["DeiTForImageClassification"], hidden_size=192, num_attention_heads=3, intermediate_size=768
    ),
    "resnet18": lambda: TimmWrapperConfig(architecture="resnet18"),
    "mobilenetv3-small": lambda: TimmWrapperConfig(architecture="mobilenetv3_small_100"),
    "mobilenetv3-large": lambda: TimmWrapperConfig(architecture="mobilenetv3_large_100"),
    "efficientnet-lite0": lambda: TimmWrapperConfig(architecture="efficientnet_lite0"),
}


@dataclass
class Arguments:
    preset: str | None = field(default=None, metadata={"help": f"flags for one of {sorted(PRESETS)}; yours come first"})
    model_name_or_path: str = field(default="facebook/deit-tiny-patch16-224", metadata={"help": "a trained classifier"})
    dataset_name: str = field(default="ILSVRC/imagenet-1k", metadata={"help": "unless folders or files are given"})
    train_split: str = "train"
    validation_split: str = "validation"
    train_dir: str | None = field(default=None, metadata={"help": "a folder of images for each class"})
    validation_dir: str | None = field(default=None, metadata={"help": "a folder of images for each class"})
    train_file: str | None = field(default=None, metadata={"help": "parquet with image and label columns"})
    validation_file: str | None = field(default=None, metadata={"help": "parquet with image and label columns"})
    split_labels: float | None = field(
        default=None,
        metadata={"help": "share of the labels to train on where there is one data set, the rest is held out"},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "images, drawn by --seed"})
    max_eval_samples: int | None = field(default=None, metadata={"help": "images, drawn by --seed"})
    augment: bool = field(default=True, metadata={"help": "random crops and flips in training"})
    mixup: float | None = field(
        default=None, metadata={"help": "mix images by shares from Beta(mixup, mixup); with --teacher True alone"}
    )
    image_size: int | None = field(default=None, metadata={"help": "pixels; default what the model wants"})
    batch_norm: str = field(default="freeze", metadata={"help": "freeze, fold (into the weights) or reestimate"})
    digital_ends: bool = field(
        default=False, metadata={"help": "keep the first convolution and the classifier digital"}
    )
    base_steps: int = field(default=0, metadata={"help": "train the digital base first, with a new head if need be"})
    base_learning_rate: float = 1e-3
    base_batch_size: int = 128
    base_bf16: bool = field(default=False, metadata={"help": "train the base in bfloat16, whatever --bf16 says"})
    from_scratch: bool = field(
        default=False, metadata={"help": "a new model of the preset's shape (needs --base_steps)"}
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": "of its shape, such as image_size=32,patch_size=4"}
    )


@dataclass
class Training(RecipeTrainingArguments):
    output_dir: str | None = "outputs/image-classification"
    per_device_train_batch_size: int = 32
    per_device_eval_batch_size: int = 64
    remove_unused_columns: bool | None = False


def parse() -> tuple[Arguments, ReRAMArguments, Training]:
    parser: Any = HfArgumentParser((Arguments, ReRAMArguments, Training))
    parser.set_defaults(device="cmo-hfox-ibm")
    preset = parser.parse_args_into_dataclasses()[0].preset
    if preset is not None:
        if preset not in PRESETS:
            raise ValueError(f"preset={preset!r}: allowed are {sorted(PRESETS)}")
        parser.set_defaults(**PRESETS[preset])
    return parser.parse_args_into_dataclasses()


def load(arguments: Arguments, which: str):
    """The data set "train" or "validation"; None where the flags name only the other one."""
    folder, file = getattr(arguments, f"{which}_dir"), getattr(arguments, f"{which}_file")
    others = (arguments.train_dir, arguments.train_file, arguments.validation_dir, arguments.validation_file)
    if not (folder or file) and any(others):
        return None
    return load_rows(arguments.dataset_name, getattr(arguments, f"{which}_split"), file, folder)


def split_by_label(dataset, share: float, seed: int):
    """Two data sets without a label in common."""
    _, column = find_columns(dataset)
    if not 0 < share < 1:
        raise ValueError(f"split_labels={share!r}: allowed is a number in (0, 1)")
    labels = torch.tensor(dataset[column][:])
    order = torch.unique(labels)[
        torch.randperm(len(torch.unique(labels)), generator=torch.Generator().manual_seed(seed))
    ]
    first = torch.isin(labels, order[: round(share * len(order))])
    return tuple(dataset.select(part.nonzero().flatten().tolist()) for part in (first, ~first))


def load_data(arguments: Arguments, seed: int):
    train, held = load(arguments, "train"), load(arguments, "validation")
    if train is None or held is None:
        if arguments.split_labels is None:
            raise ValueError("only one data set is given: allowed are two, or one with --split_labels")
        train, held = split_by_label(train or held, arguments.split_labels, seed)
    return draw(train, arguments.max_train_samples, seed), draw(held, arguments.max_eval_samples, seed)


def new_model(arguments: Arguments, classes: int):
    if arguments.preset is None:
        raise ValueError(f"from_scratch needs a preset: allowed are {sorted(SHAPES)}")
    config = SHAPES[arguments.preset]()
    config.num_labels = classes
    if arguments.config_overrides:
        config.update_from_string(arguments.config_overrides)
    return AutoModelForImageClassification.from_config(config, dtype=torch.float32)


def load_model(name: str, **changes):
    model, found = AutoModelForImageClassification.from_pretrained(
        name, dtype=torch.float32, output_loading_info=True, **changes
    )
    if found["missing_keys"] and not changes:
        raise ValueError(f"{name} is no image classifier: its checkpoint lacks {sorted(found['missing_keys'])}")
    return model


def train_base(arguments: Arguments, training: Training, train, classes: int, names: list[str] | None) -> str:
    """The digital base, trained or finetuned on the data; its folder."""
    home = Path(training.output_dir or ".") / "base"
    set_seed(training.seed)
    if arguments.from_scratch:
        model, name = new_model(arguments, classes), None
    else:
        name = arguments.model_name_or_path
        model = load_model(name, num_labels=classes, ignore_mismatched_sizes=True)
    augmented, _ = image_transforms(model, name, arguments.image_size)
    image, label = find_columns(train)
    settings = replace(
        training,
        output_dir=str(home),
        max_steps=arguments.base_steps,
        learning_rate=arguments.base_learning_rate,
        per_device_train_batch_size=arguments.base_batch_size,
        bf16=training.bf16 or arguments.base_bf16,
        push_to_hub=False,
    )
    keep_preprocessing(model, arguments.image_size)
    if names:
        model.config.id2label, model.config.label2id = dict(enumerate(names)), {n: i for i, n in enumerate(names)}
    processor = image_processor(model, name, arguments.image_size)
    images = ImageDataset(train, augmented, image, label, check_labels(train, model, "the training data"))
    claim_folder(home, recipe_settings(settings), model, images, "a base model")
    if (home / "model" / "config.json").exists():
        return str(home / "model")
    trainer = Trainer(model, settings, train_dataset=images, processing_class=processor)
    trainer.train(resume_from_checkpoint=last_checkpoint(home))
    trainer.save_model(str(home / "model"))
    trainer.accelerator.wait_for_everyone()
    return str(home / "model")


class Reestimate(TrainerCallback):
    """Batch norm's statistics once more after training, of the crossbar."""

    def __init__(self, batches):
        self.batches = batches

    def on_train_end(self, args, state, control, model=None, **kwargs):
        reestimate_batch_norm(model, self.batches())


def ends_of(model) -> list[str]:
    """Names of the first and the last layer that would go on crossbars."""
    names = [name for name, module in model.named_modules() if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear))]
    return [names[0], names[-1]]


def main() -> None:
    arguments, reram, training = parse()
    use_fused_kernels(reram.fused_kernels)
    if arguments.batch_norm not in ("freeze", "fold", "reestimate"):
        raise ValueError(f"batch_norm={arguments.batch_norm!r}: allowed are freeze, fold and reestimate")
    if arguments.from_scratch and not arguments.base_steps:
        raise ValueError("from_scratch=True and base_steps=0: a new model needs base_steps")
    config, methods = reram.config(), reram.chosen_methods()
    with training.main_process_first():
        train, held = load_data(arguments, training.seed)
        image, label = find_columns(held, "the evaluation data")
        _, train_label = find_columns(train, "the training data", labels=not reram.label_free)
    home = arguments.model_name_or_path
    if arguments.base_steps:  # by all processes together
        names = getattr(held.features[label], "names", None)
        classes = len(names) if names else max(held[label]) + 1
        home = train_base(arguments, training, train, classes, names)
    model = load_model(home)
    held_classes = check_labels(held, model, "the evaluation data")
    train_classes = None if train_label is None else check_labels(train, model, "the training data")
    source = None if arguments.from_scratch else arguments.model_name_or_path
    augmented, plain = image_transforms(model, source, arguments.image_size)
    images = ImageDataset(train, augmented if arguments.augment else plain, image, train_label, train_classes)
    mixed = images if arguments.mixup is None else MixUp(images, arguments.mixup)
    size, workers = training.per_device_eval_batch_size, training.dataloader_num_workers
    evaluate = ImageClassification(held, plain, size, workers, held_classes)
    if arguments.digital_ends:
        config = ReRAMConfig.from_dict(
            {**config.to_dict(), "modules_to_not_convert": [*ends_of(model), *(config.modules_to_not_convert or [])]}
        )

    def batches():
        generator = torch.Generator().manual_seed(training.seed)
        unchanged = ImageDataset(train, plain, image, None)
        yield from islice(DataLoader(unchanged, 32, shuffle=True, generator=generator), 8)

    def base():
        model = load_model(home)
        if arguments.batch_norm == "fold" and batch_norms(model):
            fold_batch_norm(model, next(batches()))
        return model

    def make_trainer(method_config: ReRAMConfig, folder: str) -> ReRAMTrainer:
        set_seed(training.seed)
        trainer = ReRAMTrainer(
            base(),
            replace(training, output_dir=folder, push_to_hub=False),
            train_dataset=mixed,
            calibration_dataset=ImageDataset(train, plain, image, None),
            processing_class=image_processor(model, source, arguments.image_size),
            reram_config=method_config,
            teacher=base() if reram.teacher else None,
            teacher_weight=reram.teacher_weight,
            teacher_temperature=reram.teacher_temperature,
            freeze_batch_norm=arguments.batch_norm != "reestimate",
        )
        if arguments.batch_norm == "reestimate" and batch_norms(trainer.model):
            trainer.add_callback(Reestimate(batches))
        return trainer

    def prepare(trainer: ReRAMTrainer) -> None:
        if arguments.batch_norm == "reestimate" and batch_norms(trainer.model):
            reestimate_batch_norm(trainer.model, batches())

    local = arguments.validation_dir or arguments.validation_file or arguments.train_dir or arguments.train_file
    trained_on = name_of_data(
        arguments.dataset_name,
        arguments.train_split,
        *(arguments.train_dir, arguments.train_file, arguments.validation_dir, arguments.validation_file),
    )
    about = recipe_about(
        "recipes/image_classification.py",
        str(arguments.preset) if arguments.from_scratch else arguments.model_name_or_path,
        training,
        task="image-classification",
        metric="accuracy",
        dataset=Path(local).name if local else arguments.dataset_name,
        dataset_split="held-out labels" if arguments.split_labels else arguments.validation_split,
        examples=len(held),
        label_free=train_label is None,
        training=[f"trained on {len(train)} images of {trained_on}"],
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
        title=f"{about.dataset} on {config.device.name}, {reram.chips} chips",
        settings=recipe_settings(training, arguments, reram),
        allow_uncalled=reram.allow_uncalled,
        prepare=prepare,
    )
    if training.process_index == 0:
        output = Path(training.output_dir)
        print((output / "report.md").read_text())
        if training.push_to_hub and OURS in methods:
            push(output / OURS.folder / "model", training.hub_model_id or about.name, training.hub_private_repo)
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main()
