"""What the cards of a recipe's models say of where they are from."""

import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from ..hub.about import About

# Names of flags and settings whose values are secrets, unlike ``eos_token``; and what the Hub's tokens look like.
SECRET = re.compile(
    r"-*(((push[-_]to[-_])?hub|hf|(use[-_])?auth|access|api)[-_])?tok(en?)?|.*(secret|password|api[-_]?key)",
    re.IGNORECASE,
)
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
HIDDEN = "hf_..."


def recipe_about(script: str, base: str, arguments: TrainingArguments, **known: Any) -> About:
    """What all recipes say alike of their models: base, name, repository, and the command that was given, without the
    tokens in it.

    Args:
        script: the recipe. base: Hub id, folder, or another name of the base model.
        arguments: name the repository. known: the other fields of :class:`About`.
    """
    name = Path(base).resolve().name
    return About(
        base_model=name if Path(base).is_dir() else base,
        name=f"{name}-reram",
        repo=arguments.hub_model_id,
        command="accelerate launch " + shlex.join([script, *_without_tokens(sys.argv[1:], arguments)]),
        **known,
    )


def _without_tokens(words: Iterable[str], arguments: TrainingArguments) -> Iterator[str]:
    """A command line's words without flags for secrets and their values; a token in what else is said is hidden."""
    known = [
        value for name, value in vars(arguments).items() if SECRET.fullmatch(name) and isinstance(value, str) and value
    ]
    after_flag = False
    for word in words:
        flag, given, _ = word.partition("=")
        is_flag = word.startswith("-")
        secret = is_flag and SECRET.fullmatch(flag) is not None
        if secret or (after_flag and not is_flag):
            after_flag = secret and not given
            continue
        after_flag = False
        for value in known:
            word = word.replace(value, HIDDEN)
        yield TOKEN.sub(HIDDEN, word)


def without_tokens(value: Any) -> Any:
    """JSON values without the secrets in them."""
    if isinstance(value, Mapping):
        return {
            name: HIDDEN if part is not None and SECRET.fullmatch(str(name)) else without_tokens(part)
            for name, part in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [without_tokens(part) for part in value]
    return TOKEN.sub(HIDDEN, value) if isinstance(value, str) else value


def name_of_data(dataset: str, split: str, *paths: str | None) -> str:
    """A data set as a card names it: a file or folder by its own name, where a path is given, else the Hub id and the
    split."""
    path = next((path for path in paths if path is not None), None)
    return f"{dataset} ({split})" if path is None else Path(path).resolve().name
