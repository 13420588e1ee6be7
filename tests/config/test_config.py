import copy
import json
import pickle

import numpy as np
import pytest
from torch import nn

from hf_reram import DeviceConfig, ReRAMConfig, crossbar_layers, patch_model

WRONG = pytest.mark.parametrize(
    ("field", "value"),
    [
        ("device", "unobtainium"),
        ("device", {"g_min": 1.0}),
        ("device", 3),
        ("range_shrink", 0),
        ("range_shrink", 1e-30),
        ("range_shrink", 1.5),
        ("range_shrink", "tiny"),
        ("gain", "loud"),
        ("input_percentile", 0),
        ("input_percentile", 101),
        ("input_percentile", "auto"),
        ("learn_input_range", "yes"),
        ("weight_scale", "per_galaxy"),
        ("weight_clip", -1),
        ("weight_clip", float("nan")),
        ("tile_size", 0),
        ("tile_size", 1.5),
        ("dac_bits", 1),
        ("adc_bits", 64),
        ("target_modules", []),
        ("target_modules", [1]),
        ("modules_to_not_convert", "head"),
        ("retention_loss", "magic"),
        ("retention_weight", -1),
        ("retention_weight", float("inf")),
        ("retention_times", []),
        ("retention_times", ["soon"]),
        ("temperature", 0),
        ("temperature", "hot"),
        ("calibration_batches", 0),
        ("calibration_batches", None),
        ("redundancy", -1),
        ("redundancy", np.float32(5)),
        ("input_range", "dynamic"),
        ("center_inputs", "no"),
        ("retention_warmup", 2),
        ("retention_loss", "drfit"),
        ("range_shrink", 7),
        ("tile_size", "abc"),
        ("adc_bits", np.int64(1)),
    ],
)


@WRONG
def test_wrong_config_values_are_value_errors(field, value):
    with pytest.raises(ValueError) as error:
        ReRAMConfig(**{field: value})
    assert field in str(error.value)
    assert "allowed" in str(error.value) or "lacks" in str(error.value)


@WRONG
def test_a_wrong_value_that_is_set_later_is_refused_and_the_old_one_stays(field, value):
    config = ReRAMConfig(tile_size=8, dac_bits=8, adc_bits=8)
    before = config.to_dict()
    with pytest.raises(ValueError) as error:
        setattr(config, field, value)
    assert field in str(error.value)
    assert "allowed" in str(error.value) or "lacks" in str(error.value)
    assert config.to_dict() == before
    # Where it is put there past the check, the model says so.
    if field not in ("device", "learn_input_range"):
        config.__dict__[field] = value
        model = nn.Sequential(nn.Linear(4, 4))
        with pytest.raises(ValueError, match=field):
            patch_model(model, config)
        assert not crossbar_layers(model)


@pytest.mark.parametrize(
    ("field", "value", "found"),
    [
        ("device", "generic", DeviceConfig.from_preset("generic")),
        ("device", DeviceConfig.from_preset("cmo-hfox-ibm").to_dict(), DeviceConfig.from_preset("cmo-hfox-ibm")),
        ("temperature", "85C", 358.15),
        ("retention_times", "10y", ["10y"]),
        ("retention_times", (np.int64(60), "1d"), [60, "1d"]),
        ("retention_loss", None, "none"),
        ("tile_size", np.int32(8), 8),
        ("redundancy", np.float32(0.5), 0.5),
        ("target_modules", ("b", "a"), ["a", "b"]),
        ("input_range", "per_token", "per_token"),
    ],
)
def test_what_is_set_later_is_what_the_constructor_makes_of_it(field, value, found):
    config = ReRAMConfig()
    setattr(config, field, value)
    assert getattr(config, field) == getattr(ReRAMConfig(**{field: value}), field) == found
    assert isinstance(getattr(config, field), type(found))
    assert ReRAMConfig.from_dict(json.loads(config.to_json_string())).to_dict() == config.to_dict()


def test_the_older_way_to_learn_ranges_can_be_set_later():
    config = ReRAMConfig()
    config.learn_input_range = True
    assert config.input_range == "learned"
    config.learn_input_range = False
    assert config.input_range == "static"
    config.input_range = "auto"
    with pytest.raises(ValueError, match="input_range='auto': allowed is 'learned'"):
        config.learn_input_range = True
    with pytest.raises(ValueError, match="weight_scale='per_tile'"):
        config.weight_scale = "per_tile"
    config.tile_size = 4
    config.weight_scale = "per_tile"
    with pytest.raises(ValueError, match="quant_method='gptq': allowed is 'reram'"):
        config.quant_method = "gptq"


def test_config_round_trips_through_json_with_the_device_in_full(tmp_path):
    config = ReRAMConfig(device="cmo-hfox-ibm", dac_bits=8, retention_times=["1s", 3600], target_modules=["query"])
    data = json.loads(config.to_json_string())
    assert data["device"]["retention"]["std_offset"] == [0.41183342]
    assert ReRAMConfig.from_dict(data).to_dict() == config.to_dict()
    config.to_json_file(tmp_path / "c.json")
    assert ReRAMConfig.from_json_file(tmp_path / "c.json").to_dict() == config.to_dict()


def test_newer_and_unknown_configs_are_refused():
    data = ReRAMConfig().to_dict()
    with pytest.raises(ValueError, match="newer"):
        ReRAMConfig.from_dict({**data, "version": 99})
    with pytest.raises(ValueError, match="no fields"):
        ReRAMConfig.from_dict({**data, "flux": 1})


@pytest.mark.parametrize("name", ["retention_times", "modules_to_not_convert", "target_modules"])
def test_lists_do_not_change_in_place_of_which_no_model_would_hear(name):
    config = ReRAMConfig(**{name: ["1d"]})
    held = getattr(config, name)
    for change in (
        lambda: held.append("10y"),
        lambda: held.__setitem__(0, "10y"),
        lambda: held.sort(),
        lambda: setattr(config, name, held.__iadd__(["10y"])),
    ):
        with pytest.raises(TypeError, match=r"\['1d'\]: a ReRAMConfig's list is not changed in place"):
            change()
    copies = [copy.deepcopy(config), pickle.loads(pickle.dumps(config)), ReRAMConfig.from_dict(config.to_dict())]
    assert all(getattr(each, name) == ["1d"] for each in (config, *copies)) and type(config.to_dict()[name]) is list
    setattr(config, name, [*held, "10y"])
    assert getattr(config, name) == ["1d", "10y"]
