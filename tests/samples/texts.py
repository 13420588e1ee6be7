"""A small causal model with a tokenizer of words, saved as a folder."""

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ["<end>", "<unknown>", "the", "cell", "drifts", "and", "holds", "a", "weight", "for", "years", "."]
TEXTS = ["the cell drifts .", "a cell holds a weight for years .", "the weight drifts and the cell holds ."] * 4


def tokenizer() -> PreTrainedTokenizerFast:
    found = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unknown>"))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=found, eos_token="<end>", unk_token="<unknown>")


def llama(**changes) -> LlamaForCausalLM:
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(WORDS), max_position_embeddings=32, eos_token_id=0, **shape, **changes)
    return LlamaForCausalLM(config).eval()


def save_model(folder: Path) -> LlamaForCausalLM:
    model = llama()
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return model
