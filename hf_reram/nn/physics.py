"""What a config means for retention, and what training forwards sample of it."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..config import ReRAMConfig
from ..device.moments import WeightError, alone, weight_error
from ..device.seeds import derived_seed
from ..device.time import parse_time
from .ops.random import seeded_normal, white_noise_like


@dataclass(frozen=True)
class Physics:
    """What a config says about retention; immutable.

    Attributes:
        config: that it comes from. times: s, to be robust at. error: moments of a weight's error, averaged over them.
        term: the closed form that training forwards collect: None, "output", "weight" or "sensitivity".
        drift: the error that the loss wants sampled: None, "drift" (the device's) or "noise" (white).
    """

    config: ReRAMConfig
    times: tuple[float, ...]
    error: WeightError
    term: str | None
    drift: str | None

    @classmethod
    def of(cls, config: ReRAMConfig) -> "Physics":
        """Work it out."""
        parts = (config.retention_loss or "none").split("+")
        times = tuple(parse_time(t) for t in config.retention_times)
        return cls(
            config=config,
            times=times,
            error=weight_error(config.device, times, config.temperature),
            term=next((p for p in parts if p in ("output", "weight", "sensitivity")), None),
            drift=next((p for p in parts if p in ("drift", "noise")), None),
        )

    @property
    def term_reads_input(self) -> bool:
        """Whether the term depends on the power of a layer's input."""
        return self.term in ("output", "sensitivity")

    @property
    def term_reads_output(self) -> bool:
        """Whether the term depends on a layer's output, of which its digital bias is no part."""
        return self.term == "output"

    def error_at(self, time: float, temperature: float | None = None, source: str | None = None) -> WeightError:
        """The moments at one time [s], at a temperature [K], None for the config's; of one source of error alone, see
        :data:`hf_reram.device.moments.SOURCES`, None for all together."""
        kelvin = self.config.temperature if temperature is None else temperature
        device = self.config.device if source is None else alone(self.config.device, source)
        return weight_error(device, (time,), kelvin)

    def aged(self, time: float, temperature: float | None = None, source: str | None = None) -> "Physics":
        """The same with the moments of one time [s] and temperature [K], and of one source alone if given."""
        return replace(self, error=self.error_at(time, temperature, source))


@dataclass(frozen=True)
class Sampling:
    """What training forwards sample; see :func:`hf_reram.sampled_drift`.

    Attributes:
        kind: "drift" (the device's error) or "noise" (white). error: of one time, for "drift".
        seed: so that all micro-batches and processes of a step see one chip; None draws from torch's global generator.
        strength: share of its size that is sampled.
        seed_tensor, strength_tensor: the same on the CPU for compiled code, which would else be compiled anew for each;
            the seed -1 for None.
        prefix: of the layers' names, so that parts that were patched alike do not share their noise. shared: names of
            the layers whose cells others hold their weight in, by theirs.
    """

    kind: str
    error: WeightError
    seed: int | None = None
    strength: float = field(default=1.0, compare=False)
    seed_tensor: Tensor = field(default_factory=lambda: torch.full((), -1, dtype=torch.int64), compare=False)
    strength_tensor: Tensor = field(default_factory=lambda: torch.ones((), dtype=torch.float32), compare=False)
    prefix: str = ""
    shared: dict[str, str] = field(default_factory=dict, compare=False)

    @property
    def share(self) -> Tensor | None:
        """The strength, None where all is sampled and that is known."""
        return self.strength_tensor if torch.compiler.is_compiling() or self.strength != 1.0 else None

    def normal(self, like: Tensor, name: str) -> Tensor:
        """Standard normal variates for the layer ``name``, of shape, dtype and device of ``like``."""
        name = self.prefix + self.shared.get(name, name)
        if torch.compiler.is_compiling():
            return seeded_normal(like.detach(), self.seed_tensor, name)
        generator = None
        if self.seed is not None:
            generator = torch.Generator(like.device).manual_seed(derived_seed(self.seed, name))
        return white_noise_like(like.detach(), generator)


def sampling(
    physics: Physics, kind: str | None, seed: int | None, prefix: str = "", strength: float = 1.0
) -> Sampling | None:
    """For the loss that ``physics`` says, or for ``kind``, at one of the times, drawn; None to sample nothing."""
    kind = kind or physics.drift
    if kind is None:
        return None
    time = physics.times[0]
    if kind == "drift" and len(physics.times) > 1:
        generator = None if seed is None else torch.Generator().manual_seed(derived_seed(seed, "time"))
        time = physics.times[int(torch.randint(len(physics.times), (), generator=generator))]
    number = torch.full((), -1 if seed is None else seed, dtype=torch.int64)
    share = torch.full((), strength, dtype=torch.float32, device="cpu")
    return Sampling(kind, physics.error_at(time), seed, strength, number, share, prefix)
