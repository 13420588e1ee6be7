"""The Trainer trains a step at a rate of 0, evaluates chips, saves and writes its card: alone, under DDP and FSDP2.

python -m torch.distributed.run --nproc_per_node 2 -m tests.evaluation.trainer_script OUT FOLDER
"""

import os
import sys

import torch
from transformers import TrainingArguments, set_seed

from hf_reram import ReRAMConfig, ReRAMTrainer, calibrate, patch_model
from hf_reram.model.sharding import is_sharded
from tests.samples import models
from tests.samples.devices import device
from tests.samples.processes import save_all_and_leave
from tests.training.following_script import data
from tests.training.launch_script import fsdp_on_cpus


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main(out: str, folder: str) -> None:
    torch.set_num_threads(1)
    args = TrainingArguments(
        folder,
        max_steps=1,
        learning_rate=0.0,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=3,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )
    fsdp_on_cpus(args)
    set_seed(0)
    model = models.tiny_bert()
    rows = data(24)  # whole batches: of a smaller last one a Trainer weighs the loss otherwise in several processes
    patch_model(model, ReRAMConfig(device=device(read_noise=0.0)))
    calibrate(model, [{key: torch.stack([row[key] for row in rows[:8]]) for key in rows[0]}])
    options = {"train_dataset": rows, "eval_dataset": rows, "compute_metrics": accuracy, "follow_training": False}
    trainer = ReRAMTrainer(model, args, **options)
    trainer.train()
    found = {"sharded": is_sharded(trainer.model)}
    try:
        trainer.evaluate_robustness(["1s"], share_chips=True, progress=False, seeds=1, references=False)
    except ValueError as error:
        found["refused"] = str(error)
    resume = os.path.join(folder, "chips.jsonl")
    found["report"] = trainer.evaluate_robustness(["1s", "1d"], seeds=2, progress=False, resume=resume).to_dict()
    trainer.save_model(folder)
    trainer.create_model_card()
    save_all_and_leave(found, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
