"""Devices of the tests, and the config of a crossbar that computes as the digital layer does."""

from hf_reram import DeviceConfig, ReRAMConfig

# Retention without spread: what was programmed stays.
SILENT = {"type": "log", "std_offset": [0.0], "std_slope": [0.0]}


def device(**changes) -> DeviceConfig:
    """The NeuRRAM preset with some fields changed."""
    return DeviceConfig.from_dict({**DeviceConfig.from_preset("hfox-neurram").to_dict(), **changes})


def straight(**fields) -> ReRAMConfig:
    """A config whose crossbar is an ideal linear one: no curvature, no clipping, no loss."""
    options = {"device": device(v0=1e6), "range_shrink": 1.0, "weight_clip": None, "retention_loss": "none"}
    return ReRAMConfig(**{**options, **fields})
