"""lm-evaluation-harness: models on crossbars as one of its model types, and what its results say of crossbars.

:mod:`.register` tells lm-eval of both once hf_reram is imported. Importing this module imports lm-eval.
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from lm_eval.models.huggingface import HFLM
from tqdm import tqdm
from transformers.utils import logging

from ..device.temperature import parse_temperature
from ..device.time import format_time, parse_time
from ..hub.load import ADAPTER, has_file, load_model
from ..hub.whole import held_back, missing_from, refuse_random
from ..model.deploy import deploy, digital
from ..model.find import crossbar_layers, is_chip, is_digital, reset_calls, uncalled
from ..model.finite import refuse_not_finite
from ..model.summary import summarize

logger = logging.get_logger(__name__)

OFF = "off: the digital model"
IDEAL = "as ideal crossbars, with I-V curve and converters alone: no chip"


class ReRAMLM(HFLM):
    """lm-eval's model type ``reram``: a robust checkpoint as a chip.

    The results' ``config`` has ``crossbars``, which says what the figures are of, beside what lm-eval writes there.

    Args:
        pretrained: folder or Hub id of a robust checkpoint, or of adapters of one, or a model on crossbars.
        time: since programming, such as "10y", or seconds; None: ideal crossbars, no chip.
        temperature: K, or a text such as "85C"; None takes the config's.
        seed: number of the chip, default 0.
        crossbars: False evaluates the digital model.
        kwargs: of lm-eval's model type ``hf``.

    Raises:
        ValueError: a plain checkpoint, one that lacks weights or numbers of calibration, NaN or infinite weights, a bad
            time or temperature, or one of them without a chip to be of.
    """

    AUTO_MODEL_CLASS: Any = None

    def __init__(
        self,
        pretrained: Any,
        time: str | float | None = None,
        temperature: str | float | None = None,
        seed: int = 0,
        crossbars: bool = True,
        **kwargs: Any,
    ):
        if not isinstance(crossbars, bool):
            raise ValueError(f"crossbars={crossbars!r}: allowed are True and False")
        if (time is None or not crossbars) and (temperature is not None or seed != 0 or time is not None):
            raise ValueError(
                f"time={time!r}, temperature={temperature!r}, seed={seed!r}, crossbars={crossbars!r}: a chip needs a "
                "time, and neither ideal crossbars (no time) nor the digital model (crossbars=False) take any of them"
            )
        self.chip = None if time is None else (parse_time(time), temperature, seed)
        kelvin = None if temperature is None else parse_temperature(temperature)
        name = pretrained if isinstance(pretrained, str) else type(pretrained).__name__
        if isinstance(pretrained, str) and has_file(pretrained, ADAPTER):  # with crossbars of their own beside them
            kwargs.setdefault("tokenizer", pretrained)
            pretrained = load_model(pretrained).to(kwargs.get("device") or "cpu")
        super().__init__(pretrained, **kwargs)
        if not crossbar_layers(self.model):
            raise ValueError(
                f"{name} is a plain checkpoint: allowed is a robust one; hf-reram eval --lm-eval puts plain ones on "
                "crossbars"
            )
        refuse_not_finite(self.model)
        self.crossbars, self.silent = crossbars, set[str]()
        if not crossbars:
            self.said = OFF
        elif self.chip is None:
            self.said = f"on: {_layers(self.model)} {IDEAL}"
        else:
            heat = "" if kelvin is None else f" at {kelvin:g} K"
            self.said = f"on: {_layers(self.model)} as chip {seed}, {format_time(self.chip[0])} after programming{heat}"

    def _create_model(self, *args: Any, **kwargs: Any) -> None:
        """As lm-eval's, of checkpoints that have all of their class's weights."""
        auto = self.AUTO_MODEL_CLASS
        self.AUTO_MODEL_CLASS = _Whole(auto)
        try:
            with held_back():
                super()._create_model(*args, **kwargs)
        finally:
            self.AUTO_MODEL_CLASS = auto

    @contextmanager
    def as_asked(self) -> Iterator[None]:
        """The model as what it is to be evaluated as; notes which layers did not run so."""
        if not self.crossbars:
            with digital(self.model):
                yield
            return
        reset_calls(self.model)
        if self.chip is None:
            yield
        else:
            with deploy(self.model, *self.chip):
                yield
        self.silent |= set(uncalled(self.model))

    def loglikelihood(self, *args: Any, **kwargs: Any) -> Any:
        with self.as_asked():
            return super().loglikelihood(*args, **kwargs)

    def loglikelihood_rolling(self, *args: Any, **kwargs: Any) -> Any:
        with self.as_asked():
            return super().loglikelihood_rolling(*args, **kwargs)

    def generate_until(self, *args: Any, **kwargs: Any) -> Any:
        with self.as_asked():
            return super().generate_until(*args, **kwargs)


class _Whole:
    """In place of one of transformers' Auto classes."""

    def __init__(self, auto: Any):
        self.auto = auto

    def from_pretrained(self, name: Any, **given: Any) -> Any:
        model, info = self.auto.from_pretrained(name, output_loading_info=True, **given)
        refuse_random(name, model, missing_from(info, model))
        return model


def crossbars_of(lm: Any) -> str:
    """What the figures of one of lm-eval's Hugging Face models are of, in words; logged where it has crossbars."""
    layers = crossbar_layers(lm.model)
    if isinstance(lm, ReRAMLM):
        said = lm.said
        if lm.silent:
            said += f"; {len(lm.silent)} of them did not run in all requests: {', '.join(sorted(lm.silent))}"
    elif not layers or is_digital(lm.model):
        said = OFF
    else:
        said = f"on: {_layers(lm.model)} {'as a chip' if is_chip(lm.model) else IDEAL}"
    if layers:
        logger.warning("crossbars %s", said)
    return said


def _layers(model: Any) -> str:
    found = summarize(model)
    return f"{found.layers} layers on {found.device}"


class _Hidden(tqdm):
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{**kwargs, "disable": True})


@contextmanager
def without_bars() -> Iterator[None]:
    """lm-eval shows no progress bars of its own: there would be three for each chip."""
    shown = [module for name, module in sys.modules.items() if name.startswith("lm_eval.") and hasattr(module, "tqdm")]
    with ExitStack() as stack:
        for module in shown:
            stack.enter_context(patch.object(module, "tqdm", _Hidden))
        yield
