"""Where a recipe's models are said to be from."""

import sys

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
