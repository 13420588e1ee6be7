"""The whole path on scikit-learn's handwritten digits, in minutes on a laptop: digital base, crossbar, finetuning,
chips that age, checkpoint. Needs no network and no data beside it."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging as hf_logging

from ..calibration.settle import calibrate
from ..config import ReRAMConfig
from ..device import DeviceConfig
from ..device.retention import retention_from_dict
from ..evaluation.report import RobustnessReport
from ..evaluation.robustness import evaluate_robustness
from ..hub.about import About
from ..hub.publish import publish
from ..integrations.trainer import ReRAMTrainer
from ..model.deploy import deploy, digital
from ..model.patch import patch_model
from ..model.summary import summarize
from .comparison import CONTROL, METHODS, OURS, Method, write_comparison

TIMES = ("1s", "1d", "10y")
LEARNING_RATE = 1e-3  # of the finetunings; the base's is twice as much

# A hard corner, on purpose: an I-V curve read far into its sinh, and a spread that grows with conductance and time.
CORNER = DeviceConfig(
    name="demo corner",
    source="hf_reram's demo, not a published device: chosen so that both errors show on an easy task",
    g_min=1.0,
    g_max=50.0,
    v0=0.25,
    read_voltage=0.75,
    retention=retention_from_dict({"type": "generic", "A": 0.005, "tau": 1.0, "s0": 0.5, "s1": 0.05, "s2": 0.04}),
    programming=(0.2, 0.01),
    read_noise=0.1,
    assumed=("g_min", "g_max", "v0", "read_voltage", "retention", "programming", "read_noise"),
)


@dataclass
class Digits:
    """Train and test parts, each as (images (n, 1, 8, 8), labels (n,))."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @classmethod
    def load(cls, seed: int = 0) -> "Digits":
        """scikit-learn's digits (UCI optical recognition of handwritten digits), a fifth of them for testing.

        Raises:
            ImportError: scikit-learn is not installed.
        """
        try:
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        except ImportError as error:
            raise ImportError("the demo needs scikit-learn: pip install 'hf_reram[demo]'") from error
        data = load_digits()
        images = (torch.tensor(data.images, dtype=torch.float32)[:, None] - 8) / 8
        labels = torch.tensor(data.target)
        train, test = train_test_split(range(len(labels)), test_size=0.2, random_state=seed, stratify=labels)
        return cls((images[train], labels[train]), (images[test], labels[test]))

    def dataset(self) -> list[dict[str, Tensor]]:
        return [{"pixel_values": x, "labels": y} for x, y in zip(*self.train)]

    def accuracy(self, model: nn.Module) -> dict[str, float]:
        """Percent of the test images that the model gets right."""
        images, labels = self.test
        model.eval()
        with torch.inference_mode():
            right = model(pixel_values=images).logits.argmax(-1) == labels
        return {"accuracy": 100 * float(right.float().mean())}


def small_deit() -> nn.Module:
    """A DeiT for 8 x 8 digits: 16 patches, 4 layers, 64 channels."""
    return DeiTForImageClassification(
        DeiTConfig(
            image_size=8,
            patch_size=2,
            num_channels=1,
            hidden_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=128,
            num_labels=10,  # type: ignore[call-arg]
        )
    )


def _arguments(folder: Path, epochs: float, learning_rate: float, seed: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        learning_rate=learning_rate,
        per_device_train_batch_size=64,
        warmup_steps=0.1,
        lr_scheduler_type="cosine",
        weight_decay=0.01,
        seed=seed,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )


def train_base(digits: Digits, folder: Path, epochs: float, seed: int) -> nn.Module:
    """The digital base."""
    set_seed(seed)
    model = small_deit()
    trainer = Trainer(model, _arguments(folder, epochs, 2e-3, seed), train_dataset=digits.dataset())
    trainer.remove_callback(PrinterCallback)  # the demo shows progress of its own
    trainer.train()
    return model


def make_model(
    method: Method, base: nn.Module, digits: Digits, folder: Path, epochs: float, seed: int, redundancy: float = 0.0
) -> Any:
    """One method's model, made out of the base."""
    set_seed(seed)
    model = copy.deepcopy(base)
    config = method.config(ReRAMConfig(device=CORNER, retention_times=[TIMES[-1]], redundancy=redundancy))
    if method.loss is None:
        patch_model(model, config)
        return calibrate(model, [{"pixel_values": images} for images in digits.train[0].split(64)])
    arguments = _arguments(folder, epochs, LEARNING_RATE, seed)
    trainer = ReRAMTrainer(model, arguments, train_dataset=digits.dataset(), reram_config=config)
    trainer.remove_callback(PrinterCallback)
    (trainer.train_digitally if method.digital else trainer.train)()
    return model


def run_demo(
    folder: str | Path = "reram-demo",
    chips: int = 16,
    base_epochs: float = 40,
    epochs: float = 25,
    seed: int = 0,
    redundancy: float = ReRAMConfig.redundancy,
    progress: Callable[[str], None] = print,
) -> dict[str, RobustnessReport]:
    """Train, compare, write ``report.json``, ``report.md``, ``robustness.png`` and ``checkpoint/`` into ``folder``, and
    load the checkpoint again.

    Args:
        chips: how many for each row. redundancy: cells on top, as a share, see :class:`ReRAMConfig`.
        progress: called with what has just been finished.

    Returns:
        Reports by label of :data:`METHODS`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    hf_logging.disable_progress_bar()
    digits = Digits.load()
    base = train_base(digits, folder, base_epochs, seed)
    accuracy = digits.accuracy(base)["accuracy"]
    progress(f"digital base: {accuracy:.1f} % of {len(digits.test[1])} test digits")
    shared = base, digits, folder, epochs, seed, redundancy
    with digital(make_model(CONTROL, *shared)) as control:
        finetuned = digits.accuracy(control)["accuracy"]
    progress(f"{CONTROL.label}: {finetuned:.1f} %")
    reports, ours = {}, None
    for method in METHODS:
        if method is CONTROL:
            continue
        model = make_model(method, *shared)
        report = evaluate_robustness(model, digits.accuracy, times=TIMES, seeds=chips, progress=False)
        reports[method.label] = report
        if method is OURS:
            ours = model
        last = report.statistic("accuracy", TIMES[-1])
        progress(f"{method.label}: {last.shown(1)} % after {TIMES[-1]}")
    title = f"Handwritten digits on {CORNER.name}, {chips} chips"
    about = About(
        task="image-classification",
        metric="accuracy",
        dataset="scikit-learn's handwritten digits",
        dataset_split="test",
        base_model="small-deit-digits",
        name="digits-reram",
        examples=len(digits.test[1]),
        base_metrics={"accuracy": accuracy},
        control_metrics={"accuracy": finetuned},
    )
    reports[OURS.label].about = about.to_dict()
    write_comparison(folder, reports, title=title)
    assert ours is not None
    ours.save_pretrained(folder / "checkpoint")
    publish(folder / "checkpoint", reports[OURS.label], reports, title)
    check_reload(ours, folder / "checkpoint", digits)
    progress(f"checkpoint loads again with {summarize(ours).layers} crossbar layers and the same predictions")
    return reports


def check_reload(model: nn.Module, folder: Path, digits: Digits) -> None:
    """Load the checkpoint and compare its predictions, as an ideal crossbar and as one aged chip.

    Raises:
        RuntimeError: they differ.
    """
    again = DeiTForImageClassification.from_pretrained(folder)
    images = digits.test[0][:64]
    with torch.inference_mode():
        model.eval()
        same = torch.allclose(model(images).logits, again(images).logits, atol=1e-5)
        config: dict = {"time": "1d", "seed": 7}
        with deploy(model, **config), deploy(again, **config):
            torch.manual_seed(0)
            aged = model(images).logits
            torch.manual_seed(0)
            same = same and torch.allclose(aged, again(images).logits, atol=1e-5)
    if not same:
        raise RuntimeError(f"the checkpoint in {folder} predicts something else than the model that it was saved from")
