"""Three steps of a model of which each process calls other layers, by hand: routed experts and dropped layers, or a
loss that is not finite in one of them.

python -m torch.distributed.run --nproc_per_node 2 -m tests.training.routed_script OUT MODE RETENTION_LOSS

MODE "one" does in one process what the two do together, "ddp" and "fsdp" are theirs.
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hf_reram import (
    ReRAMConfig,
    add_retention_loss,
    calibrate,
    follow_training,
    hold_weights,
    patch_model,
    sampled_drift,
)
from hf_reram.nn.tensors import whole
from tests.samples.processes import save_all_and_leave

# What each process calls in each step: experts, and whether the layer that may be dropped runs. In the second step one
# process calls no crossbar, in the third nobody the layer that may be dropped.
ROUTES = {0: [((0, 1), True), ((1,), True), ((2, 0), False)], 1: [((1, 2), False), ((), False), ((2,), False)]}
PROCESSES, STEPS = 2, 3
DIGITAL = {"modules_to_not_convert": ["head"]}


class Routed(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.dropped, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x, experts=(0, 1, 2), dropped=True):
        # FSDP2 reduces the gradients of those weights that have some, which must be the same ones in all processes.
        nothing = 0.0 * sum(p.sum() for p in self.parameters())
        x = torch.tanh(x + sum(self.experts[i](x) for i in experts) + nothing)
        return self.head(torch.tanh(self.dropped(x)) if dropped else x)


def batch(process: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(10 * step + process)
    return torch.randn(16, 8, generator=generator), torch.randint(3, (16,), generator=generator)


def wrapped(model, mode: str):
    if mode == "ddp":
        return DistributedDataParallel(model)
    if mode == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=init_device_mesh("cpu", (PROCESSES,)))  # one group: other layers need no other gathers
    return model


def main(out: str, mode: str, kind: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if mode != "one":
        dist.init_process_group("gloo")
    inner = patch_model(Routed(), ReRAMConfig(retention_loss=kind, retention_weight=5.0, **DIGITAL))
    calibrate(inner, [batch(0, 9)[0]])
    model = wrapped(inner, mode)
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.1)
    mine, found = range(PROCESSES) if mode == "one" else [dist.get_rank()], []
    follow_training(inner)
    for step in range(STEPS):
        model.train()
        task, kept = torch.zeros(()), []
        with sampled_drift(inner, seed=step):
            for process in mine:
                x, labels = batch(process, step)
                kept.append(model(x, *ROUTES[process][step]))  # forwards wait for a loss while their outputs live
                task = task + nn.functional.cross_entropy(kept[-1], labels) / len(mine)
        loss, value = add_retention_loss(task, inner)
        loss.backward()
        found.append({"retention": float(value)})
        found[-1]["grads"] = {name: whole(p.grad).clone() for name, p in inner.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
        follow_training(inner)
        hold_weights(inner)
        found[-1]["state"] = {name: whole(t.detach()).clone() for name, t in inner.state_dict().items()}
    save_all_and_leave(found, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
