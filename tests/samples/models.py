"""A small BERT and what it is called with."""

import torch
from transformers import BertConfig, BertForSequenceClassification


def tiny_bert(**changes) -> BertForSequenceClassification:
    """Two layers of width 16 on 50 tokens, three labels, no dropout, in eval mode; ``changes`` go to its config."""
    shape = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 3}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(**{**shape, "intermediate_size": 32, **dropout, **changes})
    return BertForSequenceClassification(config).eval()


def bert_batch(n: int = 8, length: int = 6, seed: int = 1) -> dict[str, torch.Tensor]:
    """``n`` labelled rows of ``length`` tokens; every other row ends with two tokens of padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 50, (n, length), generator=generator)
    mask = torch.ones(n, length, dtype=torch.long)
    mask[::2, -2:] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": torch.randint(3, (n,), generator=generator),
    }
