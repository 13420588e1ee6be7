import json
import math

import pytest
import torch
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers.modeling_outputs import CausalLMOutput
from typer.testing import CliRunner

from hf_reram import ReRAMConfig, calibrate, deploy, evaluate_robustness, patch_model
from hf_reram.cli import app
from hf_reram.tasks import Perplexity, load_rows, load_task, packed, texts_of, window_length
from tests.samples.texts import TEXTS, WORDS, llama, save_model, tokenizer


class Uniform(nn.Module):
    """All words are alike to it."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, input_ids, use_cache=None):
        return CausalLMOutput(logits=self.scale * torch.zeros(*input_ids.shape, 50))


def test_perplexity_of_a_model_that_knows_nothing_is_its_vocabulary():
    windows = [torch.arange(10), torch.arange(10) + 3, torch.arange(4)]
    found = Perplexity(windows, batch_size=2)(Uniform())
    assert found["perplexity"] == pytest.approx(50, rel=1e-6)
    assert found["loss"] == pytest.approx(math.log(50), rel=1e-6)


def test_perplexity_is_that_of_each_token_after_those_before():
    torch.manual_seed(0)
    model = llama().train()
    windows = packed(TEXTS, tokenizer(), 16)
    total, count = 0.0, 0
    with torch.no_grad():
        for window in windows:
            for t in range(1, len(window)):
                chances = model.eval()(window[None, :t]).logits[0, -1].double().softmax(-1)
                total -= float(chances[window[t]].log())
                count += 1
    model.train()
    for batch_size in (1, 3):
        assert Perplexity(windows, batch_size)(model)["loss"] == pytest.approx(total / count, rel=1e-5)
        assert model.training


def test_windows_hold_all_texts_one_after_the_other(caplog):
    with caplog.at_level("WARNING", "hf_reram"):
        windows = packed(["the cell drifts", "", "  \n", "a weight"], tokenizer(), 4, "my texts")
    assert [window.tolist() for window in windows] == [[2, 3, 4, 0], [7, 8, 0]]
    assert "my texts: 2 of 4 texts are empty and left out" in caplog.text
    assert [len(w) for w in packed(["the cell drifts and holds"], tokenizer(), 5)] == [
        5
    ]  # one token more predicts none
    with pytest.raises(ValueError, match="no text is left of 2"):
        packed(["", " "], tokenizer(), 4)


def test_a_text_ends_once():
    ending = tokenizer()
    ending._tokenizer.post_processor = TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 0)])
    assert [w.tolist() for w in packed(["the cell", "a weight"], ending, 16)] == [[2, 3, 0, 7, 8, 0]]


def test_texts_of_a_data_set():
    assert texts_of(Dataset.from_dict({"id": [1, 2, 3], "context": ["a", "b", "a"]})) == ["a", "b"]
    with pytest.raises(ValueError, match=r"columns \['id'\]: missing is a text column"):
        texts_of(Dataset.from_dict({"id": [1]}))
    empty = Dataset.from_dict({"text": ["a", "", None, " ", "a"]})
    assert texts_of(empty) == ["a", "", "", " "]  # which packed counts
    with pytest.raises(ValueError, match="has int where texts should be"):
        texts_of(Dataset.from_dict({"text": [1]}))


def test_conversations_are_written_out_by_the_chat_template(caplog):
    chats = [[{"role": "the", "content": "cell drifts"}], [{"role": "a", "content": "weight"}]]
    assert texts_of(Dataset.from_dict({"messages": [*chats, []], "text": ["x"] * 3})) == [*chats, []]
    chat = tokenizer()
    with pytest.raises(ValueError, match="my chats holds conversations, and the tokenizer has no chat template"):
        packed(chats, chat, 4, "my chats")
    chat.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }} . {% endfor %}"
    with caplog.at_level("WARNING", "hf_reram"):
        assert [w.tolist() for w in packed([[], *chats], chat, 4)] == [[2, 3, 4, 11], [7, 8, 11]]
    assert "1 of 3 texts are empty and left out" in caplog.text
    with pytest.raises(ValueError, match="allowed are messages with 'role' and 'content'"):
        packed([[{"from": "human", "value": "hello"}]], chat, 4)


def test_windows_are_no_longer_than_the_models():
    assert window_length(llama()) == 32 and window_length(llama(), 8) == 8
    for length in (33, 1, 2.0, True):
        with pytest.raises(ValueError, match="allowed is an integer from 2 to 32"):
            window_length(llama(), length)


def test_plain_text_is_read_by_paragraphs(tmp_path):
    (tmp_path / "a.txt").write_text("the cell\ndrifts\n\n\na weight\n", encoding="utf-8")
    assert load_rows("", "train", file=str(tmp_path / "a.txt"))["text"][:] == ["the cell\ndrifts", "a weight"]
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"b\.txt is no text in UTF-8"):
        load_rows("", "train", file=str(tmp_path / "b.txt"))
    (tmp_path / "c.txt").write_text("the cell", encoding="utf-8-sig")  # as some editors begin a file
    assert load_rows("", "train", file=str(tmp_path / "c.txt"))["text"][:] == ["the cell"]


def test_files_that_cannot_be_read_are_named(tmp_path):
    for rows in (b'{"text": "caf\xe9"}\n', b'{"text": "the cell"}\n' * 5000 + b'{"text": "caf\xe9"}\n'):
        (tmp_path / "a.jsonl").write_bytes(rows)
        with pytest.raises(ValueError, match=r"a\.jsonl is no text in UTF-8"):
            load_rows("", "train", file=str(tmp_path / "a.jsonl"))
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match=r"empty\.jsonl is empty: allowed is at least one row"):
        load_rows("", "train", file=str(tmp_path / "empty.jsonl"))


def test_windows_that_do_not_fit_the_model():
    with pytest.raises(ValueError, match="length=40: allowed is an integer from 2 to 32"):
        Perplexity([torch.ones(40, dtype=torch.long)])(llama())
    with pytest.raises(ValueError, match=f"have token 50: allowed are the model's, 0 to {len(WORDS) - 1}"):
        Perplexity([torch.tensor([1, 50])])(llama())


def test_empty_documents_are_counted_by_row(tmp_path, caplog):
    save_model(tmp_path / "base")
    rows = [*TEXTS[:3], "", None]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    with caplog.at_level("WARNING", "hf_reram"):
        task = load_task("text-generation", llama(), str(tmp_path / "base"), str(tmp_path / "texts.jsonl"))
    assert "2 of 5 texts are empty and left out" in caplog.text
    ends = int(sum((batch["input_ids"] == 0).sum() for batch in task.evaluate.batches))
    assert ends == 3  # one behind each text
    (tmp_path / "none.txt").write_text(" \n\n \n")
    with pytest.raises(ValueError, match="no text is left"):
        load_task("text-generation", llama(), str(tmp_path / "base"), str(tmp_path / "none.txt"))


@pytest.mark.parametrize("content", ["[]", '{"text": "a"}\n{"text": ', "{'text': 1}"])
def test_a_file_without_rows_is_named(tmp_path, content):
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(ValueError, match=r"rows\.json holds no rows that can be read as json"):
        load_rows("", "train", file=str(tmp_path / "rows.json"))


def test_chips_of_a_language_model():
    torch.manual_seed(0)
    model = llama()
    evaluate = Perplexity(packed(TEXTS, tokenizer(), 16))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)  # so that it is sure of what it says
    patch_model(model, ReRAMConfig(device="hfox-neurram", input_range="per_token"))
    calibrate(model, evaluate.batches)
    report = evaluate_robustness(model, evaluate, ["1s", "1d"], seeds=2, progress=False)
    with deploy(model, "1d", seed=1):
        torch.manual_seed(0)
        again = evaluate(model)["loss"]
    chip = next(m for m in report.measurements if m.time == 86400 and m.seed == 1)
    assert chip.metrics["loss"] == pytest.approx(again, rel=0.05)
    assert chip.metrics["perplexity"] == pytest.approx(math.exp(chip.metrics["loss"]))
    assert chip.metrics["loss"] != report.digital["loss"]


def test_eval_of_text_generation(tmp_path):
    save_model(tmp_path / "base")
    (tmp_path / "texts.txt").write_text("\n\n".join(dict.fromkeys(TEXTS)), encoding="utf-8")
    command = ["eval", str(tmp_path / "base"), "--dataset", str(tmp_path / "texts.txt"), "--device", "cmo-hfox-ibm"]
    command += ["--input-range", "per_token", "--chips", "2", "--times", "10y", "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out" / "robustness.json").read_text())
    assert report["config"]["input_range"] == "per_token"
    assert report["about"]["task"] == "text-generation" and report["about"]["metric"] == "perplexity"
    assert 1 < report["digital"]["perplexity"] < 2 * len(WORDS)
    assert len(report["measurements"]) == 2


def test_a_model_without_a_tokenizer_and_one_that_is_no_causal_model(tmp_path, tiny_bert):
    model = llama()
    model.save_pretrained(tmp_path / "bare")
    Dataset.from_dict({"text": TEXTS}).to_parquet(tmp_path / "texts.parquet")
    with pytest.raises(ValueError, match="bare has no tokenizer"):
        load_task("text-generation", model, str(tmp_path / "bare"), str(tmp_path / "texts.parquet"))
    with pytest.raises(ValueError, match="no logits of each token"):
        Perplexity([torch.arange(5)])(tiny_bert_without_cache(tiny_bert))


def tiny_bert_without_cache(model):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, use_cache):
            return self.model(input_ids)

    return Wrapped()
