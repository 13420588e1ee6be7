"""Training with the Trainer on two processes, of which one gets a NaN: both must stop, and say so.

python -m torch.distributed.run --nproc_per_node 2 -m tests.training.nan_script FOLDER PART
"""

import os
import sys

import torch
import torch.distributed as dist
from transformers import TrainingArguments, set_seed

from hf_reram import ReRAMConfig, ReRAMTrainer, calibrate, crossbar_layers, patch_model
from hf_reram.model.sharding import is_sharded
from tests.samples import models
from tests.training.following_script import data
from tests.training.launch_script import fsdp_on_cpus


class OneNaN(ReRAMTrainer):
    """The second process's loss, or a retention term of a layer, is NaN in the second step."""

    part = "loss"

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        broken = self.state.global_step == 1 and self.args.process_index == 1
        if broken and self.part == "term":
            next(iter(crossbar_layers(model).values())).register_forward_hook(break_term)
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return loss * float("nan") if broken and self.part == "loss" else loss


def break_term(layer, args, output) -> None:
    terms = layer.crossbar.forward.terms
    terms[layer.crossbar_name] = terms[layer.crossbar_name] * float("nan")


def main(folder: str, part: str) -> None:
    torch.set_num_threads(1)
    common = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    args = TrainingArguments(folder, max_steps=4, per_device_train_batch_size=4, **common)
    fsdp_on_cpus(args)
    set_seed(0)
    model, rows = models.tiny_bert(), data(32)
    patch_model(model, ReRAMConfig(retention_loss="output+drift"))
    calibrate(model, [{key: torch.stack([row[key] for row in rows[:8]]) for key in rows[0]}])
    trainer = OneNaN(model, args, train_dataset=rows)
    trainer.part = part
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
