"""The official evaluation script's behaviour, case by case."""

import pytest

from hf_reram.tasks.metrics import SquadV2
from hf_reram.tasks.metrics.squad_v2 import normalize_answer, squad_v2_metrics, token_f1


def question(key, *golds):
    return {"id": key, "answers": {"text": list(golds), "answer_start": [0] * len(golds)}}


def answer(key, text, null=0.0):
    return {"id": key, "prediction_text": text, "no_answer_probability": null}


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Cat", "cat"),
        ("an apple, a day!", "apple day"),
        ("theatre another", "theatre another"),
        ("U.S.A.", "usa"),
        ("mother-in-law", "motherinlaw"),
        ("a-b", "ab"),
        ("\tthe\n", ""),
        ("Ünïcode Ä", "ünïcode ä"),
        ("«the»", "«"),
    ],
)
def test_normalization(text, normal):
    if text == "«the»":  # only ASCII punctuation is removed
        assert normalize_answer(text) == "« »"
    else:
        assert normalize_answer(text) == normal


@pytest.mark.parametrize(
    ("prediction", "gold", "f1"),
    [
        ("the cat sat", "cat sat", 1.0),
        ("cat", "cat sat", 2 / 3),
        ("cat cat", "cat", 2 / 3),
        ("dog", "cat", 0.0),
        ("", "", 1.0),
        ("", "cat", 0.0),
        ("the", "", 1.0),
        ("the", "a", 1.0),
    ],
)
def test_f1(prediction, gold, f1):
    assert token_f1(prediction, gold) == pytest.approx(f1)


def test_the_best_of_several_golds_counts():
    found = squad_v2_metrics([answer("1", "in Paris, France")], [question("1", "Paris", "Paris France")])
    assert found["f1"] == pytest.approx(100 * 4 / 5)
    assert found["exact"] == 0


def test_no_answer_questions_and_groups():
    references = [question("1", "cat"), question("2"), question("3"), question("4", "dog")]
    found = squad_v2_metrics([answer("1", "cat"), answer("2", ""), answer("3", "x"), answer("4", "")], references)
    assert (found["exact"], found["HasAns_exact"], found["NoAns_exact"]) == (50, 50, 50)
    assert (found["total"], found["HasAns_total"], found["NoAns_total"]) == (4, 2, 2)
    assert found["AvNA"] == 50
    assert found["HasAns_AvNA"] == 50


def test_a_gold_of_nothing_but_articles_counts_as_none():
    assert squad_v2_metrics([answer("1", "")], [question("1", "the")])["exact"] == 100
    # It still is a question with an answer, as in the official script.
    assert squad_v2_metrics([answer("1", "")], [question("1", "the")])["HasAns_total"] == 1


def test_threshold_and_its_best_choice():
    references = [question("1", "cat"), question("2"), question("3", "dog")]
    predictions = [answer("1", "cat", 0.1), answer("2", "x", 0.6), answer("3", "dog", 0.8)]
    assert squad_v2_metrics(predictions, references)["exact"] == pytest.approx(200 / 3)
    found = squad_v2_metrics(predictions, references, no_answer_threshold=0.5)
    assert found["exact"] == pytest.approx(200 / 3)
    assert found["NoAns_f1"] == 100
    # Abstaining on all scores 1, answering the surest 2, then 1, then 2 again: the first best counts.
    assert found["best_exact"] == pytest.approx(200 / 3)
    assert found["best_exact_thresh"] == pytest.approx(0.1)


def test_only_one_kind_of_question_has_no_other_group():
    assert "NoAns_f1" not in squad_v2_metrics([answer("1", "cat")], [question("1", "cat")])


@pytest.mark.parametrize("predictions", [[], [answer("2", "x")], [answer("1", "x"), answer("1", "x")]])
def test_other_questions_are_an_error(predictions):
    with pytest.raises(ValueError, match="one prediction for each"):
        squad_v2_metrics(predictions, [question("1", "cat")])


def test_as_an_evaluate_metric(tmp_path):
    metric = SquadV2(cache_dir=str(tmp_path))
    found = metric.compute(predictions=[answer("1", "a cat")], references=[question("1", "cat")])
    assert found["exact"] == found["f1"] == 100
