import json
from dataclasses import replace

import pytest
from transformers import HfArgumentParser

from hf_reram import DeviceConfig, ReRAMConfig
from hf_reram.tasks.arguments import RecipeTrainingArguments, ReRAMArguments
from hf_reram.tasks.comparison import METHODS


def parse(*flags: str) -> ReRAMArguments:
    (arguments,) = HfArgumentParser((ReRAMArguments,)).parse_args_into_dataclasses(args=list(flags))
    return arguments


def test_defaults_are_the_configs():
    assert parse().config().to_dict() == ReRAMConfig(device="hfox-neurram", retention_times=["10y"]).to_dict()
    assert list(parse().chosen_methods()) == list(METHODS)


def test_flags_reach_the_config(tmp_path):
    file = tmp_path / "cell.json"
    file.write_text(json.dumps({**DeviceConfig.from_preset("cmo-hfox-ibm").to_dict(), "name": "mine"}))
    flags = ["--device", str(file), "--range_shrink", "0.5", "--weight_clip", "none", "--temperature", "330"]
    flags += ["--retention_loss", "output+drift", "--retention_weight", "0.3", "--retention_times", "1d", "10y"]
    flags += ["--weight_scale", "per_tile", "--tile_size", "64", "--redundancy", "0.05"]
    flags += ["--dac_bits", "8", "--adc_bits", "9", "--retention_warmup", "0.9"]
    flags += ["--modules_to_not_convert", "down_proj", "lm_head"]
    config = parse(*flags).config()
    assert (config.weight_scale, config.tile_size, config.dac_bits, config.adc_bits) == ("per_tile", 64, 8, 9)
    assert config.redundancy == 0.05
    assert (config.retention_warmup, config.modules_to_not_convert) == (0.9, ["down_proj", "lm_head"])
    assert (config.device.name, config.range_shrink, config.weight_clip, config.temperature) == ("mine", 0.5, None, 330)
    assert (config.retention_loss, config.retention_weight) == ("output+drift", 0.3)
    assert len(config.retention_times) == 2


def test_what_is_evaluated_last_is_trained_for():
    assert parse("--times", "1mo", "1d", "3600").config().retention_times == ["1mo"]
    assert parse("--times", "1s", "10y", "--retention_times", "1d").config().retention_times == ["1d"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--weight_clip", "much"], "weight_clip='much'"),
        (["--range_shrink", "none"], "range_shrink='none'"),
        (["--range_shrink", "2"], "range_shrink=2"),
        (["--device", "unobtainium"], "unobtainium"),
        (["--retention_times", "soon"], "soon"),
        (["--times", "1s", "late"], "late"),
        (["--weight_scale", "per_tile"], "tile_size"),
    ],
)
def test_bad_values_are_named(flags, message):
    with pytest.raises(ValueError, match=message):
        parse(*flags).config()


def test_methods_by_parts_of_their_labels():
    assert [m.label for m in parse("--methods", "naive", "hf_reram").chosen_methods()] == ["naive crossbar", "hf_reram"]
    with pytest.raises(ValueError, match="methods='magic'"):
        parse("--methods", "magic").chosen_methods()
    with pytest.raises(FileNotFoundError):
        parse("--device", "nowhere.json").config()


def test_epochs_that_are_given_count(tmp_path):
    def training(*flags):
        parser = HfArgumentParser((RecipeTrainingArguments,))
        (found,) = parser.parse_args_into_dataclasses(args=["--output_dir", str(tmp_path), "--use_cpu", "True", *flags])
        return found.max_steps, replace(found, seed=1).max_steps, found.num_train_epochs

    assert training() == (200, 200, 3.0)
    assert training("--num_train_epochs", "3") == (-1, -1, 3.0)
    assert training("--max_steps", "200", "--num_train_epochs", "2") == (200, 200, 2.0)
