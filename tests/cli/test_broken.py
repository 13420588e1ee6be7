"""Checkpoints that are not whole, or not of their config: each command refuses them by name, in one line."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, BertModel, PegasusConfig, PegasusForConditionalGeneration
from typer.testing import CliRunner

from hf_reram import ReRAMConfig, calibrate, crossbar_layers, load_model, patch_model
from hf_reram.cli import app
from hf_reram.cli.model import patched
from tests.samples import images as image_sample
from tests.samples.models import bert_batch, tiny_bert

QUERY = "bert.encoder.layer.0.attention.self.query"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    model = tiny_bert()
    model.save_pretrained(folder / "plain")
    calibrate(patch_model(model, ReRAMConfig(device="cmo-hfox-ibm")), [bert_batch()]).save_pretrained(folder / "robust")
    return folder


@pytest.fixture
def broken(checkpoints, tmp_path):
    """Makes a checkpoint whose weights and config.json were changed."""

    def make(kind="robust", weights=lambda tensors: None, **config):
        folder = tmp_path / "broken"
        shutil.copytree(checkpoints / kind, folder)
        tensors = load_file(folder / "model.safetensors")
        weights(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        data = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**data, **config}))
        return folder

    return make


def commands(folder, *names):
    out = ["--dataset", "none.parquet", "--device", "cmo-hfox-ibm", "--output", str(folder.parent / "out")]
    more = {"eval": out, "inspect": ["--device", "cmo-hfox-ibm"], "card": [], "push": ["me/model"]}
    return [[name, str(folder), *more[name]] for name in names or more]


def refused(command) -> str:
    """The line that says why."""
    done = CliRunner().invoke(app, command)
    (line,) = done.stderr.splitlines()
    assert done.exit_code == 1 and line.startswith("error: ") and not done.stdout
    return line.removeprefix("error: ")


def without(*keys):
    def change(tensors):
        for key in keys:
            del tensors[key]

    return change


def with_value(key, value):
    def change(tensors):
        tensors[key] = value

    return change


@pytest.mark.parametrize("kind", ["robust", "plain"])
@pytest.mark.parametrize(
    "key", [f"{QUERY}.weight", f"{QUERY}.bias", "bert.embeddings.word_embeddings.weight", "classifier.weight"]
)
def test_weights_that_are_missing_are_not_made_up(broken, kind, key):
    folder = broken(kind, without(key))
    told = f"{folder} lacks weights of BertForSequenceClassification, which would be random: {key}: allowed is"
    for command in commands(folder, *(("eval", "card", "push") if key.startswith("classifier") else ())):
        assert refused(command).startswith(told)


def test_a_head_that_is_missing_is_none_to_inspect(broken, caplog):
    """As of sentence encoders that were saved with the name of another class."""
    folder = broken("plain", without("classifier.weight", "classifier.bias"))
    done = CliRunner().invoke(app, ["inspect", str(folder), "--device", "generic", "--json"])
    assert done.exit_code == 0, done.stderr
    names = [layer["name"] for layer in json.loads(done.stdout)["layers"]]
    assert len(names) == 13 and "pooler.dense" in names
    model = load_model(folder, headless=True)
    assert type(model).__name__ == "BertModel"
    stored = load_file(folder / "model.safetensors")
    assert torch.equal(model.pooler.dense.weight, stored["bert.pooler.dense.weight"])


def test_what_is_tied_or_not_read_may_be_missing(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=20, n_positions=8))
    model.save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    assert torch.equal(load_model(tmp_path / "tied").lm_head.weight, model.transformer.wte.weight)
    image_sample.save_model(tmp_path / "images")
    file = tmp_path / "images" / "model.safetensors"
    kept = {key: t for key, t in load_file(file).items() if not key.endswith("num_batches_tracked")}
    save_file(kept, file, {"format": "pt"})
    assert len(crossbar_layers(patched(str(tmp_path / "images"), "generic")[0])) == 7


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_named(broken, checkpoints, value):
    weight = load_file(checkpoints / "robust" / "model.safetensors")[f"{QUERY}.weight"]
    weight[0, 0] = value
    folder = broken("robust", with_value(f"{QUERY}.weight", weight))
    told = f"NaN or infinite values are in {QUERY}.weight: allowed are finite numbers"
    assert refused(["inspect", str(folder)]) == told


@pytest.mark.parametrize("lost", [["range_shrink"], ["range_shrink", "gain", "input_range"]])
def test_numbers_of_calibration_that_are_missing_are_not_chosen_anew(broken, lost):
    folder = broken("robust", without(*(f"{QUERY}.{name}" for name in lost)))
    names = ", ".join(f"{QUERY}.{name}" for name in sorted(lost))
    told = f"{folder} lacks numbers of calibration, which other layers of it have: {names}: allowed is"
    for command in commands(folder):
        assert refused(command).startswith(told)


def test_a_checkpoint_that_was_not_calibrated_still_is_here(tmp_path):
    """All its numbers are there, and say so."""
    patch_model(tiny_bert(), ReRAMConfig()).save_pretrained(tmp_path)
    model, fresh = patched(str(tmp_path), None)
    assert fresh and not any(layer.calibrated for layer in crossbar_layers(model).values())


def test_layers_without_numbers_are_named_where_all_are_calibrated_anew(tmp_path):
    model = patch_model(image_sample.save_model(tmp_path), ReRAMConfig(device="cmo-hfox-ibm"))
    calibrate(model, [torch.randn(4, 3, 32, 32)])
    name, layer = next(iter(crossbar_layers(model).items()))
    layer.input_range.zero_()  # as of an expert without a token
    model.save_pretrained(tmp_path)
    image_sample.dataset(8).to_parquet(tmp_path / "images.parquet")
    command = ["eval", str(tmp_path), "--dataset", str(tmp_path / "images.parquet"), "--chips", "1", "--times", "1d"]
    done = CliRunner().invoke(app, [*command, "--output", str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0, done.stderr
    told = f"all layers calibrated on the evaluated inputs, since these had no numbers of calibration: {name}"
    assert json.loads(done.stdout)["notes"][-1] == told


def stored_config(**changes):
    config = ReRAMConfig(device="cmo-hfox-ibm").to_dict()
    return {"quantization_config": {**config, **changes}}


NONE = "and its config.json no quantization_config, which says of which device: it was taken out, or parts without"
DIGITAL = "holds numbers of calibration of layers that its quantization_config leaves digital"


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"quantization_config": None}, f"holds numbers of calibration of 14 crossbar layers, {NONE}"),
        ({"quantization_config": [1]}, "quantization_config=[1]: allowed is an object"),
        (
            stored_config(modules_to_not_convert=["classifier"]),
            f"{DIGITAL}: classifier (target_modules=None, modules_to_not_convert=['classifier']): allowed is",
        ),
        (stored_config(target_modules="nothing"), "(14 in all) (target_modules='nothing', modules_to_not_convert"),
        (
            {"hidden_size": 32},
            "bert.embeddings.LayerNorm.bias has another shape in the checkpoint, [16], than in a "
            "BertForSequenceClassification of its config, [32], and so have",
        ),
    ],
    ids=["none", "list", "excluded", "no target", "size"],
)
def test_a_config_of_another_model_says_which_way(broken, config, told):
    folder = broken("robust", **config)
    for command in commands(folder):
        assert told in refused(command)


def test_a_number_of_another_shape_is_named(broken):
    folder = broken("robust", with_value(f"{QUERY}.weight_scale", torch.ones(3)))
    told = f"{folder}: {QUERY}.weight_scale has another shape in the checkpoint, [3], than in a "
    for command in commands(folder):
        assert refused(command).startswith(told) and "[16]: allowed" in refused(command)


def test_from_pretrained_names_layers_that_a_config_has_made_digital(broken, caplog):
    folder = broken("robust", **stored_config(modules_to_not_convert=["classifier", "pooler"]))
    told = "numbers of calibration of layers that its quantization_config leaves digital: "
    for cls, names in ((type(tiny_bert()), "bert.pooler.dense, classifier"), (type(tiny_bert().bert), "pooler.dense")):
        caplog.clear()
        with caplog.at_level("WARNING", "hf_reram"):
            cls.from_pretrained(folder)
        assert f"{told}{names}" in caplog.text


def test_weights_that_the_config_has_no_place_for_are_named(broken, caplog):
    folder = broken("plain", num_hidden_layers=1)
    with caplog.at_level("WARNING", "hf_reram"):
        assert AutoConfig.from_pretrained(folder).num_hidden_layers == len(load_model(folder).bert.encoder.layer) == 1
    assert "holds weights that a BertForSequenceClassification has no place for: bert.encoder.layer.1." in caplog.text


def test_the_line_is_all_that_is_shown(broken, python):
    """Not transformers' report before it, nor warnings of what was refused."""
    folder = broken("robust", without(f"{QUERY}.weight", f"{QUERY}.range_shrink"), vocab_size=51)
    for command in commands(folder):
        done = python.run("-m", "hf_reram", *command)
        (line,) = done.stderr.strip().splitlines()
        assert done.returncode == 1 and "word_embeddings.weight has another shape in the checkpoint, [50, 16]" in line


def test_what_no_figure_depends_on_may_be_missing(tmp_path, caplog):
    bare = BertModel(tiny_bert().config, add_pooling_layer=False)
    patch_model(bare, ReRAMConfig())
    calibrate(bare, [{key: value for key, value in bert_batch().items() if key != "labels"}])
    bare.save_pretrained(tmp_path / "bare")
    layers = crossbar_layers(load_model(tmp_path / "bare"))
    assert sum(layer.calibrated for layer in layers.values()) == len(crossbar_layers(bare))
    assert "pooler.dense.weight is random" in caplog.text or "pooler.dense.bias, pooler.dense.weight" in caplog.text
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 16}
    pegasus = PegasusForConditionalGeneration(PegasusConfig(vocab_size=20, **sizes, **heads))
    pegasus.save_pretrained(tmp_path / "pegasus")
    file = tmp_path / "pegasus" / "model.safetensors"
    tensors = {key: value for key, value in load_file(file).items() if "embed_positions" not in key}
    save_file(tensors, file, {"format": "pt"})
    positions = load_model(tmp_path / "pegasus").model.encoder.embed_positions.weight
    torch.testing.assert_close(positions, pegasus.model.encoder.embed_positions.weight)
