"""A layer on a crossbar runs, or it is none and named: parents that read weights, weights that are computed, hooks."""

import ast
import copy
import importlib
import inspect
import pickle
from pathlib import Path

import pytest
import torch
import transformers
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_module
from peft import FrodConfig, HRAConfig, LoraConfig, ShiraConfig, SupertuningConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.parametrize import register_parametrization

from hf_reram import ReRAMConfig, calibrate, crossbar_layers, deploy, digital, patch_model, unpatch_model
from hf_reram.model.bypass import READ_PAST, SWITCHES
from hf_reram.model.find import reset_calls, uncalled
from tests.samples.zoo import DECODER, SPEECH, TEXT, image, tokens


@torch.no_grad()
def _run(model, batch) -> torch.Tensor:
    torch.manual_seed(0)
    output = model(**batch) if isinstance(batch, dict) else model(*batch)
    if isinstance(output, torch.Tensor):
        return output
    return next(v for v in output.to_tuple()[::-1] if isinstance(v, torch.Tensor) and v.is_floating_point())


def _check(model, batch, left=(), copies=(copy.deepcopy,), **options):
    """Patch, and see by value that each crossbar runs, that those ``left`` are none, and that unpatching undoes it."""
    model.eval()
    before = _run(model, batch)
    attributes = {name: dict(m.__dict__) for name, m in model.named_modules()}
    patch_model(model, ReRAMConfig(device="cmo-hfox-ibm", **options))
    layers = crossbar_layers(model)
    assert layers and not set(layers) & set(left)
    with digital(model):
        torch.testing.assert_close(_run(model, batch), before, rtol=1e-4, atol=1e-5)
    calibrate(model, [batch])
    fresh = _run(model, batch)
    for twin in (model, *(make(model) for make in copies)):
        reset_calls(twin)
        with deploy(twin, "10y", seed=1):
            aged = _run(twin, batch)
        assert not uncalled(twin)
        assert torch.equal(_run(twin, batch), fresh) and not torch.equal(aged, fresh)
    unpatch_model(model)
    assert torch.equal(_run(model, batch), before)
    for name, module in model.named_modules():
        assert module.__dict__.keys() == attributes[name].keys()
        plain = (bool, int, float, str, type(None))
        assert {k: v for k, v in module.__dict__.items() if isinstance(v, plain)} == {
            k: v for k, v in attributes[name].items() if isinstance(v, plain)
        }


def _pickled(model):
    return pickle.loads(pickle.dumps(model))


# PyTorch's encoder


class OwnAttention(nn.MultiheadAttention):
    """With a forward of its own, so that nothing tells what it does with its weights."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def _encoder_layer(own=False, **options) -> nn.TransformerEncoderLayer:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, **options)
    if own:
        layer.self_attn = OwnAttention(16, 2, batch_first=True)
    return layer


def _padding(*lengths: int) -> torch.Tensor:
    return torch.arange(max(lengths))[None] >= torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("target", ["linear1", "linear2"])
def test_the_fast_path_of_pytorchs_encoder_layer_is_off(activation, target):
    model, x = nn.Sequential(_encoder_layer(activation=activation), nn.Linear(16, 3)), torch.randn(2, 5, 16)
    _check(model, (x,), ["0.self_attn.out_proj"], (copy.deepcopy, _pickled), target_modules=[target])


def test_nested_tensors_of_pytorchs_encoder_are_off():
    encoder = nn.TransformerEncoder(_encoder_layer(), 2)
    assert encoder.use_nested_tensor
    batch = {"src": torch.randn(2, 5, 16), "src_key_padding_mask": _padding(5, 3)}
    encoder.eval()
    before = _run(encoder, batch)
    patch_model(encoder, ReRAMConfig(device="cmo-hfox-ibm"))
    kept = ~batch["src_key_padding_mask"]
    with digital(encoder):
        torch.testing.assert_close(_run(encoder, batch)[kept], before[kept], rtol=1e-4, atol=1e-5)
    calibrate(encoder, [batch])
    for twin in (encoder, copy.deepcopy(encoder), _pickled(encoder)):
        reset_calls(twin)
        with deploy(twin, "10y"):
            aged = _run(twin, batch)
        assert not uncalled(twin)
        assert ((aged - before)[kept].abs().amax(-1) > 0).all()
    unpatch_model(encoder)
    assert encoder.use_nested_tensor and torch.equal(_run(encoder, batch), before)


def test_an_encoder_without_crossbars_keeps_its_fast_path():
    model = nn.Sequential(_encoder_layer(), nn.Linear(16, 3)).eval()
    before = vars(model[0]).copy()
    patch_model(model, ReRAMConfig(target_modules=["1"]))
    assert vars(model[0]) == before


# Parents that read weights


def _speech(kind: str, **more):
    shape = {**SPEECH, "tdnn_dim": (8, 8), "tdnn_kernel": (2, 2), "tdnn_dilation": (1, 1), "xvector_output_dim": 8}
    return _transformer(f"{kind}ForXVector", f"{kind}Config", {**shape, **more})


def _transformer(model: str, config: str, shape):
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**shape)).eval()


MAMBA = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
JAMBA = {"num_experts": 1, "mamba_d_state": 4, "attn_layer_period": 2, "attn_layer_offset": 1}
BOTTLENECK = {"embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16}
REFORMER = {
    "vocab_size": 60,
    "attention_head_size": 8,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "feed_forward_size": 32,
    "axial_pos_embds": False,
    "attn_layers": ["lsh", "local"],
    "is_decoder": True,
    "lsh_attn_chunk_length": 4,
    "local_attn_chunk_length": 4,
    "num_hashes": 1,
    "num_buckets": 2,
}
WAVE = {"input_values": torch.randn(2, 800, generator=torch.Generator().manual_seed(1))}
KERNELS = ["tdnn.0.kernel", "tdnn.1.kernel"]
WAVLM = [f"wavlm.encoder.layers.0.attention.{name}_proj" for name in ("q", "k", "v", "out")]

TRANSFORMERS = {
    "mamba": (lambda: _transformer("MambaForCausalLM", "MambaConfig", MAMBA), ["backbone.layers.0.mixer.dt_proj"]),
    "jamba": (
        lambda: _transformer("JambaForCausalLM", "JambaConfig", {**DECODER, **JAMBA}),
        ["model.layers.0.mamba.dt_proj"],
    ),
    "mobilebert": (
        lambda: _transformer("MobileBertForMaskedLM", "MobileBertConfig", {**TEXT, "hidden_size": 32, **BOTTLENECK}),
        ["cls.predictions.dense"],  # the decoder is tied
    ),
    "reformer": (
        lambda: _transformer("ReformerModelWithLMHead", "ReformerConfig", REFORMER),
        [f"reformer.encoder.layers.0.attention.self_attention.{name}" for name in ("query_key", "value")],
    ),
    "wavlm": (lambda: _speech("WavLM"), WAVLM + KERNELS),
    "wav2vec2": (lambda: _speech("Wav2Vec2"), KERNELS),
    "bloom": (
        lambda: _transformer(
            "BloomForCausalLM",
            "BloomConfig",
            {
                "vocab_size": 60,
                "n_layer": 1,
                "n_head": 2,
                "hidden_size": 16,
                "pretraining_tp": 2,
                "slow_but_exact": True,
            },
        ),
        [],
    ),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_models_of_transformers(name, caplog):
    build, left = TRANSFORMERS[name]
    model = build()
    batch = WAVE if model.main_input_name == "input_values" else {"input_ids": tokens()}
    with caplog.at_level("WARNING", "hf_reram"):
        _check(model, batch, left)
    assert all(layer in caplog.text for layer in left[:2])


def test_a_parent_that_is_the_whole_model_with_adapters_and_without():
    from transformers.models.detr.modeling_detr import DetrMHAttentionMap

    batch = torch.randn(2, 3, 16), torch.randn(2, 16, 4, 4)
    _check(DetrMHAttentionMap(16, 2), batch, ["k_proj"])
    adapted = get_peft_model(DetrMHAttentionMap(16, 2), LoraConfig(target_modules=["q_proj", "k_proj"]))
    _check(adapted, batch, ["k_proj"])


def _beit():
    from timm.models.beit import Beit

    return Beit(img_size=32, patch_size=16, embed_dim=16, depth=1, num_heads=2, num_classes=2)


def _eva():
    from timm.models.eva import Eva

    return Eva(img_size=32, patch_size=16, embed_dim=16, depth=1, num_heads=2, num_classes=2)


def _swin_v2():
    from timm.models.swin_transformer_v2 import SwinTransformerV2

    model = SwinTransformerV2(img_size=32, window_size=4, embed_dim=8, depths=(1,), num_heads=(1,), num_classes=2)
    for norm in (m for m in model.modules() if isinstance(m, nn.LayerNorm)):
        nn.init.ones_(norm.weight)  # those after a block begin at 0
    return model


@pytest.mark.parametrize(("build", "qkv"), [(_beit, "blocks.0"), (_eva, "blocks.0"), (_swin_v2, "layers.0.blocks.0")])
def test_biases_of_timms_attention_are_added_after_its_crossbar(build, qkv):
    pytest.importorskip("timm")
    x = image()["pixel_values"]
    _check(build(), (x,), copies=(copy.deepcopy, _pickled))
    _check(build(), (x,), target_modules=[f"{qkv}.attn.qkv"])


def test_torchvisions_swin_stays_digital_where_it_reads_weights():
    models = pytest.importorskip("torchvision.models")
    shape = {"patch_size": [4, 4], "embed_dim": 8, "depths": [2], "num_heads": [1], "window_size": [4, 4]}
    left = [f"features.1.{block}.attn.{name}" for block in (0, 1) for name in ("qkv", "proj")]
    for block in (None, models.swin_transformer.SwinTransformerBlockV2):
        more = {} if block is None else {"block": block}
        _check(models.SwinTransformer(**shape, **more, num_classes=2), (image()["pixel_values"],), left)


@pytest.mark.parametrize("config", [HRAConfig(r=2), ShiraConfig(r=1), FrodConfig(), SupertuningConfig()])
def test_layers_under_adapters_of_their_weight_stay_digital(config):
    config.target_modules = {"0"}
    model = get_peft_model(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)), config)
    _check(model, (torch.randn(4, 16),), ["0"])


def _of_table(path: str):
    package, _, name = path.rpartition(".")
    pytest.importorskip(package.partition(".")[0])
    return getattr(importlib.import_module(package), name)


@pytest.mark.parametrize("path", READ_PAST)
def test_the_parents_of_the_table_still_read_weights(path):
    source = inspect.getsource(_of_table(path))
    if path.startswith("peft."):
        products = "F.linear(", "F.conv2d(", "functional.linear("
        replaced = "register_parametrization(", "base_layer.in_proj_weight"
        assert any(product in source for product in (*products, *replaced))
    else:  # or give the layer to a method that does
        assert all(f"self.{c}.weight" in source or f" self.{c}," in source for c in READ_PAST[path])


@pytest.mark.parametrize("path", SWITCHES)
def test_the_parents_of_the_table_still_have_their_switch(path):
    cls, (name, _) = _of_table(path), SWITCHES[path]
    assert f"self.{name} = " in inspect.getsource(cls) and f"self.{name}" in inspect.getsource(cls.forward)


# Weights that are computed


class _Twice(nn.Module):
    def forward(self, x):
        return 2 * x


def _prune(layer):
    return prune.l1_unstructured(layer, "weight", 0.5)


def _biased(layer):
    return register_parametrization(layer, "bias", _Twice())


@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm:FutureWarning")
@pytest.mark.parametrize(
    "computed",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        _prune,
        _biased,
    ],
)
def test_layers_whose_weight_is_computed_stay_digital(computed, caplog):
    model = nn.Sequential(computed(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 4))
    with caplog.at_level("WARNING", "hf_reram"):
        _check(model, (torch.randn(3, 4),), ["0"], copies=())
    assert "these layers stay digital: 0 (their weight or bias is computed" in caplog.text
    patch_model(model, ReRAMConfig())
    model.train()(torch.randn(3, 4)).sum().backward()
    assert all(p.grad is not None for p in model[0].parameters())


# Forwards on the instance


def _hooked(model):
    """With a hook of accelerate on every layer, as a device map sets them."""
    return dispatch_model(model, {"": "cpu"}, force_hooks=True)


def test_hooks_of_accelerate_call_each_crossbar(tiny_bert):
    batch = {"input_ids": tokens(50)}
    plain = _run(tiny_bert, batch)
    _hooked(tiny_bert)
    names = list(crossbar_layers(patch_model(tiny_bert, ReRAMConfig())))
    unpatch_model(tiny_bert)
    assert len(names) == 14 and all("forward" in vars(tiny_bert.get_submodule(name)) for name in names)
    for name in names:
        patch_model(tiny_bert, ReRAMConfig(device="cmo-hfox-ibm", target_modules=[name]))
        with digital(tiny_bert):
            assert torch.equal(_run(tiny_bert, batch), plain)
        with deploy(tiny_bert, "10y"):
            assert not torch.equal(_run(tiny_bert, batch), plain), name
        unpatch_model(tiny_bert)
        assert torch.equal(_run(tiny_bert, batch), plain)


class _Counts(ModelHook):
    calls = 0

    def pre_forward(self, module, *args, **kwargs):
        _Counts.calls += 1
        return args, kwargs


def _hook(model):
    return add_hook_to_module(model[0], _Counts(), append=True)


def _unhook(model):
    return remove_hook_from_module(model[0])


@pytest.mark.parametrize("before", [(), (_hook,), (_hook, _hook), (_hook, _unhook)])
@pytest.mark.parametrize("between", [(), (_hook,), (_unhook,), (_hook, _unhook), (_unhook, _hook)])
@pytest.mark.parametrize("after", [(), (_unhook,)])
def test_hooks_come_and_go_in_any_order(before, between, after):
    model, x = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)).eval(), torch.randn(5, 6)
    plain = _run(model, (x,))
    for step in before:
        step(model)
    patch_model(model, ReRAMConfig(device="cmo-hfox-ibm", target_modules=["0"]))
    calibrate(model, [x])
    for step in between:
        step(model)
    for twin in (model, copy.deepcopy(model)):
        with deploy(twin, "10y"):
            assert not torch.equal(_run(twin, (x,)), plain)
    for step in after:
        step(model)
    unpatch_model(model)
    assert torch.equal(_run(model, (x,)), plain)
    seen = _Counts.calls
    _run(model, (x,))
    assert (_Counts.calls > seen) == hasattr(model[0], "_hf_hook")


def test_offloaded_layers_stay_digital_or_are_refused(caplog):
    model, x = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)), torch.randn(5, 6)
    plain = _run(model, (x,))
    add_hook_to_module(model[0], AlignDevicesHook("cpu", offload=True))
    with caplog.at_level("WARNING", "hf_reram"):
        patch_model(model, ReRAMConfig(device="cmo-hfox-ibm"))
    assert list(crossbar_layers(model)) == ["2"] and "0 (their weight is offloaded" in caplog.text
    assert model[2].crossbar.config.modules_to_not_convert == ["0"]  # where it is loaded whole
    calibrate(model, [x])
    with deploy(model, "10y"):
        assert not torch.equal(_run(model, (x,)), plain)
    unpatch_model(model)
    assert torch.equal(_run(model, (x,)), plain)
    model = cpu_offload(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)))
    with pytest.raises(ValueError, match=r"nothing to patch.*0, 1 \(their weight is offloaded"):
        patch_model(model, ReRAMConfig())
    assert _run(model, (x,)).shape == (5, 6)


def test_a_forward_that_someone_put_on_the_instance_stays_digital(caplog):
    model, x = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), torch.randn(5, 6)
    inner = model[0].forward
    model[0].forward = lambda x: inner(x) + 1
    with caplog.at_level("WARNING", "hf_reram"):
        _check(model, (x,), ["0"], copies=())
    assert "these layers stay digital: 0 (their forward is replaced on the instance" in caplog.text
    add_hook_to_module(model[0], _Counts())  # keeps and calls what is not the class's forward
    _check(model, (x,), ["0"], copies=())


# Names


def test_asking_for_layers_that_stay_digital_is_an_error():
    model = nn.Sequential(_encoder_layer(own=True), parametrizations.weight_norm(nn.Linear(16, 3)))
    with pytest.raises(ValueError, match=r"'out_proj' matches only .*: 0.self_attn.out_proj \(MultiheadAttention com"):
        patch_model(model, ReRAMConfig(target_modules=["linear1", "out_proj"]))
    with pytest.raises(ValueError, match=r"'1' matches only layers that stay digital: 1 \(their weight or bias is"):
        patch_model(model, ReRAMConfig(target_modules="1"))
    assert not crossbar_layers(model) and model[0].activation_relu_or_gelu == 1


def test_one_warning_groups_names_by_reason(caplog):
    layers = [_encoder_layer(own=True) for _ in range(10)]
    model = nn.Sequential(*layers, parametrizations.weight_norm(nn.Linear(16, 3)))
    with caplog.at_level("WARNING", "hf_reram"):
        patch_model(model, ReRAMConfig(modules_to_not_convert=["8"]))
    (message,) = [r.getMessage() for r in caplog.records if "these layers" in r.getMessage()]
    shown = ", ".join(f"{i}.self_attn.out_proj" for i in range(8))
    assert f"{shown}, … (9 in all) (MultiheadAttention computes" in message and "; 10 (their weight" in message
    assert "8.self_attn.out_proj" not in message


# The tables against the installed packages

FOLDERS = ("transformers/models", "timm/layers", "timm/models", "torchvision/models", "torch/nn")

# Reads that leave no crossbar idle in evaluation.
HARMLESS = {
    *(f"{name}Mixer.{child}" for name in ("Mamba", "FalconMamba") for child in ("x_proj", "out_proj")),  # in training
    *(f"{name}.out_proj" for name in ("BambaMixer", "FalconH1Mixer", "Mamba2Mixer", "NemotronHMamba2Mixer")),
    *(f"{name}.out_proj" for name in ("GraniteMoeHybridMambaLayer", "Zamba2MambaMixer")),
    *(f"Gemma3nTextAltUp.{kind}_coefs" for kind in ("correction", "prediction")),  # clipped, in training
    "DisentangledSelfAttention.in_proj",  # for query states that no model has
    "LinearSelfAttention.qkv_proj",
    *(f"Gemma4{kind}AssistantForCausalLM.lm_head" for kind in ("", "Unified")),  # tied
    "NaFlexEmbeds.proj",  # for patches of another size than the model's
}
SETS_UP = ("init", "reset", "fuse", "reparameterize", "set_input_size")


ABOUT = ("dtype", "device", "shape", "size")


def _reads(tree: ast.Module):
    """``Class.layer`` for each layer that a class makes and of which a method reads ``self.layer.weight``."""
    for cls in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        made = [node for node in ast.walk(cls) if isinstance(node, ast.Assign) and _makes_a_layer(node.value)]
        layers = {f"self.{t.attr}.weight" for node in made for t in node.targets if isinstance(t, ast.Attribute)}
        for method in (node for node in cls.body if isinstance(node, ast.FunctionDef)):
            if layers and not any(part in method.name for part in SETS_UP):
                nodes = list(ast.walk(method))
                known = {id(n.value) for n in nodes if isinstance(n, ast.Attribute) and (n.attr in ABOUT or _is_set(n))}
                calls = [n for n in nodes if isinstance(n, ast.Call) and ast.unparse(n.func) == "isinstance"]
                known |= {id(argument) for call in calls for argument in call.args}
                for node in nodes:
                    if isinstance(node, ast.Attribute) and id(node) not in known and ast.unparse(node) in layers:
                        yield f"{cls.name}.{node.value.attr}"


def _is_set(node: ast.Attribute) -> bool:
    return isinstance(node.ctx, ast.Store)


def _makes_a_layer(value: ast.expr) -> bool:
    names = {getattr(node, "attr", getattr(node, "id", None)) for node in ast.walk(value)}
    return bool(names & {"Linear", "Conv1D", "Conv2d", "linear_layer", "NonDynamicallyQuantizableLinear"})


@pytest.mark.slow
def test_every_layer_that_is_read_past_is_in_a_table():
    """A new release of a package may read more weights: then it belongs into a table, or among the harmless."""
    tables = {f"{path.rpartition('.')[2]}.{child}" for path, children in READ_PAST.items() for child in children}
    switched = tuple(f"{path.rpartition('.')[2]}." for path in SWITCHES)
    found = set()
    for folder in FOLDERS:
        package, _, rest = folder.partition("/")
        root = Path(pytest.importorskip(package).__file__).parent / rest
        for file in root.rglob("*.py"):
            if not file.name.startswith(("modular_", "convert_")) and ".weight" in (text := file.read_text("utf-8")):
                found |= set(_reads(ast.parse(text)))
    assert len(found & tables) > 20
    assert {read for read in found - tables - HARMLESS if not read.startswith(switched)} == set()
