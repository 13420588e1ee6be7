import json

import pytest

from hf_reram import ReRAMConfig


@pytest.mark.parametrize(
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
    ],
)
def test_wrong_config_values_are_value_errors(field, value):
    with pytest.raises(ValueError) as error:
        ReRAMConfig(**{field: value})
    assert field in str(error.value)
    assert "allowed" in str(error.value) or "lacks" in str(error.value)


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
