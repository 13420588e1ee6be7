"""What the crossbar layers of a patched model share: the physics that its config means, its mode, and its forwards."""

import weakref
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from ..config import ReRAMConfig
from ..device.moments import WeightError
from .forward import Forward, Padding, nobody, runs_again
from .observe import Following
from .physics import Physics, Sampling
from .tensors import tensors_of

# Called with a state, a config that its model was patched with, and the name and value of a field that is set on it;
# says whether that has been taken care of. Set by model/, which knows what a change means.
on_change: Callable[["CrossbarState", ReRAMConfig, str, Any], bool] | None = None

# Called with layers whose weights have changed; set by clipping.py, which knows layers.
on_changed_alone: Callable[[list[Any]], None] | None = None

# Called with a state when a training forward begins that is_untended. Set by model/, which asks others.
on_untended: Callable[["CrossbarState"], None] | None = None


class CrossbarState:
    """Shared by the crossbar layers that were patched together; never saved.

    Attributes:
        physics: what the config means. digital_contexts: how many want the digital layers now.
        measure: collect noise-to-signal ratios even if the loss has no closed-form term; compiled code never does.
        sources: moments of the errors that ratios are collected of apart too, by what causes them, and with them those
            of the read-out; None: no such ratios.
        sampling: what the next training forward samples.
        forward: the last one. ratios: (noise, signal) by layer name of the last loss or measurement.
        began, trained, sampled, settled: since :meth:`begin_step`, whether a training forward with gradients began, one
            on crossbars, one of these that samples, and whether terms have joined a loss.
        calls: forwards of the model; running: what began the one that is under way, None if none is.
        report: its last robustness report, whose weights it may have left since. warned: of what there was a warning.
        names: of the layers that were put on crossbars. chips: contexts that deploy it now; deployments: so far.
        changed: layers whose weights have changed since the last forward in evaluation. misfits: by name of the
            layers whose weights do not fit their scale, the share that is clipped where it is more than by choice, else
            None, and whether all are far below it.
        autocasts: dtypes that forwards in evaluation were cast to automatically, since this was emptied.
        following: of the training that the numbers of calibration follow now, None where they stay.
        compiled: training forwards have run under ``torch.compile``, or will.
        lacking: keys of numbers of calibration that the layers' checkpoint had not, though it had others'.
    """

    report: Any = None

    def __init__(self, config: ReRAMConfig, root: nn.Module | None = None):
        self.physics = Physics.of(config)
        config.tell(self)
        self.digital_contexts = 0
        self.measure = False
        self.sources: dict[str, WeightError] | None = None
        self.sampling: Sampling | None = None
        self.forward = Forward()
        self.ratios: dict[str, Tensor] = {}
        self.begin_step()
        self.calls = 0
        self.running: Any = None
        self.warned: set[Any] = set()
        self.names: frozenset[str] = frozenset()
        self.chips = self.deployments = 0
        self.changed: list[Any] = []
        self.misfits: dict[str, tuple[float | None, bool]] = {}
        self.autocasts: set[torch.dtype] = set()
        self.following: Following | None = None
        self.compiled = False
        self.lacking: list[str] = []
        self._root = reference(root)
        self._waiting: list[Any] = []  # references to forwards whose terms may still join a loss

    def hear(self, config: ReRAMConfig, name: str, value: Any) -> bool:
        """A field is set on the state's own config or on one that was handed over; whether that needs no doing."""
        return on_change is not None and on_change(self, config, name, value)

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
    def measures(self) -> bool:
        """Whether layers collect noise-to-signal ratios that no loss needs."""
        return not torch.compiler.is_compiling() and self.measure  # in this order: one graph for both

    @property
    def looks_uncompiled(self) -> bool:
        """Whether the next training forwards look at inputs, which compiled code cannot, and so run without it."""
        return self.compiled and self.following is not None and self.following.looks

    @property
    def digital(self) -> bool:
        """Whether layers compute what the digital layer computes: while any context wants it, whichever ends first."""
        return self.digital_contexts > 0

    def note_changed(self, layer: Any) -> None:
        """A layer's weight has changed since its last forward; of one that is called by itself, nobody asks later."""
        if self.running is not None:
            self.changed.append(layer)
        elif on_changed_alone is not None:
            on_changed_alone([layer])

    def note_autocast(self, kind: str) -> None:
        """A layer runs in evaluation on a kind of device; under ``torch.compile`` nobody asks."""
        if torch.is_autocast_enabled(kind):
            self.autocasts.add(torch.get_autocast_dtype(kind))

    # Forwards

    @property
    def is_untended(self) -> bool:
        """Whether a training forward that begins now samples none of the drift that the loss wants, or the terms of the
        one before, whose outputs are gone, have joined no loss."""
        before = self.forward
        unsampled = self.sampling is None and self.physics.drift is not None
        if self.config.retention_loss == "consistency":  # whose first forward is without
            unsampled = self.sampling is None and before.sampling is None and bool(before.ran)
        return unsampled or bool(before.grad and before.terms and not before.consumed and before.kept_by() is None)

    def begin_step(self) -> None:
        """Forget what the forwards of the step before did."""
        self.began = self.trained = self.sampled = self.settled = False

    def begin(self, training: bool, batch_size: Any = 1, padding: Padding | None = None) -> Forward:
        """A new forward of the model, or of a part of it that is called by itself."""
        if training and torch.is_grad_enabled():  # only set, so that compiled code does not depend on them
            self.began = True
            if not self.digital:
                self.trained = True
                if self.sampling is not None:
                    self.sampled = True
        if training and torch.compiler.is_compiling():
            self.compiled = True
        training = training and not self.digital
        if not torch.compiler.is_compiling():
            self.forward.look_at_given()  # of one whose end nobody told, as of parts that are called by themselves
        waits = training and self.term is not None and torch.compiler.is_compiling()
        before = self.forward if waits else None
        self.forward = Forward(self.sampling, batch_size, padding, before)
        if training and not torch.compiler.is_compiling():
            self._waiting = [r for r in self._waiting if r() is not None]
            self._waiting.append(weakref.ref(self.forward))
        return self.forward

    def end(self, outputs: Any) -> None:
        """Let the forward wait for a loss as long as the outputs live that the loss is made of."""
        self.forward.look_at_given()
        for tensor in tensors_of(outputs):
            self.forward.keep_while(tensor)

    def enter(self, name: str, examples: int) -> None:
        """A layer runs in training: within a forward, or by itself, which is one too."""
        if runs_again() and self.running is None:
            return
        if self.running is None:
            self.begin(True, examples).alone = True
        if not torch.compiler.is_compiling():
            self.forward.ran.add(name)

    def current(self, name: str | None = None) -> Forward:
        """The forward that a layer runs in, or, without a name, a part of the model. Where the whole model runs in a
        backward, as losses with cached gradients (GradCache) have it, that is a forward as any other.

        Raises:
            RuntimeError: it runs again within the backward, and several forwards could be meant.
        """
        if not runs_again() or self.running is not None:
            return self.forward
        found = [f for f in self._alive() if name is None or name in f.ran] or [self.forward]
        if not all(found[-1].like(other) for other in found[:-1]):
            raise RuntimeError(
                "gradient checkpointing runs a crossbar layer again while several forwards wait for their "
                "backward, whose padding or sampled drift differ: call backward after each forward, or switch "
                "gradient checkpointing off"
            )
        return found[-1]

    def waiting(self) -> list[Forward]:
        """The forwards whose terms no loss has taken yet and whose outputs are still there; where there are none, the
        last one."""
        found = [f for f in self._alive() if f.grad and f.kept_by() is not None]
        last: Forward | None = self.forward
        while last is not None and last.compiled:  # nothing tells whether their outputs are gone
            if last.grad:
                found.append(last)
            earlier, last.before = last.before, None
            last = earlier
        found = [f for f in found if f.terms and not f.consumed] or [self.forward]
        return [f for f in found if f.terms and not f.consumed]

    def _alive(self) -> list[Forward]:
        return [forward for r in self._waiting if (forward := r()) is not None]

    def settle(self, forwards: list[Forward]) -> None:
        """These forwards' terms have joined a loss; their graphs would keep activations alive."""
        self.settled = True
        for forward in forwards:
            forward.consumed, forward.terms = True, {}

    # Copies

    def __deepcopy__(self, memo):
        """A copy of the patched model has a state of its own; that of a layer alone, as PEFT makes them of heads,
        shares its model's."""
        root = self._root()
        if root is not None and id(root) not in memo:
            return self
        copy = CrossbarState(deepcopy(self.config, memo))  # which a copied model.config holds too
        copy.report, copy.names = self.report, self.names
        if root is not None:
            copy.adopt(memo[id(root)])
        memo[id(self)] = copy
        return copy

    def adopt(self, root: nn.Module | None) -> None:
        """Belong to this model, after it was copied or loaded."""
        self._root = reference(root)

    def __getstate__(self):
        return {"config": self.config, "names": self.names}

    def __setstate__(self, saved):
        CrossbarState.__init__(self, saved["config"])
        self.names = saved.get("names", frozenset())


def reference(module: nn.Module | None) -> Any:
    """Weak, so that a state or a hook keeps no model alive."""
    return nobody if module is None else weakref.ref(module)
