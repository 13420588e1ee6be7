"""A small BERT, a smaller model called as it is, and what they are called with."""

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput


def tiny_bert(**changes) -> BertForSequenceClassification:
    """Two layers of width 16 on 50 tokens, three labels, no dropout, in eval mode; ``changes`` go to its config."""
    shape = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 3}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(**{**shape, "intermediate_size": 32, **dropout, **changes})
    return BertForSequenceClassification(config).eval()


class FewLayers(nn.Module):
    """Three linear layers on padded tokens, two of them on one input: compiled in a fraction of a BERT's time."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.query, self.key = nn.Linear(16, 16), nn.Linear(16, 16)
        self.classifier = nn.Linear(16, 3)

    def forward(self, input_ids, attention_mask, labels):
        x = self.embedding(input_ids)
        scores = self.query(x) @ self.key(x).transpose(1, 2)
        scores = scores.masked_fill(attention_mask[:, None] == 0, -1e4)
        logits = self.classifier(nn.functional.gelu(scores.softmax(-1) @ x)[:, 0])
        return SequenceClassifierOutput(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


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
