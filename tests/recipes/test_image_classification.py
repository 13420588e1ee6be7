import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForImageClassification

import hf_reram
from tests.samples import images as image_sample

pytest.importorskip("torchvision")

RECIPE = Path(__file__).parents[2] / "recipes" / "image_classification.py"
SMALL = ["--max_steps", "2", "--chips", "2", "--times", "1s", "10y", "--use_cpu", "True"]
SMALL += ["--per_device_train_batch_size", "4", "--base_batch_size", "4"]


@pytest.fixture
def run(python, tmp_path) -> Callable[..., str]:
    """Runs the recipe, and gives what it prints, or its errors where it ``fails``."""

    def run(*flags: str, fails: bool = False) -> str:
        done = python.run(str(RECIPE), "--output_dir", str(tmp_path / "out"), *SMALL, *flags)
        assert (done.returncode != 0) == fails, done.stderr[-3000:]
        return done.stderr if fails else done.stdout

    return run


@pytest.fixture
def base(tmp_path) -> list[str]:
    image_sample.save_model(tmp_path / "base")
    return ["--model_name_or_path", str(tmp_path / "base")]


def test_the_whole_protocol_on_folders_of_images(run, tmp_path, base):
    data = ["--train_dir", str(image_sample.folders(tmp_path / "a")), "--validation_dir"]
    data.append(str(image_sample.folders(tmp_path / "b", 8)))
    assert "| hf_reram |" in run(*base, *data)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(report) == 5
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out" / "hf-reram" / "model")
    assert hf_reram.crossbar_layers(model)
    card = (tmp_path / "out" / "hf-reram" / "model" / "README.md").read_text()
    assert "AutoModelForImageClassification" in card and "8 examples" in card
    assert "trained on 12 images of a" in card
    assert all(json.loads((tmp_path / "out" / "protocol.json").read_text())["content"].values())
    assert run(*base, *data) and json.loads((tmp_path / "out" / "report.json").read_text()) == report
    one, other, *_ = sorted((tmp_path / "b").rglob("*.png"))
    one.write_bytes(other.read_bytes())
    assert "holds a comparison with other values of ['content.evaluation']" in run(*base, *data, fails=True)


@pytest.mark.parametrize("batch_norm", ["fold", "reestimate"])
def test_one_file_without_labels(run, tmp_path, base, batch_norm):
    image_sample.dataset(16).to_parquet(tmp_path / "all.parquet")
    data = ["--train_file", str(tmp_path / "all.parquet"), "--split_labels", "0.5", "--teacher", "True"]
    flags = ["--batch_norm", batch_norm, "--digital_ends", "True", "--methods", "hf_reram"]
    assert "| hf_reram |" in run(*base, *data, *flags)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out" / "hf-reram" / "model")
    layers = hf_reram.crossbar_layers(model)
    assert "resnet.embedder.embedder.convolution" not in layers and "classifier.1" not in layers and len(layers) == 5
    report = json.loads((tmp_path / "out" / "hf-reram" / "robustness.json").read_text())
    assert report["about"]["examples"] == 8 and report["about"]["label_free"]


@pytest.mark.parametrize(
    ("preset", "overrides"),
    [
        ("deit-tiny", "image_size=32,patch_size=16,num_hidden_layers=1"),
        ("mobilenetv3-small", None),
        ("efficientnet-lite0", "architecture=test_efficientnet"),
        pytest.param("efficientnet-lite0", None, marks=pytest.mark.slow),
        pytest.param("resnet18", None, marks=pytest.mark.slow),
        pytest.param("mobilenetv3-large", None, marks=pytest.mark.slow),
    ],
)
def test_presets_train_a_base_of_their_own_shape(run, tmp_path, preset, overrides):
    pytest.importorskip("timm")
    image_sample.dataset(8).to_parquet(tmp_path / "train.parquet")
    data = ["--train_file", str(tmp_path / "train.parquet"), "--validation_file", str(tmp_path / "train.parquet")]
    flags = ["--preset", preset, "--from_scratch", "True", "--base_steps", "1", "--image_size", "32"]
    flags += ["--config_overrides", overrides] if overrides else []
    assert "| hf_reram |" in run(*data, *flags, "--methods", "hf_reram")


def test_a_new_head_for_other_classes(run, tmp_path):
    image_sample.save_model(tmp_path / "base", classes=7)
    image_sample.dataset(8).to_parquet(tmp_path / "train.parquet")
    data = ["--train_file", str(tmp_path / "train.parquet"), "--validation_file", str(tmp_path / "train.parquet")]
    data += ["--model_name_or_path", str(tmp_path / "base"), "--methods", "naive"]
    assert "4 classes and the model 7" in run(*data, fails=True)
    trained, again = (run(*data, "--base_steps", "1") for _ in range(2))
    assert "| naive crossbar |" in again and trained.endswith(again)
    assert "base holds a base model with other values of ['settings.max_steps']" in run(
        *data, "--base_steps", "2", fails=True
    )
    image_sample.dataset(12).to_parquet(tmp_path / "train.parquet")
    assert "other values of ['content.training data']" in run(*data, "--base_steps", "1", fails=True)
    image_sample.dataset(8).to_parquet(tmp_path / "train.parquet")
    model = image_sample.save_model(tmp_path / "base", classes=7)
    next(model.parameters()).data.neg_()
    model.save_pretrained(tmp_path / "base")
    assert "other values of ['content.base']" in run(*data, "--base_steps", "1", fails=True)


def test_two_processes_train_a_base_together(python, tmp_path):
    image_sample.save_model(tmp_path / "base", classes=7)
    image_sample.dataset(8).to_parquet(tmp_path / "train.parquet")
    data = ["--train_file", str(tmp_path / "train.parquet"), "--validation_file", str(tmp_path / "train.parquet")]
    data += ["--model_name_or_path", str(tmp_path / "base"), "--base_steps", "1", "--methods", "naive"]
    ranks = python.run_two(str(RECIPE), "--output_dir", str(tmp_path / "out"), *SMALL, *data)
    assert [rank.returncode for rank in ranks] == [0, 0], ranks[0].stderr[-3000:]
    assert sum(rank.stdout.count("| naive crossbar |") for rank in ranks) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--preset", "alexnet"], "preset='alexnet'"),
        (["--train_dir", "nowhere"], "no such path nowhere"),
        (["--batch_norm", "drop"], "batch_norm='drop'"),
        (["--from_scratch", "True"], "a new model needs base_steps"),
    ],
)
def test_bad_input_is_a_clear_error(run, base, flags, message):
    assert message in run(*base, *flags, fails=True)
