"""A checkpoint's model, from the Hub or a folder, whatever its class."""

import os
from typing import Any

from transformers.utils import cached_file

from ..model.find import crossbar_layers
from .report import attach_report, stored_report

ADAPTER = "adapter_config.json"


def load_model(name: str | os.PathLike, **where: Any) -> Any:
    """A checkpoint's model in the class that its config names, out of transformers' own; one of PEFT's adapters on the
    checkpoint that they were trained on.

    Args:
        name: folder or Hub id. where: as in ``from_pretrained``.

    Raises:
        ValueError: the config names no such class.
    """
    if has_file(name, ADAPTER, **where):
        from peft import PeftConfig, PeftModel

        base = load_model(PeftConfig.from_pretrained(str(name), **where).base_model_name_or_path)
        model = PeftModel.from_pretrained(base, name, **where)
        if crossbar_layers(model) and (report := stored_report(name, **where)) is not None:
            attach_report(model, report, name)
        return model
    import transformers

    config = transformers.AutoConfig.from_pretrained(name, **where)
    for architecture in config.architectures or ():
        if hasattr(transformers, architecture):
            return getattr(transformers, architecture).from_pretrained(name, config=config, **where)
    raise ValueError(f"{name}: architectures={config.architectures!r}: allowed is a class of transformers")


def has_file(name: str | os.PathLike, file: str, **where: Any) -> bool:
    """Whether a checkpoint has a file.

    Args:
        name: folder or Hub id. where: as in ``from_pretrained``.
    """
    try:
        return cached_file(name, file, **where) is not None
    except OSError:  # no such file, or no way to it
        return False
