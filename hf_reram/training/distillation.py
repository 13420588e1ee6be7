"""How far a model's predictions are from a teacher's."""

import math

import torch.nn.functional as F
from torch import Tensor

from ..model.inputs import find_logits


def divergence(student, teacher, temperature: float = 1.0) -> Tensor:
    """How far the student's predictions are from the teacher's: KL(teacher ‖ student) over the last dimension of each
    logits tensor, mean over all others, summed over tensors; for a single regression value, the mean squared error.

    Args:
        student, teacher: outputs of two forwards of models with the same head; the teacher's get no gradient.
        temperature: divides the logits, and its square multiplies the divergence, so that gradients stay of one size
            (Hinton et al., arXiv 1503.02531). Above 1, classes that are unlikely count more.

    Raises:
        ValueError: their logits differ in shape, or a bad temperature.
    """
    check_temperature("temperature", temperature)
    total: Tensor | None = None
    for s, t in zip(find_logits(student), find_logits(teacher), strict=True):
        if s.shape != t.shape:
            raise ValueError(f"student logits {tuple(s.shape)} and teacher logits {tuple(t.shape)} differ in shape")
        s, t = s.float(), t.detach().float()
        if s.shape[-1] == 1:
            part = F.mse_loss(s, t)
        else:
            log_s, log_t = ((z.reshape(-1, z.shape[-1]) / temperature).log_softmax(-1) for z in (s, t))
            part = F.kl_div(log_s, log_t, log_target=True, reduction="batchmean") * temperature**2
        total = part if total is None else total + part
    assert total is not None
    return total


def check_temperature(name: str, temperature: float) -> None:
    """
    Raises:
        ValueError: not a finite number above 0.
    """
    if not (isinstance(temperature, (int, float)) and 0 < temperature < math.inf):
        raise ValueError(f"{name}={temperature!r}: allowed is a finite number above 0")
