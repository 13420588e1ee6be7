"""Training with the Trainer on two processes, of which one calls no crossbar, or of a model whose crossbars are frozen:
what each has logged.

python -m torch.distributed.run --nproc_per_node 2 -m tests.training.uncalled_script OUT RETENTION_LOSS WAY
"""

import os
import sys

import torch
from torch import nn
from transformers import TrainingArguments

from hf_reram import ReRAMConfig, ReRAMTrainer
from tests.samples.processes import save_all_and_leave


class Skipping(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head, self.skips = nn.Linear(8, 8), nn.Linear(8, 3), False

    def forward(self, x, labels=None):
        first = 0 * self.first.weight.sum() if self.skips else self.first(x)
        logits = self.head(torch.relu(x + first))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def main(out: str, loss: str, way: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    args = TrainingArguments(
        out + ".out",
        max_steps=2,
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        ddp_find_unused_parameters=True,
    )
    data = [{"x": torch.randn(8), "labels": torch.tensor(i % 3)} for i in range(64)]
    config = ReRAMConfig(target_modules=["first"], retention_loss=loss)
    trainer = ReRAMTrainer(Skipping(), args, train_dataset=data, reram_config=config)
    if way == "frozen":
        trainer.model.first.requires_grad_(False)
    else:
        trainer.model.skips = os.environ.get("RANK") == "1"
    trainer.train()
    save_all_and_leave([log for log in trainer.state.log_history if "loss" in log], out)


if __name__ == "__main__":
    main(*sys.argv[1:])
