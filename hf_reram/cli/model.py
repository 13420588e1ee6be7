"""The MODEL that commands take: a robust checkpoint, or a plain one that is patched here."""

from pathlib import Path
from typing import Any

from safetensors import safe_open

from ..config import ReRAMConfig
from ..hub.load import load_model
from ..model.find import crossbar_layers, crossbar_states
from ..model.patch import patch_model
from ..model.remap import remap
from ..tasks.flags import device_of


def patched(name: str, device: str | None, times: list[str] | None = None, **options: Any) -> tuple[Any, bool]:
    """A checkpoint's model on crossbars, and whether it still has to be calibrated.

    Args:
        device: for a plain checkpoint, or to put a robust one on other cells, the same layers. times: that a plain
            checkpoint is calibrated for, None for the config's own; a robust one keeps its own. options: more of
            :class:`ReRAMConfig`, those alone that the user gave: a robust checkpoint keeps its own of the others, as
            does each part of it that was patched by itself.

    Raises:
        ValueError: a plain checkpoint and no device, or one of crossbars whose config is lost. OSError: see
            :func:`hf_reram.load_model`.
    """
    model = _loaded(name)
    if not crossbar_layers(model):
        if _holds_numbers(name):
            raise ValueError(
                f"{name} holds numbers of crossbars, and no ReRAMConfig says of which device: where parts without a "
                "config of their own were patched by themselves, save_pretrained keeps none. Allowed are models that "
                "were patched as a whole or in parts that are models (PreTrainedModel)"
            )
        if device is None:
            raise ValueError(f"{name} is a plain checkpoint: --device says which cells to put it on")
        if times is not None:
            options["retention_times"] = times
        return patch_model(model, ReRAMConfig(device=device_of(device), **options)), True
    if device is not None:
        options["device"] = ReRAMConfig(device=device_of(device)).device.to_dict()
    remap(model, [ReRAMConfig.from_dict({**state.config.to_dict(), **options}) for state in crossbar_states(model)])
    return model, not all(layer.calibrated for layer in crossbar_layers(model).values())


def _loaded(name: str) -> Any:
    """
    Raises:
        OSError: no such folder, and no such checkpoint that the Hub can be asked for; names it.
    """
    try:
        return load_model(name)
    except OSError as error:
        if name in str(error):
            raise
        raise OSError(f"{name} is no folder, and on the Hub it was not found: {error}") from error


def _holds_numbers(name: str) -> bool:
    """Whether the weights in a folder have crossbars' numbers beside them."""
    for file in Path(name).glob("*.safetensors") if Path(name).is_dir() else ():
        with safe_open(file, "pt") as weights:
            if any(key.endswith(".range_shrink") for key in weights.keys()):  # noqa: SIM118
                return True
    return False


def words(values: list[str] | None, option: str) -> list[str]:
    """``["1s,1d", "10y"]`` as ``["1s", "1d", "10y"]``; none where the option was not given.

    Raises:
        ValueError: it was given, and holds none.
    """
    found = [word for value in values or [] for word in value.replace(",", " ").split()]
    if values and not found:
        raise ValueError(f"{option} {' '.join(values)}: allowed are words between commas")
    return found
