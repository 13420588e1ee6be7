"""One training step of a tiny QA model, its loss and gradients saved: run alone, by DDP and by FSDP2 on two processes.

python -m torch.distributed.run --nproc_per_node 2 tests/training/distributed_script.py OUT MODE RETENTION_LOSS
"""

import os
import sys

import torch
import torch.distributed as dist
from transformers import BertConfig, BertForQuestionAnswering, TrainerCallback, TrainingArguments, set_seed

from hf_reram import ReRAMConfig, ReRAMTrainer, add_retention_loss, calibrate, deploy, patch_model, sampled_drift
from hf_reram.calibration import sensitivity


def model_and_batch(rows: slice):
    set_seed(0)
    shape = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = BertForQuestionAnswering(BertConfig(**shape, **quiet, intermediate_size=32))
    ids = torch.randint(1, 50, (8, 6))
    labels = torch.randint(6, (8, 2))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch |= {"start_positions": labels[:, 0], "end_positions": labels[:, 1]}
    return model, batch, {k: v[rows] for k, v in batch.items()}


def trainer_step(out: str, config: ReRAMConfig) -> None:
    """The Trainer's own step: DDP where there are two processes."""
    model, batch, _ = model_and_batch(slice(None))
    data = [{k: v[i] for k, v in batch.items()} for i in range(8)]
    found = {}

    class Catch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            found.update({n.removeprefix("module."): p.grad.clone() for n, p in model.named_parameters()})

    processes = int(os.environ.get("WORLD_SIZE", 1))
    arguments = TrainingArguments(
        out + ".out",
        max_steps=1,
        per_device_train_batch_size=8 // processes,
        use_cpu=True,
        max_grad_norm=0.0,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
    )
    trainer = ReRAMTrainer(
        model, arguments, train_dataset=data, reram_config=config, callbacks=[Catch()], calibration_dataset=data[:4]
    )
    trainer.train()
    if trainer.is_world_process_zero():
        torch.save({"loss": trainer.state.log_history[0]["loss"], "grads": found}, out)


def bare_step(out: str, config: ReRAMConfig, sharded: bool) -> None:
    """A step by hand, with FSDP2 if ``sharded``."""
    rank, processes = (dist.get_rank(), dist.get_world_size()) if sharded else (0, 1)
    model, batch, mine = model_and_batch(slice(rank, None, processes))
    patch_model(model, config)
    calibrate(model, [batch])
    if sharded:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (processes,))
        for block in model.bert.encoder.layer:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    model.train()
    with sampled_drift(model, seed=1):
        loss = model(**mine).loss
    if any(kind in config.retention_loss for kind in ("output", "sensitivity", "weight")):
        loss, _ = add_retention_loss(loss, model)
    loss.backward()
    full = {
        n: (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad) for n, p in model.named_parameters()
    }
    loss = loss.detach()
    if sharded:
        dist.all_reduce(loss)
    with deploy(model.eval(), "1d", seed=3), torch.no_grad():
        torch.manual_seed(0)
        chip = model(**batch).start_logits
    if rank == 0:
        torch.save({"loss": float(loss) / processes, "grads": full, "chip": chip}, out)


if __name__ == "__main__":
    sensitivity.DRAWN = 64  # of few examples 1,024 take seconds
    torch.set_num_threads(1)
    path, mode, kind = sys.argv[1:]
    reram = ReRAMConfig(retention_loss=kind, retention_weight=5.0)
    if mode == "trainer":
        trainer_step(path, reram)
    else:
        if mode == "fsdp":
            dist.init_process_group("gloo")
        bare_step(path, reram, mode == "fsdp")
    if dist.is_initialized():
        dist.barrier()  # gloo aborts where one process leaves while the other still talks
        dist.destroy_process_group()
        sys.stderr.flush()
        os._exit(0)  # gloo's threads may still be ending, and abort the interpreter's exit
