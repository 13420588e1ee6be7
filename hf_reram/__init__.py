"""hf_reram: pretrained Hugging Face models, finetuned to be robust on ReRAM crossbars.

Importing it lets ``from_pretrained`` bring back the crossbar layers of a checkpoint, and ``pipeline`` answer questions.
"""

from .calibration.ranges import calibrate
from .config import ReRAMConfig
from .device import DeviceConfig
from .evaluation.report import RobustnessReport
from .evaluation.robustness import evaluate_robustness
from .hub.report import report_of
from .integrations.pipeline import register as _register
from .integrations.quantizer import ReRAMQuantizer
from .model.deploy import deploy, digital
from .model.find import crossbar_layers
from .model.patch import patch_model, unpatch_model
from .model.summary import summarize
from .nn.ops.fused import use_fused_kernels
from .training.losses import add_retention_loss, hold_weights, noise_to_signal, retention_loss, sampled_drift
from .training.trainer import ReRAMTrainer
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
