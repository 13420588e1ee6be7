import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent / "distributed_script.py"
PAIR = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def run(command, out, mode, kind):
    done = subprocess.run([*command, str(SCRIPT), str(out), mode, kind], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out)


@pytest.mark.parametrize("kind", ["output", "sensitivity+drift"])
@pytest.mark.parametrize(("one", "two"), [("trainer", "trainer"), ("plain", "fsdp")], ids=["DDP", "FSDP2"])
def test_two_processes_have_the_loss_and_gradients_of_one(tmp_path, one, two, kind):
    alone = run([sys.executable], tmp_path / "one.pt", one, kind)
    pair = run(PAIR, tmp_path / "two.pt", two, kind)
    assert pair["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert pair["grads"].keys() == alone["grads"].keys()
    for name, grad in alone["grads"].items():
        torch.testing.assert_close(pair["grads"][name], grad, rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    if "chip" in alone:
        torch.testing.assert_close(pair["chip"], alone["chip"], rtol=1e-4, atol=1e-6)
