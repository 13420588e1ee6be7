from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from torch import nn

from hf_reram.tasks.question_answering import QuestionAnswering, training_features
from tests.samples import squad as squad_sample


class Oracle(nn.Module):
    """Points at the tokens of the words given for each question, or at the first token."""

    def __init__(self, words: list[list[int]], sure: float = 5.0):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))
        self.words, self.sure = words, sure

    def forward(self, input_ids, attention_mask, token_type_ids):
        start, end = torch.zeros(input_ids.shape), torch.zeros(input_ids.shape)
        for row, ids in enumerate(input_ids.tolist()):
            for wanted in self.words:
                for k in range(len(ids) - len(wanted) + 1):
                    if ids[k : k + len(wanted)] == wanted and token_type_ids[row, k] == 1:
                        start[row, k] += self.sure
                        end[row, k + len(wanted) - 1] += self.sure
        return SimpleNamespace(start_logits=start, end_logits=end)


@pytest.fixture(scope="module")
def tokenizer():
    return squad_sample.tokenizer()


@pytest.mark.parametrize("length", [20, 64])
def test_training_spans_are_the_gold_answers(tokenizer, length):
    data = squad_sample.dataset(12)
    features = training_features(data, tokenizer, length, 6)
    found = set()
    for row in features:
        start, end = row["start_positions"], row["end_positions"]
        if start:
            found.add(tokenizer.decode(row["input_ids"][start : end + 1]))
        else:
            assert end == 0
    assert found == {row["answers"]["text"][0] for row in data if row["answers"]["text"]}
    assert (len(features) > len(data)) == (length == 20)


def test_windows_without_labels_need_no_answers(tokenizer):
    data = squad_sample.dataset(12)
    bare = training_features(data.remove_columns(["answers", "id"]), tokenizer, 20, 6, labels=False)
    full = training_features(data, tokenizer, 20, 6)
    assert bare["input_ids"] == full["input_ids"]
    assert not {"start_positions", "end_positions"} & set(bare.column_names)


def test_gold_answers_that_do_not_stand_in_their_context_are_left_out(tokenizer, caplog):
    rows = squad_sample.rows(6)
    rows[1]["answers"]["answer_start"] = [3]
    assert len(training_features(Dataset.from_list(rows), tokenizer, 64, 6)) == 5
    rows = [{**row, "answers": {"text": ["x"], "answer_start": [0]}} for row in rows]
    with pytest.raises(ValueError, match="no question whose gold"):
        training_features(Dataset.from_list(rows), tokenizer, 64, 6)


@pytest.mark.parametrize("length", [20, 64])
def test_the_best_window_answers(tokenizer, length):
    data = squad_sample.dataset(12)
    evaluate = QuestionAnswering(data, tokenizer, length, 6, batch_size=5)
    oracle = Oracle([tokenizer(place, add_special_tokens=False)["input_ids"] for place in squad_sample.PLACES])
    oracle.train().frozen = nn.Dropout().eval()
    metrics = evaluate(oracle)
    assert oracle.training and not oracle.frozen.training  # each part its own mode again
    assert metrics["HasAns_f1"] == metrics["HasAns_exact"] == metrics["HasAns_span_f1"] == 100
    assert metrics["NoAns_f1"] == 0  # it always answers
    assert metrics["total"] == 12


def test_abstaining_compares_with_the_first_token(tokenizer):
    data = squad_sample.dataset(12)
    shy = Oracle([], sure=0.0)
    assert QuestionAnswering(data, tokenizer)(shy)["NoAns_AvNA"] == 0  # a tie is answered
    strict = QuestionAnswering(data, tokenizer, null_threshold=-1.0)
    metrics = strict(shy)
    assert metrics["NoAns_f1"] == 100
    assert metrics["HasAns_f1"] == 0
    assert all(p["no_answer_probability"] == 0.5 for p in strict.predict(shy))


def renamed(data, column, values):
    return data.remove_columns(column).add_column(column, values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.remove_columns("answers"), "missing are"),
        (lambda d: d.select([]), "empty"),
        (lambda d: d.remove_columns("answers").add_column("answers", ["x"] * len(d)), "allowed is a dict"),
        (lambda d: Dataset.from_list([*d, d[0]]), "id twice"),
        (lambda d: renamed(d, "question", [5] * 6), "has 5 as the question of row 0: allowed is a text"),
        (lambda d: renamed(d, "context", ["", *[None] * 5]), "has None as the context of row 1: allowed is a text"),
    ],
)
def test_bad_data_are_refused(tokenizer, change, message):
    with pytest.raises(ValueError, match=message):
        QuestionAnswering(change(squad_sample.dataset(6)), tokenizer)


def test_a_model_that_is_not_for_qa_and_a_bad_stride_are_refused(tokenizer):
    class Classifier(Oracle):
        def forward(self, **kwargs):
            return SimpleNamespace(logits=torch.zeros(1))

    with pytest.raises(ValueError, match="not for QA"):
        QuestionAnswering(squad_sample.dataset(6), tokenizer)(Classifier([]))
    with pytest.raises(ValueError, match="stride"):
        QuestionAnswering(squad_sample.dataset(6), tokenizer, 20, 20)
