"""Three steps of a tiny model with the Trainer, as accelerate launches it: losses as JSON, and the saved model.

accelerate launch --config_file recipes/configs/ddp.yaml -m tests.training.launch_script OUT
"""

import json
import os
import sys

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments, set_seed

from hf_reram import ReRAMConfig, ReRAMTrainer, calibrate, patch_model


def fsdp_on_cpus(args: TrainingArguments) -> None:
    """accelerate leaves FSDP out on CPUs, where PyTorch has it: let it take these for GPUs, over gloo."""
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        assert args.device.type == "cpu"  # which sets the state up
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def main(out: str) -> None:
    torch.set_num_threads(1)
    set_seed(0)
    shape = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 3}
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = BertForSequenceClassification(BertConfig(**shape, **quiet, intermediate_size=32))
    ids, labels = torch.randint(1, 50, (24, 6)), torch.randint(3, (24,))
    data = [{"input_ids": i, "attention_mask": torch.ones_like(i), "labels": label} for i, label in zip(ids, labels)]
    args = TrainingArguments(
        out,
        max_steps=3,
        per_device_train_batch_size=8 // int(os.environ.get("WORLD_SIZE", 1)),
        logging_steps=1,
        learning_rate=1e-3,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        train_sampling_strategy="sequential",
    )
    fsdp_on_cpus(args)
    config = ReRAMConfig(retention_loss="output", retention_weight=5.0)
    patch_model(model, config)
    calibrate(model, [{key: torch.stack([row[key] for row in data[:8]]) for key in data[0]}])
    trainer = ReRAMTrainer(model, args, train_dataset=data)
    trainer.train()
    trainer.save_model(out)
    if trainer.is_world_process_zero():
        kind = str(trainer.accelerator.distributed_type)
        logs = [
            {key: log[key] for key in ("loss", "retention_loss", "grad_norm")} for log in trainer.state.log_history[:3]
        ]
        print(json.dumps({"processes": trainer.args.world_size, "kind": kind, "logs": logs}), flush=True)
    if dist.is_initialized():
        dist.barrier()  # gloo aborts where one process leaves while the other still talks
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)  # gloo's threads may still be ending, and abort the interpreter's exit


if __name__ == "__main__":
    main(sys.argv[1])
