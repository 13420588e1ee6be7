import json

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import BertConfig, BertForTokenClassification, PreTrainedTokenizerFast
from typer.testing import CliRunner

from hf_reram.cli import app
from hf_reram.tasks import TokenClassification, entity_metrics
from hf_reram.tasks.metrics import EntityF1
from hf_reram.tasks.metrics.entities import are_entity_tags, entities
from hf_reram.tasks.registry import token_classification
from tests.samples.texts import TEXTS

NAMES = ["O", "B-PART", "I-PART", "B-TIME"]
PIECES = ["[PAD]", "[UNK]", "the", "cell", "drift", "##s", "and", "hold", "a", "weight", "for", "year", "."]
SENTENCES = [text.split() for text in TEXTS[:3]]


def pieces() -> PreTrainedTokenizerFast:
    """Words become several tokens."""
    found = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(PIECES)}, unk_token="[UNK]"))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    found.normalizer = normalizers.Replace("\u200b", "")  # so that a word may have no token
    return PreTrainedTokenizerFast(tokenizer_object=found, pad_token="[PAD]", unk_token="[UNK]")


def bert(names=NAMES) -> BertForTokenClassification:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    model = BertForTokenClassification(BertConfig(vocab_size=len(PIECES), **shape, **labels)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5)  # so that it says several things
    return model


def guesses(model) -> list[list[int]]:
    """Word by word: what the model says of the token that the word begins with, each sentence by itself."""
    found, words = [], pieces()
    for sentence in SENTENCES:
        parts = [words(word, add_special_tokens=False)["input_ids"] for word in sentence]
        with torch.no_grad():
            best = model(torch.tensor([[token for part in parts for token in part]])).logits[0].argmax(-1).tolist()
        found.append([best[sum(map(len, parts[:i]))] for i in range(len(parts))])
    return found


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_a_words_tag_is_that_of_its_first_token(batch_size):
    model = bert()
    said = guesses(model)
    assert len({tag for row in said for tag in row}) > 1
    gold = [[tag if (i + j) % 3 else (tag + 1) % 4 for j, tag in enumerate(row)] for i, row in enumerate(said)]
    data = Dataset.from_dict({"tokens": SENTENCES, "ner_tags": gold})
    found = TokenClassification(data, pieces(), model.config.id2label, batch_size=batch_size)(model.train())
    named = [[[NAMES[tag] for tag in row] for row in rows] for rows in (said, gold)]
    assert found == pytest.approx(entity_metrics(*named)) and 0 < found["f1"] < 100 and model.training
    right = [a == b for mine, theirs in zip(said, gold) for a, b in zip(mine, theirs)]
    assert found["accuracy"] == pytest.approx(100 * sum(right) / len(right))


def test_tags_are_the_models_by_name():
    model = bert()
    said = guesses(model)
    names = [[NAMES[tag] for tag in row] for row in said]
    others = ["B-TIME", "O", "I-PART", "B-PART"]  # the data set counts in another order
    feature = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=others))})
    rows = [[others.index(name) for name in row] for row in names]
    for data in (
        Dataset.from_dict({"words": SENTENCES, "tags": names}),
        Dataset.from_dict({"tokens": SENTENCES, "ner_tags": rows}, features=feature),
    ):
        assert TokenClassification(data, pieces(), model.config.id2label)(model)["accuracy"] == 100
    nameless = {i: f"LABEL_{i}" for i in range(4)}  # by number, and no entities
    data = Dataset.from_dict({"tokens": SENTENCES, "ner_tags": said}).cast(feature)
    assert TokenClassification(data, pieces(), nameless)(model) == {"accuracy": 100.0}


def test_tags_may_be_told():
    said = [["NONE", "first", "in", "TIME"][: len(words)] + ["NONE"] * (len(words) - 4) for words in SENTENCES]
    digits = [["0"] * len(words) for words in SENTENCES]
    told = {"NONE": "O", "first": "B-PART", "in": "I-PART", "TIME": "3"}
    for columns in ({"ner_tags": said}, {"ner_tags": digits, "pos_tags": said}):
        data, names = Dataset.from_dict({"tokens": SENTENCES, **columns}), dict(enumerate(NAMES))
        with pytest.raises(ValueError, match=r"or label_names that say|nothing tells which of them"):
            TokenClassification(data, pieces(), names)
        found = TokenClassification(data, pieces(), names, label_names=told)
        assert found.wanted[0].tolist() == [0, 1, 2, 3]
    data = Dataset.from_dict({"tokens": SENTENCES, "ner_tags": digits})
    assert TokenClassification(data, pieces(), names).wanted[0].tolist() == [0] * 4


@pytest.mark.parametrize("none", [-1, -100])
@pytest.mark.parametrize("named", [True, False])
def test_words_without_a_tag_are_left_out_and_counted(caplog, none, named):
    rows = [[0, none, 1, 2], [3] * 8, [none] * 8]
    data = Dataset.from_dict({"tokens": [words[: len(row)] for words, row in zip(SENTENCES, rows)], "ner_tags": rows})
    if named:
        feature = {"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=NAMES))}
        data = data.cast(Features(feature)) if none == -1 else data
    with caplog.at_level("WARNING", "hf_reram"):
        found = TokenClassification(data, pieces(), dict(enumerate(NAMES)))
    assert [row.tolist() for row in found.wanted] == [[0, 1, 2], [3] * 8, []]
    assert "9 of 20 words are left out, without a tag" in caplog.text


def test_of_several_columns_of_tags_the_models_is_taken():
    speech = ["DT", "NN", "VB", "O"]
    said = [["DT", "NN", "VB", "O"][: len(words)] + ["NN"] * (len(words) - 4) for words in SENTENCES]
    columns = {"tokens": SENTENCES, "pos_tags": said, "ner_tags": [["O"] * len(words) for words in SENTENCES]}
    data = Dataset.from_dict(columns)
    assert TokenClassification(data, pieces(), dict(enumerate(NAMES))).wanted[0].tolist() == [0, 0, 0, 0]
    ours = dict(enumerate([*speech[:3], "O"]))
    data = Dataset.from_dict({**columns, "ner_tags": [["B-TIME"] * len(words) for words in SENTENCES]})
    assert TokenClassification(data, pieces(), ours).wanted[0].tolist() == [0, 1, 2, 3]
    for names in ({0: "A", 1: "B"}, {i: f"LABEL_{i}" for i in range(4)}):
        with pytest.raises(ValueError, match=r"several columns of tags, \['ner_tags', 'pos_tags'\], and nothing tells"):
            TokenClassification(data, pieces(), names)
    features = {"tokens": List(Value("string")), "pos_tags": List(ClassLabel(names=speech))}
    numbered = {**columns, "pos_tags": [[speech.index(tag) for tag in row] for row in said]}
    data = Dataset.from_dict(numbered).cast(Features({**features, "ner_tags": List(Value("string"))}))
    assert TokenClassification(data, pieces(), {i: f"LABEL_{i}" for i in range(4)}).wanted[0].tolist() == [0, 1, 2, 3]


def test_words_without_a_token_are_left_out_and_counted(caplog):
    model = bert()
    said = guesses(model)
    sentences = [[*SENTENCES[0][:1], "\u200b", *SENTENCES[0][1:]], *SENTENCES[1:]]
    tags = [[said[0][0], (said[0][0] + 1) % 4, *said[0][1:]], *said[1:]]
    with caplog.at_level("WARNING", "hf_reram"):
        evaluate = TokenClassification(
            Dataset.from_dict({"tokens": sentences, "labels": tags}), pieces(), model.config.id2label
        )
    assert "1 of 21 words are left out, without a tag or a token within 512" in caplog.text
    assert evaluate(model)["accuracy"] == 100
    short = TokenClassification(
        Dataset.from_dict({"tokens": SENTENCES, "labels": said}), pieces(), dict(enumerate(NAMES)), 3
    )
    assert [len(row) for row in short.wanted] == [3, 3, 3] and "11 of 20 words" in caplog.text


def test_what_does_not_fit_is_an_error():
    good = {"tokens": [["the", "cell"]], "ner_tags": [[0, 1]]}
    for changes, message in (
        ({"tokens": None}, "missing are words, one of"),
        ({"ner_tags": None}, "missing are tags, one of"),
        ({"tokens": [], "ner_tags": []}, "is empty"),
        ({"ner_tags": [[0]]}, "2 words and 1 tags in row 0"),
        ({"tokens": ["the cell"]}, "'the cell' and .* in row 0: allowed are lists"),
        ({"tokens": [[1, 2]]}, "has 1 among the words of row 0"),
        ({"tokens": [["the", None]]}, "has None among the words of row 0"),
        ({"ner_tags": [[0, None]]}, r"tags \[None\]: allowed are 0 to 3"),
        ({"ner_tags": [[0, 4]]}, r"tags \[4\]: allowed are 0 to 3"),
        (
            {"ner_tags": [["O", "B-DRUG"]]},
            r"tags \['B-DRUG'\] among its \['B-DRUG', 'O'\]: allowed are the model's, \['B-PART'",
        ),
        ({"tokens": [["\u200b"]], "ner_tags": [[0]]}, "hold no word of 1"),
    ):
        data = Dataset.from_dict({key: value for key, value in {**good, **changes}.items() if value is not None})
        with pytest.raises(ValueError, match=message):
            TokenClassification(data, pieces(), dict(enumerate(NAMES)))
    slow = type("Slow", (), {"is_fast": False})()
    with pytest.raises(ValueError, match="Slow does not tell which word a token is of"):
        TokenClassification(Dataset.from_dict(good), slow, dict(enumerate(NAMES)))
    with pytest.raises(ValueError, match="no logits of 3 classes for each token"):
        TokenClassification(Dataset.from_dict(good), pieces(), dict(enumerate(NAMES[:3])))(bert())


def test_entities_of_tags():
    assert entities(["B-A", "I-A", "O", "B-B", "B-B"]) == {("A", 0, 2), ("B", 3, 4), ("B", 4, 5)}
    assert entities(["I-A", "I-B", "I-B"]) == {("A", 0, 1), ("B", 1, 3)}  # IOB1
    assert entities(["B-A", "E-A", "S-A", "S-A"]) == entities(["B-A", "L-A", "U-A", "U-A"])
    assert entities(["B-A", "E-A", "S-A", "S-A"]) == {("A", 0, 2), ("A", 2, 3), ("A", 3, 4)}
    assert entities([]) == set()
    assert are_entity_tags(NAMES)
    assert not are_entity_tags(["O"]) and not are_entity_tags(["NOUN", "VERB"]) and not are_entity_tags(["O", "PER"])
    found = entity_metrics([["B-A", "O", "B-B"], ["O"]], [["B-A", "I-A", "B-B"], ["B-A"]])
    assert found == pytest.approx({"precision": 50, "recall": 100 / 3, "f1": 40, "accuracy": 50})
    assert EntityF1().compute(predictions=[["B-A", "O"]], references=[["B-A", "O"]])["f1"] == 100
    assert entity_metrics([["O"]], [["O"]]) == {"precision": 0, "recall": 0, "f1": 0, "accuracy": 100}
    for mine, theirs, message in (([["O"]], [["O", "O"]], "one tag a word"), ([], [], "no word")):
        with pytest.raises(ValueError, match=message):
            entity_metrics(mine, theirs)


tag = st.sampled_from(["O", *(f"{prefix}-{kind}" for prefix in "BIES" for kind in "AB")])


@given(st.lists(st.tuples(tag, tag), min_size=1, max_size=12))
def test_entities_are_those_of_seqeval(pairs):
    seqeval = pytest.importorskip("seqeval.metrics")
    mine, gold = ([list(column)] for column in zip(*pairs))
    found = entity_metrics(mine, gold)
    for name, theirs in (("f1", "f1_score"), ("precision", "precision_score"), ("recall", "recall_score")):
        assert found[name] == pytest.approx(100 * getattr(seqeval, theirs)(gold, mine, zero_division=0))


def test_eval_of_token_classification(tmp_path):
    bert().save_pretrained(tmp_path / "base")
    pieces().save_pretrained(tmp_path / "base")
    rows = [{"tokens": words, "ner_tags": ["O"] * (len(words) - 1) + ["B-TIME"]} for words in SENTENCES]
    (tmp_path / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["eval", str(tmp_path / "base"), "--dataset", str(tmp_path / "words.jsonl"), "--chips", "2", "--json"]
    command += ["--device", "cmo-hfox-ibm", "--times", "10y", "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out" / "robustness.json").read_text())
    assert report["about"]["task"] == "token-classification" and report["about"]["metric"] == "f1"
    assert set(report["digital"]) == {"f1", "precision", "recall", "accuracy"} and len(report["measurements"]) == 2


def test_words_of_tokenizers_with_spaces_in_tokens(tmp_path):
    """As RoBERTa's, which refuses words unless it is told that each has a space before it."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import RobertaConfig, RobertaForTokenClassification, RobertaTokenizerFast

    letters = {letter: i + 5 for i, letter in enumerate(sorted(ByteLevel.alphabet()))}
    vocabulary = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4, **letters}
    RobertaTokenizerFast(vocab=vocabulary, merges=[]).save_pretrained(tmp_path)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = RobertaConfig(vocab_size=len(vocabulary), id2label=dict(enumerate(NAMES)), pad_token_id=1, **shape)
    data = Dataset.from_dict({"tokens": [["a", "cell"]], "ner_tags": [["O", "B-PART"]]})
    task = token_classification(RobertaForTokenClassification(config).eval(), str(tmp_path), data)
    assert task.evaluate.first[0].tolist() == [1, 3]  # <s> Ġ a Ġ c e l l </s>
    assert task.metric == "f1"
