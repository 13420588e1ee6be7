"""hf_reram: pretrained Hugging Face models, finetuned to be robust on ReRAM crossbars.

Importing it lets ``from_pretrained`` bring back the crossbar layers of a checkpoint.
"""

from .config import ReRAMConfig
from .device import DeviceConfig
from .patching import crossbar_layers, patch_model, summarize, unpatch_model
from .quantizer import ReRAMQuantizer
from .version import __version__

__all__ = [
    "DeviceConfig",
    "ReRAMConfig",
    "ReRAMQuantizer",
    "__version__",
    "crossbar_layers",
    "patch_model",
    "summarize",
    "unpatch_model",
]
