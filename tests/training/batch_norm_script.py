"""Four steps of a small model with frozen batch norm, two accumulated batches each, alone or on two processes.

python -m torch.distributed.run --nproc_per_node 2 -m tests.training.batch_norm_script OUT
"""

import os
import sys

import torch
from torch import nn
from transformers import TrainingArguments, set_seed

from hf_reram import ReRAMConfig, ReRAMTrainer, calibrate, patch_model
from tests.samples.processes import save_all_and_leave


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x, labels=None):
        logits = self.last(self.norm(self.first(x)))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def main(out: str) -> None:
    torch.set_num_threads(1)
    args = TrainingArguments(
        out + ".folder",
        max_steps=4,
        per_device_train_batch_size=4 // int(os.environ.get("WORLD_SIZE", 1)),
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        adam_epsilon=1.0,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        train_sampling_strategy="sequential",
    )
    set_seed(0)
    rows = [{"x": 2 * torch.randn(6) + 1, "labels": torch.tensor(i % 3)} for i in range(32)]
    model = patch_model(Normed(), ReRAMConfig(retention_loss="output+drift"))
    calibrate(model, [{key: torch.stack([row[key] for row in rows[:8]]) for key in rows[0]}])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = ReRAMTrainer(model, args, train_dataset=rows, freeze_batch_norm=True)
    trainer.train()
    found = {"before": before, "after": model.state_dict()}
    save_all_and_leave(found, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
