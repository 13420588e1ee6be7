"""hf_reram: pretrained Hugging Face models, finetuned to be robust on ReRAM crossbars.

Importing it lets ``from_pretrained`` bring back the crossbar layers of a checkpoint, and does nothing else: what stands
below is imported when it is first used.
"""

from typing import TYPE_CHECKING

from .integrations.plain_trainer import register_plain_trainer as _register_plain_trainer
from .integrations.register import register_harness as _register_harness
from .integrations.register import register_quantizer as _register_quantizer
from .integrations.wrappers import register_wrappers as _register_wrappers
from .lazy import lazy_names as _lazy_names
from .version import __version__

if TYPE_CHECKING:
    from .calibration.settle import calibrate
    from .config import ReRAMConfig
    from .device import DeviceConfig
    from .evaluation.inspect import inspect_layers
    from .evaluation.report import RobustnessReport
    from .evaluation.robustness import evaluate_robustness
    from .hub.load import load_model
    from .hub.report import report_of
    from .integrations.quantizer import ReRAMQuantizer
    from .integrations.trainer import ReRAMTrainer, ReRAMTrainerMixin
    from .model.deploy import deploy, digital
    from .model.export import export_conductances
    from .model.find import crossbar_layers
    from .model.patch import patch_model, unpatch_model
    from .model.reconfigure import reconfigure
    from .model.summary import summarize
    from .model.targets import adapter_target_modules
    from .nn.ops.fused import use_fused_kernels
    from .nn.registry import register_crossbar
    from .training.distillation import divergence
    from .training.following import follow_training, stop_following
    from .training.losses import add_retention_loss, hold_weights, noise_to_signal, retention_loss, sampled_drift

# The same for Python, by module; tests/test_import.py compares the three lists.
_NAMES = {
    "calibration.settle": ["calibrate"],
    "config": ["ReRAMConfig"],
    "device": ["DeviceConfig"],
    "evaluation.inspect": ["inspect_layers"],
    "evaluation.report": ["RobustnessReport"],
    "evaluation.robustness": ["evaluate_robustness"],
    "hub.load": ["load_model"],
    "hub.report": ["report_of"],
    "integrations.quantizer": ["ReRAMQuantizer"],
    "integrations.trainer": ["ReRAMTrainer", "ReRAMTrainerMixin"],
    "model.deploy": ["deploy", "digital"],
    "model.export": ["export_conductances"],
    "model.find": ["crossbar_layers"],
    "model.patch": ["patch_model", "unpatch_model"],
    "model.reconfigure": ["reconfigure"],
    "model.summary": ["summarize"],
    "model.targets": ["adapter_target_modules"],
    "nn.ops.fused": ["use_fused_kernels"],
    "nn.registry": ["register_crossbar"],
    "training.distillation": ["divergence"],
    "training.following": ["follow_training", "stop_following"],
    "training.losses": ["add_retention_loss", "hold_weights", "noise_to_signal", "retention_loss", "sampled_drift"],
}

__all__ = [
    "DeviceConfig",
    "ReRAMConfig",
    "ReRAMQuantizer",
    "ReRAMTrainer",
    "ReRAMTrainerMixin",
    "RobustnessReport",
    "__version__",
    "adapter_target_modules",
    "add_retention_loss",
    "calibrate",
    "crossbar_layers",
    "deploy",
    "digital",
    "divergence",
    "evaluate_robustness",
    "export_conductances",
    "follow_training",
    "hold_weights",
    "inspect_layers",
    "load_model",
    "noise_to_signal",
    "patch_model",
    "reconfigure",
    "register_crossbar",
    "report_of",
    "retention_loss",
    "sampled_drift",
    "stop_following",
    "summarize",
    "unpatch_model",
    "use_fused_kernels",
]

__getattr__, __dir__ = _lazy_names(__name__, _NAMES)

_register_quantizer()
_register_harness()
_register_wrappers()
_register_plain_trainer()
