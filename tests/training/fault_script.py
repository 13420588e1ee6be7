"""Six steps of a tiny model, with a checkpoint after every second, and something that goes wrong.

python -m tests.training.fault_script OUT [FAULT]; prints the losses of all steps as JSON.
"""

import json
import os
import resource
import signal
import sys
from collections.abc import Callable

import torch
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback, TrainingArguments

from hf_reram import ReRAMConfig, ReRAMTrainer
from hf_reram.training.checkpoints import last_checkpoint


def kill() -> None:
    """What kill -9 does."""
    os.kill(os.getpid(), signal.SIGKILL)


class Killed(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 4:
            kill()


def without_space(save: Callable, *args, **kwargs) -> None:
    """Save while no file may grow beyond 4 KiB; stderr, a file in the tests, takes the traceback afterwards."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        return save(*args, **kwargs)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def break_saving(trainer: ReRAMTrainer, fault: str) -> None:
    """Let the saving of checkpoint-4 go wrong at one of its stages."""
    stage, last = {
        "kill while the model is saved": ("_save", "model.safetensors"),
        "kill while the optimizer is saved": ("_save_optimizer_and_scheduler", None),
        "kill while the state is saved": ("_save_rng_state", None),
        "disk full": ("_save", None),
    }[fault]
    save = getattr(trainer, stage)

    def broken(folder, *args, **kwargs):
        if "checkpoint-4" not in str(folder):
            return save(folder, *args, **kwargs)
        if fault == "disk full":
            return without_space(save, folder, *args, **kwargs)
        if last:
            trainer.processing_class = _Killer()
        result = save(folder, *args, **kwargs)
        if stage == "_save_rng_state":
            with open(os.path.join(folder, "trainer_state.json"), "w", encoding="utf-8") as file:
                file.write('{"best_metric": null, "epo')
        kill()
        return result

    setattr(trainer, stage, broken)


class _Killer:
    """Stands for a tokenizer, which is saved after the weights."""

    def save_pretrained(self, folder):
        assert os.path.exists(os.path.join(folder, "model.safetensors"))
        kill()


def main(out: str, fault: str = "") -> None:
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 3}
    model = BertForSequenceClassification(BertConfig(**shape, intermediate_size=32))
    ids, labels = torch.randint(1, 50, (48, 6)), torch.randint(3, (48,))
    data = [{"input_ids": i, "attention_mask": torch.ones_like(i), "labels": label} for i, label in zip(ids, labels)]
    args = TrainingArguments(
        out,
        max_steps=6,
        save_steps=2,
        save_total_limit=1,
        logging_steps=1,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    callbacks = [Killed()] if fault == "kill in training" else []
    config = ReRAMConfig(retention_loss="output+drift", retention_times=["1d"])
    trainer = ReRAMTrainer(model, args, train_dataset=data, reram_config=config, callbacks=callbacks)
    if fault and not callbacks:
        break_saving(trainer, fault)
    trainer.train(resume_from_checkpoint=last_checkpoint(out))
    print(json.dumps([log["loss"] for log in trainer.state.log_history if "loss" in log]))


if __name__ == "__main__":
    main(*sys.argv[1:])
