import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Wav2Vec2Config, Wav2Vec2ForCTC

from hf_reram import (
    ReRAMConfig,
    add_retention_loss,
    calibrate,
    crossbar_layers,
    deploy,
    patch_model,
    sampled_drift,
    summarize,
    unpatch_model,
)
from hf_reram.model import patch
from hf_reram.nn import CrossbarConv1D, CrossbarLayer, CrossbarLinear
from tests.samples import zoo
from tests.samples.devices import straight
from tests.samples.models import bert_batch


def test_patching_twice_and_unpatching_a_digital_model_are_errors(tiny_bert):
    patch_model(tiny_bert, ReRAMConfig())
    with pytest.raises(ValueError, match="patched already"):
        patch_model(tiny_bert, ReRAMConfig())
    unpatch_model(tiny_bert)
    with pytest.raises(ValueError, match="no crossbar layers"):
        unpatch_model(tiny_bert)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["nothing"]},
        {"target_modules": ".*nothing"},
        {"target_modules": "("},
        {"modules_to_not_convert": ["nothing"]},
        {"target_modules": ["classifier"], "modules_to_not_convert": ["classifier"]},
    ],
)
def test_patterns_that_match_nothing_are_errors(tiny_bert, options):
    with pytest.raises(ValueError, match=r"nothing|no regular expression"):
        patch_model(tiny_bert, ReRAMConfig(**options))
    assert not crossbar_layers(tiny_bert)


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 14),
        ({"target_modules": ["query", "value"]}, 4),
        ({"target_modules": r".*attention\.self\..*"}, 6),
        ({"modules_to_not_convert": ["classifier", "bert.pooler"]}, 12),
        ({"modules_to_not_convert": ["encoder.layer.0"]}, 8),
    ],
)
def test_selection_by_name(tiny_bert, options, count):
    patch_model(tiny_bert, ReRAMConfig(**options))
    assert len(crossbar_layers(tiny_bert)) == count


def test_summary_and_print_tell_what_is_on_crossbars(tiny_bert):
    patch_model(tiny_bert, ReRAMConfig(device="cmo-hfox-ibm"))
    assert "cmo-hfox-ibm, input_range=not calibrated, b=0.8" in repr(tiny_bert)
    calibrate(tiny_bert, [bert_batch()])
    assert "not calibrated" not in repr(tiny_bert)
    summary = summarize(tiny_bert)
    weights = sum(layer.weight.numel() for layer in crossbar_layers(tiny_bert).values())
    assert (summary.layers, summary.calibrated, summary.cells) == (14, 14, 2 * weights)
    assert summary.share == pytest.approx(weights / sum(p.numel() for p in tiny_bert.parameters()))
    assert any("word_embeddings" in name for name in summary.digital)


def test_gpt2_keeps_its_tied_head_digital():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=16)).eval()
    ids = torch.randint(60, (2, 9))
    digital = model(ids).logits
    patch_model(model, straight())
    layers = crossbar_layers(model)
    assert all(type(layer) is CrossbarConv1D for layer in layers.values())
    assert "lm_head" not in layers
    torch.testing.assert_close(model(ids).logits, digital, rtol=1e-5, atol=1e-6)


def test_a_bare_layer_is_a_model_too():
    layer = nn.Linear(4, 3)
    x = torch.randn(5, 4)
    digital = layer(x)
    patch_model(layer, straight())
    assert type(layer) is CrossbarLinear
    torch.testing.assert_close(layer(x), digital)


def test_subclasses_with_a_forward_of_their_own_stay_digital():
    class Odd(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    class OwnAttention(nn.MultiheadAttention):
        def forward(self, x):
            return super().forward(x, x, x)

    model = nn.ModuleDict({"odd": Odd(4, 4), "plain": nn.Linear(4, 4), "attention": OwnAttention(4, 2)})
    patch_model(model, ReRAMConfig())
    assert list(crossbar_layers(model)) == ["plain"]
    assert summarize(model).digital == (
        "odd (Odd)",
        "attention (OwnAttention)",
        "attention.out_proj (NonDynamicallyQuantizableLinear)",
    )


def test_kinds_that_are_not_put_on_crossbars_are_named(caplog):
    kinds = {
        "cell": nn.LSTMCell(4, 4),
        "sequence": nn.GRU(4, 4),
        "conv": nn.Conv3d(4, 4, 1),
        "two": nn.Bilinear(4, 4, 2),
    }
    with caplog.at_level("WARNING", "hf_reram"):
        patch_model(nn.ModuleDict({**kinds, "plain": nn.Linear(4, 4)}), ReRAMConfig())
    assert "cell (LSTMCell), sequence (GRU), conv (Conv3d), two (Bilinear) multiply by weights of kinds" in caplog.text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_weights_are_refused_by_name(value):
    model = nn.Sequential(nn.Linear(4, 4))
    with torch.no_grad():
        model[0].weight[1, 2] = value
    with pytest.raises(ValueError, match="'0'"):
        patch_model(model, ReRAMConfig())


def test_nan_inputs_are_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    patch_model(model, ReRAMConfig())
    with pytest.raises(ValueError, match="NaN"):
        model(torch.full((2, 4), float("nan")))


@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_patched_models_can_be_copied_and_pickled_after_training(tiny_bert, make):
    patch_model(tiny_bert, ReRAMConfig(retention_loss="output"))
    calibrate(tiny_bert, [bert_batch()])
    tiny_bert.train()(**bert_batch()).loss.backward()
    twin = make(tiny_bert.eval())
    states = {id(layer.crossbar) for layer in crossbar_layers(twin).values()}
    assert len(states) == 1
    assert states != {id(layer.crossbar) for layer in crossbar_layers(tiny_bert).values()}
    with deploy(twin, "1d"):
        assert crossbar_layers(tiny_bert)["classifier"].chip is None
    assert torch.equal(twin(**bert_batch()).logits, tiny_bert(**bert_batch()).logits)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_part_has_the_state_of_its_model_before_any_forward(tiny_bert, make):
    """As PEFT copies heads."""
    patch_model(tiny_bert, ReRAMConfig())
    model = make(tiny_bert)
    state = model.bert.pooler.dense.crossbar
    assert copy.deepcopy(model.classifier).crossbar is state
    assert state is not tiny_bert.classifier.crossbar and copy.deepcopy(model).classifier.crossbar is not state


def test_unpatching_waits_for_parametrizations_to_be_taken_off(tiny_bert):
    before = copy.deepcopy(tiny_bert.state_dict())
    patch_model(tiny_bert, ReRAMConfig())
    nn.utils.parametrizations.weight_norm(tiny_bert.classifier)
    with pytest.raises(ValueError, match=r"classifier: take them off first"):
        unpatch_model(tiny_bert)
    assert isinstance(tiny_bert.bert.pooler.dense, CrossbarLayer)
    nn.utils.parametrize.remove_parametrizations(tiny_bert.classifier, "weight")
    unpatch_model(tiny_bert)
    assert type(tiny_bert.classifier) is nn.Linear
    for name, tensor in tiny_bert.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=1e-6, atol=1e-7)


def test_peft_wraps_crossbar_layers():
    from peft import LoraConfig, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification

    shape = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 3}
    model = BertForSequenceClassification(BertConfig(**shape, intermediate_size=32))
    patch_model(model, ReRAMConfig(retention_loss="output"))
    calibrate(model, [bert_batch()])
    lora = get_peft_model(model, LoraConfig(target_modules=["query", "value"], task_type="SEQ_CLS"))
    lora.train()(**bert_batch()).loss.backward()
    trained = [n for n, p in lora.named_parameters() if p.grad is not None]
    assert any("lora_B" in n for n in trained)
    assert not any("base_layer" in n for n in trained)


@pytest.mark.parametrize("loss", ["output", "sensitivity", "output+drift"])
def test_an_activation_in_place_does_not_overwrite_what_the_term_needs(loss):
    def model(inplace):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace), nn.Flatten(), nn.Linear(144, 5)).train()

    x, grads = torch.randn(2, 3, 8, 8), []
    for inplace in (False, True):
        net = model(inplace)
        patch_model(net, ReRAMConfig(retention_loss=loss))
        calibrate(net, [x])
        add_retention_loss(net(x).square().mean(), net)[0].backward()
        grads.append(net[0].weight.grad)
    torch.testing.assert_close(*grads)
    unpatch_model(net)
    assert net[1].inplace


class _AddsInPlace(nn.Module):
    """A residual connection in place, as torchvision's and some of transformers' models have it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x, in_place=True):
        y = self.first(x)
        y = y.add_(x) if in_place is True or (in_place is None and self.training) else y + x
        return self.second(y)


@pytest.mark.parametrize("loss", ["output", "sensitivity", "weight", "output+drift"])
@pytest.mark.parametrize("calibrated", [True, False])
def test_outputs_that_the_model_changes_in_place(loss, calibrated):
    """None: in training alone, where calibration does not look."""
    grads = []
    for in_place in (False, True, None):
        model, x = _AddsInPlace().train(), torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
        patch_model(model, ReRAMConfig(retention_loss=loss))
        calibrate(model, [{"x": x, "in_place": in_place}])
        assert [layer.copies_output for layer in crossbar_layers(model).values()] == [in_place or None, None]
        if not calibrated:  # as from a checkpoint: nobody has looked
            for layer in crossbar_layers(model).values():
                layer.copies_output = True
        with sampled_drift(model):
            y = model(x, in_place=in_place)
        add_retention_loss(y.square().sum(), model)[0].backward()
        grads.append([p.grad.clone() for p in model.parameters()])
        if calibrated:
            found = [layer.copies_output for layer in crossbar_layers(model).values()]
            assert found == [in_place is not False, False]
    for one, *others in zip(*grads, strict=True):
        for other in others:
            torch.testing.assert_close(one, other)


def test_speech_that_is_masked_in_training_alone():
    torch.manual_seed(0)
    model = Wav2Vec2ForCTC(Wav2Vec2Config(**{**zoo.SPEECH, "mask_time_prob": 0.5, "mask_time_length": 2}))
    patch_model(model, ReRAMConfig(retention_loss="output+drift"))
    batch = {"input_values": torch.randn(2, 400), "labels": torch.tensor([[3, 4], [5, 6]])}
    calibrate(model, [batch])
    with sampled_drift(model.train()):
        loss, value = add_retention_loss(model(**batch).loss, model)
    loss.backward()
    changed = [name for name, layer in crossbar_layers(model).items() if layer.copies_output]
    assert changed == ["wav2vec2.feature_projection.projection"] and float(value) > 0
    assert all(bool(layer.weight.grad.isfinite().all()) for layer in crossbar_layers(model).values())


@pytest.mark.parametrize("where", ["init_crossbar", "initialize_layers", "hook"])
def test_patching_is_all_or_nothing(tiny_bert, monkeypatch, where):
    expected, batch = copy.deepcopy(tiny_bert), bert_batch()
    calls = []

    def fail(*args, **kwargs):
        calls.append(1)
        if len(calls) == 5 or where != "init_crossbar":
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    if where == "hook":
        monkeypatch.setattr(patch, "ON_PATCH", [fail])
    else:
        owner = CrossbarLinear if where == "init_crossbar" else patch
        original = getattr(owner, where)
        monkeypatch.setattr(owner, where, fail)
    with pytest.raises(KeyboardInterrupt):
        patch_model(tiny_bert, ReRAMConfig())
    monkeypatch.undo()
    assert not crossbar_layers(tiny_bert) and not any("_crossbar_hooks" in m.__dict__ for m in tiny_bert.modules())
    assert tiny_bert.state_dict().keys() == expected.state_dict().keys()
    assert torch.equal(tiny_bert(**batch).logits, expected(**batch).logits)
    assert not hasattr(tiny_bert.config, "quantization_config")
    patch_model(tiny_bert, ReRAMConfig())
    assert len(crossbar_layers(tiny_bert)) == 14
