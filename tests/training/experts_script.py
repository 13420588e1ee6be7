"""A tiny mixture of experts calibrated, one training step with its optimizer's, and a chip: run alone, and on two
processes with half of the examples each, so that experts have other tokens in each.

python -m torch.distributed.run --nproc_per_node 2 -m tests.training.experts_script OUT MODE
"""

import os
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from hf_reram import (
    ReRAMConfig,
    add_retention_loss,
    calibrate,
    crossbar_layers,
    deploy,
    hold_weights,
    patch_model,
    sampled_drift,
)
from hf_reram.model.sharding import reshard
from hf_reram.nn.tensors import whole
from tests.samples.experts import experts_of, mixtral, tokens


def step(out: str, mode: str, processes: int, rank: int) -> None:
    """What a process alone finds is saved, or the first of several."""
    model, ids = mixtral(), tokens()
    patch_model(model, ReRAMConfig(device="cmo-hfox-ibm", retention_loss="output+drift", weight_clip=2.0))
    wrapped = model
    if mode == "ddp":
        wrapped = DistributedDataParallel(model)
    if mode == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (processes,))
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    calibrate(wrapped, [ids])
    ranges = {name: float(layer.input_range) for name, layer in crossbar_layers(model).items()}
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    with sampled_drift(model, seed=1):
        mine = ids[rank::processes]
        loss = wrapped(mine, labels=mine).loss
    loss, _ = add_retention_loss(loss, wrapped)
    loss.backward()
    stacks = "gate_up_proj", "down_proj"
    gradients = [whole(getattr(experts_of(model), name).grad) for name in stacks]
    optimizer.step()
    hold_weights(model)
    reshard(model)
    weights = [whole(getattr(experts_of(model), name).detach()).clone() for name in stacks]
    with deploy(model.eval(), "1d", seed=3), torch.no_grad():
        torch.manual_seed(0)
        chip = model(ids).logits
    if rank == 0:
        found = {"ranges": ranges, "gradients": gradients, "weights": weights, "chip": chip}
        torch.save(found, out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    several = int(os.environ.get("WORLD_SIZE", 1))
    if several > 1:
        dist.init_process_group("gloo")
    step(*sys.argv[1:], several, dist.get_rank() if several > 1 else 0)
    if several > 1:
        dist.barrier()  # gloo aborts where one process leaves while the other still talks
        dist.destroy_process_group()
        sys.stderr.flush()
        os._exit(0)  # gloo's threads may still be ending, and abort the interpreter's exit
