"""What a checkpoint's weights lack, or hold beyond its config: transformers makes the first up and leaves the second
out, each in a table of its own, and no figure of such a model is the checkpoint's."""

import logging
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers.utils import logging as transformers_logging

from ..config import SELECTION_FIELDS
from ..device.checks import shown, some
from ..model.find import crossbar_layers
from ..nn.scalars import BUFFERS

MARK = ".range_shrink"  # ends the key of one of each crossbar's numbers, and no other
# What checkpoints may lack and no evaluation reads: counts of batch norm, SpecAugment's vector, and what the first
# layer of DPT's fusion has and does not run.
UNREAD = re.compile(r"(\.num_batches_tracked|(^|\.)masked_spec_embed)$|fusion_stage\.layers\.0\.residual_layer1\.")
logger = transformers_logging.get_logger(__name__)


class _Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


@contextmanager
def held_back() -> Iterator[None]:
    """Around loading: hf_reram's warnings are shown once it is done, and of a checkpoint that is refused its error
    alone. transformers' report is not shown."""
    ours, theirs, kept = logging.getLogger("hf_reram"), logging.getLogger("transformers.modeling_utils"), _Kept()
    handlers, propagate = ours.handlers, ours.propagate
    ours.handlers, ours.propagate = [kept], False
    theirs.addFilter(_is_error)  # of another level it would report more
    try:
        yield
    finally:
        ours.handlers, ours.propagate = handlers, propagate
        theirs.removeFilter(_is_error)
    for record in kept.records:
        logging.getLogger(record.name).handle(record)


def missing_from(info: Mapping[str, Any], model: Any) -> list[str]:
    """Keys of a model's weights that its checkpoint lacks, without those that no figure depends on: what trainings
    alone read, what its class computes (sinusoids), and the pooler of a model without a head, which a warning names.

    Args:
        info: of ``from_pretrained(..., output_loading_info=True)``, which leaves out what is tied or made anew.
    """
    found = sorted(key for key in info["missing_keys"] if not UNREAD.search(key) and not _is_computed(model, key))
    poolers = [key for key in found if model.base_model is model and "pooler" in key.split(".")]
    if poolers:
        logger.warning("%s is random, as the checkpoint lacks it: do not use what it pools", some(poolers))
    return [key for key in found if key not in poolers]


def _is_computed(model: Any, key: str) -> bool:
    try:
        module = model.get_submodule(key.rpartition(".")[0])
    except AttributeError:
        return False
    return "Sinusoidal" in type(module).__name__


def refuse_random(name: Any, model: Any, missing: Collection[str]) -> None:
    """
    Args:
        name: of the checkpoint. missing: keys that it lacks.

    Raises:
        ValueError: there are some, or crossbars lack numbers of calibration that others have; names them.
    """
    if missing:
        raise ValueError(
            f"{name} lacks weights of {type(model).__name__}, which would be random: {some(sorted(missing))}: allowed "
            "is a checkpoint that has them all"
        )
    layers = crossbar_layers(model).values()
    if lacking := dict.fromkeys(key for layer in layers for key in layer.crossbar.lacking):
        raise ValueError(
            f"{name} lacks numbers of calibration, which other layers of it have: {some(sorted(lacking))}: allowed is "
            f"a checkpoint that has them all, as {type(model).__name__}.from_pretrained, hf_reram.calibrate(model, "
            "batches) and save_pretrained make one"
        )


def refuse_misplaced(name: Any, model: Any, keys: Collection[str]) -> None:
    """
    Args:
        name: of adapters. model: their base. keys: of their weights that have no place beside it.

    Raises:
        ValueError: there are some; names them.
    """
    if keys:
        raise ValueError(
            f"{name} holds weights that have no place beside a {type(model).__name__}: {some(sorted(keys))}: allowed "
            "are adapters of the model that their adapter_config.json names"
        )


def refuse_misshaped(name: Any, model: Any, mismatched: Collection[tuple]) -> None:
    """
    Raises:
        ValueError: weights have other shapes in the checkpoint than its config says; names the first.
    """
    if mismatched:
        key, there, wanted = min(mismatched)
        more = f", and so have {len(mismatched) - 1} more" * (len(mismatched) > 1)
        raise ValueError(
            f"{name}: {key} has another shape in the checkpoint, {list(there)}, than in a {type(model).__name__} of "
            f"its config, {list(wanted)}{more}: allowed are a config.json and weights that were saved together"
        )


def refuse_digital(name: Any, model: Any, unexpected: Collection[str]) -> None:
    """
    Raises:
        ValueError: the checkpoint holds numbers of crossbars, and they are none in the model; says why.
    """
    found = sorted(key.removesuffix(MARK) for key in unexpected if key.endswith(MARK))
    if not found:
        return
    config = getattr(model.config, "quantization_config", None)
    if config is None and not crossbar_layers(model):
        raise ValueError(
            f"{name} holds numbers of calibration of {len(found)} crossbar layers, and its config.json no "
            "quantization_config, which says of which device: it was taken out, or parts without a config of their "
            "own were patched by themselves, of which save_pretrained keeps none. Allowed are models that were patched "
            "as a whole or in parts that are models (PreTrainedModel)"
        )
    said = ", ".join(f"{field}={shown(getattr(config, field, None))}" for field in SELECTION_FIELDS)
    raise ValueError(
        f"{name} holds numbers of calibration of layers that its quantization_config leaves digital: {some(found)} "
        f"({said}): allowed is the config that it was saved with"
    )


def weights_of(keys: Collection[str]) -> list[str]:
    """The keys that are no crossbars' numbers."""
    return sorted(key for key in keys if key.rpartition(".")[2] not in BUFFERS)
