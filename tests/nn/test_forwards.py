"""What one forward samples and collects is its own."""

import copy
import gc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

from hf_reram import (
    ReRAMConfig,
    add_retention_loss,
    calibrate,
    crossbar_layers,
    deploy,
    noise_to_signal,
    patch_model,
    retention_loss,
    sampled_drift,
)
from hf_reram.model.find import crossbar_state
from tests.samples import models
from tests.samples.layers import KINDS, layer_of
from tests.samples.models import bert_batch


def halves() -> list[dict[str, torch.Tensor]]:
    whole = bert_batch(8)
    return [{key: value[part] for key, value in whole.items()} for part in (slice(0, 3), slice(3, 8))]


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def close(found, expected) -> None:
    scale = max(float(g.abs().max()) for g in expected.values())
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("loss", ["output", "weight", "output+drift"])
def test_two_forwards_before_one_backward_are_one_of_both_batches(tiny_bert, loss):
    """Values and gradients of the retention loss alone are those of the batches together."""
    patch_model(tiny_bert.train(), ReRAMConfig(retention_loss=loss))
    calibrate(tiny_bert, [bert_batch()])
    whole = bert_batch(8)
    with sampled_drift(tiny_bert, seed=1):
        one = tiny_bert(**whole)
    expected, value = add_retention_loss(0 * one.logits.sum(), tiny_bert, 3.0)
    expected.backward()
    wanted = gradients(tiny_bert)
    with sampled_drift(tiny_bert, seed=1):
        outputs = [tiny_bert(**half) for half in halves()]
    total, both = add_retention_loss(0 * sum(y.logits.sum() for y in outputs), tiny_bert, 3.0)
    total.backward()
    if loss == "weight":  # which counts a weight twice in both of its sums
        assert float(both) == pytest.approx(float(value), rel=1e-5)
    else:
        assert float(both) == pytest.approx(float(value), rel=1e-4)
    assert float(total.detach()) == pytest.approx(3 * float(both), rel=1e-5)
    close(gradients(tiny_bert), wanted)


def test_losses_of_two_forwards_may_be_added_afterwards(tiny_bert):
    patch_model(tiny_bert.train(), ReRAMConfig(retention_loss="output", retention_weight=2.0))
    calibrate(tiny_bert, [bert_batch()])
    wanted: dict[str, torch.Tensor] = {}
    for half in halves():
        add_retention_loss(tiny_bert(**half).loss, tiny_bert)[0].backward()
        for name, grad in gradients(tiny_bert).items():
            wanted[name] = wanted.get(name, 0) + grad
    losses = [add_retention_loss(tiny_bert(**half).loss, tiny_bert)[0] for half in halves()]
    sum(losses).backward()
    close(gradients(tiny_bert), wanted)


def test_a_forward_whose_outputs_are_gone_does_not_count(tiny_bert):
    patch_model(tiny_bert.train(), ReRAMConfig(retention_loss="output"))
    calibrate(tiny_bert, [bert_batch()])
    first, second = halves()
    alone = float(retention_loss_of(tiny_bert, second))
    tiny_bert(**first)  # to look at, say
    gc.collect()
    with torch.no_grad():
        reference = tiny_bert(**first)  # a frozen reference, kept
    assert float(retention_loss_of(tiny_bert, second)) == pytest.approx(alone, rel=1e-6)
    assert reference.logits.requires_grad is False


def retention_loss_of(model, batch) -> torch.Tensor:
    return add_retention_loss(model(**batch).loss, model)[1]


def test_a_loss_is_taken_once(tiny_bert):
    patch_model(tiny_bert.train(), ReRAMConfig(retention_loss="output"))
    calibrate(tiny_bert, [bert_batch()])
    loss = tiny_bert(**bert_batch()).loss
    add_retention_loss(loss, tiny_bert)
    with pytest.raises(RuntimeError, match="training mode"):
        add_retention_loss(loss, tiny_bert)


def test_ratios_are_those_of_the_last_loss(tiny_bert):
    patch_model(tiny_bert.train(), ReRAMConfig(retention_loss="output"))
    calibrate(tiny_bert, [bert_batch()])
    value = retention_loss(tiny_bert) if tiny_bert(**bert_batch()) else None
    ratios = noise_to_signal(tiny_bert)
    assert ratios.keys() == crossbar_layers(tiny_bert).keys()
    assert sum(ratios.values()) / len(ratios) == pytest.approx(float(value.detach()), rel=1e-5)


def test_seed_and_kind_do_not_outlive_their_context(tiny_bert):
    patch_model(tiny_bert.train(), ReRAMConfig(retention_loss="drift"))
    calibrate(tiny_bert, [bert_batch()])
    with torch.no_grad():
        ideal = tiny_bert(**bert_batch()).logits
        with sampled_drift(tiny_bert, seed=3):
            one, same = tiny_bert(**bert_batch()).logits, tiny_bert(**bert_batch()).logits
        with sampled_drift(tiny_bert):
            other, another = tiny_bert(**bert_batch()).logits, tiny_bert(**bert_batch()).logits
        after = tiny_bert(**bert_batch()).logits
    assert torch.equal(one, same) and torch.equal(ideal, after)
    assert not torch.equal(other, another) and not torch.equal(one, ideal)


def test_a_positional_mask_counts(tiny_bert):
    patch_model(tiny_bert.train(), ReRAMConfig(retention_loss="output"))
    calibrate(tiny_bert, [bert_batch()])
    batch = bert_batch()
    named = tiny_bert(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = float(add_retention_loss(named.sum(), tiny_bert)[1])
    given = tiny_bert(batch["input_ids"], batch["attention_mask"]).logits
    assert float(add_retention_loss(given.sum(), tiny_bert)[1]) == pytest.approx(expected, rel=1e-6)
    unmasked = tiny_bert(batch["input_ids"]).logits
    assert float(add_retention_loss(unmasked.sum(), tiny_bert)[1]) != pytest.approx(expected, rel=1e-4)


def t5() -> T5ForConditionalGeneration:
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=40, decoder_start_token_id=0, dropout_rate=0.0, **shape))


def test_an_encoders_mask_is_not_the_decoders():
    """Whose tokens are as many: the powers of each layer's inputs are counted as the layer meets them."""
    model = t5().train()
    patch_model(model, ReRAMConfig(retention_loss="output"))
    ids, mask = torch.randint(1, 40, (3, 5)), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    batch = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": torch.randint(1, 40, (3, 5))}
    calibrate(model, [batch])
    model(**batch)
    kept = crossbar_state(model).forward.kept
    for name in crossbar_layers(model):
        cross = "EncDecAttention.k" in name or "EncDecAttention.v" in name
        if name.startswith("encoder") or cross:
            assert torch.equal(kept[name][0][0], mask) and torch.equal(kept[name][1][0], mask.flatten()), name
        else:
            assert kept[name] == ([None], [None]), name
    model(**batch, decoder_attention_mask=mask.flip(1))
    kept = crossbar_state(model).forward.kept
    assert torch.equal(kept["decoder.block.0.layer.0.SelfAttention.q"][0][0], mask.flip(1))
    assert torch.equal(kept["encoder.block.0.layer.0.SelfAttention.q"][0][0], mask)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_refuses_forwards_that_it_cannot_tell_apart(tiny_bert, reentrant):
    patch_model(tiny_bert.train(), ReRAMConfig(retention_loss="output"))
    calibrate(tiny_bert, [bert_batch()])
    tiny_bert.gradient_checkpointing_enable({"use_reentrant": reentrant})
    losses = [tiny_bert(**half).loss for half in halves()]  # whose padding differs
    total, _ = add_retention_loss(sum(losses), tiny_bert)
    with pytest.raises(RuntimeError, match="several forwards"):
        total.backward()


def test_a_part_of_the_model_may_be_called_by_itself(tiny_bert):
    patch_model(tiny_bert.train(), ReRAMConfig(retention_loss="output"))
    calibrate(tiny_bert, [bert_batch()])
    batch = {key: value for key, value in bert_batch().items() if key != "labels"}
    values = []
    for _ in range(3):
        hidden = tiny_bert.bert(**batch).last_hidden_state
        loss, value = add_retention_loss(hidden.square().mean(), tiny_bert)
        loss.backward()
        values.append(float(value))
    assert values[1] == pytest.approx(values[0], rel=1e-6) and values[2] == pytest.approx(values[0], rel=1e-6)


def test_a_chip_is_not_trained(tiny_bert):
    patch_model(tiny_bert, ReRAMConfig())
    calibrate(tiny_bert, [bert_batch()])
    with deploy(tiny_bert, "1d"):
        with pytest.raises(RuntimeError, match="train outside of deploy"):
            tiny_bert.train()(**bert_batch()).loss.backward()
        tiny_bert.eval()(**bert_batch()).loss.backward()  # as gradients of its inputs need
    tiny_bert.train()(**bert_batch()).loss.backward()


@pytest.mark.parametrize(("loss", "whole"), [("none", False), ("output+drift", True)])
def test_a_compiled_chip_is_not_trained(loss, whole):
    """In one graph or with breaks."""
    model = patch_model(nn.Linear(4, 8), ReRAMConfig(retention_loss=loss))
    x = torch.randn(3, 4)
    calibrate(model, [x])
    torch._dynamo.reset()
    compiled = torch.compile(model.train(), fullgraph=whole, backend="eager")
    with deploy(model, "1d"):
        with pytest.raises(torch._dynamo.exc.Unsupported if whole else RuntimeError, match="train outside"):
            compiled(x).sum().backward()
        model.eval()
        with torch.no_grad():
            assert not torch.equal(compiled(x), calibrated_ideal(model, x))


def calibrated_ideal(model, x):
    alone = copy.deepcopy(model)  # is no chip
    return alone(x)


def test_what_stands_on_a_chip_is_not_trained_either():
    """Nothing before the digital head takes a gradient by itself."""
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Linear(8, 2))
    patch_model(model, ReRAMConfig(retention_loss="output", modules_to_not_convert=["1"]))
    x = torch.randn(3, 4)
    calibrate(model, [x])
    with deploy(model.train(), "1d"), pytest.raises(RuntimeError, match="train outside of deploy"):
        model(x).sum().backward()


def test_a_forward_that_fails_is_over(tiny_bert):
    patch_model(tiny_bert.train(), ReRAMConfig(retention_loss="drift"))
    calibrate(tiny_bert, [bert_batch()])
    ids = bert_batch()["input_ids"]
    with sampled_drift(tiny_bert, seed=1):
        drifted = tiny_bert.bert(ids).last_hidden_state
        with pytest.raises(IndexError):
            tiny_bert(ids + 10**6)
    # A part by itself is not in that forward, whose drift is over.
    assert not torch.equal(tiny_bert.bert(ids).last_hidden_state, drifted)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_refuses_one_layer_under_two_masks(reentrant):
    """Which of them its second run is for, nothing tells."""

    class Pair(nn.Module):
        def __init__(self, encoder):
            super().__init__()
            self.encoder = encoder

        def forward(self, input_ids, masks):
            return sum(self.encoder(input_ids, attention_mask=mask).logits.square().mean() for mask in masks)

    model = patch_model(Pair(models.tiny_bert()).train(), ReRAMConfig(retention_loss="output"))
    batch = bert_batch()
    ids, mask = batch["input_ids"], torch.ones_like(batch["input_ids"])
    calibrate(model, [(ids, [mask])])
    model.train().encoder.gradient_checkpointing_enable({"use_reentrant": reentrant})
    other = mask.clone()
    other[:, 4:] = 0
    add_retention_loss(model(ids, [mask, mask.clone()]), model)[0].backward()
    with pytest.raises(RuntimeError, match="2 times in one forward with attention masks of its own"):
        add_retention_loss(model(ids, [mask, other]), model)[0].backward()


def test_a_layer_may_be_called_by_keyword():
    model = nn.Sequential(nn.Linear(4, 3))
    x = torch.randn(5, 4)
    patch_model(model, ReRAMConfig())
    calibrate(model, [x])
    assert torch.equal(model[0](input=x), model[0](x))


def test_what_is_sampled_is_that_of_the_context_for_a_part_by_itself_too(tiny_bert):
    patch_model(tiny_bert.train(), ReRAMConfig(retention_loss="drift"))
    calibrate(tiny_bert, [bert_batch()])
    ids = bert_batch()["input_ids"]

    def encode():
        with torch.no_grad():
            return tiny_bert.bert(ids).last_hidden_state

    ideal = encode()
    with sampled_drift(tiny_bert, seed=1):
        drifted = encode()
        with torch.no_grad():
            tiny_bert(ids)
    assert not torch.equal(drifted, ideal) and torch.equal(encode(), ideal)
    with sampled_drift(tiny_bert, seed=1):
        assert torch.equal(encode(), drifted)


def test_a_head_on_a_decoder_reads_decoder_tokens():
    shape = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    shape |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 40}
    model = BartForConditionalGeneration(BartConfig(**shape, tie_word_embeddings=False)).train()
    patch_model(model, ReRAMConfig(retention_loss="output"))
    ids, mask = torch.randint(4, 40, (2, 5)), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    model(ids, mask, decoder_input_ids=ids)
    kept = crossbar_state(model).forward.kept
    assert kept["lm_head"] == kept["model.decoder.layers.0.fc1"] == ([None], [None])
    assert torch.equal(kept["model.encoder.layers.0.fc1"][0][0], mask)
    model(ids, mask, decoder_input_ids=ids, decoder_attention_mask=mask.flip(0))
    assert torch.equal(crossbar_state(model).forward.kept["lm_head"][0][0], mask.flip(0))


def test_a_last_forward_that_nobody_keeps_does_not_join_the_loss_of_another(tiny_bert):
    patch_model(tiny_bert.train(), ReRAMConfig(retention_loss="output"))
    calibrate(tiny_bert, [bert_batch()])
    first, second = halves()
    alone = float(retention_loss_of(tiny_bert, first))
    kept = tiny_bert(**first)
    tiny_bert(**second)
    assert float(add_retention_loss(kept.loss, tiny_bert)[1]) == pytest.approx(alone, rel=1e-6)
    kept = tiny_bert(**first)
    with torch.no_grad():
        tiny_bert(**second)
    assert float(add_retention_loss(kept.loss, tiny_bert)[1]) == pytest.approx(alone, rel=1e-6)


def test_memory_that_changes_under_a_tensor_is_read_anew():
    model = nn.Sequential(nn.Linear(6, 4)).eval()
    values = np.random.default_rng(0).standard_normal((5, 6)).astype("f4")
    x = torch.from_numpy(values)
    patch_model(model, ReRAMConfig())
    calibrate(model, [x.clone()])
    with torch.no_grad():
        before = model(x)
        values[:] = -values
        assert not torch.equal(model(x), before) and torch.equal(model(x), model(x.clone()))


def test_memory_that_changes_under_the_input_of_a_part_is_read_anew():
    model = nn.Sequential(nn.Linear(4, 3))
    x = np.ones((2, 4), dtype=np.float32)
    patch_model(model, ReRAMConfig())
    calibrate(model, [torch.from_numpy(x)])
    shared = torch.from_numpy(x)
    with torch.no_grad():
        first = model[0](shared)
        x[:] = -0.5
        assert torch.equal(model[0](shared), model[0](shared.clone())) and not torch.equal(model[0](shared), first)


def test_one_input_under_two_masks_has_the_power_of_each():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def forward(self, x, masks):
            return sum(self.inner(inputs_embeds=x, attention_mask=mask).square().mean() for mask in masks)

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, inputs_embeds, attention_mask):
            return self.layer(inputs_embeds)

    model = patch_model(Twice().train(), ReRAMConfig(retention_loss="output"))
    x, whole = torch.randn(2, 5, 4), torch.ones(2, 5, dtype=torch.long)
    few = whole.clone()
    few[:, 1:] = 0
    calibrate(model, [(x, [whole])])
    terms = []
    for masks in ([whole], [few], [whole, few]):
        model.train()(x, masks)
        terms.append(crossbar_state(model).forward.terms["inner.layer"].detach())
    torch.testing.assert_close(terms[2], terms[0] + terms[1])


@pytest.mark.parametrize("options", [{}, {"adc_bits": 8}, {"tile_size": 2, "dac_bits": 6, "adc_bits": 8}])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_makes_nothing(kind, options):
    """As experts get that no token is routed to."""
    layer, x = layer_of(kind)
    model = patch_model(nn.Sequential(layer).train(), ReRAMConfig(**options))
    expected = model(x)[:0]
    assert model(x[:0]).shape == expected.shape
    with deploy(model.eval(), "1d"):
        assert model(x[:0]).shape == expected.shape


def test_buffers_that_are_moved_under_inference_mode_are_ordinary():
    model = patch_model(nn.Sequential(nn.Linear(4, 3)), ReRAMConfig())
    with torch.inference_mode():
        model._apply(lambda t: t.clone())
    assert not model[0].input_range.is_inference()
    calibrate(model, [torch.randn(3, 4)])


def test_a_buffer_that_is_replaced_is_seen():
    layer = patch_model(nn.Linear(4, 3), ReRAMConfig())
    for _ in range(50):
        for value in (0.3, 0.7):
            layer.gain = torch.full((1,), value)
        assert layer.scalars().gain == pytest.approx(0.7)
        layer.gain = torch.full((1,), 0.1)
        assert layer.scalars().gain == pytest.approx(0.1)


def loss_beside(model, before, batch):
    """The retention loss of a batch, after ``before`` has run something else."""
    loss = model(**batch).loss
    before()
    return float(add_retention_loss(loss, model)[1])


def test_parts_that_nobody_keeps_do_not_join_the_loss_of_a_forward(tiny_bert):
    patched = calibrated(tiny_bert)
    batch, other = halves()
    alone = loss_beside(patched, lambda: None, batch)
    part, head = copy.deepcopy(patched.bert), copy.deepcopy(patched.classifier)
    x = torch.randn(4, head.in_features)

    def without_gradients(call):
        with torch.no_grad():
            call()

    for name, before in {
        "an encoder": lambda: without_gradients(lambda: patched.bert(other["input_ids"])),
        "a copy of the encoder": lambda: without_gradients(lambda: part(other["input_ids"])),
        "a layer": lambda: patched.classifier(x),
        "a copy of a layer": lambda: without_gradients(lambda: head(9 * x)),
        "forward itself": lambda: without_gradients(lambda: patched.forward(**other)),
    }.items():
        assert loss_beside(patched, before, batch) == pytest.approx(alone, rel=1e-6), name


def calibrated(model):
    patch_model(model, ReRAMConfig(retention_loss="output"))
    return calibrate(model, halves()).train()


class Encoding(nn.Module):
    """Is called by its parts only."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)

    def encode(self, x):
        return self.last(torch.relu(self.first(x)))

    def forward(self, x):
        return self.encode(x)


def test_parts_alone_have_the_loss_of_the_whole():
    torch.manual_seed(0)
    model, x, other = Encoding(), torch.randn(16, 6), 5 * torch.randn(16, 6)
    patch_model(model, ReRAMConfig(retention_loss="output"))
    calibrate(model, [x]).train()
    y = model(x)
    whole = add_retention_loss(y.sum(), model)
    whole[0].backward()
    expected = gradients(model)
    model.zero_grad()
    with torch.no_grad():
        model.encode(other)
    model(other)
    model.encode(other)
    y = model.encode(x)
    parts = add_retention_loss(y.sum(), model)
    assert float(parts[1]) == pytest.approx(float(whole[1]), rel=1e-6)
    parts[0].backward()
    close(gradients(model), expected)


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x):
        return SimpleNamespace(y=self.layer(x))


def test_outputs_of_any_kind_keep_their_forward():
    torch.manual_seed(0)
    model, a, b = Named(), torch.randn(8, 6), 3 * torch.randn(8, 6)
    patch_model(model, ReRAMConfig(retention_loss="output"))
    calibrate(model, [torch.cat((a, b))]).train()
    both = add_retention_loss(sum(model(x).y.sum() for x in (a, b)), model)[1]
    at_once = add_retention_loss(model(torch.cat((a, b))).y.sum(), model)[1]
    assert float(both) == pytest.approx(float(at_once), rel=1e-5)


class Translator(nn.Module):
    """An encoder-decoder that transformers does not know."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.encoder, self.decoder, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 20)

    def forward(self, input_ids, attention_mask, decoder_input_ids):
        hidden = self.encoder(self.embed(input_ids)).mean(1, keepdim=True)
        return self.head(self.decoder(self.embed(decoder_input_ids)) + hidden)


def test_a_mask_beside_a_decoders_tokens_is_not_theirs():
    model = Translator()
    ids, mask = torch.randint(0, 20, (2, 6)), torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])
    patch_model(model, ReRAMConfig(retention_loss="output"))
    calibrate(model, [(ids, mask, ids)]).train()
    model(ids, mask, ids)
    kept = crossbar_state(model).forward.kept
    assert kept["decoder"][0] == kept["head"][0] == [None]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"dac_bits": 8, "adc_bits": 8}], ids=["ideal", "converters"])
@pytest.mark.parametrize("kind", KINDS)
def test_learned_ranges_run_in_half_precision(kind, options, dtype):
    torch.manual_seed(0)
    layer, x = layer_of(kind)
    model = nn.Sequential(layer)
    patch_model(model, ReRAMConfig(learn_input_range=True, **options))
    calibrate(model, [x])
    expected = model.eval()(x).detach()
    model.to(dtype)
    off = model(x.to(dtype)).float() - expected  # single elements may be a step of a converter off
    assert off.std() < 0.05 * expected.std()
    y = model.train()(x.to(dtype))
    assert y.dtype == dtype and model[0].input_range.dtype == torch.float32
    y.float().square().sum().backward()
    assert model[0].input_range.grad.dtype == torch.float32 and torch.isfinite(model[0].input_range.grad).all()
