"""How far a model's predictions are from a teacher's."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..device.checks import is_finite
from ..model.inputs import Prediction, find_logits, find_predictions


def divergence(student, teacher, temperature: float = 1.0, *, model: nn.Module | None = None) -> Tensor:
    """How far the student's predictions are from the teacher's: KL(teacher ‖ student) of classes, and of labels that
    are predicted each for itself, or for values the mean squared error; mean over examples, tokens and pixels, summed
    over logits tensors.

    Args:
        student, teacher: outputs of two forwards of models with the same head; the teacher's get no gradient.
        temperature: divides the logits, and its square multiplies the divergence, so that gradients stay of one size
            (Hinton et al., arXiv 1503.02531). Above 1, classes that are unlikely count more.
        model: the student on crossbars, whose last forward the student's outputs are of. Its config says where logits
            are those of labels or values, and its attention mask which tokens are padding, which do not count. Without
            it all logits are taken as those of classes (the second dimension of images, else the last), and all
            tokens count.

    Raises:
        ValueError: their logits differ in shape, or a bad temperature.
    """
    check_temperature("temperature", temperature)
    total: Tensor | None = None
    for prediction, t in zip(find_predictions(student, model), find_logits(teacher).values(), strict=True):
        s = prediction.logits
        if s.shape != t.shape:
            raise ValueError(f"student logits {tuple(s.shape)} and teacher logits {tuple(t.shape)} differ in shape")
        part = _by_place(prediction, t, temperature)
        keep = prediction.keep
        part = part.mean() if keep is None else (part * keep).sum() / keep.sum().clamp(min=1)
        total = part if total is None else total + part
    assert total is not None
    return total


def _by_place(prediction: Prediction, teacher: Tensor, temperature: float) -> Tensor:
    """The divergence at each place, (examples, places)."""
    s, t = prediction.by_place(prediction.logits), prediction.by_place(teacher.detach())
    if prediction.kind == "values":
        return F.mse_loss(s, t, reduction="none").mean(-1)
    s, t = s / temperature, t / temperature
    if prediction.kind == "labels":  # yes or no, the two classes of each label
        s, t = (torch.stack((z, torch.zeros_like(z)), -1) for z in (s, t))
    s, t = s.log_softmax(-1), t.log_softmax(-1)
    return F.kl_div(s, t, reduction="none", log_target=True).flatten(2).sum(-1) * temperature**2


def check_temperature(name: str, temperature: float) -> None:
    """
    Raises:
        ValueError: not a finite number above 0.
    """
    if not (is_finite(temperature) and temperature > 0):
        raise ValueError(f"{name}={temperature!r}: allowed is a finite number above 0")
