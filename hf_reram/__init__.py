"""hf_reram: pretrained Hugging Face models, finetuned to be robust on ReRAM crossbars.

Importing it lets ``from_pretrained`` bring back the crossbar layers of a checkpoint, and ``pipeline`` answer questions.
"""

from .calibration import calibrate
from .checkpoint import report_of
from .config import ReRAMConfig
from .deployment import deploy, digital
from .device import DeviceConfig
from .evaluation import evaluate_robustness
from .losses import add_retention_loss, hold_weights, noise_to_signal, retention_loss, sampled_drift
from .nn.fused import use_fused_kernels
from .patching import crossbar_layers, patch_model, summarize, unpatch_model
from .pipeline import register as _register
from .quantizer import ReRAMQuantizer
from .report import RobustnessReport
from .trainer import ReRAMTrainer
from .version import __version__

_register()

__all__ = [
    "DeviceConfig",
    "ReRAMConfig",
    "ReRAMQuantizer",
    "ReRAMTrainer",
    "RobustnessReport",
    "__version__",
    "add_retention_loss",
    "calibrate",
    "crossbar_layers",
    "deploy",
    "digital",
    "evaluate_robustness",
    "hold_weights",
    "noise_to_signal",
    "patch_model",
    "report_of",
    "retention_loss",
    "sampled_drift",
    "summarize",
    "unpatch_model",
    "use_fused_kernels",
]
