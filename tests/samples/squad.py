"""A handful of made-up SQuAD-like questions, a word-level tokenizer and a tiny QA model for them."""

from pathlib import Path

import torch
from datasets import Dataset
from transformers import BertConfig, BertForQuestionAnswering, BertTokenizerFast, DataCollatorWithPadding

PLACES = ["paris", "london", "rome", "oslo", "cairo", "lima"]
PEOPLE = ["ann", "bob", "cid", "dan", "eve", "fay"]


def rows(count: int = 12) -> list[dict]:
    found = []
    for i in range(count):
        who, where = PEOPLE[i % 6], PLACES[(i * 5 + i // 6) % 6]
        filler = "the weather was fine and the sea was blue . " * (i % 3)
        context = f"{filler}{who} lives in the city of {where} . {filler}"
        answers = {"text": [], "answer_start": []}
        question = f"who is the king of {where} ?"
        if i % 4:
            question = f"where does {who} live ?"
            answers = {"text": [where], "answer_start": [context.index(where)]}
        found.append({"id": str(i), "title": "made up", "context": context, "question": question, "answers": answers})
    return found


def dataset(count: int = 12) -> Dataset:
    return Dataset.from_list(rows(count))


def tokenizer() -> BertTokenizerFast:
    words = sorted({w for row in rows(36) for text in (row["context"], row["question"]) for w in text.split()})
    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    return BertTokenizerFast(vocab=vocabulary)


def model(words: int) -> BertForQuestionAnswering:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForQuestionAnswering(BertConfig(vocab_size=words, max_position_embeddings=64, **shape)).eval()


def collator(fast: BertTokenizerFast) -> DataCollatorWithPadding:
    return DataCollatorWithPadding(fast)


def write(folder: Path) -> dict[str, str]:
    """A checkpoint and data files in ``folder``; their paths by the recipe's flags."""
    if not (folder / "base").exists():
        fast = tokenizer()
        fast.save_pretrained(folder / "base")
        model(len(fast)).save_pretrained(folder / "base")
        dataset(12).to_parquet(folder / "train.parquet")
        dataset(6).to_json(folder / "validation.json")
    return {
        "--model_name_or_path": str(folder / "base"),
        "--train_file": str(folder / "train.parquet"),
        "--validation_file": str(folder / "validation.json"),
    }
