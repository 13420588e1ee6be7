"""``pipeline`` on robust checkpoints."""

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)

from hf_reram import ReRAMConfig, calibrate, crossbar_layers, deploy, patch_model
from hf_reram.integrations.pipeline import QuestionAnsweringPipeline
from hf_reram.tasks.question_answering import QuestionAnswering
from tests.samples import squad as squad_sample


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """A calibrated crossbar model, untrained."""
    folder = tmp_path_factory.mktemp("robust")
    fast = squad_sample.tokenizer()
    model = squad_sample.model(len(fast))
    evaluate = QuestionAnswering(squad_sample.dataset(), fast, 64, 8)
    patch_model(model, ReRAMConfig(device="cmo-hfox-ibm"))
    calibrate(model, [dict(batch) for _, batch in evaluate.batches])
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def answer(checkpoint):
    return pipeline("question-answering", model=checkpoint, device="cpu")


def test_the_checkpoint_answers_as_a_crossbar_model(answer):
    assert isinstance(answer, QuestionAnsweringPipeline) and crossbar_layers(answer.model)
    row = squad_sample.rows()[1]
    got = answer(question=row["question"], context=row["context"])
    assert got["answer"] == row["context"][got["start"] : got["end"]] and 0 < got["score"] <= 1


def test_answers_are_those_of_the_evaluation(answer):
    """The evaluation's best span, where a question has one window."""
    rows = squad_sample.rows()
    evaluate = QuestionAnswering(squad_sample.dataset(), answer.tokenizer, 64, 8)
    expected = [found["n_best"][0]["text"] for found in evaluate.predict(answer.model)]
    got = answer([{"question": row["question"], "context": row["context"]} for row in rows])
    assert [found["answer"] for found in got] == expected


@pytest.mark.parametrize("side", ["right", "left"])
def test_batches_change_nothing(checkpoint, side):
    model = AutoModelForQuestionAnswering.from_pretrained(checkpoint)
    # The absolute positions of BERT would shift with padding on the left.
    with torch.no_grad():
        model.bert.embeddings.position_embeddings.weight.zero_()
    fast = AutoTokenizer.from_pretrained(checkpoint, padding_side=side)
    pipe = pipeline("question-answering", model=model, tokenizer=fast, device="cpu")
    rows = squad_sample.rows(6)
    inputs = {key: [row[key] for row in rows] for key in ("question", "context")}
    alone, together = (
        pipe(**inputs, max_seq_len=24, doc_stride=4),
        pipe(**inputs, batch_size=4, max_seq_len=24, doc_stride=4),
    )
    for one, other in zip(alone, together, strict=True):
        assert one["answer"] == other["answer"] and one["score"] == pytest.approx(other["score"], abs=1e-5)


def test_long_contexts_are_read_to_their_end(answer):
    """The same best span as over all windows, by hand."""
    row = {"question": "where does bob live ?", "context": "the sea was blue . " * 20 + "bob lives in rome ."}
    got = answer(**row, max_seq_len=24, doc_stride=4, top_k=1000)
    assert max(found["end"] for found in got) == len(row["context"])
    assert len({(found["start"], found["end"]) for found in got}) == len(got)
    assert [found["score"] for found in got] == sorted((found["score"] for found in got), reverse=True)


def test_no_answer_only_if_allowed(answer):
    with torch.no_grad():
        answer.model.qa_outputs.weight.zero_()
    row = squad_sample.rows()[0]
    inputs = {"question": row["question"], "context": row["context"]}
    assert answer(inputs)["answer"]
    found = answer(inputs, top_k=10_000, handle_impossible_answer=True)
    empty = [one for one in found if not one["answer"]]
    assert len(empty) == 1 and (empty[0]["start"], empty[0]["end"]) == (0, 0)
    # All starts and ends are alike: the first token and the context's share the probability.
    tokens = len(answer.tokenizer(row["context"], add_special_tokens=False)["input_ids"]) + 1
    assert empty[0]["score"] == pytest.approx(tokens**-2)


@pytest.mark.parametrize(
    "inputs",
    [
        {"question": "who ?"},
        {"question": "who ?", "context": ""},
        {"question": "", "context": "ann"},
        {"question": ["who ?", "where ?"], "context": ["ann"]},
        {"question": "who ?", "context": "ann", "top_k": 0},
        {"question": "who ?", "context": "ann", "max_seq_len": 2},
    ],
)
def test_bad_input(answer, inputs):
    with pytest.raises(ValueError):
        answer(**inputs)


def test_other_pipelines_take_crossbar_checkpoints(tmp_path):
    config = BertConfig(vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    images = ViTConfig(image_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    fast = squad_sample.tokenizer()
    inputs = {
        "text-classification": (
            BertForSequenceClassification(config),
            fast,
            dict(fast("ann lives", return_tensors="pt")),
        ),
        "image-classification": (
            ViTForImageClassification(images),
            ViTImageProcessor(size={"height": 32, "width": 32}),
            {"pixel_values": torch.randn(2, 3, 32, 32)},
        ),
    }
    asked = {"text-classification": "bob lives in rome", "image-classification": Image.new("RGB", (40, 50), "red")}
    for task, (model, processor, batch) in inputs.items():
        patch_model(model.eval(), ReRAMConfig(device="cmo-hfox-ibm"))
        calibrate(model, [batch])
        model.save_pretrained(tmp_path / task)
        processor.save_pretrained(tmp_path / task)
        pipe = pipeline(task, model=str(tmp_path / task), device="cpu")
        assert len(crossbar_layers(pipe.model)) == len(crossbar_layers(model))
        now = pipe(asked[task])
        assert sum(found["score"] for found in pipe(asked[task], top_k=None)) == pytest.approx(1, abs=1e-5)
        with deploy(pipe.model, "10y", seed=1):
            assert pipe(asked[task]) != now
