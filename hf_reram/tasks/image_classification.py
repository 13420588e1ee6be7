"""Image classification: data sets, preprocessing as the model wants it, top-1 and top-5.

Data sets are as on the Hub: an image column and a column of labels, numbers or names.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers.utils import logging

from ..model.inputs import evaluating
from .labels import classes_of

logger = logging.get_logger(__name__)

IMAGES = ("image", "img", "pixel_values")
LABELS = ("label", "labels", "fine_label")
CROPS = (0.35, 1.0)  # share of the image's area in a training crop
KEPT_BYTES = 1 << 30  # preprocessed images that are kept for the next evaluation


def find_columns(dataset, what: str = "dataset", labels: bool = True) -> tuple[str, str | None]:
    """Names of the image column and the label column.

    Raises:
        ValueError: there is no such column, or no row.
    """
    columns = dataset.column_names
    image = next((name for name in IMAGES if name in columns), None)
    label = next((name for name in LABELS if name in columns), None)
    if image is None or (labels and label is None):
        lacking = f"an image column, one of {list(IMAGES)}" if image is None else f"labels, one of {list(LABELS)}"
        raise ValueError(f"{what} has columns {columns}: missing is {lacking}")
    if len(dataset) == 0:
        raise ValueError(f"{what} is empty: allowed is at least one image")
    return image, label if labels else None


def check_labels(
    dataset, model: Any, what: str = "dataset", label_names: Mapping[str, str] | None = None
) -> dict[Any, int]:
    """Whether a data set's labels are the model's classes; classes without an image are counted in a warning.

    Args:
        label_names: see :func:`hf_reram.tasks.labels.classes_of`.

    Returns:
        the model's class of each label that occurs, see :func:`hf_reram.tasks.labels.classes_of`.

    Raises:
        ValueError: names of other classes, another number of classes, or labels outside the model's.
    """
    _, column = find_columns(dataset, what)
    assert column is not None
    known = model.config.id2label
    names = getattr(dataset.features[column], "names", None)
    classes = classes_of(dataset[column][:], names, known, what, label_names=label_names)
    empty = len(known) - len(set(classes.values()))
    if empty:
        logger.warning("%s has no image of %d of the %d classes", what, empty, len(known))
    return classes


class ImageDataset(Dataset):
    """A Hub data set as ``pixel_values`` and, with a label column, ``labels``.

    Args:
        transform: from a PIL image in RGB to a tensor (channels, height, width).
        image, label: columns; without ``label`` no labels.
        classes: the model's class of each label, as :func:`check_labels` finds it; None: labels are its numbers.

    Raises:
        ValueError: on access, an image that cannot be decoded; names its row and file.
    """

    classes: Mapping[Any, int] | None = None

    def __init__(
        self,
        dataset,
        transform: Callable[[Any], Tensor],
        image: str = "image",
        label: str | None = "label",
        classes: Mapping[Any, int] | None = None,
    ):
        self.dataset, self.transform, self.image, self.label = dataset, transform, image, label
        if classes is not None and any(label != number for label, number in classes.items()):
            self.classes = classes

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            row = self.dataset[index]
            pixels = self.transform(row[self.image].convert("RGB"))
        except (OSError, SyntaxError) as error:  # PIL raises both for broken files
            raise ValueError(f"image {index} cannot be decoded: {error}") from error
        if self.label is None:
            return {"pixel_values": pixels}
        label = row[self.label]
        return {"pixel_values": pixels, "labels": int(label) if self.classes is None else self.classes[label]}


class MixUp(Dataset):
    """Images mixed with others, drawn at random: ``λ x_i + (1 - λ) x_j`` with λ from Beta(α, α) (Zhang et al., arXiv
    1710.09412). They have no labels; a teacher says what is in them. From few images it makes many (Beyer et al., arXiv
    2106.05237).

    Args:
        images: without labels. alpha: above 0; 1 draws λ evenly.

    Raises:
        ValueError: another alpha, or images with labels.
    """

    def __init__(self, images: ImageDataset, alpha: float):
        if not 0 < alpha < math.inf:
            raise ValueError(f"mixup={alpha!r}: allowed is a number above 0")
        if images.label is not None:
            raise ValueError(f"mixup={alpha!r}: mixed images have no labels, allowed is a teacher alone")
        self.images, self.share = images, torch.distributions.Beta(alpha, alpha)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        other = int(torch.randint(len(self), ()))
        one, two = (self.images[i]["pixel_values"] for i in (index, other))
        return {"pixel_values": two.lerp(one, float(self.share.sample()))}


def image_transforms(model: Any, name: str | None, size: int | None = None) -> tuple[Callable, Callable]:
    """Preprocessing for training (random crop, flip) and for evaluation, as the model's image processor, or timm, says.

    Args:
        model: of any class with an image processor, or transformers' wrapper of a timm model.
        name: where the model came from, a Hub id or a folder; None: it is new, and its config's ``image_size`` says.
        size: pixels of the side instead of what they say.

    Raises:
        ImportError: torchvision is missing.
        ValueError: nothing says how to preprocess.
    """
    _need_vision()
    if hasattr(model, "timm_model"):
        from timm.data import create_transform, resolve_data_config

        wanted = resolve_data_config(_timm_size(size), model=model.timm_model)
        mild: Any = {"auto_augment": None, "re_prob": 0, "color_jitter": None, "scale": CROPS}
        return create_transform(**wanted, is_training=True, **mild), create_transform(**wanted)
    return processor_transforms(image_processor(model, name, size))


def _need_vision() -> None:
    try:
        import torchvision  # noqa: F401
    except ImportError as error:
        raise ImportError("image classification needs torchvision: pip install 'hf_reram[vision]'") from error


def image_processor(model: Any, name: str | None, size: int | None = None) -> Any:
    """The image processor that goes with a model's checkpoint; None for a timm model, whose config.json says it all.

    Args, Raises: as :func:`image_transforms`.
    """
    if hasattr(model, "timm_model"):
        return None
    from transformers import AutoImageProcessor, ViTImageProcessor

    if name is None:
        side = size or getattr(model.config, "image_size", None)
        if side is None:
            raise ValueError("nothing says how large images are: give an image size")
        shape = {"height": side, "width": side}
        return ViTImageProcessor(size=shape, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    try:
        return AutoImageProcessor.from_pretrained(name, **({"size": size, "crop_size": size} if size else {}))
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} has no image processor, so nothing says how to preprocess images: {error}") from error


def keep_preprocessing(model: Any, size: int | None) -> None:
    """Have a timm model's config.json say how :func:`image_transforms` preprocesses with ``size``."""
    if not hasattr(model, "timm_model"):
        return
    model.config.pretrained_cfg = {**model.timm_model.pretrained_cfg, **_timm_size(size)}
    model.timm_model.pretrained_cfg = model.config.pretrained_cfg


def _timm_size(size: int | None) -> dict[str, Any]:
    """What timm's preprocessing calls an image size of one's own."""
    return {"input_size": (3, size, size), "crop_pct": 1.0} if size else {}


def processor_transforms(processor: Any) -> tuple[Callable, Callable]:
    """The same of an image processor."""
    from torchvision.transforms import v2

    side = _height_width(processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size)
    normalize = v2.Normalize(processor.image_mean, processor.image_std) if processor.do_normalize else v2.Identity()
    train = v2.Compose(
        [
            v2.RandomResizedCrop(side, scale=CROPS),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            normalize,
        ]
    )
    return train, _Evaluation(processor)


class _Evaluation:
    """The image processor itself on one image; a class, so that DataLoader workers can have it."""

    def __init__(self, processor: Any):
        self.processor = processor

    def __call__(self, image: Any) -> Tensor:
        return self.processor(image, return_tensors="pt")["pixel_values"][0]


def _height_width(size: Any) -> tuple[int, int]:
    values = dict(size)
    edge = values.get("shortest_edge")
    return (edge, edge) if edge else (values["height"], values["width"])


class ImageClassification:
    """Top-1 and top-5 accuracy of a model on a data set, in percent.

    Calling it with a model gives ``accuracy`` and, from 6 classes on, ``top5_accuracy``, so it fits
    :func:`hf_reram.evaluate_robustness`. Preprocessed images are kept from the first call on, up to 1 GiB.

    Args:
        dataset: see the module. transform: as :func:`image_transforms` gives for evaluation.
        batch_size: images a forward. workers: processes that decode and preprocess.
        classes: see :class:`ImageDataset`.

    Raises:
        ValueError: as :func:`find_columns`.
    """

    _kept: list[Mapping[str, Tensor]] | None = None

    def __init__(
        self,
        dataset,
        transform: Callable[[Any], Tensor],
        batch_size: int = 64,
        workers: int = 0,
        classes: Mapping[Any, int] | None = None,
    ):
        image, label = find_columns(dataset, "the evaluation data")
        self.images = ImageDataset(dataset, transform, image, label, classes)
        self.batch_size, self.workers = batch_size, workers

    def told_by(self) -> dict[str, Any]:
        """What figures depend on, see :func:`hf_reram.evaluation.content.described`."""
        return {name: value for name, value in vars(self).items() if name not in ("batch_size", "workers", "_kept")}

    def batches(self):
        if self._kept is not None:
            yield from self._kept
            return
        kept, size = [], 0
        for batch in DataLoader(self.images, self.batch_size, num_workers=self.workers):
            size += batch["pixel_values"].nbytes
            if size <= KEPT_BYTES:
                kept.append(batch)
            yield batch
        self._kept = kept if size <= KEPT_BYTES else None

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Accuracies of the model in evaluation mode.

        Raises:
            ValueError: the model gives no logits over classes.
        """
        right = torch.zeros(2, dtype=torch.float64)
        with evaluating(model):
            device = next(model.parameters()).device
            for batch in self.batches():
                with torch.inference_mode():
                    logits = model(pixel_values=batch["pixel_values"].to(device)).logits.float().cpu()
                if logits.dim() != 2:
                    raise ValueError(
                        f"{type(model).__name__} gives logits of shape {tuple(logits.shape)}: allowed is "
                        "(images, classes)"
                    )
                best = logits.topk(min(5, logits.shape[1])).indices == batch["labels"][:, None]
                right += torch.stack([best[:, 0].sum(), best.any(1).sum()])
        top1, top5 = (100 * right / len(self.images)).tolist()
        return {"accuracy": top1} | ({"top5_accuracy": top5} if logits.shape[1] > 5 else {})
