"""A tiny BERT calibrated, inspected and evaluated as chips, its weights sharded by FSDP2 where two processes run it;
what the first process finds is saved.

python -m torch.distributed.run --nproc_per_node 2 -m tests.evaluation.sharded_script CASE OUT
"""

import json
import math
import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from hf_reram import (
    ReRAMConfig,
    calibrate,
    crossbar_layers,
    deploy,
    evaluate_robustness,
    export_conductances,
    inspect_layers,
    patch_model,
    report_of,
)
from hf_reram.calibration import sensitivity
from hf_reram.evaluation import robustness
from hf_reram.model.digest import weights_digest
from hf_reram.nn.layer import BUFFERS
from hf_reram.nn.tensors import whole
from tests.samples import models
from tests.samples.lab import about
from tests.samples.models import bert_batch

CALIBRATED = {
    "default": {},
    "redundancy": {"redundancy": 0.3},
    "learned": {"learn_input_range": True, "retention_loss": "sensitivity+drift"},
    "converters": {"adc_bits": 8, "dac_bits": 8, "range_shrink": "auto", "equalize_inputs": True},
    "per token": {"input_range": "auto", "adc_bits": 8},
}


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def shard(model, **options):
    """Each block and the root by themselves; alone as it is."""
    if dist.is_initialized():
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for block in model.bert.encoder.layer:
            fully_shard(block, mesh=mesh, **options)
        fully_shard(model, mesh=mesh, **options)
    return model


def sharded(**options):
    torch.manual_seed(0)
    model = shard(patch_model(models.tiny_bert(), ReRAMConfig(**options)))
    return calibrate(model, [bert_batch(), bert_batch(seed=2)])


@torch.no_grad()
def losses(model) -> dict[str, float]:
    return {"loss": float(model(**bert_batch(seed=3)).loss)}


def report(model, evaluate=losses, **options) -> dict:
    options = {"times": ["1s", "1d"], "seeds": 2, "progress": False, **options}
    return evaluate_robustness(model, evaluate, **options).to_dict()


def message(call) -> str:
    """Of the error that it raises; all processes have to get to this."""
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


def numbers(options: dict) -> dict:
    """Of a model that is calibrated, inspected and evaluated while it is sharded."""
    model = sharded(**options)
    found = {"digest": weights_digest(model), "report": report(model), "same": report_of(model) is not None}
    found["layers"] = {
        name: [whole(getattr(layer, buffer).detach()).clone() for buffer in BUFFERS] + [layer.sensitivity]
        for name, layer in crossbar_layers(model).items()
    }
    found["kinds"] = {layer.name: layer.range_kind for layer in inspect_layers(model, "1d")}
    for key, batches in (("by weights", None), ("by data", [bert_batch(seed=4)])):
        found[key] = {
            f"{layer.name} {name}": 0.0 if value is None else value
            for layer in inspect_layers(model, "1d", batches=batches)
            for name, value in {**asdict(layer), **layer.sources}.items()
            if name not in ("name", "kind", "range_kind", "sources")
        }
    with deploy(model, "1d", seed=3), torch.no_grad():  # the root's weights are whole since the last forward
        torch.manual_seed(7)  # of the read noise
        found["chip"] = model(**bert_batch()).logits
    folder = export_conductances(model, f"{sys.argv[2]}.array", "1d", seed=3, formats=["safetensors"])
    with deploy(model, conductances=folder), torch.no_grad():
        torch.manual_seed(7)
        found["read back"] = model(**bert_batch()).logits
    found["conductances"] = about(folder)
    return found


def patched_after() -> dict:
    """Put on crossbars while it is sharded and frozen."""
    torch.manual_seed(0)
    model = shard(models.tiny_bert().requires_grad_(False))
    patch_model(model, ReRAMConfig(retention_loss="sensitivity"))
    calibrate(model, [bert_batch()])
    layers = crossbar_layers(model)
    return {"digest": weights_digest(model), "sensitivity": {name: layer.sensitivity for name, layer in layers.items()}}


def low_precision() -> dict:
    """A chip in bfloat16 of weights that are kept in float32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    torch.manual_seed(0)
    model = patch_model(models.tiny_bert(), ReRAMConfig())
    calibrate(model, [bert_batch()])
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    model = shard(model, mp_policy=policy) if dist.is_initialized() else model
    with deploy(model, "1d", seed=3), torch.no_grad():
        return {"chip": model(**bert_batch()).logits.float()}


def alike(out: str) -> dict:
    """What the processes see differs; all have to decide as the first one does."""
    model, log = sharded(), Path(out + ".jsonl")
    mine = list(range(3 + rank()))  # chips
    whole_report = report(model, seeds=mine, resume=str(log), key="losses")
    lines = [line for line in log.read_text().splitlines() if line]
    # A log that lacks runs, and that only one process has.
    found = {"report": whole_report, "runs": len(lines)}
    dist.barrier()
    if rank() == 0:
        log.write_text("\n".join(log.read_text().splitlines()[:-4]) + "\n")
    dist.barrier()
    evaluations = []

    def counted(model):
        evaluations.append(1)
        return losses(model)

    found["resumed"] = report(model, counted, seeds=mine, resume=str(log) if rank() == 0 else None, key="losses")
    found["evaluations"] = len(evaluations)

    def nan(model):
        return losses(model) if rank() == 0 else {**losses(model), "loss": math.nan}

    found["nan in another"] = report(model, nan)

    def fails(model):
        losses(model)
        if rank() == 1:
            raise ValueError("no figures here")
        return losses_of_nobody

    losses_of_nobody = {"loss": 0.0}
    found["failed"] = message(lambda: report(model, fails))
    found["shared"] = report(model, share_chips=True)
    torch.manual_seed(0)
    plain = calibrate(patch_model(models.tiny_bert(), ReRAMConfig()), [bert_batch(), bert_batch(seed=2)])
    plain = torch.nn.parallel.DistributedDataParallel(plain)
    found["DDP"] = report(plain, seeds=mine, resume=f"{out}.{rank()}.jsonl")
    found["divided"] = report(plain.module, seeds=mine, share_chips=True)
    device, runs, shared, measure = torch.device("cuda", rank()), [], f"{out}.shared.jsonl", robustness._measure

    def on_own_device(model):
        return losses(model) if device.type == "cuda" else {}

    def noted(*args):  # not in the evaluation, of which all that it holds counts
        runs.append(args[2])
        return measure(*args)

    robustness._measure = noted
    found["keyed"] = [report(plain.module, on_own_device, share_chips=True, resume=shared) for _ in range(2)]
    found["keyed evaluations"], robustness._measure = len(runs), measure
    found["failed apart"] = message(lambda: report(plain.module, fails, share_chips=True))

    def changes():
        with deploy(model, "1d"), torch.no_grad():
            model(**bert_batch())
            if rank() == 1:
                next(iter(crossbar_layers(model).values())).weight.to_local().add_(1.0)

    found["changed"] = message(changes)
    weight = next(iter(crossbar_layers(model).values())).weight.to_local()
    with torch.no_grad():
        weight[0, 0] = math.nan if rank() == 1 else weight[0, 0]  # of one process's part
    calls = (lambda: report(model), lambda: inspect_layers(model, "1d"), lambda: calibrate(model, [bert_batch()]))
    found["not finite"] = [message(call) for call in calls]
    return found


def main(case: str, out: str) -> None:
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    if case in CALIBRATED:
        found = numbers(CALIBRATED[case])
    else:
        found = {"patched": patched_after, "bfloat16": low_precision}[case]() if case != "alike" else alike(out)
    every = [found]
    if dist.is_initialized():
        every = [None] * dist.get_world_size()
        dist.all_gather_object(every, found)
    if rank() == 0:
        torch.save(every, out)
        print(json.dumps(len(every)))
    if dist.is_initialized():
        dist.barrier()  # gloo aborts where one process leaves while the other still talks
        dist.destroy_process_group()
        sys.stderr.flush()
        os._exit(0)  # gloo's threads may still be ending, and abort the interpreter's exit


if __name__ == "__main__":
    sensitivity.DRAWN = 64  # of few examples 1,024 take seconds
    main(*sys.argv[1:])
