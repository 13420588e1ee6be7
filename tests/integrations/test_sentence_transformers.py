"""The mixin beside sentence-transformers' trainer, whose losses run the model several times."""

import copy
import inspect
import pickle

import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import BertConfig, BertModel

from hf_reram import (
    ReRAMConfig,
    ReRAMTrainerMixin,
    calibrate,
    crossbar_layers,
    deploy,
    evaluate_robustness,
    patch_model,
    report_of,
    sampled_drift,
    unpatch_model,
)
from hf_reram.hub.push import _files
from tests.samples.devices import device, straight
from tests.samples.models import bert_batch
from tests.samples.texts import TEXTS, WORDS, tokenizer

sentence_transformers = pytest.importorskip("sentence_transformers")

from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer  # noqa: E402
from sentence_transformers import SentenceTransformerTrainingArguments as Arguments  # noqa: E402
from sentence_transformers.sentence_transformer import losses, modules  # noqa: E402
from sentence_transformers.sentence_transformer.evaluation import (  # noqa: E402
    BinaryClassificationEvaluator,
    EmbeddingSimilarityEvaluator,
    InformationRetrievalEvaluator,
    ParaphraseMiningEvaluator,
    SequentialEvaluator,
    TripletEvaluator,
)


class CrossbarTrainer(ReRAMTrainerMixin, SentenceTransformerTrainer):
    pass


PAIRS = {
    "anchor": ["the cell drifts", "a cell holds", "the weight", "years and years"] * 3,
    "positive": ["a weight for years .", "the weight drifts and the cell holds .", "a cell .", "for years"] * 3,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    sizes = {"vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    torch.manual_seed(0)
    BertModel(BertConfig(**sizes, **still, intermediate_size=32, initializer_range=0.2)).save_pretrained(folder)
    words = tokenizer()
    words.pad_token = "<end>"
    words.save_pretrained(folder)
    return str(folder)


def fresh(folder, dense=False):
    torch.manual_seed(0)
    parts = [modules.Transformer(folder), modules.Pooling(16), *([modules.Dense(16, 8)] if dense else [])]
    return SentenceTransformer(modules=parts, device="cpu")


def similarity(*scores):
    texts = ["the cell", "a weight", "years", "drifts"], ["a cell", "the weight drifts", "and", "for years ."]
    return EmbeddingSimilarityEvaluator(*texts, list(scores) or [0.9, 0.5, 0.1, 0.3], write_csv=False)


def trainer_of(tmp_path, model, kind=CrossbarTrainer, loss=losses.MultipleNegativesRankingLoss, **options):
    options = {"train_dataset": Dataset.from_dict(PAIRS), "loss": loss(model), **options}
    args = Arguments(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy=options.pop("save_strategy", "no"),
        save_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    return kind(model, args, **options)


def noisy(**fields):
    still = device(v0=1e6, read_noise=0.0)
    return straight(**{"device": still, "retention_loss": "drift", "retention_warmup": 0.0, **fields})


def logged(trainer, *names):
    return [[entry[name] for name in names] for entry in trainer.state.log_history if "loss" in entry]


def test_on_an_ideal_crossbar_it_trains_as_the_digital_trainer_does(tmp_path, folder):
    crossbars = trainer_of(tmp_path, fresh(folder), reram_config=straight(retention_loss="none"))
    assert len(crossbar_layers(crossbars.model)) == 7
    plain = trainer_of(tmp_path, fresh(folder), SentenceTransformerTrainer)
    for trainer in (crossbars, plain):
        trainer.train()
    for one, other in zip(*(logged(t, "loss", "grad_norm") for t in (crossbars, plain)), strict=True):
        assert one == pytest.approx(other, rel=0.03)  # the largest input of each layer gets no gradient


def test_it_calibrates_on_all_columns_of_its_own_batches(tmp_path, folder):
    """As by hand on the same texts, padded in another way or not at all."""
    trainer = trainer_of(tmp_path, fresh(folder), reram_config=straight(retention_loss="none"))
    texts = [text for column in PAIRS.values() for text in column]
    for whole in (True, False):
        model = fresh(folder)
        patch_model(model if whole else model[0].model, straight(retention_loss="none"))
        for batches in ([model.preprocess(texts)], [model.preprocess([text]) for text in texts]):
            calibrate(model, batches)
            layers = zip(crossbar_layers(model).values(), crossbar_layers(trainer.model).values())
            for layer, other in layers:
                assert float(other.input_range) == pytest.approx(float(layer.input_range), rel=1e-3)
                torch.testing.assert_close(other.input_offset, layer.input_offset, rtol=1e-3, atol=1e-4)


def test_several_data_sets_calibrate(tmp_path, folder):
    model = fresh(folder)
    data = DatasetDict(a=Dataset.from_dict(PAIRS), b=Dataset.from_dict(PAIRS).select(range(8)))
    loss = {"a": losses.MultipleNegativesRankingLoss(model), "b": losses.MultipleNegativesRankingLoss(model)}
    trainer = trainer_of(tmp_path, model, train_dataset=data, loss=lambda _: loss, reram_config=noisy())
    assert all(layer.calibrated for layer in crossbar_layers(model).values())
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("kind", ["output", "sensitivity"])
def test_the_terms_of_all_columns_join_the_loss(tmp_path, folder, kind):
    config = noisy(retention_loss=f"{kind}+drift", retention_weight=3.0)
    trainer = trainer_of(tmp_path, fresh(folder), reram_config=config)
    forwards = []
    trainer.model[0].model.register_forward_hook(lambda *_: forwards.append(1))
    trainer.train()
    assert len(forwards) == 2 * 2
    for total, task, retention in logged(trainer, "loss", "task_loss", "retention_loss"):
        assert total == pytest.approx(task + 3.0 * retention, rel=1e-4) and retention > 0


def test_cached_gradients_are_those_under_the_same_drift(tmp_path, folder):
    found = []
    for loss in (
        losses.MultipleNegativesRankingLoss,
        lambda model: losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2),
    ):
        trainer = trainer_of(tmp_path, fresh(folder), loss=loss, reram_config=noisy())
        trainer.train()
        found.append(logged(trainer, "loss", "grad_norm"))
    for one, other in zip(*found, strict=True):
        assert one == pytest.approx(other, rel=1e-3)


def test_cached_gradients_have_no_closed_form(tmp_path, folder):
    def cached(model):
        return losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2)

    trainer = trainer_of(tmp_path, fresh(folder), loss=cached, reram_config=noisy(retention_loss="output"))
    with pytest.raises(RuntimeError, match=r"cached gradients .* allowed is retention_loss='drift'"):
        trainer.train()


def test_evaluators_measure_chips(tmp_path, folder):
    model, evaluator = fresh(folder), similarity()
    trainer = trainer_of(
        tmp_path, model, eval_dataset=Dataset.from_dict(PAIRS), evaluator=evaluator, reram_config=noisy()
    )
    options = {"times": ["1d"], "seeds": 2, "progress": False}
    report, direct = trainer.evaluate_robustness(**options), evaluate_robustness(model, evaluator, **options)
    assert set(report.metrics) == {"loss", *direct.metrics}
    for one, other in zip(report.measurements, direct.measurements, strict=True):
        with deploy(model.eval(), "1d", seed=one.seed):
            by_hand = evaluator(model)
        for name in direct.metrics:
            assert one.metrics[name] == pytest.approx(by_hand[name]) == other.metrics[name]
    assert report.measurements[0].metrics != report.measurements[1].metrics


def test_what_is_saved_has_its_crossbars_and_is_the_same_chip(tmp_path, folder, caplog):
    trainer = trainer_of(tmp_path, fresh(folder, dense=True), reram_config=noisy(), evaluator=similarity())
    model = trainer.model
    assert "2.linear" not in crossbar_layers(model)  # it would be saved as a digital layer
    trainer.train()
    report = trainer.evaluate_robustness(["1d"], seeds=1, progress=False)
    trainer.save_model(str(tmp_path / "saved"))
    again = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert crossbar_layers(again).keys() == crossbar_layers(model).keys()
    for one, other in zip(crossbar_layers(again).values(), crossbar_layers(model).values()):
        assert one.calibrated and torch.equal(one.input_range, other.input_range)
    with deploy(model.eval(), "1d", seed=5), deploy(again.eval(), "1d", seed=5):
        aged = again.encode(TEXTS)
        assert model.encode(TEXTS) == pytest.approx(aged, abs=1e-5)
    assert again.encode(TEXTS) != pytest.approx(aged, abs=1e-3)
    assert report_of(again).measurements == report.measurements and "other weights" not in caplog.text
    assert report_of(again[0].model) is None
    again.train()
    with sampled_drift(again, seed=1):
        drifted = again(again.preprocess(TEXTS))["sentence_embedding"]
    assert not torch.allclose(drifted, again(again.preprocess(TEXTS))["sentence_embedding"], atol=1e-3)
    assert {"1_Pooling/config.json", "2_Dense/model.safetensors", "modules.json"} <= set(_files(tmp_path / "saved"))
    unpatch_model(model).save_pretrained(str(tmp_path / "digital"))
    assert not crossbar_layers(SentenceTransformer(str(tmp_path / "digital"), device="cpu"))


def test_copies_run_themselves(folder):
    """Also where the forward of the model inside is called past its hooks."""
    model = calibrate(patch_model(fresh(folder), noisy()), [fresh(folder).preprocess(TEXTS)])
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model[0].model))):
        inner = copied if isinstance(copied, BertModel) else copied[0].model
        assert inner.forward.model is inner
        with torch.no_grad():
            inner.embeddings.word_embeddings.weight.zero_()
            ids = torch.tensor([[2, 3, 4]])
            assert not torch.allclose(inner.forward(ids)[0], model[0].model.forward(ids)[0], atol=1e-2)
    assert inspect.signature(inner.forward) == inspect.signature(BertModel.forward.__get__(inner))


def test_it_resumes(tmp_path, folder):
    whole = trainer_of(tmp_path, fresh(folder), save_strategy="steps", reram_config=noisy())
    whole.train()
    again = trainer_of(tmp_path, fresh(folder), save_strategy="steps", reram_config=noisy())
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    one, two = whole.model.state_dict(), again.model.state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("wrong", [{"teacher": True}, {"reram_config": ReRAMConfig(retention_loss="consistency")}])
def test_what_compares_two_forwards_is_refused(tmp_path, folder, wrong):
    if "teacher" in wrong:
        wrong = {"teacher": fresh(folder)}
    with pytest.raises(ValueError, match="allowed are sentence-transformers' own losses"):
        trainer_of(tmp_path, fresh(folder), **{"reram_config": noisy(), **wrong})


def test_a_resumed_evaluation_knows_its_loss_and_its_evaluator(tmp_path, folder):
    model, data = fresh(folder), Dataset.from_dict(PAIRS)
    options = {"times": ["1d"], "seeds": 1, "progress": False, "references": False, "resume": tmp_path / "log.jsonl"}

    def run(*scores, scale=20.0):
        trainer = trainer_of(
            tmp_path,
            model,
            loss=lambda model: losses.MultipleNegativesRankingLoss(model, scale=scale),
            eval_dataset=data,
            evaluator=similarity(*scores),
            reram_config=noisy(),
        )
        return trainer.evaluate_robustness(**options).measurements

    assert run() == run()
    with pytest.raises(ValueError, match=r"what differs: 'trainer', 'trainer\.evaluator'\)"):
        run(0.1, 0.2, 0.3, 0.4)
    with pytest.raises(ValueError, match=r"what differs: 'trainer', 'trainer\.loss'\)"):
        run(scale=5.0)


def test_models_are_exported_beside_the_package(tiny_bert):
    """Which asks their ``forward`` for its code."""
    patch_model(tiny_bert.eval(), ReRAMConfig())
    calibrate(tiny_bert, [bert_batch()])
    assert "forward" in vars(tiny_bert)
    batch = {name: value for name, value in bert_batch().items() if name != "labels"}
    with torch.no_grad():
        found = torch.export.export(tiny_bert, (), batch, strict=False).module()(**batch).logits
        torch.testing.assert_close(found, tiny_bert(**batch).logits)


ONE, OTHER = ["the cell", "a weight", "years", "drifts"], ["a cell", "the weight drifts", "and", "for years ."]
BY_ID = [{f"{kind}{i}": text for i, text in enumerate(texts)} for kind, texts in (("q", ONE), ("c", OTHER))]
EVALUATORS = {
    "similarity": lambda **options: EmbeddingSimilarityEvaluator(ONE, OTHER, [0.9, 0.5, 0.1, 0.3], **options),
    "binary": lambda **options: BinaryClassificationEvaluator(ONE, OTHER, [1, 0, 1, 0], **options),
    "triplet": lambda **options: TripletEvaluator(ONE, OTHER, ONE[::-1], **options),
    "retrieval": lambda **options: InformationRetrievalEvaluator(*BY_ID, {f"q{i}": {f"c{i}"} for i in range(4)}),
    "paraphrase": lambda **options: ParaphraseMiningEvaluator(BY_ID[0], duplicates_list=[("q0", "q1"), ("q2", "q3")]),
    "sequential": lambda **options: SequentialEvaluator([similarity(), EVALUATORS["triplet"]()]),
}


@pytest.mark.parametrize("kind", EVALUATORS)
def test_an_evaluator_is_the_same_after_its_use(kind, tmp_path, folder):
    model = calibrate(patch_model(fresh(folder), ReRAMConfig()), [fresh(folder).preprocess(TEXTS[:4])])
    options = {"times": ["1d"], "progress": False, "resume": tmp_path / "log.jsonl"}
    evaluator = EVALUATORS[kind]()
    first = evaluate_robustness(model, evaluator, seeds=1, **options)
    more = evaluate_robustness(model, evaluator, seeds=2, **options)
    assert more.measurements[:1] == first.measurements and len(more.measurements) == 2
    assert evaluate_robustness(model, EVALUATORS[kind](), seeds=2, **options).measurements == more.measurements
    if kind in ("similarity", "binary", "triplet"):
        named = EVALUATORS[kind](similarity_fn_names=["cosine"])
        assert evaluate_robustness(model, named, seeds=2, **options).measurements == more.measurements
        with pytest.raises(ValueError, match=r"what differs: 'evaluation', 'evaluation\.similarity_fn_names'"):
            evaluate_robustness(model, EVALUATORS[kind](similarity_fn_names=["euclidean"]), seeds=2, **options)
    if kind in ("similarity", "retrieval"):
        model.similarity_fn_name = "dot"
        with pytest.raises(ValueError, match="what differs: 'evaluation'"):
            evaluate_robustness(model, EVALUATORS[kind](), seeds=2, **options)
