"""The task loss without crossbars: what the digital control trains with, against the same computed by hand."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import TrainerCallback

from hf_reram import crossbar_layers
from hf_reram.integrations.trainer import DigitalTrainer
from tests.training.test_trainer import examples, fresh_bert, trainer_of


class Count(TrainerCallback):
    """Someone's own."""

    def __init__(self):
        self.steps = 0

    def on_step_end(self, *_, **__):
        self.steps += 1


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_control_follows_labels_and_teacher_as_the_loss_says(tmp_path, share, accumulated):
    base, teacher = fresh_bert(), fresh_bert(1)
    options = {"teacher": teacher, "teacher_weight": share, "teacher_temperature": 2.0}
    of_steps = {"max_steps": 1, "learning_rate": 1e-2, "optim": "sgd", "max_grad_norm": 0.0}
    of_steps |= {"per_device_train_batch_size": 16 // accumulated, "gradient_accumulation_steps": accumulated}
    crossbars = trainer_of(tmp_path, model=copy.deepcopy(base), data=examples(16), arguments_=of_steps, **options)
    control = DigitalTrainer.beside(crossbars)
    assert not crossbar_layers(control.model)
    control.train()

    for module in base.modules():  # as the control's, whose dropout is none
        assert not isinstance(module, torch.nn.Dropout) or module.p == 0
    batch = {name: torch.stack([row[name] for row in examples(16)]) for name in examples(1)[0]}
    logits = base(**batch).logits
    with torch.no_grad():
        guide = teacher(**{name: value for name, value in batch.items() if name != "labels"}).logits
    divergence = F.kl_div((logits / 2).log_softmax(-1), (guide / 2).log_softmax(-1), log_target=True, reduction="sum")
    loss = (1 - share) * F.cross_entropy(logits, batch["labels"]) + share * divergence / 16 * 2**2
    loss.backward()
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.grad is not None:
                parameter -= 1e-2 * parameter.grad
    for (name, own), expected in zip(control.model.named_parameters(), base.parameters()):
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-6, msg=name)


def test_the_control_keeps_a_persons_callbacks(tmp_path):
    count = Count()
    control = DigitalTrainer.beside(trainer_of(tmp_path, callbacks=[count]))
    control.train()
    assert count.steps == 4
    assert [type(c) for c in control.callback_handler.callbacks].count(Count) == 1
