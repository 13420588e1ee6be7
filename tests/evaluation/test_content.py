"""Two fingerprints are the same just where what they are of does the same."""

import collections
import copy
import enum
import functools
import json
import random
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import (
    ByT5Tokenizer,
    CLIPImageProcessor,
    CLIPProcessor,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    ViTImageProcessor,
    default_data_collator,
)

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


class Scored(torch.nn.Module):
    def __init__(self, rows):
        super().__init__()
        self.rows = rows

    def forward(self, model):
        return float(len(self.rows))


def test_a_script_s_module_is_told_by_all_that_it_holds():
    rows = [Dataset.from_dict({"x": [x]}) for x in (1, 2)]
    assert told_apart(*map(Scored, rows), Scored([1.0, 2.0]), Scored([2.0, 1.0]))


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


def told_apart(*values):
    """Whether each is told from all others, and the same when it is told again."""
    found = [described(value) for value in values]
    return found == [described(value) for value in values] and len(set(found)) == len(values)


def test_processors_are_told_by_all_that_they_hold(tmp_path):
    processor = CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 32}), squad.tokenizer())
    before = described(processor)
    processor(text=["a text"], images=[np.zeros((40, 40, 3), np.uint8)], return_tensors="pt")
    assert described(processor) == before
    loaded = []
    for place in "ab":  # the second as the first was saved
        processor.save_pretrained(tmp_path / place)
        loaded.append(described(processor := CLIPProcessor.from_pretrained(tmp_path / place)))
    assert loaded == loaded[:1] * 2
    before = loaded[0]
    processor.tokenizer.padding_side = "left"
    found = {before, described(processor)}
    processor.chat_template = "{{ messages }}"
    found.add(described(processor))
    processor.tokenizer.add_tokens("more")
    found.add(described(processor))
    processor.image_processor.do_center_crop = False
    assert len({*found, described(processor)}) == 5


def test_tokenizers_are_told_by_templates_settings_and_code():
    class Shouting(type(squad.tokenizer())):
        def __call__(self, text, **options):
            return super().__call__(text.upper(), **options)

    class Whispering(type(squad.tokenizer())):
        def __call__(self, text, **options):
            return super().__call__(text.lower(), **options)

    Whispering.__qualname__ = Shouting.__qualname__
    spoken = squad.tokenizer()
    spoken.chat_template = "{{ messages }}"
    assert told_apart(squad.tokenizer(), spoken, *(kind(**spoken.init_kwargs) for kind in (Shouting, Whispering)))
    slow = ByT5Tokenizer(extra_ids=5)
    before = described(slow)
    slow("some text that is cut", truncation=True, max_length=3)
    assert described(slow) == before and not slow.is_fast
    assert told_apart(slow, ByT5Tokenizer(extra_ids=6), ByT5Tokenizer(extra_ids=5, token_type_ids_pattern="all_zeros"))


def scale(x, by):
    return x * by


class Grade(enum.Enum):
    PASS = 0.5


class Stern(enum.Enum):
    PASS = 0.6


Stern.__qualname__ = Grade.__qualname__


def kind_of(value):
    return value if isinstance(value, str) else type(value).__name__


@pytest.mark.parametrize(
    "one, other",
    [
        (torch.nn.CrossEntropyLoss(label_smoothing=0.1), torch.nn.CrossEntropyLoss(label_smoothing=0.2)),
        (torch.nn.CrossEntropyLoss(torch.ones(2)), torch.nn.CrossEntropyLoss(torch.zeros(2))),
        (Scorer([1]), Scorer([2])),
        (Scorer([1]).__call__, Scorer([2]).__call__),
        (Path("a"), Path("b")),
        (torch.float32, torch.bfloat16),
        (functools.partialmethod(scale, by=1), functools.partialmethod(scale, by=2)),
        (re.compile("a"), re.compile("a", re.IGNORECASE)),
        (Grade.PASS, Stern.PASS),
        (None, 0),
    ],
    ids=kind_of,
)
def test_all_that_a_class_has_counts(one, other):
    def kind(value):
        return type("Mine", (Scorer,), {"part": value, "__doc__": str(value), "__module__": __name__})

    assert told_apart(kind(one), kind(other))
    assert described(kind(one)) == described(kind(one))


def test_a_class_s_notes_are_no_part_of_it():
    def kind(doc):
        return type("Mine", (Scorer,), {"__doc__": doc, "__annotations__": {"a": doc}, "__module__": __name__})

    assert described(kind("a")) == described(kind("b"))


def test_a_script_s_own_decorator_is_told_by_its_code():
    """Also where it stands for a function of a library, as whose it gives itself out."""

    def doubled(function):
        @functools.wraps(function)
        def inner(x):
            return 2 * function(x)

        return inner

    def halved(function):
        @functools.wraps(function)
        def inner(x):
            return function(x) / 2

        return inner

    class At:
        def __init__(self, function, threshold):
            functools.update_wrapper(self, function)
            self.threshold = threshold

        def __call__(self, x):
            return self.__wrapped__(x) > self.threshold

    class Below(At):
        def __call__(self, x):
            return self.__wrapped__(x) < self.threshold

    Below.__qualname__ = At.__qualname__
    mean = torch.nn.functional.relu
    assert mean.__module__ == doubled(mean).__module__ == "torch.nn.functional"
    assert told_apart(mean, doubled(mean), halved(mean), doubled(torch.nn.functional.gelu))
    assert told_apart(len, At(len, 0.5), At(len, 0.3), At(max, 0.5), Below(len, 0.5))
    assert told_apart(*(torch.no_grad()(make(factor, CODE)) for factor in (2, 3)))  # a library's around a script's


NUMBER = re.compile(r"-?\d+")


def numbers(prediction):
    return {"n": len(NUMBER.findall(str(prediction)))}


def test_patterns_count(monkeypatch):
    before = described(numbers)
    assert numbers("1 and -2") == {"n": 2} and described(numbers) == before
    monkeypatch.setitem(numbers.__globals__, "NUMBER", re.compile(r"\d"))
    assert described(numbers) != before


def test_random_numbers_of_a_collator_are_told_by_their_seed():
    def collator(seed):
        return DataCollatorForLanguageModeling(squad.tokenizer(), seed=seed)

    used = collator(1)
    before = described(used)
    used([{"input_ids": [5, 6, 7, 8]}])
    assert used.generator is not None and described(used) == before == described(collator(1))
    assert before != described(collator(2))
    used.generator = torch.Generator().manual_seed(3)
    assert described(used) != before
    for make_ in (lambda seed: torch.Generator().manual_seed(seed), np.random.default_rng):
        drawn = make_(3)
        before = described(drawn)
        torch.rand(2, generator=drawn) if isinstance(drawn, torch.Generator) else drawn.random(2)
        assert described(drawn) == before and told_apart(drawn, make_(4))


class Rows(torch.utils.data.Dataset):
    def __init__(self, file, scale=1.0):
        self.file, self.scale = file, scale


def test_a_script_s_data_set_is_told_by_its_attributes_and_files(tmp_path):
    (tmp_path / "rows.txt").write_text("a")
    made = functools.partial(Rows, str(tmp_path / "rows.txt"))
    used = made()
    before = [content_of(used), described(lambda: used)]
    assert content_of(made()) == before[0] != content_of(made(scale=2.0))
    (tmp_path / "rows.txt").write_text("b")
    assert content_of(made()) != before[0] and described(lambda: used) != before[1]
    used.scale = 2.0
    assert content_of(used) != content_of(made())


def test_which_columns_are_seen_is_part_of_a_data_set():
    rows = Dataset.from_dict({"input_ids": [[1], [2]], "attention_mask": [[1], [0]]})
    hidden = rows.with_format(None, columns=["input_ids"])
    assert "attention_mask" not in hidden[0]
    assert content_of(rows) == content_of(rows.with_format(None)) != content_of(hidden)


def test_a_file_that_is_written_to_is_no_part_of_an_evaluation(tmp_path):
    with open(tmp_path / "log.txt", "w") as log, open(tmp_path / "log.txt") as read:
        code = "def score(x):\n  print(x, file=log)\n  return x"
        score = make_with(code, log=log)
        before = described(score)
        assert score("a text") == "a text" and described(score) == before
        log.flush()
        assert read.read() == "a text\n"
        with pytest.raises(ValueError, match=r"nothing tells one _io\.TextIOWrapper from another"):
            described(make_with(code, log=read))


def make_with(code, **names):
    names = {"__name__": "__main__", **names}
    exec(code, names)
    return names["score"]


def test_functions_by_type_and_modules_of_torchscript_are_told():
    @functools.singledispatch
    def kind(value):
        return 1

    before = described(kind)
    assert kind(2) == 1 and described(kind) == before  # which it remembers
    kind.register(str, lambda value: 2)
    assert described(kind) != before
    scripted = [torch.jit.script(torch.nn.Linear(2, 2)) for _ in range(2)]
    scripted[1].load_state_dict(scripted[0].state_dict())
    relu = torch.jit.script(torch.nn.Sequential(torch.nn.ReLU()))
    assert described(scripted[0]) == described(scripted[1])
    assert told_apart(scripted[0], relu, torch.jit.script(torch.nn.Sequential(torch.nn.Tanh())))
    with torch.no_grad():
        scripted[1].weight.add_(1)
    assert described(scripted[0]) != described(scripted[1])


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
        *("attributes.attention_head_size", "attributes.class", "attributes.num_attention_heads", "attributes.scaling"),
    ]
    assert other_settings(mine, {"of another version": 1, "hidden_act": "gelu"}) == []
    model.config.problem_type = "single_label_classification"  # as its head writes there when it first runs
    assert settings_of(model) == mine
    model.config.problem_type = "regression"
    assert settings_of(model) != mine
    assert settings_of(torch.nn.Linear(2, 2)).keys() == {"attributes"}
    assert settings_of(torch.nn.ModuleDict({"one": tiny_bert()}))["one.hidden_act"] == "gelu"


class Meter:
    def __init__(self, scale=1.0):
        self.scale, self.sum = scale, 0.0

    def update(self, value):
        self.sum += self.scale * value


def named_and_closed_over(use, kept):
    """Functions that use it as a global, and as a variable of what they are in."""
    names = {"__name__": "__main__", "KEPT": kept, "torch": torch, "np": np}
    lines = [f"def score():\n  {use}", f"def outer(KEPT):\n  def score():\n    {use}\n  return score"]
    exec("\n".join(lines), names)
    return [names["score"], names["outer"](kept)]


@pytest.mark.parametrize(
    "use, one, other",
    [
        ("KEPT[0] = 1.0", torch.zeros(3), torch.ones(3)),
        ("KEPT[KEPT == -100] = 0", np.zeros(3), np.ones(3)),
        ("KEPT[1:] = 0", np.zeros(3), np.ones(3)),
        ("KEPT[:] = KEPT * 2", np.zeros(3), np.ones(3)),
        ("KEPT.copy_(KEPT * 2)", torch.zeros(3), torch.ones(3)),
        ("KEPT['calls'] += 1", collections.Counter(), collections.Counter(calls=1)),
        ("KEPT.setdefault('mask', None)", {"x": 1}, {"x": 2}),
        ("KEPT.append(KEPT.pop())", [1], [2]),
        ("KEPT.update(2.0)", Meter(1.0), Meter(2.0)),
        ("KEPT.random()", random.Random(1), random.Random(2)),
        ("KEPT.seed(0); KEPT.random()", random.Random(1), random.Random(2)),
        ("KEPT.rand()", np.random.RandomState(1), np.random.RandomState(2)),
        ("KEPT.pop('b', None)", *(DatasetDict(a=Dataset.from_dict({"x": [x]})) for x in (1, 2))),
    ],
    ids=kind_of,
)
def test_what_an_evaluation_starts_from_counts(use, one, other):
    for first, second in zip(named_and_closed_over(use, one), named_and_closed_over(use, other)):
        assert told_apart(first, second)
