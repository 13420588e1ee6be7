"""What a recipe's results depend on of its flags, by which a comparison is resumed or refused."""

from dataclasses import asdict
from typing import Any

from transformers import TrainingArguments

from .about import without_tokens

# Of TrainingArguments, what cannot change the trained weights: where and what is written, logged, evaluated and
# uploaded, and what does the work. All else can, and what later versions of transformers add may.
NEUTRAL = (
    *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "do_train", "do_eval", "do_predict"),
    *("run_name", "project", "report_to", "disable_tqdm", "debug", "skip_memory_metrics", "torch_empty_cache_steps"),
    *("include_num_input_tokens_seen", "prediction_loss_only", "include_for_metrics", "batch_eval_metrics"),
    *("per_device_eval_batch_size", "bf16_full_eval", "fp16_full_eval", "push_to_hub", "enable_jit_checkpoint"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context"),
    *("use_cpu", "local_rank", "ddp_backend", "ddp_timeout", "ddp_bucket_cap_mb", "ddp_find_unused_parameters"),
)
# What chooses the weights where the best checkpoint is loaded at the end.
CHOOSING = (
    *("eval_strategy", "eval_steps", "eval_delay", "save_strategy", "save_steps", "per_device_eval_batch_size"),
    *("bf16_full_eval", "fp16_full_eval", "prediction_loss_only", "include_for_metrics", "batch_eval_metrics"),
    *("eval_accumulation_steps", "eval_do_concat_batches", "eval_use_gather_object"),
)
NEUTRAL_KINDS = ("logging_", "log_", "save_", "eval_", "hub_", "trackio_")  # as their names begin

# Of a recipe's own flags, what may be another when it is resumed.
FREE = ("times", "chips", "methods", "allow_uncalled")


def recipe_settings(training: TrainingArguments, *arguments: Any) -> dict[str, Any]:
    """All that a recipe's results depend on of its flags, as ``settings`` for
    :func:`hf_reram.tasks.run_protocol`: of ``training`` what can change the trained weights, and the number of
    processes, which share a step's examples; of the other ``arguments`` (dataclasses) all but times, chips and methods,
    of which there may be more when the comparison is resumed, and what is only said of them. Tokens are left out."""
    found = {name: value for each in arguments for name, value in asdict(each).items() if name not in FREE}
    for name, value in training.to_dict().items():
        chooses = training.load_best_model_at_end and name in CHOOSING
        if chooses or (name not in NEUTRAL and not name.startswith(NEUTRAL_KINDS)):
            found[name] = value
    flagged = "fp16" if training.fp16 else "bf16" if training.bf16 else "no"
    if (precision := getattr(training, "mixed_precision", flagged)) != flagged:  # as accelerate launch sets it
        found["mixed_precision"] = precision
    return without_tokens({**found, "processes": training.world_size})
