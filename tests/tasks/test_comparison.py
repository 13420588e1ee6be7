"""What the compared methods differ in, and what a folder's comparison may be resumed with."""

import copy
import json
import re
import threading
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import (
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from hf_reram import ReRAMConfig, ReRAMTrainer
from hf_reram.evaluation.content import part_of
from hf_reram.model.digest import weights_digest
from hf_reram.tasks import About, Perplexity, claim_folder, packed, run_protocol
from hf_reram.tasks.comparison import CONTROL, METHODS, OURS
from hf_reram.tasks.question_answering import QuestionAnswering
from hf_reram.tasks.text_classification import TextClassification
from hf_reram.tasks.token_classification import TokenClassification
from tests.samples import squad
from tests.samples.experts import expert_inputs, mixtral
from tests.samples.models import tiny_bert
from tests.samples.texts import TEXTS, WORDS, llama, tokenizer

NAIVE, CALIBRATED = METHODS[:2]


class Comparison:
    """A small one without training, whose parts can be changed before it is run again."""

    def __init__(self, folder: Path):
        torch.manual_seed(0)
        self.folder, self.base, self.config = folder, llama(), ReRAMConfig(device="cmo-hfox-ibm")
        self.held, self.train, self.streamed = TEXTS[:2], TEXTS[1:], False
        self.arguments = TrainingArguments(str(folder), max_steps=1, use_cpu=True, report_to=[], disable_tqdm=True)

    def evaluate(self) -> Perplexity:
        return Perplexity(packed(self.held, tokenizer(), 16))

    def trainer(self, config: ReRAMConfig, folder: str) -> ReRAMTrainer:
        rows = [window.tolist() for window in packed(self.train, tokenizer(), 4) if len(window) == 4]
        data = Dataset.from_dict({"input_ids": rows, "labels": rows})
        data = data.to_iterable_dataset() if self.streamed else data
        model = copy.deepcopy(self.base)
        return ReRAMTrainer(
            model, self.arguments, train_dataset=data, data_collator=default_data_collator, reram_config=config
        )

    def run(
        self,
        chips: int = 1,
        times: tuple[str, ...] = ("1d",),
        methods=(NAIVE,),
        label_free=False,
        metric="perplexity",
        **more,
    ):
        about = About("text-generation", metric, "texts", "base", "robust", label_free=label_free)
        return run_protocol(
            self.trainer, self.evaluate(), self.config, self.folder, times, about, chips, methods, **more
        )


@pytest.fixture
def comparison(tmp_path) -> Comparison:
    return Comparison(tmp_path)


def cut(log: Path) -> None:
    """As a kill before the last chip leaves it."""
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))


@pytest.mark.parametrize("killed", [True, False])
def test_other_evaluated_texts_are_refused_in_the_same_folder(comparison, killed):
    comparison.run(chips=2)
    if killed:
        cut(comparison.folder / "naive-crossbar" / "chips.jsonl")
    comparison.held = TEXTS[1:3]
    named = r"\['content\.evaluation', 'content\.evaluation\.batches'\]"
    with pytest.raises(ValueError, match=rf"holds a comparison with other values of {named}.* say with key="):
        comparison.run(chips=2)


def test_a_file_that_an_evaluation_names_counts(comparison, tmp_path):
    """And no folder that the comparison itself is in."""
    file, folder, inner = tmp_path / "factor.txt", f"{comparison.folder}/", comparison.evaluate()

    def evaluate(model):
        open(f"{folder}seen.txt", "a").close()
        return {"perplexity": float(file.read_text()) * inner(model)["perplexity"]}

    file.write_text("1")
    comparison.evaluate = lambda: evaluate
    first, again = comparison.run(), comparison.run(chips=2)
    assert again[NAIVE.label].measurements[:1] == first[NAIVE.label].measurements
    file.write_text("2")
    with pytest.raises(ValueError, match=rf"'content\.evaluation\.file {re.escape(str(file))}'\]: .* say with key="):
        comparison.run()


def test_figures_of_other_texts_are_not_resumed_without_the_protocol_either(comparison):
    """Each file tells by itself what it is of."""
    comparison.run()
    (comparison.folder / "protocol.json").unlink()
    comparison.held = TEXTS[1:3]
    with pytest.raises(ValueError, match="runs of other weights, another config or another evaluation"):
        comparison.run()
    (comparison.folder / "naive-crossbar" / "chips.jsonl").unlink()
    found = comparison.run()["naive crossbar"].about["base_metrics"]
    assert found == pytest.approx(comparison.evaluate()(comparison.base), rel=1e-6)


def test_another_base_model_in_the_same_place_is_refused(comparison):
    comparison.run()
    with torch.no_grad():
        comparison.base.lm_head.weight[0, 0] += 0.01
    with pytest.raises(ValueError, match=r"other values of \['content.base'\]"):
        comparison.run()


def test_the_same_weights_with_another_config_are_another_base_model(comparison):
    comparison.run()
    comparison.base.config.hidden_act = "gelu"
    with pytest.raises(ValueError, match=r"other values of \['content.base'\]"):
        comparison.run()


def test_the_same_weights_that_generate_otherwise_are_another_base_model(comparison):
    comparison.run()
    comparison.base.generation_config.num_beams = 4
    with pytest.raises(ValueError, match=r"other values of \['content.base'\]"):
        comparison.run()


def test_other_training_data_are_refused(comparison):
    comparison.run()
    comparison.train = TEXTS[:3]
    with pytest.raises(ValueError, match=r"other values of \['content.training data'\]"):
        comparison.run()


def test_training_data_that_nothing_tells_are_left_out(comparison, caplog):
    comparison.streamed = True
    with caplog.at_level("WARNING", "hf_reram"):
        report = comparison.run()
    assert "other training data would not be noticed" in caplog.text
    assert json.loads((comparison.folder / "protocol.json").read_text())["content"]["training data"] is None
    assert comparison.run()["naive crossbar"].measurements == report["naive crossbar"].measurements


def test_a_folder_that_does_not_say_of_what_its_figures_are_is_refused(comparison):
    comparison.run()
    file = comparison.folder / "protocol.json"
    before = json.loads(file.read_text())
    before.pop("content")
    file.write_text(json.dumps(before))
    with pytest.raises(ValueError, match=r"other values of \['content.evaluation'"):
        comparison.run()


@pytest.mark.parametrize("left", ["checkpoint-300/trainer_state.json", "model/config.json", "trained.txt"])
def test_trainings_of_which_nothing_tells_what_they_are_are_refused(comparison, monkeypatch, left):
    """They would be resumed, or taken as they are."""
    file = comparison.folder / OURS.folder / left
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    monkeypatch.setattr(comparison, "trainer", None)
    name = left.partition("/")[0]
    with pytest.raises(ValueError, match=f"holds hf-reram/{name} and no protocol.json.*: allowed is another folder"):
        comparison.run()
    with pytest.raises(ValueError, match=f"holds {name} and no protocol.json"):
        claim_folder(comparison.folder / OURS.folder, {"max_steps": 3}, comparison.base, [1], "a base model")
    assert [path.name for path in comparison.folder.iterdir()] == [OURS.folder]


def test_a_claimed_folder_is_another_trainings_no_more(comparison):
    base = comparison.folder / "base"
    for _ in range(2):
        claim_folder(base, {"max_steps": 3}, comparison.base, [1], "a base model")
        (base / "model").mkdir(exist_ok=True)
    with pytest.raises(ValueError, match=r"holds a base model with other values of \['settings.max_steps'\]"):
        claim_folder(base, {"max_steps": 4}, comparison.base, [1], "a base model")
    assert comparison.run()[NAIVE.label].measurements  # beside a base that was trained there


def test_two_processes_compare_as_one(python, tmp_path):
    """Although ``evaluate`` holds another device in each; the first one alone writes what all share."""
    folder, out = tmp_path / "compared", tmp_path / "found.pt"
    for done in python.run_two("-m", "tests.tasks.comparison_script", str(folder), str(out)):
        assert done.returncode == 0, done.stderr[-3000:]
    first, second = torch.load(out, weights_only=False)
    assert first["keys"] != second["keys"]
    assert first["reports"] == second["reports"]  # of a run and of one that goes on with it
    for before, after in first["reports"]:
        assert before["measurements"] == after["measurements"] and len(after["measurements"]) == 2
    assert (first["again"], second["again"]) == (0, 0)
    assert not second["written"] and {"protocol.json", "base.json", "digital.json"} <= first["written"]
    assert first["refused"].endswith("allowed are the same ones, which resumes it, or another folder")
    assert second["refused"] == f"the check of a folder failed in process 0: ValueError: {first['refused']}"


def test_more_chips_other_times_and_more_methods_go_on(comparison):
    """What was measured stays, and the rest is what it is in a folder of its own."""
    comparison.run(chips=1, times=("1d",))
    log = comparison.folder / "naive-crossbar" / "chips.jsonl"
    before = log.read_text()
    both = {"chips": 2, "times": ("1d", "1y"), "methods": (CALIBRATED, NAIVE)}
    found = comparison.run(**both)
    assert log.read_text().startswith(before)
    assert len(log.read_text().split("\n\n")) == 2 + 2 * 2
    fresh = Comparison(comparison.folder / "fresh").run(**both)
    for label in ("naive crossbar", CALIBRATED.label):
        assert found[label].measurements == fresh[label].measurements and len(found[label].measurements) == 4


def test_an_evaluation_that_nothing_tells_needs_a_key(comparison):
    lock = threading.Lock()

    def evaluate(model):
        assert lock is not None
        return Perplexity(packed(TEXTS[:2], tokenizer(), 16))(model)

    comparison.evaluate = lambda: evaluate
    with pytest.raises(ValueError, match="the evaluation cannot be told from another one: say with key="):
        comparison.run()
    comparison.run(key="two texts")
    with pytest.raises(ValueError, match=r"other values of \['content.evaluation'\]"):
        comparison.run(key="three texts")


def test_a_key_that_is_no_json_value_is_refused_before_any_work(comparison, monkeypatch):
    monkeypatch.setattr(comparison, "trainer", None)
    with pytest.raises(ValueError, match=r"key=.*: allowed is a JSON value"):
        comparison.run(key={"split": object()})


def test_figures_of_another_version_are_measured_again(comparison, monkeypatch):
    """So that all are of the one that the report names."""
    first = comparison.run()[NAIVE.label]
    calls = []
    evaluate = comparison.evaluate()
    comparison.evaluate = lambda: lambda model: calls.append(1) or evaluate(model)
    assert comparison.run(key=part_of("evaluation", evaluate))[NAIVE.label] == first and not calls
    monkeypatch.setattr(torch, "__version__", "0.1")
    again = comparison.run(key=part_of("evaluation", evaluate))[NAIVE.label]
    assert len(calls) == 4 and again.measurements == first.measurements  # the base, the references, the chip
    assert again.about["versions"]["torch"] == "0.1" != first.about["versions"]["torch"]


def test_fewer_examples_a_forward_go_on(comparison):
    """As after a device has run out of memory."""
    comparison.run()
    log = comparison.folder / "naive-crossbar" / "chips.jsonl"
    before = log.read_text()
    comparison.evaluate = lambda: Perplexity(packed(comparison.held, tokenizer(), 16), batch_size=1)
    comparison.run(chips=2)
    assert log.read_text().startswith(before) and len(log.read_text().split("\n\n")) == 4


HEADS = {
    "text": BertForSequenceClassification,
    "token": BertForTokenClassification,
    "question": BertForQuestionAnswering,
}


@pytest.mark.parametrize("kind", HEADS)
def test_evaluations_are_told_by_their_rows(kind):
    """And by nothing that they remember of a run."""

    def made(size=2, last="cid"):
        if kind == "question":
            return QuestionAnswering(squad.dataset(4 if last == "cid" else 5), squad.tokenizer(), batch_size=size)
        texts = ["ann lives in oslo", "bob lives in the city of paris", f"{last} lives"]
        if kind == "text":
            rows = Dataset.from_dict({"text": texts, "label": [0, 1, 1]})
            return TextClassification(rows, squad.tokenizer(), 2, batch_size=size)
        words = [text.split() for text in texts]
        rows = Dataset.from_dict({"tokens": words, "tags": [["X"] * len(row) for row in words]})
        return TokenClassification(rows, squad.tokenizer(), {0: "X", 1: "Y"}, batch_size=size)

    evaluate = made()
    found = [part_of("evaluation", made(size)) for size in (1, 2, 3)]
    assert evaluate(HEADS[kind](tiny_bert(num_labels=2).config).eval()) and part_of("evaluation", evaluate) == found[0]
    assert len({*found}) == 1 and len(made(1).batches) > len(made(3).batches)
    assert part_of("evaluation", made(last="dan")) != found[0]


def test_experts_that_no_token_reaches_are_named_where_that_is_allowed(comparison):
    comparison.base = mixtral(experts=6, chosen=1, vocab_size=len(WORDS))
    batches = comparison.evaluate().batches
    reached = {
        number
        for batch in batches
        for number, (rows, *_) in enumerate(expert_inputs(comparison.base, batch))
        if len(rows)
    }
    layers = [f"model.layers.0.mlp.experts.{i}" for i in range(6) if i not in reached]
    expected = [f"{layer}.{part}" for layer in layers for part in ("gate_up", "down")]
    assert expected
    with pytest.raises(RuntimeError, match=f"{len(expected)} of 17 crossbar layers were not called.*--allow-uncalled"):
        comparison.run(methods=(CALIBRATED,))
    report = comparison.run(methods=(CALIBRATED,), allow_uncalled=True)[CALIBRATED.label]
    assert report.uncalled == expected
    said = (comparison.folder / "report.md").read_text()
    assert f"were no chip, of {CALIBRATED.label}: {', '.join(expected)}." in said


def test_the_base_is_the_same_however_it_is_mapped(comparison):
    """And with adapters beside it; another weight is another base."""
    from peft import LoraConfig, get_peft_model

    options = {"weight_clip": 2.0, "equalize_inputs": True, "redundancy": 0.25, "input_range": "learned"}
    config = ReRAMConfig(device="cmo-hfox-ibm", **options)
    models = [comparison.trainer(method.config(config), str(comparison.folder)).model for method in (NAIVE, OURS)]
    assert {weights_digest(model, base=True) for model in models} == {weights_digest(comparison.base)}
    assert len({weights_digest(model) for model in models}) > 1
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)  # of random numbers
    adapted = [get_peft_model(model, lora) for model in models]
    assert len({weights_digest(model, base=True) for model in adapted}) == 1
    with torch.no_grad():
        adapted[0].get_base_model().lm_head.weight[0, 0] += 0.01
    assert len({weights_digest(model, base=True) for model in adapted}) == 2


def test_the_control_is_what_a_plain_trainer_makes_of_the_base(comparison):
    found = comparison.run(methods=(NAIVE, CONTROL))[NAIVE.label].about
    plain = comparison.trainer(comparison.config, str(comparison.folder))
    base = copy.deepcopy(comparison.base)
    data, collator = plain.train_dataset, plain.data_collator
    Trainer(base, comparison.arguments, train_dataset=data, data_collator=collator).train()
    expected = comparison.evaluate()(base)
    assert found["control_metrics"] == pytest.approx(expected, rel=1e-6)
    assert found["base_metrics"]["perplexity"] != pytest.approx(expected["perplexity"], rel=1e-3)
    row = f"| digital, finetuned | – | {expected['perplexity']:.1f} |"
    assert row in (comparison.folder / "report.md").read_text()


def test_the_control_is_trained_once(comparison, monkeypatch):
    first = comparison.run(methods=(CONTROL, NAIVE))[NAIVE.label].about["control_metrics"]
    monkeypatch.setattr(ReRAMTrainer, "train_digitally", None)
    assert comparison.run(methods=(CONTROL, NAIVE))[NAIVE.label].about["control_metrics"] == first


def test_a_control_of_other_texts_is_measured_again(comparison):
    comparison.run(methods=(CONTROL, NAIVE))
    for file in ("protocol.json", "naive-crossbar/chips.jsonl", "digital-finetuned/trained.txt"):
        (comparison.folder / file).unlink()
    comparison.held = TEXTS[1:3]
    found = comparison.run(methods=(CONTROL, NAIVE))[NAIVE.label].about["control_metrics"]
    comparison.folder /= "other"
    assert found == comparison.run(methods=(CONTROL, NAIVE))[NAIVE.label].about["control_metrics"]


def test_a_base_that_would_follow_itself_has_no_control(comparison):
    report = comparison.run(methods=(CONTROL, NAIVE), label_free=True)[NAIVE.label]
    assert report.about["control_metrics"] == {} and not (comparison.folder / "digital-finetuned").exists()
    assert "digital, finetuned" not in (comparison.folder / "report.md").read_text()


def test_the_base_and_the_control_are_measured_in_evaluation_mode(comparison):
    comparison.base = llama(attention_dropout=0.5).train()

    def evaluate(model) -> float:
        assert not any(module.training for module in model.modules())
        with torch.no_grad():
            return float(model(torch.arange(6)[None]).logits.sum())

    comparison.evaluate = lambda: evaluate
    about = comparison.run(methods=(NAIVE, CONTROL), metric="metric", key="sum")[NAIVE.label].about
    assert about["base_metrics"] == {"metric": pytest.approx(evaluate(comparison.base.eval()), rel=1e-6)}
    assert about["control_metrics"].keys() == {"metric"} and about["control_metrics"] != about["base_metrics"]


def test_a_control_alone_is_no_comparison(comparison):
    with pytest.raises(ValueError, match="allowed is at least one that is on crossbars"):
        comparison.run(methods=(CONTROL,))


def test_methods_differ_from_ours_in_what_their_names_say():
    options = {"weight_clip": 2.5, "range_shrink": 0.5, "equalize_inputs": True}
    options |= {"weight_scale": "per_tile", "tile_size": 64, "redundancy": 0.1}
    config = ReRAMConfig(device="cmo-hfox-ibm", retention_loss="output", **options)
    ours = config.to_dict()
    found = {}
    for method in METHODS:
        theirs = method.config(config).to_dict()
        found[method.label] = {key: theirs[key] for key in ours if theirs[key] != ours[key]}
    naive = {"range_shrink": 1.0, "weight_clip": None, "retention_loss": "none"}
    naive |= {"center_inputs": False, "equalize_inputs": False, "weight_scale": "per_channel", "redundancy": 0.0}
    assert found.pop("naive crossbar") == found.pop(CONTROL.label) == naive
    assert found.pop("finetuned with noise injection") == {"retention_loss": "noise"}
    assert found.pop(OURS.label) == {}
    assert all(changes == {"retention_loss": "none"} for changes in found.values()) and len(found) == 2
