"""Python processes that do not import torch and transformers anew.

An interpreter that has imported them, and nothing of hf_reram, forks one process for each command. So a process takes
a tenth of a second instead of many, and in all else is one of its own, with arguments, environment, working directory,
exit code and signals.
"""

import atexit
import gc
import importlib.util
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).parents[2]
LIBRARIES = [
    "accelerate",
    "datasets",
    "evaluate",
    "matplotlib.pyplot",
    "peft",
    "scipy.stats",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "transformers.models.auto.modeling_auto",
    "transformers.models.bert.modeling_bert",
    "transformers.models.resnet.modeling_resnet",
    "transformers.pipelines",
    "transformers.trainer",
    "typer",
]
PATIENCE = 300  # seconds
OPTIONAL = ["timm", "torchvision.transforms.v2"]


class Process:
    """A process that an ``Interpreter`` has started; its output goes to files, so that no pipe fills up."""

    def __init__(self, interpreter: "Interpreter", pid: int, out: Path, err: Path):
        self.interpreter, self.pid, self.out, self.err = interpreter, pid, out, err
        self.code: int | None = None

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def poll(self) -> int | None:
        """The exit code, a signal's with a minus; None while it runs."""
        if self.code is None:
            self.code = self.interpreter.request({"poll": self.pid})
        return self.code

    def wait(self) -> subprocess.CompletedProcess:
        """What subprocess.run gives, once it has ended; after ``PATIENCE`` it is killed."""
        end = time.monotonic() + PATIENCE
        while self.poll() is None:
            if time.monotonic() > end:
                self.kill()
            time.sleep(0.01)
        return subprocess.CompletedProcess(str(self.pid), self.code, self.out.read_text(), self.err.read_text())


class Interpreter:
    """Starts processes of Python, until it is closed.

    Args:
        libraries: names of modules that it imports, by default those that most commands need; of hf_reram none.
        environment: what differs from this process's environment: values, or None for what is not to be set. What
            libraries read when they are imported has to stand here; a command can only add to it.
    """

    def __init__(self, libraries: Sequence[str] | None = None, **environment: str | None):
        self.environment = _changed(os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, environment)
        self.folder = tempfile.TemporaryDirectory()
        self.count = 0
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        if libraries is None:
            libraries = [*LIBRARIES, *(name for name in OPTIONAL if importlib.util.find_spec(name.partition(".")[0]))]
        command = [sys.executable, "-m", "tests.samples.interpreter", *libraries]
        self.server = subprocess.Popen(command, cwd=ROOT, env=self.environment, text=True, **pipes)

    def start(self, *command: str, cwd: Path = ROOT, **environment: str | None) -> Process:
        """``python *command``: a script, ``-m`` and a module or ``-c`` and code; and arguments."""
        self.count += 1
        out, err = (Path(self.folder.name, f"{self.count}.{name}") for name in ("out", "err"))
        request = {"command": command, "cwd": str(cwd), "environment": _changed(self.environment, environment)}
        return Process(self, self.request({**request, "out": str(out), "err": str(err)}), out, err)

    def run(self, *command: str, **options) -> subprocess.CompletedProcess:
        return self.start(*command, **options).wait()

    def run_two(self, *command: str, **options) -> list[subprocess.CompletedProcess]:
        """The command in two processes that torch.distributed joins, as ``torchrun --nproc_per_node 2`` starts them."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        group |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        ranks = [self.start(*command, **options, **group, RANK=rank, LOCAL_RANK=rank) for rank in "01"]
        end = time.monotonic() + PATIENCE
        while None in (codes := [rank.poll() for rank in ranks]):
            if any(codes) or time.monotonic() > end:  # the other waits for one that has failed
                for rank in ranks:
                    rank.kill()
            time.sleep(0.01)
        return [rank.wait() for rank in ranks]

    def request(self, content: dict):
        self.server.stdin.write(json.dumps(content) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait(60)
        self.server.stdout.close()
        self.folder.cleanup()


def _changed(environment: dict[str, str], changes: dict[str, str | None]) -> dict[str, str]:
    return {key: value for key, value in {**environment, **changes}.items() if value is not None}


def _serve() -> dict | None:
    """Answers requests; returns in each forked process with its request, and at the end with None."""
    replies, children = os.fdopen(os.dup(1), "w"), set()
    for line in sys.stdin:
        request = json.loads(line)
        if "command" in request:
            answer = os.fork()
            if answer == 0:
                replies.close()
                return request
            children.add(answer)
        else:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
            if pid:
                children.remove(pid)
        replies.write(json.dumps(answer) + "\n")
        replies.flush()
    for child in children:
        os.kill(child, signal.SIGKILL)
    return None


def _become(request: dict) -> NoReturn:
    """The rest of this process: the command, as an interpreter of its own would run it."""
    for target, path in enumerate((os.devnull, request["out"], request["err"])):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC if target else os.O_RDONLY)
        os.dup2(file, target)
        os.close(file)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    code = 0
    try:
        _execute(request["command"], request["cwd"])
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:  # whatever it is, an interpreter prints it and exits with 1
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # without freeing one by one, in seconds, what the libraries hold


def _execute(command: list[str], cwd: str) -> None:
    if command[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *command[2:]], cwd
        exec(command[1], {"__name__": "__main__"})
    elif command[0] == "-m":
        sys.argv, sys.path[0] = command[1:], cwd
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = command, str(Path(command[0]).resolve().parent)
        runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    for library in sys.argv[1:]:
        importlib.import_module(library)
    if "transformers.modeling_utils" in sys.modules:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        get_checkpoint_conversion_mapping("bert")  # builds the table that saving and loading look things up in
    assert not any(module.partition(".")[0] == "hf_reram" for module in sys.modules)
    gc.freeze()  # what is imported stays: collecting garbage among it would copy its pages into each process
    if found := _serve():
        _become(found)
    os._exit(0)
