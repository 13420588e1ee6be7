"""Reports, cards and configs come from strangers: whatever stands in them is read, or is a ValueError that says why."""

import copy
import json

import pytest
from huggingface_hub import ModelCard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_reram import RobustnessReport
from hf_reram.hub.about import About
from hf_reram.hub.card import model_card
from hf_reram.hub.load import load_model
from hf_reram.hub.publish import merge_cards, publish, read_comparison, write_card
from tests.config.test_fuzz import deep, places, values
from tests.hub.test_card import report

GOOD = json.loads(report().to_json())


@st.composite
def reports(draw):
    """A good report in which one to three places were replaced, removed or added to."""
    data = copy.deepcopy(GOOD)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from([p for p in places(data) if p]))
        owner = data
        for key in path[:-1]:
            owner = owner[key]
        if draw(st.booleans()):
            owner[path[-1]] = draw(values)
        else:
            del owner[path[-1]]
    return data


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(reports())
def test_any_report_makes_a_card_or_is_refused(data):
    try:
        found = RobustnessReport.from_dict(data)
        card = model_card(found, {"a": found, "b": report()})
        found.to_json()
        found.to_markdown()
    except ValueError:
        return
    assert str(card)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(data=reports())
def test_any_report_is_published_or_refused(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("published")
    try:
        found = RobustnessReport.from_dict(data)
        publish(folder, found, {"a": found})
    except ValueError:
        return
    again = RobustnessReport.from_json(folder / "robustness.json") if found.measurements else None
    assert again is None or len(again.measurements) == len(found.measurements)


def changed(*path, to):
    data = copy.deepcopy(GOOD)
    owner = data
    for key in path[:-1]:
        owner = owner[key]
    owner[path[-1]] = to
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("[" * 5000, "too deeply"),
        ("{", "not valid JSON"),
        ("3", "allowed is an object"),
        ("[]", "allowed is an object"),
        ("{}", "missing are the fields"),
        (changed("measurements", to={"a": 1}), "measurements=.*allowed is a list"),
        (changed("measurements", 0, to=3), r"measurements\[0\]"),
        (changed("measurements", 0, "time", to=10**400), r"measurements\[0\]: time"),
        (changed("measurements", 0, "time", to="1d"), "time='1d'"),
        (changed("measurements", 0, "time", to=-1), "time=-1"),
        (changed("measurements", 0, "seed", to=1.5), "seed=1.5"),
        (changed("measurements", 0, "temperature", to="hot"), "temperature='hot'"),
        (changed("measurements", 0, "metrics", to=["f1"]), "metrics="),
        (changed("measurements", 0, "metrics", to={"f1": 10**400}), "metrics="),
        (changed("measurements", 0, "metrics", to={"f1": "high"}), "metrics="),
        (changed("digital", to=[1]), "digital="),
        (changed("ideal", to={"f1": True}), "ideal="),
        (changed("config", to="reram"), "config='reram'"),
        (changed("other_configs", to={"a": 1}), "other_configs="),
        (changed("other_configs", to=["reram"]), "other_configs="),
        (changed("summary", to=None), "summary=None"),
        (changed("notes", to="note"), "notes='note'"),
        (changed("notes", to=[1]), "notes="),
        (changed("weights", to=3), "weights=3"),
        (changed("uncalled", to=3), "uncalled=3"),
        (changed("about", to=[]), "about="),
        (changed("about", to=deep(1, 400)), "levels deep"),
        (changed("config", "device", to=deep(1, 400, "a")), "levels deep"),
    ],
)
def test_what_is_no_report_says_why(tmp_path, data, message):
    file = tmp_path / "robustness.json"
    file.write_text(data if isinstance(data, str) else json.dumps(data))
    with pytest.raises(ValueError, match=f"(?s)robustness.json is no robustness report.*{message}") as error:
        RobustnessReport.from_json(file)
    assert len(str(error.value)) < 1500
    (tmp_path / "comparison.json").write_text(data if isinstance(data, str) else json.dumps({"a": data}))
    with pytest.raises(ValueError, match=r"comparison\.json"):
        read_comparison(tmp_path / "comparison.json")


def test_a_file_that_is_no_text_is_no_report(tmp_path):
    (tmp_path / "robustness.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is no robustness report"):
        RobustnessReport.from_json(tmp_path / "robustness.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("task", 3),
        ("name", None),
        ("examples", "many"),
        ("examples", -1),
        ("base_metrics", [1]),
        ("training", "x"),
        ("versions", {"a": 1}),
        ("co2_grams", 10**400),
        ("label_free", 1),
        ("command", ["rm"]),
        ("repo", 3),
    ],
)
def test_what_a_card_says_has_its_kinds(field, value):
    with pytest.raises(ValueError, match=f"'about': {field}="):
        About.from_dict({**report().about, field: value})


def test_a_base_without_the_metric_is_shown_as_such():
    assert "| digital base | – | – | – |" in model_card(report(base_metrics={"exact": 1.0})).text


@pytest.mark.parametrize(
    "metadata",
    [
        "a: " + "[" * 3000 + "]" * 3000,
        "- a\n- b",
        "a: [",
        "3: 4",
        "a: &x [1, 2]\nb: *nothing",
        "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
        + "\n".join(f"a{i}: &a{i} [" + ", ".join([f"*a{i - 1}"] * 9) + "]" for i in range(1, 20)),
        "model-index: 3",
        "model-index:\n- name: x\n  results: 3",
    ],
    ids=["deep", "list", "broken", "numbers", "alias", "bomb", "index", "results"],
)
def test_any_metadata_are_merged_or_refused(tmp_path, metadata):
    text = f"---\n{metadata}\n---\n# Mine\n"
    try:
        merged = merge_cards(text, model_card(report()), "README.md of x/y")
    except ValueError as error:
        assert "README.md of x/y" in str(error)
        (tmp_path / "README.md").write_text(text)
        with pytest.raises(ValueError):
            write_card(tmp_path / "README.md", model_card(report()))
        assert (tmp_path / "README.md").read_text() == text
        return
    assert "# Mine" in ModelCard(str(merged)).text


@pytest.mark.parametrize(
    "architectures",
    [
        "BertModel",
        [1],
        [None],
        {"a": 1},
        3,
        [],
        ["logging"],
        ["pipeline"],
        ["PreTrainedModel"],
        ["BertTokenizer"],
        ["AutoModel"],
        ["GPT2LMHeadModel"],
        ["__doc__"],
        ["x"] * 500,
        [["BertModel"]],
        None,
    ],
)
def test_wrong_architectures_say_so(tiny_bert, tmp_path, architectures):
    _write(tiny_bert, tmp_path, architectures=architectures)
    with pytest.raises(ValueError, match=r"architectures=.*BertConfig"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": -3},
        {"hidden_size": "x"},
        {"hidden_size": 10**30},
        {"vocab_size": 7},
        {"hidden_act": "nothing"},
        {"id2label": 3},
        {"dtype": "nothing"},
        {"model_type": []},
        {"quantization_config": 3},
        {"quantization_config": {"quant_method": []}},
        {"quantization_config": {"quant_method": "reram", "device": deep(1, 300)}},
        {"nothing": deep(1, 300, "a")},
    ],
    ids=lambda changes: " ".join(changes),
)
def test_a_config_that_cannot_be_is_a_value_error(tiny_bert, tmp_path, changes):
    _write(tiny_bert, tmp_path, **changes)
    with pytest.raises(ValueError):
        load_model(tmp_path)


def test_adapters_on_adapters_are_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(tmp_path), "task_type": "SEQ_CLS"})
    )
    with pytest.raises(ValueError, match="has adapters itself"):
        load_model(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="base_model_name_or_path"):
        load_model(tmp_path)


def _write(model, folder, **changes):
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
