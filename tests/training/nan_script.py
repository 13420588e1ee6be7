"""Training with the Trainer on two processes, of which one gets a NaN: both must stop, and say so.

python -m torch.distributed.run --nproc_per_node 2 -m tests.training.nan_script FOLDER
"""

import os
import sys

import torch
import torch.distributed as dist
from transformers import TrainingArguments, set_seed

from hf_reram import ReRAMConfig, ReRAMTrainer, calibrate, patch_model
from hf_reram.model.sharding import is_sharded
from tests.samples import models
from tests.training.following_script import data
from tests.training.launch_script import fsdp_on_cpus


class OneNaN(ReRAMTrainer):
    """The second process's task loss is NaN in the second step."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return loss * float("nan") if self.state.global_step == 1 and self.args.process_index == 1 else loss


def main(folder: str) -> None:
    torch.set_num_threads(1)
    common = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    args = TrainingArguments(folder, max_steps=4, per_device_train_batch_size=4, **common)
    fsdp_on_cpus(args)
    set_seed(0)
    model, rows = models.tiny_bert(), data(32)
    patch_model(model, ReRAMConfig(retention_loss="output+drift"))
    calibrate(model, [{key: torch.stack([row[key] for row in rows[:8]]) for key in rows[0]}])
    trainer = OneNaN(model, args, train_dataset=rows)
    try:
        trainer.train()
    except FloatingPointError as error:
        print(f"sharded {is_sharded(trainer.model)}, after {trainer.state.global_step}: {error}", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may still be ending, and abort the interpreter's exit


if __name__ == "__main__":
    main(*sys.argv[1:])
