"""Where a recipe's models are said to be from."""

import sys

import pytest

from hf_reram.tasks import RecipeTrainingArguments, name_of_data, recipe_about


def test_a_base_is_named_by_its_hub_id_or_its_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["somewhere/squad.py", "--train_file", "my data.parquet"])
    training = RecipeTrainingArguments(output_dir=str(tmp_path), use_cpu=True, hub_model_id="me/robust")
    known = {"task": "question-answering", "metric": "f1", "dataset": "squad"}
    (tmp_path / "mine").mkdir()
    hub = recipe_about("recipes/squad.py", "someone/bert-squad", training, **known)
    local = recipe_about("recipes/squad.py", str(tmp_path / "mine"), training, **known)
    assert (hub.base_model, hub.name, hub.repo) == ("someone/bert-squad", "bert-squad-reram", "me/robust")
    assert (local.base_model, local.name) == ("mine", "mine-reram")
    assert hub.command == "accelerate launch recipes/squad.py --train_file 'my data.parquet'"


def test_data_are_named_by_their_first_path_or_the_hub_id():
    assert name_of_data("rajpurkar/squad_v2", "train", None) == "rajpurkar/squad_v2 (train)"
    assert name_of_data("rajpurkar/squad_v2", "train", None, "a/b.parquet", "c.json") == "b.parquet"


TOKEN = "hf_" + "aB3" * 12


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--hub_token", TOKEN, "--max_steps", "5"], "--max_steps 5"),
        ([f"--hub_token={TOKEN}", "--max_steps", "5"], "--max_steps 5"),
        (["--hub_token", "of-an-own-hub", "--push_to_hub"], "--push_to_hub"),
        (["--token", "of-an-own-hub", "--lora"], "--lora"),
        (["--hub-token=short"], ""),
        (["--hub_tok", "of-an-own-hub"], ""),  # as argparse completes it
        (["--hub_t=of-an-own-hub"], "--hub_t=hf_..."),
        (["--data", f"https://me:{TOKEN}@huggingface.co/d"], "--data https://me:hf_...@huggingface.co/d"),
        (["--max_new_tokens", "5", "--token", "--lora", "--eos_token", "x"], "--max_new_tokens 5 --lora --eos_token x"),
    ],
    ids=str,
)
def test_the_command_has_no_token(tmp_path, monkeypatch, given, said):
    monkeypatch.setattr(sys, "argv", ["squad.py", *given])
    training = RecipeTrainingArguments(output_dir=str(tmp_path), use_cpu=True, hub_token="of-an-own-hub")
    about = recipe_about("squad.py", "someone/bert", training, task="", metric="", dataset="squad")
    assert about.command == f"accelerate launch squad.py {said}".strip()
