"""lm-evaluation-harness' own entry points, given robust checkpoints."""

import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from hf_reram import ReRAMConfig, calibrate, crossbar_layers, deploy, digital, load_model, patch_model
from hf_reram.cli import app
from hf_reram.tasks import Perplexity, packed
from tests.samples.devices import device
from tests.samples.harness import write_rolling
from tests.samples.texts import TEXTS, save_model, tokenizer

pytest.importorskip("lm_eval")

FORMAT = {"format": "pt"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A plain and a robust checkpoint, and a task."""
    folder = tmp_path_factory.mktemp("harness")
    torch.manual_seed(0)
    model = save_model(folder / "plain")
    patch_model(model, ReRAMConfig(device=device(read_noise=0.0), input_range="per_token"))
    calibrate(model, Perplexity(packed(TEXTS, tokenizer(), 16)).batches).save_pretrained(folder / "robust")
    tokenizer().save_pretrained(folder / "robust")
    write_rolling(folder / "tasks", TEXTS[:3])
    return folder


@pytest.fixture
def evaluated(folder, tmp_path, monkeypatch):
    import lm_eval
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # asks pip
    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)

    def run(kind: str, name: str = "robust", **arguments):
        arguments = {"pretrained": str(folder / name), **arguments}
        found = lm_eval.simple_evaluate(
            kind, arguments, ["tiny_text"], task_manager=manager, bootstrap_iters=0, device="cpu"
        )
        return found["config"].get("crossbars"), found["results"]["tiny_text"]["word_perplexity,none"]

    return run


def perplexity(model) -> float:
    """Of the task's words, each text after the token that ends one."""
    loss, words = 0.0, 0
    for text in TEXTS[:3]:
        ids = torch.tensor([[0, *tokenizer()(text)["input_ids"]]])
        with torch.no_grad():
            scores = model(ids).logits[0, :-1].double().log_softmax(-1)
        loss -= float(scores.gather(1, ids[0, 1:, None]).sum())
        words += len(text.split())
    return float(torch.tensor(loss / words).exp())


def test_results_say_what_they_are_of(folder, evaluated, caplog):
    model = load_model(folder / "robust")
    layers = f"{len(crossbar_layers(model))} layers on {device().name}"
    ideal = perplexity(model)
    with digital(model):
        plain = perplexity(model)
    with deploy(model, "2d", temperature=330, seed=3):
        chip = perplexity(model)
    assert len({round(figure, 5) for figure in (ideal, plain, chip)}) == 3
    with caplog.at_level("WARNING", "hf_reram"):
        said, found = evaluated("reram", time="2d", temperature=330, seed=3)
    assert said == f"on: {layers} as chip 3, 2d after programming at 330 K" and f"crossbars {said}" in caplog.text
    assert found == pytest.approx(chip, rel=1e-5)
    for kind, said, figure in (
        (("reram", {"crossbars": False}), "off: the digital model", plain),
        (("reram", {}), f"on: {layers} as ideal crossbars, with I-V curve and converters alone: no chip", ideal),
        (("hf", {}), f"on: {layers} as ideal crossbars, with I-V curve and converters alone: no chip", ideal),
        (("hf", {"name": "plain"}), "off: the digital model", plain),
    ):
        told, found = evaluated(kind[0], **kind[1])
        assert told == said and found == pytest.approx(figure, rel=1e-5)


def test_a_model_that_is_there_says_so_too(folder, evaluated):
    model = load_model(folder / "robust")
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=model, tokenizer=tokenizer())
    with deploy(model, "1d"):
        assert lm.get_model_info()["crossbars"].endswith("as a chip")
        with digital(model):
            assert lm.get_model_info()["crossbars"] == "off: the digital model"


def test_adapters_come_with_their_crossbars(folder, evaluated, tmp_path):
    """Also those that stand beside the adapters of a plain checkpoint, which PEFT alone opens as a digital model."""
    model = get_peft_model(load_model(folder / "plain"), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    patch_model(model, ReRAMConfig(device=device(read_noise=0.0), input_range="per_token"))
    calibrate(model, Perplexity(packed(TEXTS, tokenizer(), 16)).batches).save_pretrained(tmp_path / "adapters")
    tokenizer().save_pretrained(tmp_path / "adapters")
    with deploy(model.eval(), "2d", seed=3):
        chip = perplexity(model)
    said, found = evaluated("reram", name=tmp_path / "adapters", time="2d", seed=3)
    assert said.endswith("as chip 3, 2d after programming") and found == pytest.approx(chip, rel=1e-5)
    told, plain = evaluated("hf", name="plain", peft=str(tmp_path / "adapters"))
    assert told == "off: the digital model" and plain != pytest.approx(chip, rel=1e-5)


def test_what_is_no_chip_is_refused(evaluated):
    with pytest.raises(ValueError, match="plain is a plain checkpoint: allowed is a robust one"):
        evaluated("reram", name="plain", time="1d")
    for arguments in ({"seed": 3}, {"temperature": 330}, {"crossbars": False, "time": "1d"}):
        with pytest.raises(ValueError, match="a chip needs a time, and neither"):
            evaluated("reram", **arguments)
    with pytest.raises(ValueError, match="crossbars='no': allowed are True and False"):
        evaluated("reram", crossbars="no")


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("model.layers.0.mlp.up_proj.weight", None, "lacks weights of LlamaForCausalLM, which would be random: "),
        ("model.layers.0.mlp.up_proj.gain", None, "lacks numbers of calibration, which other layers of it have: "),
        ("model.norm.weight", torch.full((16,), torch.nan), "NaN or infinite values are in "),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused(folder, evaluated, tmp_path, key, value, told):
    shutil.copytree(folder / "robust", tmp_path / "robust")
    tensors = load_file(tmp_path / "robust" / "model.safetensors")
    del tensors[key]
    save_file({**tensors, **({} if value is None else {key: value})}, tmp_path / "robust" / "model.safetensors", FORMAT)
    with pytest.raises(ValueError, match=f"{told}{key}"):
        evaluated("reram", name=tmp_path / "robust", time="1d")


def test_layers_that_did_not_run_are_named(folder, evaluated, monkeypatch):
    from hf_reram.integrations import harness

    monkeypatch.setattr(harness, "uncalled", lambda model: ["model.layers.0.mlp.up_proj"])
    said, _ = evaluated("reram", time="1d")
    assert said.endswith("; 1 of them did not run in all requests: model.layers.0.mlp.up_proj")


def test_lm_eval_alone_does_not_load_a_robust_checkpoint(folder, python):
    """So that no digital figure is taken for a chip's."""
    code = "import sys; from lm_eval.models.huggingface import HFLM; HFLM(pretrained=sys.argv[1], device='cpu')"
    done = python.run("-c", code, str(folder / "robust"))
    assert done.returncode and "Unknown quantization type, got reram" in done.stderr


def test_the_command_line_knows_the_model_type(python, folder):
    """Whichever of both is imported first."""
    code = "; ".join(
        [
            "from lm_eval.api.registry import get_model",
            "print(get_model('reram').__module__, get_model('hf').__module__)",
        ]
    )
    for before in ("import hf_reram; ", "import lm_eval.models, hf_reram; "):
        done = python.run("-c", before + code)
        assert done.stdout.split() == ["hf_reram.integrations.harness", "lm_eval.models.huggingface"], done.stderr
    shown = CliRunner().invoke(app, ["lm-eval", "run", "--help"])
    assert "--model_args" in shown.output
