"""``generate()`` on a chip writes what the same chip says token by token, whatever it keeps of earlier tokens."""

import pytest
import torch
from transformers.generation import CompileConfig

from hf_reram import ReRAMConfig, calibrate, crossbar_layers, deploy, patch_model
from tests.samples.devices import device
from tests.samples.zoo import ZOO, tokens

CACHES = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "none": {"use_cache": False},
}
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def on_crossbars(name: str, input_range: str, read_noise: float = 0.0):
    """A model that is sure of what it says; its head is its embedding and stays digital."""
    model, batch = ZOO[name].build(), ZOO[name].batch()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)
    patch_model(model, ReRAMConfig(device=device(read_noise=read_noise), input_range=input_range))
    assert not any("lm_head" in layer for layer in crossbar_layers(model))
    return calibrate(model, [batch]).eval()


@torch.no_grad()
def by_hand(model, prompt: torch.Tensor) -> list[int]:
    """The likeliest token after all those before it, a whole forward each."""
    ids = prompt[None]
    for _ in range(GREEDY["max_new_tokens"]):
        ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids[0, len(prompt) :].tolist()


def left_padded(prompts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    longest = max(map(len, prompts))
    rows = [
        (torch.cat([torch.full((longest - len(p),), 7), p]), torch.arange(longest) >= longest - len(p)) for p in prompts
    ]
    return {
        "input_ids": torch.stack([ids for ids, _ in rows]),
        "attention_mask": torch.stack([m for _, m in rows]).long(),
    }


@pytest.mark.parametrize("input_range", ["static", "per_token"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2"])
def test_caches_and_padding_change_no_token(name, input_range):
    model = on_crossbars(name, input_range)
    prompts = [tokens()[0, :8], tokens()[1, :5]]  # the second one is padded on its left
    said = {}
    for seed in (1, 2):
        with deploy(model, "1d", seed=seed):
            said[seed] = [by_hand(model, prompt) for prompt in prompts]
            for cache, options in CACHES.items():
                found = model.generate(**left_padded(prompts), **GREEDY, **options)
                assert found[:, 8:].tolist() == said[seed], cache
    assert len({token for row in said[1] for token in row}) > 2  # it does not say one word again and again


def test_read_noise_is_drawn_in_each_forward():
    """So a cache, which saves forwards, is another draw; the same draw is what a seed of torch gives."""
    model = on_crossbars("llama", "per_token", read_noise=0.05)
    prompt = left_padded([tokens()[0, :8]])

    def scores(**options):
        torch.manual_seed(0)
        found = model.generate(**prompt, **GREEDY, **options, output_scores=True, return_dict_in_generate=True)
        return found.scores

    with deploy(model, "1d", seed=1):
        for one, same in zip(scores(), scores()):
            assert torch.equal(one, same)
        first, later = scores()[0], scores(use_cache=False)
        torch.testing.assert_close(first, later[0])  # the first forward is of the whole prompt with both
        assert not torch.allclose(scores()[1], later[1], rtol=1e-3)


def test_compiled_forwards_are_those_of_the_chip_that_is_deployed():
    """With a static cache generate() compiles the forward, on GPUs by itself; the next chip runs the same code."""
    model = on_crossbars("llama", "per_token")
    prompt = left_padded([tokens()[0, :8]])
    compiled = CompileConfig(fullgraph=True, backend="eager", mode=None)
    compiled._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    said = []
    for seed in (1, 2):
        with deploy(model, "2d", seed=seed):
            found = model.generate(**prompt, **GREEDY, **CACHES["static"], compile_config=compiled)
            said.append(found[0, 8:].tolist())
            assert said[-1] == by_hand(model, tokens()[0, :8])
    assert said[0] != said[1] and torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    with torch.no_grad():
        found = model.generate(**prompt, **GREEDY, **CACHES["static"], compile_config=compiled)
    assert found[0, 8:].tolist() == by_hand(model, tokens()[0, :8])  # the ideal crossbar
