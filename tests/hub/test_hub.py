"""Push from one process, download in another with an empty cache, over HTTP with the real client."""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from hf_reram.hub.card import BEGIN, END
from hf_reram.hub.push import _stale
from tests.hub.client import REPO
from tests.hub.server import Blob, Repo, running
from tests.samples import squad as squad_sample
from tests.samples.interpreter import Interpreter, Process


@pytest.fixture(scope="module")
def server():
    with running() as found:
        yield found


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A link to the cache of the person whose process begins."""
    link = tmp_path_factory.mktemp("home") / "now"
    link.symlink_to(tmp_path_factory.mktemp("nobody"))
    return link


@pytest.fixture(scope="module")
def online(server, home) -> Iterator[Interpreter]:
    """An interpreter whose libraries know this Hub's address, and that link."""
    names = {"HF_ENDPOINT": server.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": None}
    names |= {"HF_HUB_OFFLINE": None, "TRANSFORMERS_OFFLINE": None, "HF_HUB_DISABLE_TELEMETRY": "1"}
    interpreter = Interpreter(**names)
    yield interpreter
    interpreter.close()


@pytest.fixture
def hub(server):
    server.reset({}, {})
    return server


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return squad_sample.write(tmp_path_factory.mktemp("base"))["--model_name_or_path"]


class Person:
    """Processes with a token, and a cache that is empty at first; one at a time."""

    def __init__(self, online: Interpreter, home: Path, cache: Path, token: str | None):
        self.online, self.home, self.cache = online, home, cache
        self.token = {"HF_TOKEN": token} if token else {}
        cache.mkdir()

    def start(self, *command: str) -> Process:
        self.home.unlink()
        self.home.symlink_to(self.cache)
        return self.online.start(*command, **self.token)

    def run(self, *command: str) -> tuple[str, str]:
        done = self.start(*command).wait()
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout, done.stderr

    def client(self, *actions: str):
        """What the actions print, a list, and the process's stderr."""
        out, err = self.run("-m", "tests.hub.client", *actions)
        return [json.loads(line) for line in out.splitlines() if line.startswith(('{"', '"'))], err

    def cli(self, *arguments: str) -> str:
        return self.run("-m", "hf_reram", *arguments)[0]


@pytest.fixture
def person(online, home, tmp_path) -> Callable[..., Person]:
    """Makes a person of a name and a token, by default Ann's."""
    return lambda name, token="hf_ann": Person(online, home, tmp_path / f"home of {name}", token)


@pytest.fixture(scope="module")
def first_push(server, online, home, base, tmp_path_factory):
    server.reset({}, {})
    (digest,), _ = Person(online, home, tmp_path_factory.mktemp("first") / "home", "hf_ann").client("model", base)
    return digest, copy.deepcopy(server.repos), dict(server.objects)


@pytest.fixture
def pushed(hub, first_push) -> str:
    """Ann has pushed her model; the digest of its weights."""
    digest, *stored = first_push
    hub.reset(*stored)
    return digest


def test_a_pushed_model_comes_back_bit_for_bit_with_the_same_numbers(hub, pushed, person):
    files = hub.files(REPO)
    assert {"README.md", "config.json", "model.safetensors", "robustness.json", "robustness.png"} <= files.keys()
    assert "tokenizer.json" in files and not any(path.endswith((".bin", ".pt")) for path in files)
    assert json.loads(files["config.json"])["quantization_config"]["device"]["g_max"] == 89.0
    (loaded, asked), err = person("somebody", None).client("load", "then", "ask")
    assert loaded == {"digest": pushed, "layers": 7, "report": True}
    assert asked["layers"] == 7 and asked["answer"]
    assert "other weights" not in err


def test_the_trainer_pushes_the_same(hub, base, person, tmp_path):
    actions = ("trainer", base, str(tmp_path / "out"), "then", "load")
    (pushed, loaded), _ = person("ann").client(*actions)
    files = hub.files(REPO)
    assert not any(path.endswith(".bin") or "checkpoint" in path for path in files)
    data = yaml.safe_load(files["README.md"].decode().split("---")[1])
    assert data["license"] == "mit" and data["datasets"] == ["rajpurkar/squad_v2"]
    assert "2 steps of" in files["README.md"].decode()
    assert loaded["digest"] == pushed and loaded["layers"] == 7


def test_adapters_go_up_as_adapters(hub, pushed, person, tmp_path):
    (adapter,), _ = person("ann").client("adapter", str(tmp_path / "out"))
    files = hub.files("ann/adapter")
    assert {"adapter_config.json", "adapter_model.safetensors", "robustness.json", "robustness.png"} <= files.keys()
    assert "model.safetensors" not in files and not any(path.endswith((".bin", ".pt")) for path in files)
    _, metadata, text = files["README.md"].decode().split("---\n", 2)
    data = yaml.safe_load(metadata)
    assert (data["base_model"], data["base_model_relation"]) == (REPO, "adapter")
    assert 'hf_reram.load_model("ann/adapter")' in text and "Model Card for" not in text
    bob = person("bob", "hf_bob")
    (loaded,), _ = bob.client("load_adapter")
    assert loaded == {"digest": adapter, "layers": 7, "report": True}
    assert len(json.loads(bob.cli("inspect", "ann/adapter", "--json"))["layers"]) == 7


def test_changed_weights_go_up_without_the_old_figures(hub, base, pushed, person):
    actions = ("model", base, "1", "stale", "then", "load")
    (*_, loaded), err = person("ann").client(*actions)
    repo, files = hub.repos[REPO], hub.files(REPO)
    assert "the weights have changed" in err
    assert sum("robustness.json" in files for files in repo.commits.values()) == 1
    assert not {"robustness.json", "robustness.png"} & files.keys()
    assert b"model-index" not in files["README.md"] and b"has not been measured" in files["README.md"]
    assert loaded["report"] is None


def test_loading_says_when_the_report_is_of_other_weights(hub, pushed, person, tmp_path):
    repo = hub.repos[REPO]
    blob = repo.commits[repo.branches["main"]]["model.safetensors"]
    (tmp_path / "weights").write_bytes(blob.content)
    weights = load_file(tmp_path / "weights")
    weights["qa_outputs.bias"] += 1
    save_file(weights, tmp_path / "weights", {"format": "pt"})
    blob.content = (tmp_path / "weights").read_bytes()
    (loaded,), err = person("ann elsewhere").client("load")
    assert "was measured on other weights" in err and loaded["report"] is None


def test_an_upload_that_is_killed_leaves_the_repository_whole_and_can_be_repeated(hub, base, pushed, person):
    before = hub.files(REPO)
    hub.hold.set()
    process = person("ann").start("-m", "tests.hub.client", "model", base, "1.5")
    assert hub.begun.wait(200)
    process.kill()
    assert process.wait().returncode == -9
    hub.hold.clear()
    assert hub.files(REPO) == before
    actions = ("load", "then", "model", base, "1.5", "then", "load")
    (old, second, new), _ = person("ann elsewhere").client(*actions)
    assert second != pushed and old == {"digest": pushed, "layers": 7, "report": True}
    assert new == {"digest": second, "layers": 7, "report": True}


def test_a_commit_that_fails_is_an_error_and_can_be_repeated(hub, base, person):
    hub.fail_commits = 1
    actions = ("refused", "hf_ann", "model", base, "then", "model", base)
    (error, _), _ = person("ann").client(*actions)
    assert "500" in error
    first, second = hub.repos[REPO].commits.values()
    assert set(first) == {".gitattributes"} and "robustness.json" in second
    assert "robustness.json" in hub.files(REPO)


def test_what_people_write_on_the_hub_stays(hub, base, pushed, person):
    repo = hub.repos[REPO]
    card = repo.commits[repo.branches["main"]]["README.md"]
    text = card.content.decode().replace(BEGIN, "Our lab's note.\n\n" + BEGIN).replace(END, END + "\n\nAsk Ann.")
    card.content = text.replace("---\n", "---\nlicense: apache-2.0\n", 1).encode()
    person("ann").client("model", base, "1.5", "then", "model", base)
    text = hub.files(REPO)["README.md"].decode()
    assert text.count("Our lab's note.") == text.count("Ask Ann.") == 1 and "license: apache-2.0" in text


def _edited(text: str) -> Callable[[Repo], None]:
    """Somebody puts a line above the card on the Hub, and adds a file."""

    def edit(repo: Repo) -> None:
        files = dict(repo.commits[repo.branches["main"]])
        card = files["README.md"].content.decode()
        files["README.md"] = Blob(card.replace(BEGIN, f"{text}\n\n{BEGIN}").encode(), False)
        files[f"{text}.txt"] = Blob(text.encode(), False)
        repo.commit(files, "main")

    return edit


def test_what_is_written_on_the_hub_during_a_push_stays(hub, base, pushed, person):
    hub.edits = [_edited("one"), _edited("two")]
    (second, loaded), err = person("ann").client("model", base, "1.5", "then", "load")
    files = hub.files(REPO)
    text = files["README.md"].decode()
    assert text.count("one\n") == text.count("two\n") == 1 and files["one.txt"] == b"one"
    assert err.count("what is there now is read again") == 2
    assert second != pushed and loaded == {"digest": second, "layers": 7, "report": True}


def test_a_repository_that_never_rests_is_an_error_and_stays(hub, base, pushed, person):
    hub.edits = [_edited(f"edit {i}") for i in range(5)]
    (error,), _ = person("ann").client("refused", "hf_ann", "model", base, "1.5")
    assert "412" in error and "changed in each of 5 tries" in error
    files = hub.files(REPO)
    assert all(f"edit {i}.txt" in files for i in range(5)) and "edit 4" in files["README.md"].decode()
    assert files["model.safetensors"] in hub.objects.values()


def test_adapters_leave_the_model_beside_them_alone(hub, pushed, person, tmp_path):
    before = hub.files(REPO)
    _, err = person("ann").client("adapter_to", REPO, str(tmp_path / "out"))
    files = hub.files(REPO)
    assert before.items() <= files.items()
    added = {"adapter_config.json", "adapter_model.safetensors", "crossbars.safetensors"}
    assert files.keys() - before.keys() == added
    assert "holds a whole model" in err


@pytest.mark.parametrize(
    ("files", "there", "gone"),
    [
        (["adapter_model.safetensors"], ["model.safetensors", "robustness.json", "unet.safetensors"], []),
        (["adapter_model.safetensors"], ["pytorch_model.bin", "robustness.json"], []),
        (
            ["adapter_model-00001-of-00002.safetensors"],
            ["adapter_model.safetensors", "robustness.json", "other.safetensors", "sub/adapter_model.safetensors"],
            ["adapter_model.safetensors", "robustness.json"],
        ),
        (
            ["model.safetensors"],
            ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "comparison.json", "vae.safetensors"],
            ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "comparison.json"],
        ),
        (
            ["model.safetensors"],
            ["model.safetensors", "adapter_model.safetensors", "adapter_config.json"],
            [],
        ),
        (
            ["model.safetensors"],
            ["adapter_model.safetensors", "adapter_config.json", "notes.txt"],
            ["adapter_model.safetensors", "adapter_config.json"],
        ),
    ],
)
def test_only_what_the_new_weights_replace_is_deleted(files, there, gone):
    assert _stale(files, there) == gone


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints"])
def test_no_pickle_goes_up_during_training(hub, base, person, tmp_path, strategy):
    hub.reset({}, {})
    actions = ("training", base, str(tmp_path / "out"), strategy, "then", "load")
    (digest, loaded), err = person("ann").client(*actions)
    repo = hub.repos[REPO]
    every = {path for files in repo.commits.values() for path in files}
    assert not [path for path in every if path.endswith((".bin", ".pt", ".pth", ".pkl"))]
    assert any((tmp_path / "out" / "checkpoint-2").glob("*.pt"))
    folders = {
        "every_save": set(),
        "checkpoint": {"last-checkpoint"},
        "all_checkpoints": {"checkpoint-1", "checkpoint-2"},
    }
    assert {path.split("/")[0] for path in every if "/" in path} == folders[strategy]
    for folder in folders[strategy]:
        assert {f"{folder}/model.safetensors", f"{folder}/trainer_state.json"} <= hub.files(REPO).keys()
    assert ("without optimizer" in err) == bool(folders[strategy])
    assert len(repo.commits) >= 3 and b"has not been measured" in hub.files(REPO)["README.md"]
    assert loaded == {"digest": digest, "layers": 7, "report": None}
    assert not list((tmp_path / "out").glob(".pushing-*"))


def test_tokens_private_and_missing_repositories(hub, base, person):
    person("ann").client("model", base, "1", "private")
    assert hub.repos[REPO].private
    tries = [("hf_bob", "load"), ("none", "load"), ("hf_ann", "load", "ann/none"), ("hf_wrong", "load")]
    tries += [("hf_wrong", "model", base), ("hf_bob", "model", base)]
    actions = [word for one in tries for word in ("refused", *one, "then")][:-1]
    errors, _ = person("ann elsewhere").client(*actions)
    for error in errors[:3]:
        assert "is not a local folder and is not a valid model identifier" in error
    assert "Invalid credentials" in errors[4] and "rights" in errors[5]
    assert len(errors) == 6


def test_the_command_line_pushes_and_evaluates(hub, pushed, person, tmp_path):
    ann = person("ann")
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
    bob = person("bob", "hf_bob")
    report = json.loads(bob.cli(*command, "--output", str(tmp_path / "eval"), "--json"))
    assert report["about"]["base_model"] == "ann/second" and len(report["measurements"]) == 4
    layers = json.loads(bob.cli("inspect", "ann/second", "--json"))["layers"]
    ratios = [layer["noise_to_signal"] for layer in layers]
    assert len(layers) == 7 and ratios == sorted(ratios, reverse=True)
    told = ann.cli("push", str(local), "ann/second", "--revision", "v2")
    assert "Pushed" in told and "robustness.json" in hub.files("ann/second", "v2")


def test_a_pull_request_leaves_main_alone(hub, pushed, person, tmp_path):
    before = hub.files(REPO)
    for path, content in before.items():
        (tmp_path / path).write_bytes(content)
    assert "discussions" in person("ann").cli("push", str(tmp_path), REPO, "--create-pr")
    assert hub.files(REPO) == before and "robustness.json" in hub.files(REPO, "refs/pr/1")


def test_unknown_requests_are_told():
    """The small Hub does not answer what it does not know as if it were well."""
    import urllib.error
    import urllib.request

    with running() as hub, pytest.raises(urllib.error.HTTPError, match="501"):
        urllib.request.urlopen(f"{hub.url}/api/spaces/x/y")
