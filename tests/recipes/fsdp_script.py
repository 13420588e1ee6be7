"""A recipe on CPUs under FSDP, of which accelerate's Accelerator would make DDP there.

accelerate launch --config_file recipes/configs/fsdp2.yaml -m tests.recipes.fsdp_script recipes/squad.py ...
"""

import os
import runpy
import sys

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers import TrainerCallback

from hf_reram import ReRAMTrainer
from hf_reram.model.sharding import is_sharded

_begin, _end = PartialState.__init__, PartialState.destroy_process_group


def begin(self, *args, **kwargs) -> None:
    """PyTorch has FSDP2 on CPUs, over gloo: let accelerate take these for GPUs."""
    _begin(self, *args, **kwargs)
    if self._shared_state["distributed_type"] == DistributedType.MULTI_CPU:
        self._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def end(self, *args, **kwargs) -> None:
    dist.barrier()  # gloo aborts where one process leaves while the other still talks
    _end(self, *args, **kwargs)


class TellSharding(TrainerCallback):
    def on_train_begin(self, args, state, control, model=None, **kwargs):
        print(f"sharded: {is_sharded(model)}", file=sys.stderr)


def train(self, *args, **kwargs):
    self.add_callback(TellSharding())
    return _train(self, *args, **kwargs)


if __name__ == "__main__":
    torch.set_num_threads(1)
    _train, ReRAMTrainer.train = ReRAMTrainer.train, train
    PartialState.__init__, PartialState.destroy_process_group = begin, end
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads may still be ending, and abort the interpreter's exit
