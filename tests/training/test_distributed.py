import importlib.util
import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from hf_reram import crossbar_layers

SCRIPT, LAUNCHED = "tests.training.distributed_script", "tests.training.launch_script"
EXPERTS = "tests.training.experts_script"


def found(out, *ranks):
    for done in ranks:
        assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out)


@pytest.mark.parametrize("kind", ["output", "sensitivity+drift"])
@pytest.mark.parametrize(("one", "two"), [("trainer", "trainer"), ("plain", "fsdp")], ids=["DDP", "FSDP2"])
def test_two_processes_have_the_loss_and_gradients_of_one(python, tmp_path, one, two, kind):
    files = tmp_path / "one.pt", tmp_path / "two.pt"
    alone = found(files[0], python.run("-m", SCRIPT, str(files[0]), one, kind))
    pair = found(files[1], *python.run_two("-m", SCRIPT, str(files[1]), two, kind))
    assert pair["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert pair["grads"].keys() == alone["grads"].keys()
    for name, grad in alone["grads"].items():
        torch.testing.assert_close(pair["grads"][name], grad, rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    if "chip" in alone:
        torch.testing.assert_close(pair["chip"], alone["chip"], rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def experts_alone(python, tmp_path_factory):
    file = tmp_path_factory.mktemp("experts") / "one.pt"
    return found(file, python.run("-m", EXPERTS, str(file), "plain"))


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_experts_that_have_other_tokens_in_each_process(python, tmp_path, mode, experts_alone):
    """Stacked tensors, which FSDP2 shards, have the gradients, are held, and are the chip of one process."""
    file = tmp_path / "two.pt"
    pair = found(file, *python.run_two("-m", EXPERTS, str(file), mode))
    assert pair["ranges"] == pytest.approx(experts_alone["ranges"], rel=1e-6)
    for name in ("gradients", "weights"):
        for ours, own in zip(pair[name], experts_alone[name], strict=True):
            torch.testing.assert_close(ours, own, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(pair["chip"], experts_alone["chip"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("config", "kind"), [("ddp", "MULTI_CPU"), ("fsdp2", "FSDP"), ("deepspeed", "DEEPSPEED")])
def test_accelerate_launches_the_configs(python, tmp_path, config, kind, one_process):
    """Losses and the saved checkpoint are those of one process."""
    environment = {}
    if config == "deepspeed":
        if importlib.util.find_spec("deepspeed") is None:
            pytest.skip("needs pip install deepspeed")
        environment["DS_ACCELERATOR"] = "cpu"
    alone, weights = one_process
    launcher = ["-m", "accelerate.commands.launch", "--config_file", f"recipes/configs/{config}.yaml"]
    found = printed(python.run(*launcher, "--main_process_port", "0", "-m", LAUNCHED, str(tmp_path), **environment))
    assert found["processes"] == 2 and found["kind"] == f"DistributedType.{kind}"
    for mine, theirs in zip(found["logs"], alone["logs"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3)
    state = saved(tmp_path)
    assert state.keys() == weights.keys()
    for name, value in weights.items():
        torch.testing.assert_close(state[name], value, rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(scope="module")
def one_process(python, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return printed(python.run("-m", LAUNCHED, str(folder))), saved(folder)


def printed(done) -> dict:
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"processes"')))


def saved(folder) -> dict[str, torch.Tensor]:
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert len(crossbar_layers(model)) == 14
    return model.state_dict()
