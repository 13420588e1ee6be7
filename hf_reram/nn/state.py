"""What the crossbar layers of a patched model share: the physics that its config means, its mode, and its forwards."""

import inspect
import weakref
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..config import ReRAMConfig
from ..device.moments import WeightError, weight_error
from ..device.seeds import derived_seed
from ..device.time import parse_time
from .ops.random import seeded_normal, white_noise_like
from .sharing import forget_shared
from .tensors import tensors_of
from .untrained import refuse_backward

# Arguments with which a model, or an encoder or decoder inside it, is given its tokens.
INPUTS = frozenset(
    ("input_ids", "inputs_embeds", "decoder_inputs_embeds", "pixel_values", "input_values", "input_features")
)


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
        return self.term == "output" or (self.term == "sensitivity" and self.error.mean_square > 0)

    def error_at(self, time: float, temperature: float | None = None) -> WeightError:
        """The moments at one time [s], at a temperature [K], None for the config's."""
        kelvin = self.config.temperature if temperature is None else temperature
        return weight_error(self.config.device, (time,), kelvin)

    def aged(self, time: float, temperature: float | None = None) -> "Physics":
        """The same with the moments of one time [s] and temperature [K]."""
        return replace(self, error=self.error_at(time, temperature))


@dataclass(frozen=True)
class Sampling:
    """What training forwards sample; see :func:`hf_reram.sampled_drift`.

    Attributes:
        kind: "drift" (the device's error) or "noise" (white). error: of one time, for "drift".
        seed: so that all micro-batches and processes of a step see one chip; None draws from torch's global generator.
        seed_tensor: the same for compiled code, which would else be compiled anew for each; -1 for None.
        prefix: of the layers' names, so that parts that were patched alike do not share their noise.
    """

    kind: str
    error: WeightError
    seed: int | None = None
    seed_tensor: Tensor = field(default_factory=lambda: torch.full((), -1, dtype=torch.int64), compare=False)
    prefix: str = ""

    def normal(self, like: Tensor, name: str) -> Tensor:
        """Standard normal variates for the layer ``name``, of shape, dtype and device of ``like``."""
        name = self.prefix + name
        if torch.compiler.is_compiling():
            return seeded_normal(like.detach(), self.seed_tensor, name)
        generator = None
        if self.seed is not None:
            generator = torch.Generator(like.device).manual_seed(derived_seed(self.seed, name))
        return white_noise_like(like.detach(), generator)


def sampling(physics: Physics, kind: str | None, seed: int | None, prefix: str = "") -> Sampling | None:
    """For the loss that ``physics`` says, or for ``kind``, at one of the times, drawn; None to sample nothing."""
    kind = kind or physics.drift
    if kind is None:
        return None
    time = physics.times[0]
    if kind == "drift" and len(physics.times) > 1:
        generator = None if seed is None else torch.Generator().manual_seed(derived_seed(seed, "time"))
        time = physics.times[int(torch.randint(len(physics.times), (), generator=generator))]
    number = torch.full((), -1 if seed is None else seed, dtype=torch.int64)
    return Sampling(kind, physics.error_at(time), seed, number, prefix)


@dataclass
class Padding:
    """Which tokens are padding, where a model or an encoder or decoder inside it runs.

    Attributes:
        mask: (batch, tokens), 0 at padding, of its own tokens; None where unknown.
        other: (batch, tokens, features), states of an encoder that it attends to; other_mask: of their tokens.
        decoded: its own tokens are those of a decoder that ran inside it.
    """

    mask: Tensor | None = None
    other: Tensor | None = None
    other_mask: Tensor | None = None
    decoded: bool = False

    def keep(self, x: Tensor) -> Tensor | None:
        """1 for each row of ``x`` (batch, tokens, features) that is no padding, 0 for the others; None if unknown."""
        return rows_kept(self.mask_of(x), x)

    def mask_of(self, x: Tensor) -> Tensor | None:
        """(batch, tokens), 0 where a row of ``x`` (batch, tokens, features) is padding; None if unknown."""
        mask = self.other_mask if self.other is not None and x is self.other else self.mask
        return None if mask is None or x.dim() != 3 or x.shape[:2] != mask.shape else mask


def rows_kept(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """A mask as 1 and 0 for each row of ``x``."""
    return None if mask is None else mask.reshape(-1).to(device=x.device, dtype=torch.float32)


def same_mask(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two masks, or their absence, say the same."""
    return a is b or (a is not None and b is not None and torch.equal(a, b))


class Forward:
    """What one forward of a patched model samples and collects; made anew for each.

    Attributes:
        sampling: see :class:`Sampling`; None outside of training. batch_size: examples.
        padding: of the tokens that layers read now; around: what will be so again when an inner module ends.
        kept: masks that a layer's term was computed with, by its name, and which tokens they keep: one unless it ran
            with several.
        terms: the loss's (noise, signal) by layer name, summed over the calls of a layer. ratios: the same of "output",
            where they are only measured. scales: the gradients that terms will receive, see :mod:`.attach`.
        kept_by: a reference to what the model's outputs hold on to. compiled: it ran under torch.compile.
        consumed: the terms have joined a loss. attached: they travel attached to the layers' outputs.
        before: the last forward, where both are compiled: nothing else holds on to it.
        rerun: layers run once without gradients, and again in the backward (reentrant checkpointing).
    """

    def __init__(
        self,
        sampling: Sampling | None = None,
        batch_size: int = 1,
        padding: Padding | None = None,
        before: "Forward | None" = None,
    ):
        self.sampling, self.batch_size, self.before = sampling, batch_size, before
        self.padding = Padding() if padding is None else padding
        self.around: list[Padding] = []
        self.kept: dict[str, tuple[list[Tensor | None], list[Tensor | None]]] = {}
        self.terms: dict[str, Tensor] = {}
        self.ratios: dict[str, Tensor] = {}
        self.scales: dict[str, Tensor] = {}
        self.consumed = self.rerun = False
        self.attached = True
        self.kept_by: Any = _nobody
        self.compiled = torch.compiler.is_compiling()
        self.grad = torch.is_grad_enabled()

    def note_kept(self, name: str, mask: Tensor | None, keep: Tensor | None) -> None:
        """A layer ran with this mask. Values are compared where it matters only, which would wait for a GPU."""
        masks, keeps = self.kept.setdefault(name, ([], []))
        if not any(mask is known for known in masks):
            masks.append(mask)
            keeps.append(keep)

    def scale(self, name: str, device: torch.device) -> Tensor:
        """The gradient, (2,), that a layer's term will receive."""
        if name not in self.scales:
            self.scales[name] = torch.zeros(2, device=device)
        return self.scales[name]

    def like(self, other: "Forward") -> bool:
        """Whether both sample the same and know of no padding: a layer that runs again may be taken for either's."""
        alone = all(f.padding.mask is None and f.padding.other_mask is None for f in (self, other))
        return alone and self.sampling is other.sampling and not self.rerun and not other.rerun


class _Keeper:
    """What a model's outputs hold on to, and so its forward."""

    def __init__(self, forward: Forward):
        self.forward = forward


def _nobody() -> None:
    return None


class CrossbarState:
    """Shared by the crossbar layers that were patched together; never saved.

    Attributes:
        physics: what the config means. digital_contexts: how many want the digital layers now.
        measure: collect noise-to-signal ratios even if the loss has no closed-form term.
        sampling: what the next training forward samples.
        forward: the last one. ratios: (noise, signal) by layer name of the last loss or measurement.
        calls: forwards of the model; running: whether one is under way.
        report: its last robustness report, whose weights it may have left since. warned: of what there was a warning.
        names: of the layers that were put on crossbars. chips: contexts that deploy it now; deployments: so far.
    """

    report: Any = None

    def __init__(self, config: ReRAMConfig, root: nn.Module | None = None):
        self.physics = Physics.of(config)
        self.digital_contexts = 0
        self.measure = False
        self.sampling: Sampling | None = None
        self.forward = Forward()
        self.ratios: dict[str, Tensor] = {}
        self.calls, self.running = 0, False
        self.warned: set[Any] = set()
        self.names: frozenset[str] = frozenset()
        self.chips = self.deployments = 0
        self._root = _reference(root)
        self._waiting: list[Any] = []  # references to forwards whose terms may still join a loss

    @property
    def config(self) -> ReRAMConfig:
        """The config that the layers were patched with."""
        return self.physics.config

    @property
    def root(self) -> nn.Module | None:
        """The model that was patched, while it is there."""
        return self._root()

    @property
    def term(self) -> str | None:
        """The closed form that training forwards collect."""
        return self.physics.term

    @property
    def error(self) -> WeightError:
        """Moments of the retention error over ``config.retention_times``."""
        return self.physics.error

    @property
    def digital(self) -> bool:
        """Whether layers compute what the digital layer computes: while any context wants it, whichever ends first."""
        return self.digital_contexts > 0

    # Forwards

    def begin(self, training: bool, batch_size: int = 1, padding: Padding | None = None) -> Forward:
        """A new forward of the model."""
        waits = training and self.term is not None and torch.compiler.is_compiling() and torch.is_grad_enabled()
        before = self.forward if waits else None
        self.forward = Forward(self.sampling, batch_size, padding, before)
        if training and not torch.compiler.is_compiling():
            self._waiting = [r for r in self._waiting if r() is not None]
            self._waiting.append(weakref.ref(self.forward))
        return self.forward

    def end(self, outputs: Any) -> None:
        """Let the forward wait for a loss as long as the outputs live that the loss is made of."""
        keeper = _Keeper(self.forward)
        self.forward.kept_by = weakref.ref(keeper)
        for tensor in tensors_of(outputs):
            if tensor.grad_fn is not None:
                metadata: Any = tensor.grad_fn.metadata
                metadata["hf_reram"] = keeper

    def current(self) -> Forward:
        """The forward that a layer runs in.

        Raises:
            RuntimeError: a layer runs again within the backward, and several forwards could be meant.
        """
        forward = self.forward
        if torch.compiler.is_compiling():
            return forward
        if runs_again():
            others = [f for f in self._alive() if f is not forward]
            if not all(forward.like(other) for other in others):
                raise RuntimeError(
                    "gradient checkpointing runs a crossbar layer again while several forwards wait for their "
                    "backward, whose padding or sampled drift differ: call backward after each forward, or switch "
                    "gradient checkpointing off"
                )
        elif not self.running and (forward.consumed or forward.sampling is not self.sampling):
            return self.begin(True)  # a part of the model was called by itself
        return forward

    def waiting(self) -> list[Forward]:
        """The forwards whose terms no loss has taken yet and whose outputs are still there; where there are none, the
        last one."""
        found = [f for f in self._alive() if f.grad and f.kept_by() is not None]
        last: Forward | None = self.forward
        while last is not None and last.compiled:  # nothing tells whether their outputs are gone
            found.append(last)
            earlier, last.before = last.before, None
            last = earlier
        found = [f for f in found if f.terms and not f.consumed] or [self.forward]
        return [f for f in found if f.terms and not f.consumed]

    def _alive(self) -> list[Forward]:
        return [forward for r in self._waiting if (forward := r()) is not None]

    def settle(self, forwards: list[Forward]) -> None:
        """These forwards' terms have joined a loss; their graphs would keep activations alive."""
        for forward in forwards:
            forward.consumed, forward.terms = True, {}

    # Copies

    def __deepcopy__(self, memo):
        """A copy of the patched model has a state of its own; that of a layer alone, as PEFT makes them of heads,
        shares its model's."""
        root = self._root()
        if root is not None and id(root) not in memo:
            return self
        copy = CrossbarState(self.config)
        copy.physics, copy.report, copy.names = self.physics, self.report, self.names
        if root is not None:
            copy.adopt(memo[id(root)])
        memo[id(self)] = copy
        return copy

    def adopt(self, root: nn.Module | None) -> None:
        """Belong to this model, after it was copied or loaded."""
        self._root = _reference(root)

    def __getstate__(self):
        return {"config": self.config, "names": self.names}

    def __setstate__(self, saved):
        CrossbarState.__init__(self, saved["config"])
        self.names = saved["names"]


# Hooks of the model, classes so that it can be pickled and deep-copied


class BeginForward:
    """Forward pre-hook of a patched model, and of what in it is given tokens of its own: notes padding, and for the
    model itself (``root``) begins a new :class:`Forward`; ``names`` are those of the module's arguments."""

    def __init__(self, state: CrossbarState, module: nn.Module, root: bool, names: tuple[str, ...]):
        self.state, self.module, self.root, self.names = state, _reference(module), root, names

    def __getstate__(self):
        return {**self.__dict__, "module": self.module()}

    def __setstate__(self, saved):
        self.__dict__.update(saved, module=_reference(saved["module"]))
        if self.root:
            self.state.adopt(saved["module"])

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        given = self._by_name(args, kwargs)
        forward = self.state.current() if module.training and not self.root else self.state.forward
        around = Padding() if self.root else forward.padding
        padding = Padding(
            _by_token(given.get("attention_mask"), around.mask),
            given.get("encoder_hidden_states"),
            _by_token(given.get("encoder_attention_mask"), around.other_mask),
        )
        if not self.root:
            forward.around.append(forward.padding)
            forward.padding = padding
            return
        tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
        if not torch.compiler.is_compiling():
            _refuse_nan(tensors)
            if module.training and self.state.term is not None and getattr(module, "_is_replica", False):
                raise RuntimeError(
                    "nn.DataParallel trains copies of the model in threads, where its retention terms are lost: start "
                    "a process for each GPU instead, as accelerate launch does"
                )
        self.state.calls = 1 if torch.compiler.is_compiling() else self.state.calls + 1
        self.state.running = True
        size = tensors[0].shape[0] if tensors and tensors[0].dim() else 1
        self.state.begin(module.training and not self.state.digital, size, padding)

    def _by_name(self, args: tuple, kwargs: dict) -> dict[str, Any]:
        return {**dict(zip(self.names, args)), **kwargs} if args else kwargs


class EndForward:
    """Forward hook with the same: what it read before goes on, or its outputs are held on to."""

    def __init__(self, begin: BeginForward):
        self.begin = begin

    def __call__(self, module: nn.Module, args: tuple, outputs: Any) -> None:
        state = self.begin.state
        if not self.begin.root:
            forward, inside = state.forward, state.forward.padding
            if forward.around:
                forward.padding = forward.around.pop()
            if inside.decoded or inside.other is not None:  # what follows a decoder reads its tokens
                forward.padding = replace(forward.padding, mask=inside.mask, decoded=True)
            return
        state.running = False
        if not torch.compiler.is_compiling():
            forget_shared()
            if module.training:
                state.end(outputs)
                if state.chips:
                    refuse_backward(outputs)


def runs_again() -> bool:
    """Whether this is within a backward: gradient checkpointing runs layers again there."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def add_term(into: dict[str, Tensor], name: str, term: Tensor) -> None:
    """Add a term to those of its layer."""
    into[name] = into[name] + term if name in into else term


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of a module's forward, in their order."""
    try:
        return tuple(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):  # a forward without a signature, such as a compiled one
        return ()


def is_given_tokens(module: nn.Module) -> bool:
    """Whether a module inside the model is given tokens of its own."""
    return not INPUTS.isdisjoint(argument_names(module))


def _reference(module: nn.Module | None) -> Any:
    """Weak, so that a state or a hook keeps no model alive."""
    return _nobody if module is None else weakref.ref(module)


def _by_token(mask: Any, around: Tensor | None) -> Tensor | None:
    """An attention mask by token; one that is by pair of tokens already was made of the mask around."""
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask
    return None if mask is None else around


def _refuse_nan(tensors: list[Tensor]) -> None:
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.device.type == "cpu" and torch.isnan(tensor.detach().sum()):
            raise ValueError("an input of the model contains NaN: a crossbar cannot be driven with it")
