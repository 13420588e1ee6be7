"""Two fingerprints are the same just where what they are of does the same."""

import copy
import functools
import json
import threading

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorWithPadding, ViTImageProcessor, default_data_collator

from hf_reram.evaluation.content import content_of, described, part_of
from hf_reram.model.digest import other_settings, settings_of
from tests.samples import squad
from tests.samples.models import bert_batch, tiny_bert

THRESHOLD = 0.5


def make(factor, code):
    """A module's functions, as a script that was changed has them."""
    names = {"__name__": "__main__", "factor": factor}
    exec(code, names)
    return names["score"]


CODE = "def helper(x): return x + 1\ndef score(x): return helper(x) * factor"


def test_functions_are_told_by_their_code_and_what_they_use():
    first = described(make(2, CODE))
    assert first == described(make(2, CODE))
    changed = [
        make(3, CODE),
        make(2, CODE.replace("x + 1", "x - 1")),  # of a function that it calls
        make(2, CODE.replace("* factor", "+ factor")),
        make(2, CODE.replace("score(x)", "score(x=1)")),
    ]
    assert len({first, *map(described, changed)}) == 5

    def closed(over):
        return lambda x: x * over

    assert described(closed(1)) == described(closed(1)) != described(closed(2))
    assert described(functools.partial(closed, 1)) != described(functools.partial(closed, 2))
    assert described(functools.cache(closed(1))) != described(functools.cache(closed(2)))
    assert described(lambda x: x in {"a", "b", "c"}) != described(lambda x: x in {"a", "b", "d"})


class Scorer:
    scale = 1.0

    def __init__(self, table):
        self.table = table

    def __call__(self, x):
        return x * self.scale > THRESHOLD


class Other(Scorer):
    scale = 2.0


@pytest.mark.parametrize("kind", [list, tuple, set, np.array, torch.tensor, lambda v: dict.fromkeys(v, 1)])
def test_data_that_a_function_names_count(kind):
    """A script's weights of classes, names of labels and the like."""
    code = "def score(x): return factor"
    assert described(make(kind([1, 2]), code)) == described(make(kind([1, 2]), code))
    assert described(make(kind([1, 2]), code)) != described(make(kind([1, 3]), code))


def test_models_are_told_by_what_they_compute():
    """A collator for sequences holds the model, which remembers forwards."""
    model = tiny_bert()
    first = described([model])
    model(**bert_batch())
    patched = copy.deepcopy(model)
    assert described([copy.deepcopy(model)]) == described([model.train()]) == first
    with torch.no_grad():
        patched.classifier.bias[0] += 1
    assert described([patched]) != first
    assert described([tiny_bert(hidden_act="relu")]) != first


def test_sets_are_told_whatever_their_order():
    """Which another process may have: texts are hashed there anew."""
    one, other = {0, 8}, {8, 0}
    assert list(one) != list(other)
    assert described(one) == described(other) == described({8, 0}) != described({0, 16})
    code = make(2, "def score(x): return x in {0, 8}").__code__
    consts = tuple(frozenset(other) if part == one else part for part in code.co_consts)
    assert [list(a) for a, b in zip(code.co_consts, consts) if a is not b] == [list(one)]
    assert described(code) == described(code.replace(co_consts=consts))


def test_of_an_object_that_a_function_names_the_class_counts():
    code = "class Score:\n  def __call__(self, x): return x\nmetric = Score()\ndef score(x): return metric(x)"
    changed = code.replace("return x", "return -x", 1)
    assert described(make(2, code)) == described(make(2, code)) != described(make(2, changed))


def test_objects_are_told_by_class_and_content():
    table = {"a": torch.arange(3.0), "b": [np.arange(2), None], "c": {1, "x"}}
    again = {"a": torch.arange(3.0), "b": [np.arange(2), None], "c": {"x", 1}}
    assert described(Scorer(table)) == described(Scorer(again))
    assert described(Scorer(table)) == json.loads(json.dumps(described(Scorer(table))))
    others = [Other(table), Scorer({**table, "a": torch.arange(3)}), Scorer({**table, "b": [np.arange(2), 0]})]
    assert len({described(value) for value in (Scorer(table), *others)}) == 4
    table["self"] = table  # a circle
    assert described(table) == described(table)
    assert described(default_data_collator) != described(torch.stack)


def test_image_processors_and_tokenizers_are_told_by_their_settings():
    tokenizer = squad.tokenizer()
    half = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.5] * 3)
    assert described(half) == described(ViTImageProcessor(**half.to_dict()))
    assert described(half) != described(ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.4] * 3))
    before = described(DataCollatorWithPadding(tokenizer))
    tokenizer("a text that is cut", truncation=True, max_length=2, padding="max_length")  # which it remembers
    assert described(DataCollatorWithPadding(tokenizer)) == before
    assert described(DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8)) != before
    tokenizer.padding_side = "left"
    assert described(DataCollatorWithPadding(tokenizer)) != before


def test_what_cannot_be_told_is_an_error_that_says_what_to_do():
    with pytest.raises(ValueError, match=r"the compute_metrics cannot be told from another one: say with key=.*lock"):
        part_of("compute_metrics", Scorer(threading.Lock()))


def test_a_transform_is_part_of_a_data_set():
    rows = Dataset.from_dict({"x": [[1, 2], [3, 4]]})
    transforms = [
        lambda rows: {"x": [torch.tensor(x) for x in rows["x"]]},
        lambda rows: {"x": [[0] for _ in rows["x"]]},
    ]
    found = [content_of(rows), *(content_of(rows.with_transform(transform)) for transform in transforms)]
    assert len({*found, content_of(rows.with_format("torch"))}) == 4
    assert found[1] == content_of(rows.with_transform(transforms[0]))


def test_settings_are_what_changes_a_figure(tmp_path):
    model = tiny_bert()
    model.save_pretrained(tmp_path)
    mine = settings_of(model)
    load = type(model).from_pretrained
    assert settings_of(load(tmp_path, dtype=torch.bfloat16, hidden_dropout_prob=0.3, use_cache=False)) == mine
    labels = {0: "LABEL_2", 1: "LABEL_1", 2: "LABEL_0"}
    changed = settings_of(load(tmp_path, hidden_act="relu", num_attention_heads=4, id2label=labels))
    assert other_settings(mine, changed) == [
        *("hidden_act", "id2label.0", "id2label.2", "num_attention_heads"),
        *("modules.attention_head_size", "modules.class", "modules.num_attention_heads", "modules.scaling"),
    ]
    assert other_settings(mine, {"of another version": 1, "hidden_act": "gelu"}) == []
    model.config.problem_type = "single_label_classification"  # as its head writes there when it first runs
    assert settings_of(model) == mine
    model.config.problem_type = "regression"
    assert settings_of(model) != mine
    assert settings_of(torch.nn.Linear(2, 2)).keys() == {"modules"}
    assert settings_of(torch.nn.ModuleDict({"one": tiny_bert()}))["one.hidden_act"] == "gelu"
