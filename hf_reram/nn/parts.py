"""Layers inside a module that holds their weights itself, stacked in one parameter: experts of a mixture; query, key
and value of attention. Each becomes a layer of its own, so that it can go on a crossbar, whose weight is a part of
the module's parameter: no weight is copied, and no key of the state dict changes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from .joined import joined_class, new_joined
from .layer import CrossbarLayer
from .places import Part
from .registry import register_crossbar
from .scalars import Scalars


@register_crossbar(Part)
class CrossbarPart(CrossbarLayer, Part):
    """A :class:`.places.Part` on a crossbar: x (..., rows) to (..., columns)."""

    output_dim, input_dim, channel_dim = 0, 1, -1

    def begin(self, input: Tensor) -> Scalars | None:
        """Refuses weights that are computed anew in each forward: cells are programmed once."""
        now = super().begin(input)
        if now is not None and is_parametrized(self.holder):
            raise RuntimeError(
                f"layer {self.crossbar_name!r}: its weight is computed from other tensors in each forward, as by "
                "adapters of parameters (target_parameters), which no cells do. PEFT adds these by itself where "
                "target_modules is 'all-linear' or names experts: give it the layers outside of them, such as "
                "target_modules=['q_proj', 'k_proj', 'v_proj', 'o_proj'], which "
                "hf_reram.adapter_target_modules(model) lists; or add them before patch_model, which then leaves the "
                "module digital"
            )
        return now

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None, padded: bool = False) -> Tensor:
        return F.linear(x, weight, bias)


class Holder(nn.Module):
    """A module that holds several layers' weights itself, and calls them as its parts instead.

    A kind of holder is a subclass of this class, registered by :func:`register_holder`. It says

    - :meth:`stands_for`: which modules it can take the place of;
    - :meth:`make_parts`: their layers, as modules by the name that they get inside;
    - ``forward``: what the module computes, by calling them.
    """

    _closed_class: Any  # that it was made from
    _part_names: tuple[str, ...]

    @classmethod
    def stands_for(cls, module: nn.Module) -> bool:
        """Whether a module is of this kind."""
        raise NotImplementedError

    @classmethod
    def why_not(cls, module: nn.Module) -> str:
        """Why a module of this kind cannot be opened as it is; empty where it can."""
        return ""

    @classmethod
    def names_of_parts(cls, module: nn.Module) -> list[str]:
        """The names of the modules that :meth:`make_parts` makes."""
        raise NotImplementedError

    def make_parts(self) -> dict[str, nn.Module]:
        """Modules of :class:`.places.Part`, by :meth:`names_of_parts`."""
        raise NotImplementedError

    def parts(self) -> list[Part]:
        """Its layers, in their order."""
        return [module for module in self.modules() if isinstance(module, Part)]

    def _apply(self, fn, recurse: bool = True):
        """``.to`` and the like: parts that are deployed are still what they were programmed from, in another form."""
        chips = [
            (part, context, chip.source.has_changed(part))
            for part in self.parts()
            if isinstance(part, CrossbarLayer)
            for context, chip in (part._chips or {}).items()
        ]
        super()._apply(fn, recurse)  # of the parts before the parameter that they are of
        for part, context, stale in chips:
            chip = part._chips[context]  # type: ignore[index]
            part._chips[context] = chip.applied(lambda t: t, part, stale)  # type: ignore[index]
            part.chip = list(part._chips.values())[-1]  # type: ignore[union-attr]
        return self

    def __reduce_ex__(self, protocol):
        return new_joined, type(self).joined, self.__getstate__()  # type: ignore[attr-defined]


_HOLDERS: list[type[Holder]] = []


def register_holder(kind: type[Holder]) -> type[Holder]:
    """Class decorator: modules that it stands for are opened, so that their layers can go on crossbars."""
    _HOLDERS.append(kind)
    return kind


def holder_class(module: nn.Module) -> type[Holder] | None:
    """The kind of holder that stands in for a module that is not open, or None."""
    if isinstance(module, Holder):
        return None
    return next((kind for kind in _HOLDERS if kind.stands_for(module)), None)


def open_holder(module: Any, kind: type[Holder]) -> Holder:
    """Have a module call its layers, in place."""
    joined: Any = joined_class  # of any classes, which mypy takes for unhashable
    module.__class__, module.__dict__["_closed_class"] = joined(kind, type(module)), type(module)
    found = module.make_parts()
    module.__dict__["_part_names"] = tuple(found)
    for name, part in found.items():
        module.add_module(name, part.train(module.training))
    return module


def close_holder(module: Any) -> None:
    """The module as it was before :func:`open_holder`."""
    for name in module.__dict__.pop("_part_names"):
        module._modules.pop(name, None)
    module.__class__ = module.__dict__.pop("_closed_class")


@contextmanager
def lent(parts: list[Part], weights: Any, biases: Any = None) -> Iterator[None]:
    """Parts take these tensors for theirs inside, so that what a parameter was split into has one backward together,
    where each part alone would have a gradient of the whole parameter's size."""
    for part, weight, bias in zip(parts, weights, [None] * len(parts) if biases is None else biases, strict=True):
        part.__dict__["lent"] = weight, bias
    try:
        yield
    finally:
        for part in parts:
            part.__dict__["lent"] = None
