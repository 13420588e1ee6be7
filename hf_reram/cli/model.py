"""The MODEL that commands take: a robust checkpoint, or a plain one that is patched here."""

from pathlib import Path
from typing import Any

from ..config import ReRAMConfig
from ..hub.load import load_model
from ..model.find import crossbar_layers, crossbar_states
from ..model.patch import patch_model
from ..model.remap import remap
from ..tasks.flags import device_of


def patched(
    name: str, device: str | None, times: list[str] | None = None, headless: bool = False, **options: Any
) -> tuple[Any, bool]:
    """A checkpoint's model on crossbars, and whether it still has to be calibrated.

    Args:
        device: for a plain checkpoint, or to put a robust one on other cells, the same layers. times: that a plain
            checkpoint is calibrated for, None for the config's own; a robust one keeps its own. headless: see
            :func:`hf_reram.load_model`. options: more of :class:`ReRAMConfig`, those alone that the user gave: a robust
            checkpoint keeps its own of the others, as does each part of it that was patched by itself.

    Raises:
        ValueError: a plain checkpoint and no device, or one that :func:`hf_reram.load_model` refuses. OSError: see
            there.
    """
    model = _loaded(name, headless)
    if not crossbar_layers(model):
        if device is None:
            raise ValueError(f"{name} is a plain checkpoint: --device says which cells to put it on")
        if times is not None:
            options["retention_times"] = times
        return patch_model(model, ReRAMConfig(device=device_of(device), **options)), True
    if device is not None:
        options["device"] = ReRAMConfig(device=device_of(device)).device.to_dict()
    remap(model, [ReRAMConfig.from_dict({**state.config.to_dict(), **options}) for state in crossbar_states(model)])
    return model, not all(layer.calibrated for layer in crossbar_layers(model).values())


def _loaded(name: str, headless: bool) -> Any:
    """
    Raises:
        OSError: no such folder, and no such checkpoint that the Hub can be asked for; names it.
    """
    try:
        return load_model(name, headless=headless)
    except OSError as error:
        if name in str(error) and not _is_path(name):
            raise
        where = "" if _is_path(name) else f", and on the Hub it was not found: {error}"
        raise OSError(f"{name} is no folder{where}") from error


def _is_path(name: str) -> bool:
    """Whether it cannot be a Hub id, which is NAME or OWNER/NAME, of a checkpoint that is not here."""
    return not Path(name).exists() and (name.count("/") > 1 or name.startswith((".", "~", "/")))


def words(values: list[str] | None, option: str) -> list[str]:
    """``["1s,1d", "10y"]`` as ``["1s", "1d", "10y"]``; none where the option was not given.

    Raises:
        ValueError: it was given, and holds none.
    """
    found = [word for value in values or [] for word in value.replace(",", " ").split()]
    if values and not found:
        raise ValueError(f"{option} {' '.join(values)}: allowed are words between commas")
    return found
