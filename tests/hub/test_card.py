"""The model card: what it says, what the Hub makes of it, and what it keeps of a person's text."""

import ast
import json
import logging

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from hf_reram import ReRAMConfig, RobustnessReport
from hf_reram.evaluation.report import Measurement
from hf_reram.hub.about import About
from hf_reram.hub.card import BEGIN, END, UNMEASURED, model_card
from hf_reram.hub.publish import holds_figures, publish, read_comparison, remove_foreign, write_card


def report(value: float = 50.0, **about) -> RobustnessReport:
    known = {"task": "question-answering", "metric": "f1", "dataset": "rajpurkar/squad_v2", "name": "robust"}
    known |= {"base_model": "deepset/base", "base_metrics": {"f1": 58.25, "exact": 40.0}, "command": "run me"}
    return RobustnessReport(
        [
            Measurement(time, None, chip, {"f1": value + chip, "exact": value - 10})
            for time in (1.0, 86400.0)
            for chip in (0, 1, 2)
        ],
        digital={"f1": 57.5, "exact": 41.0},
        ideal={"f1": 57.0, "exact": 40.5},
        config=ReRAMConfig(device="cmo-hfox-ibm", retention_times=["10y"]).to_dict(),
        summary="7 crossbar layers",
        notes=["assumed, not measured: v0"],
        about=About.from_dict(known | about).to_dict(),
    )


def test_metadata_is_what_the_hub_reads():
    card = ModelCard(str(model_card(report())))
    data = card.data.to_dict()
    assert data["library_name"] == "hf_reram" and data["pipeline_tag"] == "question-answering"
    assert (data["base_model"], data["base_model_relation"]) == ("deepset/base", "finetune")
    assert data["datasets"] == ["rajpurkar/squad_v2"] and "reram" in data["tags"]
    name, results = model_index_to_eval_results(data["model-index"])
    assert name == "robust"
    values = {r.metric_name: r.metric_value for r in results}
    assert values["f1, cmo-hfox-ibm 1d after programming, mean of 3 chips"] == 51.0
    assert values["f1, ideal crossbar"] == 57.0


def test_body_says_how_to_load_it_and_what_it_reaches():
    text = model_card(report(examples=120, training=["5 steps"], date="2026-01-01")).text
    assert 'AutoModelForQuestionAnswering.from_pretrained("robust")' in text
    assert "f1: 51.0 ± 1.0 on chips 1d after programming, 58.2 of the digital base" in text
    assert "120 examples" in text and "- 5 steps" in text and "run me" in text
    assert "| digital base | – | 58.2 | 58.2 |" in text
    assert "Assumed, not measured: v0." in text
    assert "\n\n\n" not in text


def test_a_card_tells_of_a_training_only_where_one_is_known():
    for about in ({"training": ["5 steps"]}, {"label_free": True}, {"co2_grams": 3.0}):
        text = model_card(report(**about)).text
        assert "base), finetuned to keep its accuracy on simulated cmo-hfox-ibm ReRAM crossbars, whose" in text
        assert "- retention loss “drift”, for 10y at 298.15 K" in text
    text = model_card(report()).text
    assert "base) on simulated cmo-hfox-ibm ReRAM crossbars, whose" in text
    assert "- none is known of; mapped for 10y at 298.15 K" in text
    assert "finetuned" not in text and "retention loss" not in text


def test_a_card_shows_the_base_finetuned_digitally_beside_the_base():
    text = model_card(report(control_metrics={"f1": 59.75, "exact": 41.0})).text
    assert "58.2 of the digital base, 59.8 of the base finetuned digitally." in text
    assert "| digital, finetuned | – | 59.8 | 59.8 |" in text
    assert "| f1 | 58.2 | 59.8 | 51.0 |" in text


def test_a_card_of_one_hot_chip_says_so_and_claims_no_spread():
    found = report()
    found.measurements = [Measurement(m.time, 423.15, m.seed, m.metrics) for m in found.measurements if m.seed == 0]
    card = model_card(found)
    assert "f1: 50.0 on one chip 1d after programming at 423.15 K, 58.2 of the digital base" in card.text
    assert ", of a single chip at 423.15 K, so that there is no spread:" in card.text
    _, results = model_index_to_eval_results(card.data.to_dict()["model-index"])
    values = {r.metric_name: r.metric_value for r in results}
    assert values["f1, cmo-hfox-ibm 1d after programming at 423.15 K, of one chip"] == 50.0
    assert "±" not in card.text


def test_a_card_counts_the_chips_of_each_figure():
    found = report()
    found.measurements[3].metrics["f1"] = float("nan")
    del found.measurements[4].metrics["exact"]
    found.ideal["exact"] = float("nan")
    card = model_card(found)
    assert "mean ± standard deviation over 3 chips; over 2: f1 of robust after 1d:" in card.text
    assert "f1: 51.5 ± 0.7 on 2 of 3 chips 1d after programming, 58.2 of the digital base" in card.text
    assert "Mean over chips after 1d:" in card.text  # both of two
    _, results = model_index_to_eval_results(card.data.to_dict()["model-index"])
    names = {r.metric_name for r in results}
    assert "f1, cmo-hfox-ibm 1d after programming, mean of 2 chips" in names
    assert "exact, ideal crossbar" not in names


def test_a_comparison_without_measurements_is_none(tmp_path):
    found = report()
    found.measurements = []
    (tmp_path / "comparison.json").write_text(json.dumps({"a": report().to_dict(), "b": found.to_dict()}))
    with pytest.raises(ValueError, match=r"comparison\.json holds no measurements of \['b'\]"):
        read_comparison(tmp_path / "comparison.json")


@pytest.mark.parametrize("base_model", ["minilm", "./minilm", "/models/minilm"])
def test_a_local_base_is_no_hub_id(base_model):
    data = model_card(report(base_model=base_model, dataset="a file")).data.to_dict()
    assert "base_model" not in data and "datasets" not in data


def test_writing_again_keeps_what_a_person_wrote(tmp_path):
    file = tmp_path / "README.md"
    write_card(file, model_card(report(50.0)))
    text = file.read_text().replace(BEGIN, "Our lab's note.\n\n" + BEGIN).replace(END, END + "\n\nAsk Ann.")
    file.write_text(text.replace("---\n", "---\nlicense: apache-2.0\n", 1).replace("- reram", "- reram\n- mine"))
    write_card(file, model_card(report(60.0)))
    card = ModelCard.load(file)
    assert card.text.index("Our lab's note.") < card.text.index(BEGIN) < card.text.index(END)
    assert "Ask Ann." in card.text and "61.0 ± 1.0" in card.text and "51.0 ± 1.0" not in card.text
    assert card.data.license == "apache-2.0" and "mine" in card.data.tags and card.data.tags.count("reram") == 1
    before = file.read_text()
    write_card(file, model_card(report(60.0)))
    assert file.read_text() == before


def test_a_card_without_marks_is_kept_whole_below(tmp_path):
    file = tmp_path / "README.md"
    file.write_text("---\nlicense: mit\n---\n# Mine\n")
    write_card(file, model_card(report()))
    card = ModelCard.load(file)
    assert card.data.license == "mit" and card.text.strip().endswith("# Mine")
    file.write_text(file.read_text().replace(END, ""))
    with pytest.raises(ValueError, match="only one of the marks"):
        write_card(file, model_card(report()))


def test_published_files_give_the_card_again(tmp_path):
    rows = {"naive crossbar": report(30.0), "hf_reram": report()}
    publish(tmp_path, rows["hf_reram"], rows)
    again = RobustnessReport.from_json(tmp_path / "robustness.json")
    card = model_card(again, read_comparison(tmp_path / "comparison.json"))
    assert str(card).strip() == (tmp_path / "README.md").read_text().strip()
    assert (tmp_path / "robustness.png").stat().st_size > 1000
    yaml.safe_load((tmp_path / "README.md").read_text().split("---")[1])


def test_a_report_that_says_nothing_about_its_model_is_refused():
    bare = report()
    bare.about = {}
    with pytest.raises(ValueError, match="'about' is empty"):
        model_card(bare)
    bare.about = {"tsak": "x"}
    with pytest.raises(ValueError, match="tsak"):
        model_card(bare)


EVIL = [
    'x"); import os; os.system("id") #',
    "[click](javascript:alert(1))",
    "<script>alert(1)</script>",
    "a\n\n# Heading\n\n```python\nimport os\n```",
    END,
    BEGIN,
    "`; rm -rf ~ #",
    "| a | b |\n| - | - |",
    "---\nlicense: mit\n---",
    "{{ config }} {% raw %}",
    "$\\frac$",
]


@pytest.mark.parametrize("evil", EVIL)
def test_names_and_notes_are_text_and_no_code(evil, tmp_path):
    """Wherever a stranger's report has a text, the card has its own lines alone, and Python that calls nothing else."""
    device = {**ReRAMConfig(device="cmo-hfox-ibm").device.to_dict(), "name": evil, "source": evil}
    about: dict = dict.fromkeys(("name", "base_model", "repo", "dataset", "dataset_split", "command", "date"), evil)
    about |= {"training": [evil], "versions": {evil: evil}, "metric": evil, "base_metrics": {evil: 1.0}}
    for relation in ("finetune", "adapter"):
        bad = report(**about, relation=relation)
        bad.config = ReRAMConfig(device=device).to_dict()
        bad.summary, bad.notes, bad.uncalled = evil, [evil], [evil]
        bad.measurements = [Measurement(1.0, None, chip, {evil: 1.0, "f1": 2.0}) for chip in (0, 1)]
        publish(tmp_path, bad, {evil: bad}, title=evil)
        card = ModelCard.load(tmp_path / "README.md")
        assert card.data.license is None
        text = card.text
        assert text.count(BEGIN) == text.count(END) == 1 and text.strip().endswith(END)
        outside, fences = [], []
        for part in text.split("\n"):
            if fences and part == fences[-1]:
                fences.pop()
            elif not fences and part.startswith("```"):
                fences.append("`" * (len(part) - len(part.lstrip("`"))))
            elif not fences:
                outside.append(part)
        assert not fences
        lines = [line for line in outside if line not in (BEGIN, END)]
        assert not any("<" in line or "](javascript" in line for line in lines)
        headings = [line for line in lines if line.startswith("#")]
        assert len(headings) == 7 and headings[1:] == [
            "## Use", "## Robustness", "## Hardware", "## Training", "## Limits", "## Citation"
        ]  # fmt: skip
        tree = ast.parse(text.split("```python\n")[1].split("\n```")[0])
        calls = {ast.unparse(node.func).rpartition(".")[2] for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert calls == {"load_model" if relation == "adapter" else "from_pretrained", "deploy", "model"}
        assert evil in [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
        bare = report(**about)
        bare.measurements, bare.config = [], bad.config
        assert model_card(bare).text.count("\n## ") == 6


def test_reports_of_other_weights_are_removed_with_a_word_and_those_of_unknown_ones_stay(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hf_reram.hub.publish"), "propagate", True)
    found, files = report(), {"robustness.json", "robustness.png", "comparison.json"}
    for known, left in (("", files), ("here", files), ("there", set())):
        found.weights = known
        publish(tmp_path, found, {"hf_reram": found})
        (tmp_path / "README.md").unlink()
        remove_foreign(tmp_path, "here")
        assert {path.name for path in tmp_path.iterdir()} == left
        assert ("removing" in caplog.text) == (not left)
    assert f"{tmp_path}: removing robustness.json, robustness.png, comparison.json, which are of other" in caplog.text


@pytest.mark.parametrize("weights", ["", "here", "there"])
def test_what_a_card_says_of_other_weights_goes_and_what_a_person_has_written_stays(tmp_path, weights):
    found, file = report(), tmp_path / "README.md"
    found.weights = weights
    publish(tmp_path, found)
    text = file.read_text().replace("---\n", "---\nlicense: mit\n", 1)
    file.write_text(text.replace(BEGIN, f"Above.\n\n{BEGIN}").replace(END, f"{END}\n\nBelow."))
    written = file.read_text()
    remove_foreign(tmp_path, "here")
    if weights != "there":
        assert file.read_text() == written and "model-index" in written
        return
    card = ModelCard.load(file)
    assert card.text.split() == ["Above.", *BEGIN.split(), *END.split(), "Below."]
    data = card.data.to_dict()
    assert data["license"] == "mit" and data["library_name"] == "hf_reram" and "model-index" not in data
    publish(tmp_path, found)
    again = ModelCard.load(file)
    assert again.text.strip() == ModelCard(written).text.strip() and again.data.license == "mit"


@pytest.mark.parametrize("left", [None, "", "{}", '{"measurements": 3}'])
@pytest.mark.parametrize("rows", ["here", "there", None])
def test_without_a_report_a_cards_figures_go_only_where_its_comparison_is_of_others(
    tmp_path, caplog, monkeypatch, left, rows
):
    """left: what the report's file holds, None where it is gone. rows: what weights the comparison is of."""
    monkeypatch.setattr(logging.getLogger("hf_reram.hub.publish"), "propagate", True)
    found = report()
    found.weights = rows or "there"
    publish(tmp_path, found, None if rows is None else {"hf_reram": found})
    (tmp_path / "robustness.json").unlink()
    if left is not None:
        (tmp_path / "robustness.json").write_text(left)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    remove_foreign(tmp_path, "here")
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    told = (
        f"{tmp_path / 'robustness.json'} cannot be read, so that nothing tells whether its figures are of these weights"
    )
    assert (told in caplog.text) == (left is not None)
    assert ("removing" in caplog.text) == (rows == "there")
    if rows == "there":
        assert before.keys() - after.keys() == {"robustness.png", "comparison.json"}
        assert not ModelCard.load(tmp_path / "README.md").text.partition(BEGIN)[2].partition(END)[0].strip()
    else:
        assert after == before


def test_a_card_without_figures_and_a_persons_own_stay(tmp_path):
    bare, file = report(), tmp_path / "README.md"
    bare.measurements = []
    publish(tmp_path, bare)
    assert UNMEASURED in file.read_text() and not holds_figures(tmp_path)
    for text in (file.read_text(), f"# Mine\n\n{BEGIN}\n\nopen", "accuracy 0.4 on chips", "---\n: [\n---\nmine"):
        file.write_text(text)
        remove_foreign(tmp_path, "here")
        assert file.read_text() == text
    found = report()
    found.weights = "there"
    found.to_json(tmp_path / "robustness.json")
    file.write_text(f"---\n: [\n---\nmine\n{BEGIN}\nfigures\n{END}\n")
    assert holds_figures(tmp_path)
    remove_foreign(tmp_path, "here")
    assert file.read_text() == f"---\n: [\n---\nmine\n{BEGIN}\n\n{END}\n"
