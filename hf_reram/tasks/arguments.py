"""Command line flags that every recipe shares, for ``HfArgumentParser``."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import TrainingArguments

from ..config import ReRAMConfig
from ..device import parse_time
from .comparison import METHODS, Method
from .flags import device_of, mapping_flags


@dataclass
class ReRAMArguments:
    """Hardware, training and evaluation of the comparison.

    Use it beside ``TrainingArguments``: ``HfArgumentParser((ReRAMArguments, TrainingArguments))``.
    """

    device: str = field(default="hfox-neurram", metadata={"help": "preset, or JSON file of a DeviceConfig"})
    range_shrink: str = field(default="auto", metadata={"help": "auto or a number in (0, 1]"})
    input_range: str = field(
        default=ReRAMConfig.input_range,
        metadata={"help": "static, per_token (each token's or image's own), learned, or auto (static or per_token)"},
    )
    center_inputs: bool = field(
        default=ReRAMConfig.center_inputs, metadata={"help": "input channels without their means"}
    )
    weight_clip: str = field(default="auto", metadata={"help": "auto, none or RMS multiples"})
    equalize_inputs: bool = field(
        default=ReRAMConfig.equalize_inputs, metadata={"help": "input channels divided by scales of their own"}
    )
    weight_scale: str = field(
        default=ReRAMConfig.weight_scale, metadata={"help": "per_channel, per_tensor or per_tile (needs tile_size)"}
    )
    tile_size: int | None = field(default=None, metadata={"help": "rows of a crossbar tile; default one tile a layer"})
    redundancy: float = field(
        default=ReRAMConfig.redundancy, metadata={"help": "share of cells on top, where they do most"}
    )
    modules_to_not_convert: list[str] | None = field(
        default=None, metadata={"help": "names, or parts of names between dots, of layers that stay digital"}
    )
    calibration_batches: int = field(
        default=ReRAMConfig.calibration_batches, metadata={"help": "of training data, that calibration reads"}
    )
    dac_bits: int | None = field(default=None, metadata={"help": "2 to 16, sign included; default ideal"})
    adc_bits: int | None = field(default=None, metadata={"help": "2 to 16, sign included; default ideal"})
    retention_loss: str = ReRAMConfig.retention_loss or "none"
    retention_weight: float = ReRAMConfig.retention_weight
    retention_warmup: float = field(
        default=ReRAMConfig.retention_warmup, metadata={"help": "share of the steps over which sampled drift grows"}
    )
    retention_times: list[str] | None = field(
        default=None, metadata={"help": "to be robust at; default the longest of --times"}
    )
    temperature: float | None = field(default=None, metadata={"help": "K; default the device's reference"})
    fused_kernels: bool = field(
        default=False,
        metadata={"help": "compile the crossbars' element-wise work, which needs a C++ compiler on a CPU"},
    )
    times: list[str] = field(default_factory=lambda: ["1s", "1d", "1mo", "1y", "10y"], metadata={"help": "evaluated"})
    chips: int = field(default=10, metadata={"help": "evaluated, each with its own programming"})
    allow_uncalled: bool = field(
        default=False,
        metadata={"help": "evaluate also where crossbar layers never ran, as experts without a token, and name them"},
    )
    methods: list[str] = field(default_factory=list, metadata={"help": "parts of methods' labels; default all"})
    teacher: bool = field(default=False, metadata={"help": "follow the digital model's predictions"})
    teacher_weight: float = field(
        default=1.0, metadata={"help": "share of the teacher against the labels; 1 needs no labels"}
    )

    teacher_temperature: float = field(
        default=1.0, metadata={"help": "of both models' logits; above 1, unlikely classes count more"}
    )

    @property
    def label_free(self) -> bool:
        """Whether training follows the teacher alone."""
        return self.teacher and self.teacher_weight == 1

    def config(self) -> ReRAMConfig:
        """What the flags say as a config.

        Raises:
            FileNotFoundError: no such device file.
            ValueError: a value that is not allowed.
        """
        return ReRAMConfig(
            device=device_of(self.device),
            **mapping_flags(self.range_shrink, self.weight_clip, self.redundancy, self.input_range),
            center_inputs=self.center_inputs,
            equalize_inputs=self.equalize_inputs,
            weight_scale=self.weight_scale,
            tile_size=self.tile_size,
            modules_to_not_convert=self.modules_to_not_convert,
            calibration_batches=self.calibration_batches,
            dac_bits=self.dac_bits,
            adc_bits=self.adc_bits,
            retention_loss=self.retention_loss,
            retention_weight=self.retention_weight,
            retention_warmup=self.retention_warmup,
            retention_times=self.retention_times or [max(self.times, key=parse_time)],
            temperature=self.temperature,
        )

    def chosen_methods(self) -> Sequence[Method]:
        """Those of :data:`hf_reram.tasks.comparison.METHODS` that ``methods`` names.

        Raises:
            ValueError: a part that is in no label.
        """
        labels = [method.label for method in METHODS]
        for part in self.methods:
            if not any(part in label for label in labels):
                raise ValueError(f"methods={part!r}: allowed are parts of {labels}")
        return [m for m in METHODS if not self.methods or any(part in m.label for part in self.methods)]


@dataclass
class RecipeTrainingArguments(TrainingArguments):
    """``TrainingArguments`` with the defaults of a short finetuning that can be resumed: 200 steps, unless
    ``max_steps`` or ``num_train_epochs`` is given."""

    max_steps: int | None = None  # type: ignore[assignment]
    num_train_epochs: float | None = None  # type: ignore[assignment]
    learning_rate: float = 1e-4
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.1
    save_steps: float = 50
    save_total_limit: int | None = 1
    logging_steps: float = 10
    report_to: str = "none"

    def __post_init__(self):
        if self.max_steps is None:
            self.max_steps = 200 if self.num_train_epochs is None else -1
        if self.num_train_epochs is None:
            self.num_train_epochs = TrainingArguments.num_train_epochs
        super().__post_init__()
