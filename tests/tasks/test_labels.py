import logging

import pytest

from hf_reram.tasks.flags import label_names_of
from hf_reram.tasks.labels import classes_of, is_nameless

MOODS = {0: "neg", 1: "pos"}
BARE = {0: "LABEL_0", 1: "LABEL_1"}
CRANES = {0: "crane", 1: "heron", 2: "crane"}
LONG = {0: "NEGATIVE", 1: "POSITIVE"}
STARS = {0: "1 star", 1: "2 stars", 2: "3 stars"}
ENTITIES = {0: "O", 1: "B-ORG", 2: "ORGAN"}


@pytest.mark.parametrize(
    ("labels", "names", "id2label", "wanted"),
    [
        ([1, 0, 1], None, MOODS, {1: 1, 0: 0}),
        ([1.0, True], None, MOODS, {1: 1}),
        ([0, 1], ["neg", "pos"], MOODS, {0: 0, 1: 1}),
        ([0, 1], ["pos", "neg"], MOODS, {0: 1, 1: 0}),
        ([2, 0], ["POS ", "unused", "Neg"], MOODS, {2: 0, 0: 1}),  # names that do not occur are not asked for
        (["pos", "neg"], None, MOODS, {"pos": 1, "neg": 0}),
        (["LABEL_1"], None, BARE, {"LABEL_1": 1}),
        ([0, 1], ["cat", "dog"], BARE, {0: 0, 1: 1}),
        ([0, 1], ["LABEL_1", "LABEL_0"], BARE, {0: 1, 1: 0}),
        ([0, 1], ["0", "1"], MOODS, {0: 0, 1: 1}),
        (["1", "0"], None, BARE, {"1": 1, "0": 0}),
        ([0, 1, 2], ["crane", "heron", "crane"], CRANES, {0: 0, 1: 1, 2: 2}),
        ([0, 1], ["US", "us"], {0: "us", 1: "US"}, {0: 1, 1: 0}),
        (["1", "0"], None, MOODS, {"1": 1, "0": 0}),  # as JSON and CSV have them
        (["1.0"], None, MOODS, {"1.0": 1}),
        (["1", "0"], None, {0: "1", 1: "0"}, {"1": 0, "0": 1}),
        ([0, 1], ["0", "1"], {0: "0", 1: "1"}, {0: 0, 1: 1}),
        ([0, 1], ["neg", "pos"], LONG, {0: 0, 1: 1}),
        ([0, 1], ["pos", "neg"], LONG, {0: 1, 1: 0}),
        (["Pos"], None, LONG, {"Pos": 1}),
        ([1], ["neg", "pos"], {0: "neutral", 1: "negative", 2: "positive"}, {1: 2}),
        ([0, 1], ["o", "B-ORG"], ENTITIES, {0: 0, 1: 1}),
        ([0, 1, 2], ["B_org", "O", "organ"], ENTITIES, {0: 1, 1: 0, 2: 2}),
        (["3", "1"], None, STARS, {"3": 2, "1": 0}),  # no number of a class
        (["0", "1"], None, STARS, {"0": 0, "1": 1}),  # 0 is no star
        (["0", "1"], None, {0: "0 bad", 1: "1 good"}, {"0": 0, "1": 1}),
    ],
)
def test_labels_are_classes_by_name_or_number(labels, names, id2label, wanted):
    assert classes_of(labels, names, id2label) == wanted


@pytest.mark.parametrize(
    ("labels", "names", "id2label", "told"),
    [
        ([2], None, MOODS, r"labels \[2\]: allowed are 0 to 1, the model's 2 classes"),
        ([0.5, None], None, MOODS, r"labels \[0.5, None\]: allowed are 0 to 1"),
        ([-1], ["neg", "pos"], MOODS, r"labels \[-1\]: allowed are 0 to 1"),
        ([0, 1], ["cat", "pos"], MOODS, r"labels \['cat'\] among its \['cat', 'pos'\]: .* \['neg', 'pos'\]"),
        (["pos", "cat"], None, MOODS, r"labels \['cat'\] among its \['cat', 'pos'\]: .* \['neg', 'pos'\]"),
        (["pos", None], None, {0: "none", 1: "pos"}, r"labels \[None\] among its"),
        (["2"], None, MOODS, r"labels \['2'\]: allowed are 0 to 1, the model's 2 classes"),
        (["1", "pos"], None, MOODS, r"labels \['1'\] among its \['1', 'pos'\]: .* \['neg', 'pos'\]"),
        (["1", "0"], None, {0: "0", 1: "one"}, r"labels \['1'\] among its"),
        (["1", "2"], None, STARS, r"labels \['1', '2'\] among its .*'1 star'"),  # either
        ([0, 1], ["0", "1"], {0: "1 good", 1: "0 bad"}, r"labels \['0', '1'\] among its"),
        ([0, 1], ["neg", "pos"], {0: "negative", 1: "negated"}, r"labels \['neg', 'pos'\] among its"),
        ([0, 1], ["neg", "n"], {0: "NEGATIVE", 1: "POSITIVE"}, r"labels \['neg', 'n'\] among its"),
        ([0], ["neg", "cat"], LONG, r"labels \['neg'\] among its \['cat', 'neg'\]: .* \['NEGATIVE', 'POSITIVE'\]"),
        ([0, 1], ["", "pos"], LONG, r"labels \['', 'pos'\] among its"),
        (
            [0, 1],
            ["gative", "pos"],
            LONG,
            r"or label_names that say .* \(--label-names 'gative=\.\.\.' of hf-reram eval\)",
        ),
        (["cat"], None, BARE, r"labels \['cat'\]: allowed are 0 to 1"),
        ([0, 1], ["a", "b", "c"], BARE, "3 classes and the model 2: .* where the model has no names"),
        ([0, 1], ["0", "1", "2"], MOODS, "3 classes and the model 2: .* where the data set has no names"),
        ([1], ["heron", "crane", "gull"], CRANES, r"labels \['crane'\] among its"),
        ([[0, 1]], None, MOODS, r"\[0, 1\] among its labels: allowed is one number or name"),
    ],
)
def test_labels_of_other_classes_are_refused(labels, names, id2label, told):
    with pytest.raises(ValueError, match=f"^the data has .*{told}"):
        classes_of(labels, names, id2label, "the data")


def test_names_that_say_no_more_than_numbers():
    assert is_nameless(BARE) and is_nameless({0: "0", 1: "LABEL_1"})
    assert not is_nameless(MOODS) and not is_nameless({0: "LABEL_1", 1: "LABEL_0"})


def test_a_warning_says_which_names_are_taken_for_which(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hf_reram.tasks.labels"), "propagate", True)
    classes_of([0, 1], ["NEG", "pos"], MOODS, "these")
    assert not caplog.records
    classes_of([1], ["neg", "pos"], LONG, "those")
    wanted = "those has labels that begin the model's, and are taken for these: {'neg': 'NEGATIVE', 'pos': 'POSITIVE'}"
    assert [record.getMessage() for record in caplog.records] == [wanted]


@pytest.mark.parametrize(
    ("labels", "names", "id2label", "told", "wanted"),
    [
        ([0, 1], ["bad", "good"], LONG, {"bad": "negative", "good": "POSITIVE"}, {0: 0, 1: 1}),
        ([0, 1], ["bad", "good"], LONG, {"bad": "1", "good": "0"}, {0: 1, 1: 0}),
        ([0, 1, 2], ["bad", "worse", "Positive"], LONG, {"bad": "NEGATIVE", "worse": "NEGATIVE"}, {0: 0, 1: 0, 2: 1}),
        (["bad"], None, LONG, {"bad": "NEGATIVE", "good": "POSITIVE"}, {"bad": 0}),
        ([0, 1.0], None, MOODS, {"0": "pos", "1": "neg"}, {0: 1, 1.0: 0}),
        (["1", "2"], None, STARS, {"1": "2 stars", "2": "3 stars"}, {"1": 1, "2": 2}),
        ([0, 1], ["neg", "pos"], MOODS, {"neg": "pos", "pos": "neg"}, {0: 1, 1: 0}),
        ([0, 1], ["a", "b"], BARE, {"a": "LABEL_1", "b": "LABEL_0"}, {0: 1, 1: 0}),
    ],
)
def test_labels_may_be_told(labels, names, id2label, told, wanted):
    assert classes_of(labels, names, id2label, label_names=told) == wanted


@pytest.mark.parametrize(
    ("labels", "names", "told", "error"),
    [
        ([0], ["bad", "good"], {"bat": "NEGATIVE"}, r"label_names name \['bat'\]: .* the data, \['bad', 'good'\]"),
        ([0], ["bad", "good"], {"bad": "cat"}, r"take 'bad' for 'cat': .* \['NEGATIVE', 'POSITIVE'\], and .* 0 to 1"),
        ([0], ["bad", "good"], {"bad": "2"}, r"take 'bad' for '2'"),
        ([0, 1], ["bad", "good"], {"bad": "NEGATIVE"}, r"the data has labels \['good'\] among its \['bad', 'good'\]"),
        ([0, 1], None, {"0": "NEGATIVE"}, r"the data has labels \['1'\] among its \['0', '1'\]"),
    ],
)
def test_what_is_told_of_labels_has_to_be_all_of_them(labels, names, told, error):
    with pytest.raises(ValueError, match=error):
        classes_of(labels, names, LONG, "the data", label_names=told)


@pytest.mark.parametrize(
    ("texts", "wanted"),
    [
        (None, {}),
        (["neg=NEGATIVE,pos=POSITIVE"], {"neg": "NEGATIVE", "pos": "POSITIVE"}),
        (["neg=NEGATIVE", "pos = POSITIVE"], {"neg": "NEGATIVE", "pos": "POSITIVE"}),
        (["0=tench, Tinca tinca,1=goldfish"], {"0": "tench, Tinca tinca", "1": "goldfish"}),
        (['{"<=50K": "low", ">50K": 1}'], {"<=50K": "low", ">50K": "1"}),
    ],
)
def test_names_of_labels_in_flags(texts, wanted):
    assert label_names_of(texts) == wanted


@pytest.mark.parametrize("text", ["neg", "=NEGATIVE", "neg=", "", '{"neg": '])
def test_names_of_labels_that_are_none(text):
    with pytest.raises(ValueError, match=r"^label_names=.*(allowed are pairs as neg=NEGATIVE|is no JSON object)"):
        label_names_of([text])
