"""The examples of docs/ run as they stand there."""

import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import Seq2SeqTrainingArguments

from hf_reram import RobustnessReport, crossbar_layers
from tests.integrations import test_sentence_transformers as embeddings
from tests.integrations import test_trainer as seq2seq
from tests.integrations.test_sentence_transformers import folder  # noqa: F401
from tests.integrations.test_trl import COMMON, PAIRS
from tests.samples.models import bert_batch, tiny_bert
from tests.samples.texts import TEXTS, llama, tokenizer

DOCS = Path(__file__).parents[1] / "docs"
EXAMPLES = re.findall(r"^## (.+?)$.*?^```python\n(.*?)^```$", (DOCS / "trainers.md").read_text(), re.M | re.S)
PLAIN = {name: value for name, value in COMMON.items() if name not in ("bf16", "max_length")}


def given(heading, folder) -> dict:  # noqa: F811
    if heading == "Seq2SeqTrainer":
        args = Seq2SeqTrainingArguments("out", **PLAIN, predict_with_generate=True, generation_max_length=5)
        return {"model": seq2seq.tiny_t5(), "args": args, "train": seq2seq.examples(), "test": seq2seq.examples()}
    if heading.startswith("trl's"):
        trl = pytest.importorskip("trl")
        config, rows = (trl.SFTConfig, {"text": TEXTS}) if "SFT" in heading else (trl.DPOConfig, PAIRS)
        data = Dataset.from_dict(rows)
        args = config("out", **COMMON)
        return {"model": llama(), "tokenizer": tokenizer(), "args": args, "train": data, "test": data}
    if heading == "SentenceTransformerTrainer":
        found = {"model": embeddings.fresh(folder), "args": embeddings.Arguments("out", **PLAIN)}
        scored = {**embeddings.PAIRS, "score": [0.1, 0.9, 0.5, 0.3] * 3}  # for the default loss
        return {**found, "train": Dataset.from_dict(scored), "test": embeddings.similarity()}
    model = tiny_bert()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return {"model": model, "batches": [bert_batch(seed=i) for i in range(3)], "optimizer": optimizer}


@pytest.mark.parametrize(("heading", "code"), EXAMPLES, ids=[heading for heading, _ in EXAMPLES])
def test_trainers(heading, code, tmp_path, monkeypatch, folder):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    names = given(heading, folder)
    before = {name: p.detach().clone() for name, p in names["model"].named_parameters()}
    exec(compile(code, f"{heading}.py", "exec"), names)
    model = names["trainer"].model if "trainer" in names else names["model"]
    layers = crossbar_layers(model).values()
    assert layers and all(layer.calibrated for layer in layers)
    parameters = dict(model.named_parameters())
    moved = [p.any() for n, p in parameters.items() if "lora_B" in n]  # which begin at 0
    assert any(moved or [not torch.equal(p, before[n]) for n, p in parameters.items()])
    if "report" in names:
        assert isinstance(names["report"], RobustnessReport) and len(names["report"].measurements) == 4
    if "again" in names:
        assert crossbar_layers(names["again"]).keys() == crossbar_layers(model).keys()


def test_each_trainer_has_an_example():
    assert [heading for heading, _ in EXAMPLES] == [
        "Seq2SeqTrainer",
        "trl's SFTTrainer",
        "trl's DPOTrainer",
        "SentenceTransformerTrainer",
        "A loop of your own",
    ]
