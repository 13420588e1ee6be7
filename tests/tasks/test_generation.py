import json

import pytest
import torch

from hf_reram import ReRAMConfig, calibrate, deploy, patch_model
from hf_reram.tasks import Perplexity, generate_texts, packed
from tests.samples.texts import TEXTS, WORDS, llama, tokenizer


@pytest.fixture
def model():
    torch.manual_seed(0)
    return llama()


def test_texts_are_the_models_own(model, tmp_path):
    """Their first words come as often as the model says that they do."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
        chances = model(torch.tensor([[0]])).logits[0, -1].double()
    for temperature in (1.0, 2.0):
        folder = tmp_path / str(temperature)
        texts = generate_texts(model, tokenizer(), 3000, 2, folder, batch_size=1000, temperature=temperature)
        expected = (chances / temperature).softmax(-1)
        for index, word in enumerate(WORDS[2:], 2):  # the others are special, and do not show
            share = sum(text == word for text in texts) / len(texts)
            p = float(expected[index])
            assert share == pytest.approx(p, abs=4 * (p * (1 - p) / len(texts)) ** 0.5 + 1e-9), word


def test_what_was_sampled_is_not_sampled_again(model, tmp_path):
    texts = generate_texts(model, tokenizer(), 7, 8, tmp_path / "a", seed=3, batch_size=3)
    assert len(texts) == 7 and len(set(texts)) > 3 and max(len(text.split()) for text in texts) <= 7
    parts = sorted((tmp_path / "a").glob("0*.json"))
    assert [len(json.loads(part.read_text())) for part in parts] == [3, 3, 1]
    parts[1].unlink()
    first = json.loads(parts[0].read_text())
    parts[0].write_text(json.dumps(["kept", *first[1:]]))
    state = torch.get_rng_state()
    again = generate_texts(model, tokenizer(), 7, 8, tmp_path / "a", seed=3, batch_size=3)
    assert again == ["kept", *texts[1:]]
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="sampled with another seed: allowed is a new folder"):
        generate_texts(model, tokenizer(), 7, 8, tmp_path / "a", seed=4, batch_size=3)


def test_a_model_on_crossbars_samples_digitally(model, tmp_path):
    expected = generate_texts(model, tokenizer(), 4, 8, tmp_path / "a")
    patch_model(model, ReRAMConfig(device="hfox-neurram", input_range="per_token"))
    calibrate(model, Perplexity(packed(TEXTS, tokenizer(), 16)).batches)
    with deploy(model, "1d", seed=0):
        assert generate_texts(model, tokenizer(), 4, 8, tmp_path / "b") == expected
    assert generate_texts(model.train(), tokenizer(), 4, 8, tmp_path / "c") == expected
    assert model.training


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 0}, "count=0: allowed is an integer from 1"),
        ({"length": 1}, "length=1: allowed is an integer from 2"),
        ({"temperature": 0.0}, "temperature=0.0: allowed is a finite number above 0"),
        ({"batch_size": 1.5}, "batch_size=1.5: allowed is an integer from 1"),
    ],
)
def test_bad_arguments(model, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        generate_texts(model, tokenizer(), **{"count": 2, "length": 4, "folder": tmp_path, **changes})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("repetition_penalty", 50.0),
        ("num_beams", 3),
        ("max_new_tokens", 60),
        ("num_return_sequences", 2),
        ("return_dict_in_generate", True),
        ("suppress_tokens", [3]),
        ("top_k", 1),
        ("top_p", 0.1),
        ("min_p", 0.5),
    ],
)
def test_what_a_generation_config_asks_for_does_not_bend_the_distribution(model, tmp_path, name, value):
    expected = generate_texts(model, tokenizer(), 4, 8, tmp_path / "a")
    setattr(model.generation_config, name, value)
    before = model.generation_config.to_dict()
    assert generate_texts(model, tokenizer(), 4, 8, tmp_path / "b") == expected
    assert model.generation_config.to_dict() == before


def test_texts_end_where_the_model_says_so_too(model, tmp_path):
    model.generation_config.eos_token_id = [0, 11]  # as chat models end their turns
    texts = generate_texts(model, tokenizer(), 20, 16, tmp_path)
    assert not any("." in text or "<end>" in text for text in texts)
    assert len({len(text.split()) for text in texts}) > 2


def test_another_models_texts_are_not_taken(model, tmp_path):
    generate_texts(model, tokenizer(), 4, 8, tmp_path)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    with pytest.raises(ValueError, match="sampled with another model: allowed is a new folder"):
        generate_texts(model, tokenizer(), 4, 8, tmp_path)
