"""What all crossbar layers of one model share: the device, the mode of the forward, and the terms it collected."""

import hashlib
from typing import Any

import torch
from torch import Tensor

from ..config import ReRAMConfig
from ..device.moments import WeightError, weight_error
from ..device.time import parse_time
from .ops.random import white_noise_like
from .ops.reference import seeded_normal


class CrossbarState:
    """Shared by every crossbar layer of a model; never saved.

    Attributes:
        digital: layers compute what the digital layer computes.
        error: moments of the retention error over ``config.retention_times``.
        drift_error: the same at the one time that sampled drift uses now.
        term: which closed-form term training forwards collect: None, "output", "weight" or "sensitivity".
        configured_drift: which error the loss wants sampled: None, "drift" (the device's) or "noise" (white).
        drift: which one the current forward samples in training mode, None for none, and wanted: which one the next;
            see :func:`hf_reram.training.losses.sampled_drift`.
        measure: collect noise-to-signal ratios even if the loss has no closed-form term.
        mask: (batch, tokens), 0 at padding, of the current forward; None where unknown.
        terms, ratios: (noise, signal) by layer name, summed over the calls of a layer in the current forward.
        consumed: the terms have been read; the next one starts anew.
        noise_seed: seeds the sampled drift, so that all micro-batches and processes of an optimizer step see one chip;
            None draws from torch's global generator. Kept in a tensor, which compiled code reads anew.
        attached: the terms travel attached to the layers' outputs, see :mod:`.attach`; not in compiled code.
        report: the model's last robustness report, whose weights it may have left since.
    """

    report: Any = None

    def __init__(self, config: ReRAMConfig):
        self.digital = False
        self.measure = False
        self.drift: str | None = None
        self.wanted: str | None = None
        self.mask: Tensor | None = None
        self.batch_size = 1
        self.consumed = False
        self._seed = torch.full((), -1, dtype=torch.int64)
        self._seed_number: int | None = None
        self.attached = True
        self.terms: dict[str, Tensor] = {}
        self.ratios: dict[str, Tensor] = {}
        self.configure(config)

    @property
    def noise_seed(self) -> int | None:
        return self._seed_number

    @noise_seed.setter
    def noise_seed(self, seed: int | None) -> None:
        self._seed_number = seed
        self._seed.fill_(-1 if seed is None else seed)

    def configure(self, config: ReRAMConfig) -> None:
        """Take over a config: the device, the loss and its times."""
        self.config = config
        parts = (config.retention_loss or "none").split("+")
        self.term = next((p for p in parts if p in ("output", "weight", "sensitivity")), None)
        self.configured_drift = next((p for p in parts if p in ("drift", "noise")), None)
        self.times = tuple(parse_time(t) for t in config.retention_times)
        self.error = self.error_at(self.times)
        self.drift_error = self.error_at(self.times[:1])

    def error_at(self, times: tuple[float, ...], temperature: float | None = None) -> WeightError:
        """The moments at the given times [s], at a temperature [K], None for the config's."""
        kelvin = self.config.temperature if temperature is None else temperature
        return weight_error(self.config.device, times, kelvin)

    def begin_forward(self, training: bool, inputs: tuple, kwargs: dict) -> None:
        """Forget the last forward's terms; note this one's padding mask and batch size; sample what is wanted."""
        self.take_wanted()
        tensors = [v for v in (*inputs, *kwargs.values()) if isinstance(v, Tensor)]
        mask = kwargs.get("attention_mask")
        self.mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        for tensor in () if torch.compiler.is_compiling() else tensors:
            if tensor.is_floating_point() and tensor.device.type == "cpu" and torch.isnan(tensor.detach().sum()):
                raise ValueError("an input of the model contains NaN: a crossbar cannot be driven with it")
        if training:
            self._forget()
            self.batch_size = tensors[0].shape[0] if tensors and tensors[0].dim() else 1

    def take_wanted(self) -> None:
        """Sample from now on what is wanted."""
        self.drift = self.wanted

    def draw_drift_time(self) -> None:
        """One of the config's times, for sampled drift."""
        if self.drift == "drift" and len(self.times) > 1:
            pick = int(torch.randint(len(self.times), (), generator=self._generator("time", torch.device("cpu"))))
            self.drift_error = self.error_at((self.times[pick],))

    def keep(self, x: Tensor) -> Tensor | None:
        """1 for each row of ``x`` (batch, tokens, features) that is no padding, 0 for the others; None if unknown."""
        if self.mask is None or x.dim() != 3 or x.shape[:2] != self.mask.shape:
            return None
        return self.mask.reshape(-1).to(device=x.device, dtype=torch.float32)

    def _forget(self) -> None:
        self.terms.clear()
        self.ratios.clear()
        self.consumed = False

    def collect(self, into: dict[str, Tensor], name: str, term: Tensor) -> None:
        """Add a layer's term to those of this forward."""
        if self.consumed:
            self._forget()
        into[name] = into[name] + term if name in into else term

    def normal(self, like: Tensor, name: str) -> Tensor:
        """Standard normal variates for the layer ``name``, of shape, dtype and device of ``like``."""
        if torch.compiler.is_compiling():
            return seeded_normal(like.detach(), self._seed, name)
        return white_noise_like(like.detach(), self._generator(name, like.device))

    def _generator(self, name: str, device: torch.device) -> torch.Generator | None:
        if self.noise_seed is None:
            return None
        return torch.Generator(device).manual_seed(layer_seed(self.noise_seed, name))

    def __deepcopy__(self, memo):
        copy = CrossbarState(self.config)
        copy.digital, copy.report = self.digital, self.report
        memo[id(self)] = copy
        return copy

    def __getstate__(self):
        return {"config": self.config, "digital": self.digital}

    def __setstate__(self, saved):
        CrossbarState.__init__(self, saved["config"])
        self.digital = saved["digital"]


def layer_seed(seed: int, name: str) -> int:
    """A seed for one layer: independent of the order and number of layers, the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1
