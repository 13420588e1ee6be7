"""What all crossbar layers of one model share: the device, the mode of the forward, and the terms it collected."""

from collections import deque

import torch
from torch import Tensor

from ..config import ReRAMConfig
from ..device.time import parse_time
from ..device.weight_error import WeightError, weight_error

_MAX_TERMS = 65536  # a bound for models whose forward hook is bypassed, far above any real number of layers


class CrossbarState:
    """Shared by every crossbar layer of a model; never saved.

    Attributes:
        digital: layers compute what the digital layer computes.
        error: moments of the retention error over ``config.retention_times``.
        drift_error: the same at the one time that this forward's sampled drift uses.
        term: which closed-form term training forwards collect: None, "output", "weight" or "sensitivity".
        drift: which error training forwards sample: None, "drift" (the device's) or "noise" (white).
        measure: collect noise-to-signal ratios even if the loss has no closed-form term.
        mask: (batch, tokens), 0 at padding, of the current forward; None where unknown.
        terms, ratios: what the current forward collected, layer by layer.
        scale: the gradient of one term, written by :class:`hf_reram.nn.attach.Add`.
    """

    def __init__(self, config: ReRAMConfig):
        self.digital = False
        self.measure = False
        self.mask: Tensor | None = None
        self.batch_size = 1
        self.terms: deque = deque(maxlen=_MAX_TERMS)
        self.ratios: deque = deque(maxlen=_MAX_TERMS)
        self.scale = torch.zeros(1)
        self.configure(config)

    def configure(self, config: ReRAMConfig) -> None:
        """Take over a config: the device, the loss and its times."""
        self.config = config
        parts = (config.retention_loss or "none").split("+")
        self.term = next((p for p in parts if p in ("output", "weight", "sensitivity")), None)
        self.drift = next((p for p in parts if p in ("drift", "noise")), None)
        self.times = tuple(parse_time(t) for t in config.retention_times)
        self.error = self.error_at(self.times)
        self.drift_error = self.error_at(self.times[:1])

    def error_at(self, times: tuple[float, ...]) -> WeightError:
        return weight_error(self.config.device, times, self.config.temperature)

    def begin_forward(self, training: bool, inputs: tuple, kwargs: dict) -> None:
        """Forget the last forward's terms; note this one's padding mask and batch size; draw its drift time."""
        tensors = [v for v in (*inputs, *kwargs.values()) if isinstance(v, Tensor)]
        mask = kwargs.get("attention_mask")
        self.mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        if torch.compiler.is_compiling():
            return
        for tensor in tensors:
            if tensor.is_floating_point() and tensor.device.type == "cpu" and torch.isnan(tensor.detach().sum()):
                raise ValueError("an input of the model contains NaN: a crossbar cannot be driven with it")
        if training:
            self.terms.clear()
            self.ratios.clear()
            self.batch_size = tensors[0].shape[0] if tensors and tensors[0].dim() else 1
            if self.scale.device != (device := tensors[0].device if tensors else self.scale.device):
                self.scale = self.scale.to(device)
            if self.drift == "drift" and len(self.times) > 1:
                pick = int(torch.randint(len(self.times), ()))
                self.drift_error = self.error_at((self.times[pick],))

    def keep(self, x: Tensor) -> Tensor | None:
        """1 for each row of ``x`` (batch, tokens, features) that is no padding, 0 for the others; None if unknown."""
        if self.mask is None or x.dim() != 3 or x.shape[:2] != self.mask.shape:
            return None
        return self.mask.reshape(-1).to(device=x.device, dtype=torch.float32)

    def __deepcopy__(self, memo):
        copy = CrossbarState(self.config)
        copy.digital = self.digital
        memo[id(self)] = copy
        return copy

    def __getstate__(self):
        return {"config": self.config, "digital": self.digital}

    def __setstate__(self, saved):
        self.__init__(saved["config"])
        self.digital = saved["digital"]
