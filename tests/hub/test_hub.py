"""Push from one process, download in another with an empty cache, over HTTP with the real client."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from hf_reram.hub.card import BEGIN, END
from tests.hub.client import REPO
from tests.hub.server import running
from tests.samples import squad as squad_sample

ROOT = Path(__file__).parents[2]


@pytest.fixture
def hub():
    with running() as found:
        yield found


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return squad_sample.write(tmp_path_factory.mktemp("base"))["--model_name_or_path"]


class Person:
    """Processes with a token, and a cache that is empty at first."""

    def __init__(self, hub, home: Path, token: str | None = "hf_ann"):
        self.environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        self.environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        for offline in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            self.environment.pop(offline, None)
        self.environment.pop("HF_TOKEN", None)
        if token:
            self.environment["HF_TOKEN"] = token

    def start(self, *command: str) -> subprocess.Popen:
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=self.environment, stdout=pipe, stderr=pipe, text=True, cwd=ROOT)

    def run(self, *command: str, fails: bool = False) -> tuple[str, str]:
        process = self.start(*command)
        out, err = process.communicate(timeout=300)
        assert (process.returncode != 0) == fails, err[-3000:]
        return out, err

    def client(self, *actions: str, fails: bool = False):
        """What the actions print, a list, and the last process's stderr."""
        out, err = self.run(sys.executable, "-m", "tests.hub.client", *actions, fails=fails)
        return [json.loads(line) for line in out.splitlines() if line.startswith(('{"', '"'))], err

    def cli(self, *arguments: str) -> str:
        return self.run(sys.executable, "-m", "hf_reram", *arguments)[0]


def test_a_pushed_model_comes_back_bit_for_bit_with_the_same_numbers(hub, base, tmp_path):
    (pushed,), _ = Person(hub, tmp_path / "a").client("model", base)
    files = hub.files(REPO)
    assert {"README.md", "config.json", "model.safetensors", "robustness.json", "robustness.png"} <= files.keys()
    assert "tokenizer.json" in files and not any(path.endswith((".bin", ".pt")) for path in files)
    assert json.loads(files["config.json"])["quantization_config"]["device"]["g_max"] == 89.0
    (loaded, asked), err = Person(hub, tmp_path / "b", None).client("load", "then", "ask")
    assert loaded == {"digest": pushed, "layers": 7, "report": True}
    assert asked["layers"] == 7 and asked["answer"]
    assert "other weights" not in err


def test_the_trainer_pushes_the_same(hub, base, tmp_path):
    actions = ("trainer", base, str(tmp_path / "out"), "then", "load")
    (pushed, loaded), _ = Person(hub, tmp_path / "a").client(*actions)
    files = hub.files(REPO)
    assert not any(path.endswith(".bin") or "checkpoint" in path for path in files)
    data = yaml.safe_load(files["README.md"].decode().split("---")[1])
    assert data["license"] == "mit" and data["datasets"] == ["rajpurkar/squad_v2"]
    assert "2 steps of" in files["README.md"].decode()
    assert loaded["digest"] == pushed and loaded["layers"] == 7


def test_adapters_go_up_as_adapters(hub, base, tmp_path):
    ann = Person(hub, tmp_path / "a")
    (_, pushed), _ = ann.client("model", base, "then", "adapter", str(tmp_path / "out"))
    files = hub.files("ann/adapter")
    assert {"adapter_config.json", "adapter_model.safetensors", "robustness.json", "robustness.png"} <= files.keys()
    assert "model.safetensors" not in files and not any(path.endswith((".bin", ".pt")) for path in files)
    _, metadata, text = files["README.md"].decode().split("---\n", 2)
    data = yaml.safe_load(metadata)
    assert (data["base_model"], data["base_model_relation"]) == (REPO, "adapter")
    assert 'PeftModel.from_pretrained(base, "ann/adapter")' in text and "Model Card for" not in text
    bob = Person(hub, tmp_path / "b", "hf_bob")
    (loaded,), _ = bob.client("load_adapter")
    assert loaded == {"digest": pushed, "layers": 7, "report": True}
    assert len(json.loads(bob.cli("inspect", "ann/adapter", "--json"))["layers"]) == 7


def test_changed_weights_go_up_without_the_old_figures(hub, base, tmp_path):
    actions = ("model", base, "then", "model", base, "1", "stale", "then", "load")
    (*_, loaded), err = Person(hub, tmp_path / "a").client(*actions)
    repo, files = hub.repos[REPO], hub.files(REPO)
    assert "the weights have changed" in err
    assert sum("robustness.json" in files for files in repo.commits.values()) == 1
    assert not {"robustness.json", "robustness.png"} & files.keys()
    assert b"model-index" not in files["README.md"] and b"has not been measured" in files["README.md"]
    assert loaded["report"] is None


def test_loading_says_when_the_report_is_of_other_weights(hub, base, tmp_path):
    Person(hub, tmp_path / "a").client("model", base)
    repo = hub.repos[REPO]
    blob = repo.commits[repo.branches["main"]]["model.safetensors"]
    (tmp_path / "weights").write_bytes(blob.content)
    weights = load_file(tmp_path / "weights")
    weights["qa_outputs.bias"] += 1
    save_file(weights, tmp_path / "weights", {"format": "pt"})
    blob.content = (tmp_path / "weights").read_bytes()
    (loaded,), err = Person(hub, tmp_path / "b").client("load")
    assert "was measured on other weights" in err and loaded["report"] is None


def test_an_upload_that_is_killed_leaves_the_repository_whole_and_can_be_repeated(hub, base, tmp_path):
    ann = Person(hub, tmp_path / "a")
    (first,), _ = ann.client("model", base)
    before = hub.files(REPO)
    hub.hold.set()
    hub.begun.clear()
    process = ann.start(sys.executable, "-m", "tests.hub.client", "model", base, "1.5")
    assert hub.begun.wait(200)
    process.kill()
    process.communicate()
    hub.hold.clear()
    assert hub.files(REPO) == before
    actions = ("load", "then", "model", base, "1.5", "then", "load")
    (old, second, new), _ = Person(hub, tmp_path / "b").client(*actions)
    assert second != first and old == {"digest": first, "layers": 7, "report": True}
    assert new == {"digest": second, "layers": 7, "report": True}


def test_a_commit_that_fails_is_an_error_and_can_be_repeated(hub, base, tmp_path):
    hub.fail_commits = 1
    actions = ("refused", "hf_ann", "model", base, "then", "model", base)
    (error, _), _ = Person(hub, tmp_path / "a").client(*actions)
    assert "500" in error
    first, second = hub.repos[REPO].commits.values()
    assert set(first) == {".gitattributes"} and "robustness.json" in second
    assert "robustness.json" in hub.files(REPO)


def test_what_people_write_on_the_hub_stays(hub, base, tmp_path):
    ann = Person(hub, tmp_path / "a")
    ann.client("model", base)
    repo = hub.repos[REPO]
    card = repo.commits[repo.branches["main"]]["README.md"]
    text = card.content.decode().replace(BEGIN, "Our lab's note.\n\n" + BEGIN).replace(END, END + "\n\nAsk Ann.")
    card.content = text.replace("---\n", "---\nlicense: apache-2.0\n", 1).encode()
    ann.client("model", base, "1.5", "then", "model", base)
    text = hub.files(REPO)["README.md"].decode()
    assert text.count("Our lab's note.") == text.count("Ask Ann.") == 1 and "license: apache-2.0" in text


def test_tokens_private_and_missing_repositories(hub, base, tmp_path):
    ann = Person(hub, tmp_path / "a")
    ann.client("model", base, "1", "private")
    assert hub.repos[REPO].private
    tries = [("hf_bob", "load"), ("none", "load"), ("hf_ann", "load", "ann/none"), ("hf_wrong", "load")]
    tries += [("hf_wrong", "model", base), ("hf_bob", "model", base)]
    actions = [word for one in tries for word in ("refused", *one, "then")][:-1]
    errors, _ = Person(hub, tmp_path / "b").client(*actions)
    for error in errors[:3]:
        assert "is not a local folder and is not a valid model identifier" in error
    assert "Invalid credentials" in errors[4] and "rights" in errors[5]
    assert len(errors) == 6


def test_the_command_line_pushes_and_evaluates(hub, base, tmp_path):
    ann = Person(hub, tmp_path / "a")
    ann.client("model", base)
    local = tmp_path / "local"
    local.mkdir()
    for path, content in hub.files(REPO).items():
        (local / path).write_bytes(content)
    (local / "training_args.bin").write_bytes(b"a pickle")
    done = json.loads(ann.cli("push", str(local), "ann/second", "--json"))
    assert done["oid"] in hub.repos["ann/second"].commits
    assert "training_args.bin" not in hub.files("ann/second")
    assert 'from_pretrained("ann/second")' in hub.files("ann/second")["README.md"].decode()
    squad_sample.dataset(6).to_parquet(tmp_path / "v.parquet")
    command = ["eval", "ann/second", "--dataset", str(tmp_path / "v.parquet"), "--times", "1s,10y", "--chips", "2"]
    bob = Person(hub, tmp_path / "b", "hf_bob")
    report = json.loads(bob.cli(*command, "--output", str(tmp_path / "eval"), "--json"))
    assert report["about"]["base_model"] == "ann/second" and len(report["measurements"]) == 4
    layers = json.loads(bob.cli("inspect", "ann/second", "--json"))["layers"]
    ratios = [layer["noise_to_signal"] for layer in layers]
    assert len(layers) == 7 and ratios == sorted(ratios, reverse=True)
    pushed = ann.cli("push", str(local), "ann/second", "--revision", "v2")
    assert "Pushed" in pushed and "robustness.json" in hub.files("ann/second", "v2")


def test_a_pull_request_leaves_main_alone(hub, base, tmp_path):
    ann = Person(hub, tmp_path / "a")
    ann.client("model", base)
    before = hub.files(REPO)
    for path, content in before.items():
        (tmp_path / path).write_bytes(content)
    assert "discussions" in ann.cli("push", str(tmp_path), REPO, "--create-pr")
    assert hub.files(REPO) == before and "robustness.json" in hub.files(REPO, "refs/pr/1")


def test_unknown_requests_are_told():
    """The small Hub does not answer what it does not know as if it were well."""
    import urllib.error
    import urllib.request

    with running() as hub, pytest.raises(urllib.error.HTTPError, match="501"):
        urllib.request.urlopen(f"{hub.url}/api/spaces/x/y")
