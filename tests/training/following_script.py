"""Ten steps of a tiny model with the Trainer, whose numbers of calibration follow: alone, under DDP and under FSDP2.

python -m torch.distributed.run --nproc_per_node 2 -m tests.training.following_script OUT FOLDER [CHECKPOINT]

What each process has after every step goes to OUT, checkpoints to FOLDER.
"""

import os
import sys

import torch
from transformers import TrainerCallback, TrainingArguments, set_seed

from hf_reram import ReRAMConfig, ReRAMTrainer, calibrate, crossbar_layers, patch_model
from hf_reram.model.sharding import is_sharded
from hf_reram.nn.layer import BUFFERS
from hf_reram.nn.tensors import whole
from tests.samples import models
from tests.samples.processes import save_all_and_leave
from tests.training.launch_script import fsdp_on_cpus

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "BertLayer",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


class Keep(TrainerCallback):
    """The numbers of all layers after each step, and whether weights are sharded."""

    def __init__(self):
        self.numbers, self.sharded = {}, False

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.sharded = is_sharded(model)
        self.numbers[state.global_step] = {
            f"{name}.{buffer}": getattr(layer, buffer).clone()
            for name, layer in crossbar_layers(model).items()
            for buffer in BUFFERS
        }


def data(count: int) -> list[dict]:
    """Rows whose tokens come from another part of the vocabulary the later they are."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(count):
        ids = torch.randint(1, 10 + i // 2, (6,), generator=generator)
        label = torch.randint(3, (), generator=generator)
        rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": label})
    return rows


def main(out: str, folder: str, checkpoint: str | None = None) -> None:
    torch.set_num_threads(1)
    args = TrainingArguments(
        folder,
        max_steps=10,
        per_device_train_batch_size=8 // int(os.environ.get("WORLD_SIZE", 1)),
        logging_steps=1,
        learning_rate=0.3,
        adam_epsilon=1.0,  # or Adam makes whole steps of the rounding of gradients that are zero
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_steps=5,
        train_sampling_strategy="sequential",
    )
    fsdp_on_cpus(args)
    set_seed(0)
    model, rows, keep = models.tiny_bert(), data(80), Keep()
    kind = os.environ.get("INPUT_RANGE", "static")
    patch_model(model, ReRAMConfig(retention_loss="output+drift", adc_bits=8, dac_bits=8, input_range=kind))
    calibrate(model, [{key: torch.stack([row[key] for row in rows[:8]]) for key in rows[0]}])
    trainer = ReRAMTrainer(model, args, train_dataset=rows, callbacks=[keep])
    trainer.train(resume_from_checkpoint=checkpoint)
    found = {"numbers": keep.numbers, "sharded": keep.sharded, "losses": trainer.state.log_history}
    found["weights"] = {name: whole(p.detach()).clone() for name, p in trainer.model.named_parameters()}
    save_all_and_leave(found, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
