import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, BertModel

import hf_reram
from hf_reram.tasks import Perplexity, packed
from tests.samples.experts import mixtral
from tests.samples.texts import TEXTS, WORDS, save_model, tokenizer

RECIPE = Path(__file__).parents[2] / "recipes" / "language_modeling.py"
SMALL = ["--max_steps", "3", "--chips", "2", "--times", "1s", "1d", "--save_steps", "2", "--use_cpu", "True"]
SMALL += ["--max_length", "16", "--train_max_length", "8", "--per_device_train_batch_size", "2"]


def write(folder: Path) -> list[str]:
    """A small model and texts; the flags that name them."""
    torch.manual_seed(0)
    save_model(folder / "base")
    (folder / "train.txt").write_text("\n\n".join(f"{text} {text}" for text in dict.fromkeys(TEXTS)), encoding="utf-8")
    (folder / "held.txt").write_text("\n\n".join(dict.fromkeys(TEXTS)), encoding="utf-8")
    files = ["--train_file", str(folder / "train.txt"), "--validation_file", str(folder / "held.txt")]
    return ["--model_name_or_path", str(folder / "base"), *files]


@pytest.fixture
def run(python, tmp_path) -> Callable[..., str]:
    """Runs the recipe on small files, and gives what it prints, or its errors where it ``fails``."""

    def run(*flags: str, files: list[str] | None = None, processes: int = 1, fails: bool = False) -> str:
        files = write(tmp_path) if files is None else files
        command = [str(RECIPE), *files, "--output_dir", str(tmp_path / "out"), *SMALL, *flags]
        ranks = [python.run(*command)] if processes == 1 else python.run_two(*command)
        assert all((rank.returncode != 0) == fails for rank in ranks), ranks[0].stderr[-3000:]
        return "".join(rank.stderr if fails else rank.stdout for rank in ranks)

    return run


def test_the_whole_comparison_and_its_resumption(run, tmp_path):
    assert "| hf_reram |" in run()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(report) == 5 and (tmp_path / "out" / "robustness.png").exists()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    expected = Perplexity(packed(list(dict.fromkeys(TEXTS)), tokenizer(), 16))(base)
    assert report["hf_reram"]["about"]["base_metrics"]["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-4)
    assert report["hf_reram"]["config"]["input_range"] == "per_token"
    home = tmp_path / "out" / "hf-reram"
    model = AutoModelForCausalLM.from_pretrained(home / "model")
    assert hf_reram.crossbar_layers(model) and hf_reram.report_of(model).about["task"] == "text-generation"
    card = (home / "model" / "README.md").read_text()
    count = sum(len(w) == 8 for w in packed([f"{text} {text}" for text in dict.fromkeys(TEXTS)], tokenizer(), 8))
    assert f"trained on {count} windows of 8 tokens, of train.txt" in card
    assert "pipeline_tag: text-generation" in card and "on the digital base's predictions" in card
    before = (home / "chips.jsonl").read_text(), (home / "model" / "model.safetensors").read_bytes()
    (home / "chips.jsonl").write_text("".join(before[0].splitlines(keepends=True)[:-1]))
    run(files=["--model_name_or_path", str(tmp_path / "base"), *write(tmp_path)[2:]])
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    assert (home / "chips.jsonl").read_text().split() == before[0].split()
    assert (home / "model" / "model.safetensors").read_bytes() == before[1]
    assert "allowed are the same ones" in run("--learning_rate", "1e-5", fails=True)
    files = write(tmp_path)
    (tmp_path / "held.txt").write_text("the cell holds .\n\na weight drifts for years .", encoding="utf-8")
    assert "other values of ['content.evaluation'" in run(files=files, fails=True)
    files = write(tmp_path)
    torch.manual_seed(1)
    save_model(tmp_path / "base")
    assert "other values of ['content.base']" in run(files=files, fails=True)


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(["--teacher", "False"], id="labels", marks=pytest.mark.slow),
        pytest.param(
            ["--teacher_weight", "0.5", "--retention_loss", "output+drift"], id="both", marks=pytest.mark.slow
        ),
        pytest.param(["--lora", "True", "--lora_rank", "2"], id="lora", marks=pytest.mark.slow),
        pytest.param(["--lora", "True", "--lora_rank", "2", "--teacher_weight", "0.5"], id="lora and both"),
        pytest.param(["--bf16", "True", "--dtype", "bfloat16"], id="bfloat16"),
    ],
)
def test_with_labels_with_lora_and_in_bfloat16(run, tmp_path, flags):
    printed = run("--methods", "digital", "hf_reram", *flags)
    label_free = not any(flag.startswith("--teacher") for flag in flags)
    assert "| hf_reram |" in printed and ("| digital, finetuned |" in printed) != label_free
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "hf-reram" / "model")
    assert hf_reram.crossbar_layers(model) and not hasattr(model, "peft_config")


def test_lora_of_a_mixture_stands_beside_its_experts(run, tmp_path):
    files = write(tmp_path)
    base = mixtral(vocab_size=len(WORDS), max_position_embeddings=32, bos_token_id=None, eos_token_id=0)
    base.save_pretrained(tmp_path / "base")
    run("--methods", "hf_reram", "--lora", "True", "--lora_rank", "2", files=files)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "hf-reram" / "model")
    assert "model.layers.0.mlp.experts.3.down" in hf_reram.crossbar_layers(model) and not hasattr(model, "peft_config")
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, base.get_parameter(name))}
    assert moved == {f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkvo"}


def test_on_texts_that_the_model_samples(run, tmp_path):
    """By two processes, each of which samples its share."""
    files = write(tmp_path)
    files = [*files[:2], *files[4:], "--generate_data", "12", "--per_device_eval_batch_size", "4"]
    assert run("--methods", "hf_reram", files=files, processes=2).count("\n| hf_reram |") == 1
    parts = sorted((tmp_path / "out" / "generated").glob("0*.json"))
    texts = [text for part in parts for text in json.loads(part.read_text())]
    assert [len(json.loads(part.read_text())) for part in parts] == [4, 4, 4]
    count = sum(len(window) == 8 for window in packed(texts, tokenizer(), 8))
    card = (tmp_path / "out" / "hf-reram" / "model" / "README.md").read_text()
    said = f"trained on {count} windows of 8 tokens, of 12 texts of at most 8 tokens that the base model sampled at "
    assert said + "temperature 1" in card


def test_a_mixture_with_experts_that_no_token_reaches(run, tmp_path):
    """Told so after the training, one goes on with the flag, and report and card name them."""
    files = write(tmp_path)
    mixtral(experts=8, chosen=1, vocab_size=len(WORDS), max_position_embeddings=32).save_pretrained(tmp_path / "base")
    flags = ["--methods", "hf_reram"]
    assert "or have them named in the report (allow_uncalled=True" in run(*flags, files=files, fails=True)
    trained = (tmp_path / "out" / "hf-reram" / "trained.txt").read_text()
    assert "| hf_reram |" in run(*flags, "--allow_uncalled", "True", files=files)
    home = tmp_path / "out" / "hf-reram"
    assert (home / "trained.txt").read_text() == trained
    silent = ", ".join(json.loads((home / "robustness.json").read_text())["uncalled"])
    assert ".mlp.experts." in silent
    assert silent in (tmp_path / "out" / "report.md").read_text()
    assert silent in (home / "model" / "README.md").read_text()


def test_on_conversations(run, tmp_path):
    files = write(tmp_path)
    chat = tokenizer()
    chat.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    chat.save_pretrained(tmp_path / "base")
    rows = [{"messages": [{"role": "the", "content": text}, {"role": "a", "content": "cell ."}]} for text in TEXTS]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files[3] = str(tmp_path / "chats.jsonl")
    assert "| hf_reram |" in run("--methods", "hf_reram", files=files)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train_file", "nowhere.parquet"], "no such path nowhere.parquet"),
        (["--dtype", "float16"], "dtype='float16': allowed are"),
        (["--max_length", "64"], "length=64: allowed is an integer from 2 to 32"),
        (["--max_train_samples", "1", "--train_max_length", "31"], "hold no window of 31 tokens"),
        (["--generate_data", "16"], "train.txt' beside generate_data=16: allowed is one of them"),
    ],
)
def test_bad_input_is_a_clear_error(run, flags, message):
    assert message in run(*flags, fails=True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--generate_data", "0"], "count=0: allowed is an integer from 1"),
        (["--generate_data", "4", "--max_train_samples", "2"], "max_train_samples=2 beside generate_data=4: allowed"),
    ],
)
def test_bad_sampling_is_a_clear_error(run, tmp_path, flags, message):
    files = write(tmp_path)
    assert message in run(*flags, files=[*files[:2], *files[4:]], fails=True)


def test_a_model_for_something_else_and_one_without_a_tokenizer_are_refused(run, tmp_path):
    files = write(tmp_path)
    (tmp_path / "base" / "tokenizer.json").unlink()
    (tmp_path / "base" / "tokenizer_config.json").unlink()
    assert "has no tokenizer, which texts need" in run(files=files, fails=True)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=20, is_decoder=True, **small)).save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    assert "is no causal model" in run(files=files, fails=True)
