"""Code of a script's own that libraries' modules run without holding it tells models apart."""

import argparse
import operator

import pytest
import tokenizers
import torch
from accelerate.hooks import ModelHook, SequentialHook, add_hook_to_module
from tokenizers import models, pre_tokenizers
from torch import nn
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from hf_reram import ReRAMConfig, evaluate_robustness, patch_model, report_of
from hf_reram.evaluation.content import described
from hf_reram.model.attributes import CODE, NO_CODE
from hf_reram.model.digest import model_digest, other_settings, settings_of
from tests.samples.models import bert_batch, tiny_bert
from tests.samples.squad import tokenizer


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return patch_model(
        LlamaForCausalLM(LlamaConfig(vocab_size=20, num_key_value_heads=1, **shape)).eval(), ReRAMConfig()
    )


def narrow_attention(*args, **kwargs):
    output, weights = sdpa_attention_forward(*args, **kwargs)
    return output * 0.5, weights


def wide_attention(*args, **kwargs):
    output, weights = sdpa_attention_forward(*args, **kwargs)
    return output * 2.0, weights


def test_a_script_s_attention_counts_and_which_library_s_it_is_does_not():
    model = llama()
    digests = {}
    try:
        for name, function in (("eager", None), ("mine", narrow_attention), ("mine again", wide_attention)):
            if function is not None:
                AttentionInterface.register("mine", function)
            model.set_attn_implementation(name.split()[0])
            digests[name] = model_digest(model)
    finally:
        ALL_ATTENTION_FUNCTIONS._global_mapping.pop("mine", None)
    model.set_attn_implementation("sdpa")
    assert len(set(digests.values())) == 3 and model_digest(model) == digests["eager"]


def test_a_report_is_of_the_attention_that_it_was_measured_with():
    model = llama()
    tokens = torch.arange(8)[None]
    evaluate_robustness(
        model, lambda m: float(m(input_ids=tokens).logits.detach().mean()), ["1d"], seeds=1, progress=False
    )
    assert report_of(model) is not None
    try:
        AttentionInterface.register("mine", narrow_attention)
        model.set_attn_implementation("mine")
        assert report_of(model) is None
    finally:
        ALL_ATTENTION_FUNCTIONS._global_mapping.pop("mine", None)


class Louder(ModelHook):
    def __init__(self, factor: float):
        self.factor = factor

    def post_forward(self, module, output):
        return output * self.factor


@pytest.mark.parametrize("wrap", [lambda hook: hook, lambda hook: SequentialHook(ModelHook(), hook)])
def test_a_script_s_hooks_of_accelerate_count(wrap):
    digests = set()
    for factor in (None, 2.0, 3.0):
        model = llama()
        if factor is not None:
            add_hook_to_module(model.model.layers[0].mlp, wrap(Louder(factor)))
        digests.add(model_digest(model))
    assert len(digests) == 3
    model = llama()
    add_hook_to_module(model.model.layers[0].mlp, ModelHook())  # a library's
    assert model_digest(model) in digests


def test_hooks_of_all_modules_count():
    model, before = llama(), model_digest(llama())
    factor = 2.0
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, y: y * factor if isinstance(module, nn.Linear) else None
    )
    try:
        first = model_digest(model)
        factor = 3.0
        assert len({before, first, model_digest(model)}) == 3
    finally:
        handle.remove()
    assert model_digest(model) == before


@pytest.mark.parametrize("name", ["apply_rotary_pos_emb", "rotate_half"])  # called by a method, and by the former
def test_what_takes_the_place_of_a_library_s_function_counts(name, monkeypatch):
    model = llama()
    model(input_ids=torch.arange(4)[None])
    before, settings = model_digest(model), settings_of(model)
    assert settings["attributes"][CODE] == NO_CODE
    original = getattr(modeling_llama, name)
    monkeypatch.setattr(modeling_llama, name, lambda *args, **kwargs: original(*args, **kwargs))
    assert model_digest(model) != before
    assert f"{CODE}" in " ".join(other_settings(settings, settings_of(model)))


def test_autocast_around_an_evaluation_belongs_to_its_key(tmp_path):
    model, batch, log = patch_model(tiny_bert(), ReRAMConfig()), bert_batch(), tmp_path / "log.jsonl"

    def evaluate(model):
        return float(model(**batch).logits.detach().float().abs().mean())

    arguments = {"times": ["1d"], "seeds": 1, "progress": False, "resume": log}
    evaluate_robustness(model, evaluate, **arguments)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="autocast"):
        evaluate_robustness(model, evaluate, **arguments)
    evaluate_robustness(model, evaluate, **arguments)
    with torch.autocast("cpu", torch.bfloat16):
        report = evaluate_robustness(model, evaluate, key=[1], **{**arguments, "resume": tmp_path / "other.jsonl"})
    assert "evaluated under autocast to bfloat16" in report.notes
    with pytest.raises(ValueError, match="autocast"):
        evaluate_robustness(model, evaluate, key=[1], **{**arguments, "resume": tmp_path / "other.jsonl"})


def test_how_a_tokenizer_of_its_own_cuts_counts_and_inside_transformers_does_not():
    def made(cut: int) -> tokenizers.Tokenizer:
        found = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
        found.pre_tokenizer = pre_tokenizers.Whitespace()
        found.enable_truncation(cut)
        return found

    assert described(made(4)) != described(made(12)) and described(made(4)) == described(made(4))
    fast = tokenizer()
    before = described(fast)
    fast(["a b"], truncation=True, max_length=4, padding="max_length")
    assert described(fast) == before


READS = {
    "a name with a hyphen": "getattr(self.args, 'max-len')",
    "attrgetter": "operator.attrgetter('max_' + 'len')(self.args)",
    "eval": "eval('a.max_' + 'len', {'a': self.args})",
    "pairs": "dict(self.args._get_kwargs())['max_len']",
    "all of the module": "list(list(vars(self).values())[-1].__dict__.values())[0]",
    "as a text": "len(str(self.args))",
}


@pytest.mark.parametrize("way", READS)
def test_what_a_module_reads_of_arguments_in_a_roundabout_way_counts(way):
    source = f"""
class Own(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.args = args
    def forward(self, x):
        return x * {READS[way]}
"""
    names: dict = {"nn": nn, "operator": operator, "__name__": "script"}
    exec(source, names)
    told = [
        settings_of(names["Own"](argparse.Namespace(**{"max_len": length, "max-len": length}))) for length in (4, 4, 12)
    ]
    assert told[0] == told[1] != told[2]


def test_the_command_line_counts_where_code_reads_it(monkeypatch):
    names: dict = {"__name__": "script"}
    exec("import sys\ndef score(p): return p * len(sys.argv)\ndef other(p): return p * sys.maxsize", names)
    told = {}
    for argv in (["script"], ["script", "--long"]):
        monkeypatch.setattr("sys.argv", argv)
        told[len(argv)] = [described(names[name]) for name in ("score", "other")]
    assert told[1][0] != told[2][0] and told[1][1] == told[2][1]
