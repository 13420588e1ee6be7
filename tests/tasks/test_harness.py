import importlib.util
import json
import math
import random
from functools import partial

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from hf_reram import ReRAMConfig, calibrate, deploy, evaluate_robustness, patch_model
from hf_reram.cli import app
from hf_reram.evaluation.content import part_of
from hf_reram.tasks import LMEval, Perplexity, packed
from tests.samples.devices import device
from tests.samples.harness import CHOICES, write_answers, write_choice, write_rolling
from tests.samples.texts import TEXTS, llama, save_model, tokenizer

pytest.importorskip("lm_eval")


@pytest.fixture(autouse=True)
def _data_in_a_place_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def sure():
    """A model that is sure of what it says."""
    torch.manual_seed(0)
    model = llama()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(6)
    return model


def on_crossbars():
    model = patch_model(sure(), ReRAMConfig(device=device(read_noise=0.0), input_range="per_token"))
    return calibrate(model, Perplexity(packed(TEXTS, tokenizer(), 16)).batches)


def log_likelihood(model, context: list[int], continuation: list[int]) -> float:
    """Of each token after those before it, one forward each."""
    ids, total = list(context), 0.0
    with torch.no_grad():
        for token in continuation:
            total += float(model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)[token])
            ids.append(token)
    return total


def accuracies(model, rows) -> dict[str, float]:
    """As lm-eval defines them: of the likeliest choice, and of the likeliest by its length in characters."""
    words, right = tokenizer(), np.zeros(2)
    for row in rows:
        found = [
            log_likelihood(model, words(row["question"])["input_ids"], words(c)["input_ids"]) for c in row["choices"]
        ]
        lengths = [len(choice) for choice in row["choices"]]
        right += [np.argmax(found) == row["answer"], np.argmax(np.divide(found, lengths)) == row["answer"]]
    return dict(zip(("tiny_choice/acc", "tiny_choice/acc_norm"), right / len(rows)))


def test_choices_are_the_likeliest(tmp_path):
    model = sure()
    found = LMEval(["tiny_choice"], tokenizer(), include_path=write_choice(tmp_path / "tasks"))(model.train())
    assert found == pytest.approx(accuracies(model.eval(), CHOICES))
    assert 0 < found["tiny_choice/acc"] < 1  # so that it says something
    first = LMEval(["tiny_choice"], tokenizer(), limit=2, include_path=tmp_path / "tasks", batch_size=1)
    assert first.examples == 2 and first(model) == pytest.approx(accuracies(model, CHOICES[:2]))


def test_texts_and_answers(tmp_path):
    model, words, texts = sure(), tokenizer(), list(dict.fromkeys(TEXTS))
    with torch.no_grad():
        ids = words("the cell")["input_ids"]
        for _ in range(4):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    said = words.decode(ids[2:], skip_special_tokens=True).partition(".")[0]
    write_rolling(tmp_path / "tasks", texts)
    write_answers(tmp_path / "tasks", ["the cell", "the cell"], [said, "no word of it"])
    evaluate = LMEval(["tiny_text", "tiny_answer"], words, include_path=tmp_path / "tasks")
    found = evaluate(model)
    loss = -sum(log_likelihood(model, [words.eos_token_id], words(text)["input_ids"]) for text in texts)
    assert found["tiny_text/word_perplexity"] == pytest.approx(
        math.exp(loss / sum(len(text.split()) for text in texts)), rel=1e-4
    )
    assert found["tiny_answer/exact_match"] == 0.5
    assert evaluate.examples == len(texts) + 2
    assert evaluate.shown(found) == ["tiny_text/word_perplexity", "tiny_answer/exact_match"]


def test_a_chip_is_what_lm_eval_finds_on_it(tmp_path, monkeypatch):
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # asks pip
    write_choice(tmp_path / "tasks")
    write_rolling(tmp_path / "tasks", TEXTS[:4])
    names, model = ["tiny_choice", "tiny_text"], on_crossbars()
    evaluate = LMEval(names, tokenizer(), num_fewshot=2, include_path=tmp_path / "tasks")
    report = evaluate_robustness(model, evaluate, ["1s", "2d"], seeds=2, progress=False)
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    with deploy(model, "2d", seed=1):
        lm = HFLM(pretrained=model, tokenizer=tokenizer(), batch_size=2)
        theirs = lm_eval.simple_evaluate(lm, tasks=names, num_fewshot=2, task_manager=manager, bootstrap_iters=0)
    chip = next(m.metrics for m in report.measurements if m.time == 172800 and m.seed == 1)
    assert chip["tiny_choice/acc"] == theirs["results"]["tiny_choice"]["acc,none"]
    perplexity = theirs["results"]["tiny_text"]["word_perplexity,none"]
    assert chip["tiny_text/word_perplexity"] == pytest.approx(perplexity, rel=1e-5)
    figures = [r["tiny_text/word_perplexity"] for r in (report.digital, report.ideal, chip)]
    assert len({round(figure, 3) for figure in figures}) == 3
    assert theirs["config"]["crossbars"].endswith("as a chip")


def test_each_evaluation_asks_the_same(tmp_path):
    """Few-shot examples are drawn anew each time, from the same seed, and nothing outside notices."""
    model = sure()
    evaluate = LMEval(["tiny_choice"], tokenizer(), num_fewshot=3, include_path=write_choice(tmp_path / "tasks"))
    asked, told = evaluate._requests(), part_of("evaluation", evaluate)
    random.seed(5), np.random.seed(5)
    before = random.getstate()
    assert evaluate(model) == evaluate(model)
    smaller = LMEval(["tiny_choice"], tokenizer(), 3, include_path=tmp_path / "tasks", batch_size=1)
    assert told == part_of("evaluation", evaluate) == part_of("evaluation", smaller)
    other = LMEval(["tiny_choice"], tokenizer(), 2, include_path=tmp_path / "tasks")
    assert part_of("evaluation", other) != told
    assert evaluate._requests() == asked and asked["tiny_choice"][0][2][0].count("\n\n") == 3
    assert random.getstate() == before
    assert evaluate.loaded["tasks"]["tiny_choice"].instances[0].args == asked["tiny_choice"][0][2]


def test_what_it_asks_is_in_its_content(tmp_path):
    def content(folder="tasks", rows=CHOICES, more="", words=None, **options):
        write_choice(tmp_path / folder, rows, more)
        return LMEval(["tiny_choice"], words or tokenizer(), include_path=tmp_path / folder, **options).content

    same = content()
    assert content() == same and content(limit=None, batch_size=3) == same
    answers = [{**CHOICES[0], "answer": 1}, *CHOICES[1:]]
    others = [content(rows=answers), content(num_fewshot=1), content(limit=3), content(more="target_delimiter: ''")]
    (tmp_path / "tasks" / "mine.py").write_text(
        "def process(doc, results):\n    return {'acc': 1.0, 'acc_norm': 0.0}\n"
    )
    others.append(content(more="process_results: !function mine.process"))
    (tmp_path / "tasks" / "mine.py").write_text(
        "def process(doc, results):\n    return {'acc': 0.0, 'acc_norm': 0.0}\n"
    )
    others.append(content(more="process_results: !function mine.process"))
    fewer = json.loads(tokenizer().backend_tokenizer.to_str())
    fewer["model"]["vocab"]["cells"] = fewer["model"]["vocab"].pop("cell")
    other = type(tokenizer().backend_tokenizer).from_str(json.dumps(fewer))
    others.append(
        content(words=PreTrainedTokenizerFast(tokenizer_object=other, eos_token="<end>", unk_token="<unknown>"))
    )
    assert len({same, *others}) == 8


def test_what_does_not_fit_is_an_error(tmp_path, monkeypatch):
    folder = write_choice(tmp_path / "tasks")
    for options, message in (
        ({"limit": 0}, "limit=0: allowed is an integer from 1 on"),
        ({"num_fewshot": -1}, "num_fewshot=-1: allowed is an integer from 0 on"),
        ({"batch_size": True}, "batch_size=True"),
        ({"num_fewshot": 9}, "tiny_choice with 9 examples before each question: Sample larger than population"),
        ({"tasks": []}, r"tasks=\[\]: allowed is a list of at least one name"),
        ({"tasks": "tiny_choice"}, "tasks='tiny_choice'"),
        ({"tasks": [str(folder / "tiny_choice.yaml")], "include_path": None}, None),
    ):
        options = {"tasks": ["tiny_choice"], "include_path": folder, **options}
        if message is None:
            assert LMEval(tokenizer=tokenizer(), **options).names == ["tiny_choice"]
            continue
        with pytest.raises(ValueError, match=message):
            LMEval(tokenizer=tokenizer(), **options)
    with pytest.raises(FileNotFoundError, match="no such folder of task files"):
        LMEval(["tiny_choice"], tokenizer(), include_path=tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="no such task file"):
        LMEval(["none.yaml"], tokenizer())
    write_choice(folder, more="unsafe_code: true")
    with pytest.raises(ValueError, match="tiny_choice runs code that the model writes"):
        LMEval(["tiny_choice"], tokenizer(), include_path=folder)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    with pytest.raises(ImportError, match=r"not installed: pip install 'hf_reram\[llm\]'"):
        LMEval(["tiny_choice"], tokenizer())


def test_names_that_are_looked_for_among_all(tmp_path, monkeypatch):
    """lm-eval's own thousands would be too, which takes seconds."""
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    write_rolling(write_choice(tmp_path / "tasks"), TEXTS)
    assert LMEval(["tiny_*"], tokenizer(), include_path=tmp_path / "tasks").names == ["tiny_choice", "tiny_text"]
    with pytest.raises(ValueError, match=r"lm-eval knows no task 'tiny_chioce': near are \['tiny_choice'"):
        LMEval(["tiny_chioce"], tokenizer(), include_path=tmp_path / "tasks")


def test_eval_of_lm_eval_tasks(tmp_path):
    save_model(tmp_path / "base")
    folder = write_choice(tmp_path / "tasks")
    command = [
        "eval",
        str(tmp_path / "base"),
        "--lm-eval",
        "tiny_choice",
        "--include-path",
        str(folder),
        "--chips",
        "2",
    ]
    command += ["--times", "10y", "--output", str(tmp_path / "out"), "--device", "cmo-hfox-ibm"]

    def run(*more):
        done = CliRunner().invoke(app, [*command, *more])
        return done, sorted(path.name for path in (tmp_path / "out").glob("chips-*.jsonl"))

    done, logs = run()
    assert done.exit_code == 0, done.output
    assert "tiny_choice/acc, mean" in done.output
    report = json.loads((tmp_path / "out" / "robustness.json").read_text())
    about = report["about"]
    assert (
        about["metric"] == "tiny_choice/acc" and about["dataset"] == "lm-eval: tiny_choice" and about["examples"] == 6
    )
    assert about["task"] == "text-generation" and len(report["measurements"]) == 2
    assert set(report["digital"]) == {"tiny_choice/acc", "tiny_choice/acc_norm"}
    assert report["notes"][-1] == "calibrated on the evaluated inputs"
    assert len(logs) == 1 and run("--json")[1] == logs  # which the second one reads
    assert len(run("--samples", "4")[1]) == 2 and len(run("--num_fewshot".replace("_", "-"), "1")[1]) == 3
    for more, message in (
        (["--dataset", "x.json"], "allowed is one of them"),
        (["--task", "text-generation"], "allowed is --task with --dataset"),
        (["--label-names", "a=b"], "allowed is --label-names with --dataset"),
    ):
        refused = run(*more)[0]
        assert refused.exit_code == 1 and message in refused.output
    no_task = CliRunner().invoke(app, ["eval", str(tmp_path / "base"), "--num-fewshot", "1", "--dataset", "x.json"])
    assert no_task.exit_code == 1 and "with --lm-eval" in no_task.output


def test_models_that_are_not_causal(tmp_path, tiny_bert):
    tiny_bert.save_pretrained(tmp_path / "bert")
    command = ["eval", str(tmp_path / "bert"), "--lm-eval", "tiny_choice", "--device", "cmo-hfox-ibm"]
    done = CliRunner().invoke(app, [*command, "--output", str(tmp_path / "out")])
    assert done.exit_code == 1 and "BertForSequenceClassification: lm-eval's tasks need a causal" in done.output
