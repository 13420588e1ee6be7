import pytest

from hf_reram.tasks.labels import classes_of, is_nameless

MOODS = {0: "neg", 1: "pos"}
BARE = {0: "LABEL_0", 1: "LABEL_1"}
CRANES = {0: "crane", 1: "heron", 2: "crane"}


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
        (["1"], None, MOODS, r"labels \['1'\] among its"),
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
