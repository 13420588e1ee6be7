"""Training texts that a causal model samples itself, where no data are at hand."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from tqdm.auto import tqdm
from transformers import GenerationConfig

from ..device.checks import is_finite
from ..evaluation.files import write_whole
from ..model.deploy import digital_eval
from ..model.digest import weights_digest
from ..model.find import crossbar_layers, unwrapped
from ..model.inputs import evaluating, forked_rng


def generate_texts(
    model: nn.Module,
    tokenizer: Any,
    count: int,
    length: int,
    folder: str | Path,
    seed: int = 0,
    batch_size: int = 8,
    temperature: float = 1.0,
) -> list[str]:
    """Texts that a causal model samples from its own distribution, begun with nothing but its first token, so that
    finetuning follows the model where it is at home, as IBM's analog foundation models do (Büchel et al., arXiv
    2505.09663). A model on crossbars samples as the digital model that it was made from.

    Texts are sampled in batches that have seeds of their own and are kept as files, so that a killed run goes on where
    it stopped, and several processes share the work and hold the same texts at the end.

    Args:
        model: one with ``generate``. tokenizer: the model's.
        count: of texts. length: of each, in tokens at most.
        folder: where the batches are kept, of these weights and arguments alone.
        seed: of the first batch. batch_size: texts a batch. temperature: divides the logits.

    Raises:
        ValueError: a count, length or batch size that is too small, a temperature not above 0, or a folder with texts
            that were sampled otherwise.
    """
    for name, value, least in (("count", count, 1), ("length", length, 2), ("batch_size", batch_size, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r}: allowed is an integer from {least}")
    if not (is_finite(temperature) and temperature > 0):
        raise ValueError(f"temperature={temperature!r}: allowed is a finite number above 0")
    folder, state = Path(folder), PartialState()
    sizes = [min(batch_size, count - start) for start in range(0, count, batch_size)]
    files = [folder / f"{index:06d}.json" for index in range(len(sizes))]
    said: dict[str, Any] = {"count": count, "length": length, "batch_size": batch_size, "temperature": temperature}
    said |= {"seed": seed, "model": weights_digest(model)}
    if state.is_main_process:
        _claim(folder / "arguments.json", said)
    mine = range(state.process_index, len(sizes), state.num_processes)
    with digital_eval(model) if crossbar_layers(model) else evaluating(model):
        for index in tqdm(mine, desc="sampling texts", disable=not state.is_main_process):
            if not files[index].exists():
                texts = _sampled(unwrapped(model), tokenizer, sizes[index], length, temperature, seed + index)
                write_whole(files[index], json.dumps(texts, ensure_ascii=False, indent=1) + "\n")
    state.wait_for_everyone()
    return [text for file in files for text in json.loads(file.read_text(encoding="utf-8"))]


def _sampled(model: Any, tokenizer: Any, size: int, length: int, temperature: float, seed: int) -> list[str]:
    own = model.generation_config
    ends = {tokenizer.eos_token_id, *(own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id])}
    ends -= {None}
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    device = next(model.parameters()).device
    with forked_rng(model), _plain_generation(model):
        torch.manual_seed(seed)
        if begin is None:  # texts of this tokenizer neither begin nor end: any token
            start = torch.randint(model.config.vocab_size, (size, 1), device=device)
        else:
            start = torch.full((size, 1), begin, device=device)
        found = model.generate(
            input_ids=start,
            attention_mask=torch.ones_like(start),
            do_sample=True,
            temperature=float(temperature),
            top_k=0,
            max_length=length,
            eos_token_id=sorted(ends) or None,
            pad_token_id=min(ends, default=0),
        )
    rows = []
    for first, *row in found.tolist():
        end = next((i for i, token in enumerate(row) if token in ends), len(row))  # behind it is padding
        rows.append([first, *row[:end]])
    return tokenizer.batch_decode(rows, skip_special_tokens=True)


@contextmanager
def _plain_generation(model: Any) -> Iterator[None]:
    """Without what a model's generation config adds where nothing is asked for: penalties, beams, other cuts of the
    distribution."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _claim(file: Path, said: dict[str, Any]) -> None:
    if not file.exists():
        return write_whole(file, json.dumps(said, indent=2) + "\n")
    before = json.loads(file.read_text(encoding="utf-8"))
    if changed := sorted(name for name in said if before.get(name) != said[name]):
        names = ", ".join(changed)
        raise ValueError(f"{file.parent} holds texts sampled with another {names}: allowed is a new folder")
