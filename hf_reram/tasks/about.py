"""What the cards of a recipe's models say of where they are from."""

import shlex
import sys
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from ..hub.about import About


def recipe_about(script: str, base: str, arguments: TrainingArguments, **known: Any) -> About:
    """What all recipes say alike of their models: base, name, repository, and the command that was given.

    Args:
        script: the recipe. base: Hub id, folder, or another name of the base model.
        arguments: name the repository. known: the other fields of :class:`About`.
    """
    name = Path(base).resolve().name
    return About(
        base_model=name if Path(base).is_dir() else base,
        name=f"{name}-reram",
        repo=arguments.hub_model_id,
        command="accelerate launch " + shlex.join([script, *sys.argv[1:]]),
        **known,
    )


def name_of_data(dataset: str, split: str, *paths: str | None) -> str:
    """A data set as a card names it: a file or folder by its own name, where a path is given, else the Hub id and the
    split."""
    path = next((path for path in paths if path is not None), None)
    return f"{dataset} ({split})" if path is None else Path(path).resolve().name
