import json
import logging

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from transformers import BertConfig, BertForSequenceClassification
from typer.testing import CliRunner

from hf_reram.cli import app
from hf_reram.tasks import TextClassification
from tests.samples.texts import TEXTS, WORDS, tokenizer


def words():
    found = tokenizer()
    found.pad_token = "<end>"
    return found


def bert(labels: int = 3) -> BertForSequenceClassification:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForSequenceClassification(BertConfig(vocab_size=len(WORDS), num_labels=labels, **shape)).eval()


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_accuracy_is_that_of_each_text_alone(pair, batch_size):
    model = bert()
    columns = {"sentence1": TEXTS, "sentence2": TEXTS[::-1]} if pair else {"sentence": TEXTS}
    with torch.no_grad():
        guesses = [
            int(model(**words()(*texts, return_tensors="pt")).logits.argmax()) for texts in zip(*columns.values())
        ]
    labels = [guess if i % 4 else (guess + 1) % 3 for i, guess in enumerate(guesses)]
    evaluate = TextClassification(Dataset.from_dict({**columns, "label": labels}), words(), 3, batch_size=batch_size)
    assert evaluate(model.train()) == {"accuracy": 75.0}
    assert model.training


def test_texts_that_are_cut_are_counted(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hf_reram.tasks.text_classification"), "propagate", True)
    lengths = [len(ids) for ids in words()(TEXTS)["input_ids"]]
    most = sorted(set(lengths))[-2]
    data = Dataset.from_dict({"text": TEXTS, "label": [0] * len(TEXTS)})
    TextClassification(data, words(), 3, max_length=max(lengths))
    assert not caplog.records
    TextClassification(data, words(), 3, max_length=most)
    (record,) = caplog.records
    cut = sum(length > most for length in lengths)
    assert record.getMessage() == f"{cut} of {len(TEXTS)} texts are longer than {most} tokens, and cut there"


def test_numbers_are_correlated():
    model = bert(1)
    with torch.no_grad():
        values = [float(model(**words()(text, return_tensors="pt")).logits) for text in TEXTS]
    labels = list(np.linspace(0, 5, len(TEXTS)))
    found = TextClassification(Dataset.from_dict({"text": TEXTS, "label": labels}), words(), 1)(model)
    assert found["pearson"] == pytest.approx(100 * np.corrcoef(values, labels)[0, 1], abs=0.01)
    assert found["mse"] == pytest.approx(np.mean((np.array(values) - labels) ** 2), rel=1e-4)


def test_what_does_not_fit_is_an_error():
    for columns, message in (
        ({"text": ["a"]}, "missing are labels"),
        ({"label": [1]}, "missing are texts"),
        ({"text": [], "label": []}, "is empty"),
        ({"text": ["a"], "label": [-1]}, r"labels \[-1\]: allowed are 0 to 2"),
    ):
        with pytest.raises(ValueError, match=message):
            TextClassification(Dataset.from_dict(columns), words(), 3)
    data = Dataset.from_dict({"text": TEXTS, "label": [0] * len(TEXTS)})
    with pytest.raises(ValueError, match="no logits of 2 classes"):
        TextClassification(data, words(), 2)(bert(3))


@pytest.mark.parametrize(
    "order", [["negative", "neutral", "so_so Positive"], ["so-so positive", "Negative", "NEUTRAL"]]
)
@pytest.mark.parametrize("as_texts", [False, True])
def test_labels_with_names_are_the_models_by_name(order, as_texts):
    model = bert()
    model.config.id2label = {0: "NEGATIVE", 1: "NEUTRAL", 2: "so so positive"}
    plain = [name.casefold().replace("_", " ").replace("-", " ") for name in order]
    theirs = [plain.index(model.config.id2label[i].casefold()) for i in range(3)]  # of the model's classes
    numbers = [0, 1, 1, 2] * 3
    found = TextClassification(Dataset.from_dict({"text": TEXTS, "label": numbers}), words(), 3)(model)
    assert found["accuracy"] < 100
    if as_texts:
        data = Dataset.from_dict({"text": TEXTS, "label": [order[theirs[i]] for i in numbers]})
    else:
        features = Features({"text": Value("string"), "label": ClassLabel(names=order)})
        data = Dataset.from_dict({"text": TEXTS, "label": [theirs[i] for i in numbers]}, features=features)
    evaluate = TextClassification(data, words(), 3, id2label=model.config.id2label)
    assert evaluate.labels.tolist() == numbers and evaluate(model) == found


def test_eval_of_text_classification(tmp_path):
    bert().save_pretrained(tmp_path / "base")
    words().save_pretrained(tmp_path / "base")
    Dataset.from_dict({"sentence": TEXTS, "label": [0, 1, 2] * 4}).to_parquet(tmp_path / "texts.parquet")
    command = ["eval", str(tmp_path / "base"), "--dataset", str(tmp_path / "texts.parquet"), "--chips", "2", "--json"]
    done = CliRunner().invoke(
        app, [*command, "--device", "cmo-hfox-ibm", "--times", "10y", "--output", str(tmp_path / "out")]
    )
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out" / "robustness.json").read_text())
    assert report["about"]["task"] == "text-classification" and report["about"]["metric"] == "accuracy"
    assert 0 <= report["digital"]["accuracy"] <= 100 and len(report["measurements"]) == 2


def test_eval_of_a_data_set_with_names_of_its_own(tmp_path):
    model = bert()
    model.config.id2label = {0: "NEGATIVE", 1: "NEUTRAL", 2: "POSITIVE"}
    model.save_pretrained(tmp_path / "base")
    words().save_pretrained(tmp_path / "base")
    names = ["good", "bad", "so so"]
    told = ["--label-names", "bad=NEGATIVE,so so=NEUTRAL", "--label-names", "good=POSITIVE"]
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    data = Dataset.from_dict({"text": TEXTS, "label": [0, 1, 2, 2] * 3}, features=features)
    data.to_parquet(tmp_path / "texts.parquet")
    command = ["--dataset", str(tmp_path / "texts.parquet"), "--device", "cmo-hfox-ibm"]
    evaluated = ["eval", str(tmp_path / "base"), *command, "--chips", "1", "--times", "1d", "--json"]
    evaluated += ["--output", str(tmp_path / "out")]
    refused = CliRunner().invoke(app, evaluated)
    assert refused.exit_code == 1 and "label-names" in refused.output
    assert "['bad', 'good', 'so so']" in refused.output and "['NEGATIVE', 'NEUTRAL', 'POSITIVE']" in refused.output
    done = CliRunner().invoke(app, [*evaluated, *told])
    assert done.exit_code == 0, done.output
    numbers = Dataset.from_dict({"text": TEXTS, "label": [2, 0, 1, 1] * 3})
    wanted = TextClassification(numbers, words(), 3)(model)["accuracy"]
    report = json.loads((tmp_path / "out" / "robustness.json").read_text())
    assert report["digital"]["accuracy"] == wanted != TextClassification(data, words(), 3)(model)["accuracy"]
    looked = CliRunner().invoke(app, ["inspect", str(tmp_path / "base"), *command, "--json", *told])
    assert looked.exit_code == 0 and json.loads(looked.stdout)["layers"], looked.output
    for kind in ("text-generation", "question-answering"):
        wrong = CliRunner().invoke(app, [*evaluated, *told, "--task", kind])
        assert wrong.exit_code == 1 and f"with task='{kind}'" in wrong.output


def test_a_regression_has_no_names_of_labels():
    data = Dataset.from_dict({"text": TEXTS, "label": [0.5] * len(TEXTS)})
    with pytest.raises(ValueError, match="for a model with one output: allowed is None"):
        TextClassification(data, words(), 1, label_names={"a": "b"})
