"""Crossbars read nothing back from the device in a training step: on a GPU each such read would wait for all that was
queued."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_reram import (
    ReRAMConfig,
    add_retention_loss,
    calibrate,
    crossbar_layers,
    hold_weights,
    patch_model,
    sampled_drift,
)
from hf_reram.evaluation.inspect import inspect_layers
from hf_reram.nn.ops import cpu
from hf_reram.nn.ops import random as noise
from tests.samples.models import bert_batch


class Reads(TorchDispatchMode):
    """Counts reads of tensors' elements from Python, and tensors made of Python numbers, which wait as well."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.lift_fresh.default)
        return function(*args, **kwargs or {})


OPTIONS = {
    "none": {"retention_loss": "none"},
    "drift": {"retention_loss": "drift"},
    "noise": {"retention_loss": "noise"},
    "output+drift": {"retention_loss": "output+drift"},
    "sensitivity": {"retention_loss": "sensitivity"},
    "converters": {"retention_loss": "drift", "dac_bits": 8, "adc_bits": 8},
    "learned input ranges": {"retention_loss": "drift", "learn_input_range": True, "dac_bits": 8, "adc_bits": 8},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_step_reads_back_what_a_digital_one_does(tiny_bert, monkeypatch, options):
    batch = bert_batch()
    with Reads() as digital:
        tiny_bert.train()(**batch).loss.backward()  # transformers looks whether the mask is all ones
    patch_model(tiny_bert, ReRAMConfig(retention_times=["1d"], **options))
    calibrate(tiny_bert, [batch], sensitivity=True)
    # What is only looked at, and only drawn in tables, on CPU.
    monkeypatch.setattr(cpu, "all_within", lambda *tensors: False)
    monkeypatch.setattr(cpu, "takes", lambda *tensors: False)
    monkeypatch.setattr(noise, "takes", lambda *tensors: False)
    optimizer = torch.optim.SGD(tiny_bert.parameters(), lr=1e-3)
    tiny_bert.train()

    def step() -> None:
        with sampled_drift(tiny_bert):
            loss = tiny_bert(**batch).loss
        loss, _ = add_retention_loss(loss, tiny_bert)
        loss.backward()
        optimizer.step()
        hold_weights(tiny_bert)
        optimizer.zero_grad()

    step()  # reads what calibration has changed
    with Reads() as reads:
        step()
    assert reads.count == digital.count


def test_learned_ranges_are_read_once_training_is_over(tiny_bert):
    patch_model(tiny_bert, ReRAMConfig(retention_loss="none", learn_input_range=True))
    calibrate(tiny_bert, [bert_batch()])
    name, layer = next(iter(crossbar_layers(tiny_bert).items()))
    tiny_bert.train()
    tiny_bert(**bert_batch())
    before = float(layer.input_range.detach())
    with torch.no_grad():
        layer.input_range.mul_(2)
    tiny_bert(**bert_batch())
    found = {report.name: report.input_range for report in inspect_layers(tiny_bert, "1d")}
    assert found[name] == pytest.approx(2 * before)
    assert layer.eval().scalars().input_range == pytest.approx(2 * before)
