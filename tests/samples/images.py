"""A handful of made-up coloured images, as files, folders and a data set, and tiny classifiers."""

from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Pillow
from transformers import (
    ConvNextImageProcessor,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTImageProcessor,
)

COLOURS = {"red": (220, 40, 30), "green": (40, 200, 60), "blue": (40, 60, 230), "grey": (128, 128, 128)}


def picture(label: int, seed: int, size: int = 40) -> Pillow.Image:
    noise = np.random.default_rng(seed).integers(-30, 30, (size, size, 3))
    colour = np.array(list(COLOURS.values())[label])
    return Pillow.fromarray((colour + noise).clip(0, 255).astype(np.uint8))


def dataset(count: int = 16, classes: int = 4) -> Dataset:
    rows = {"image": [picture(i % classes, i) for i in range(count)], "label": [i % classes for i in range(count)]}
    features = Features({"image": Image(), "label": ClassLabel(names=list(COLOURS)[:classes])})
    return Dataset.from_dict(rows, features=features)


def folders(root: Path, count: int = 12) -> Path:
    for i in range(count):
        folder = root / list(COLOURS)[i % 4]
        folder.mkdir(parents=True, exist_ok=True)
        picture(i % 4, i).save(folder / f"{i}.png")
    return root


def save_model(folder: Path, classes: int = 4) -> PreTrainedModel:
    """A ResNet of six convolutions with batch norm, and its image processor, as a checkpoint in ``folder``."""
    torch.manual_seed(0)
    shape = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    model = ResNetForImageClassification(ResNetConfig(**shape, num_labels=classes)).eval()
    model.save_pretrained(folder)
    size = {"height": 32, "width": 32}
    ViTImageProcessor(size=size).save_pretrained(folder)
    return model


def processors():
    return {
        "square": ViTImageProcessor(size={"height": 32, "width": 32}),
        "crop": ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.875),
    }
