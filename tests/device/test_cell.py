import pytest

from hf_reram import DeviceConfig
from hf_reram.device import preset_names
from tests.samples.devices import device


@pytest.mark.parametrize("name", preset_names())
def test_presets_round_trip_and_tell_their_source(name, tmp_path):
    preset = DeviceConfig.from_preset(name)
    assert preset.source
    preset.to_json(tmp_path / "device.json")
    assert DeviceConfig.from_json(tmp_path / "device.json") == preset


@pytest.mark.parametrize(
    "wrong",
    [
        {"g_min": -1.0},
        {"g_max": 0.0},
        {"g_min": 50.0},
        {"v0": 0},
        {"v0": float("nan")},
        {"read_voltage": "0.2"},
        {"read_voltage": 100.0},
        {"read_noise": -0.1},
        {"stuck_at_min": 0.7, "stuck_at_max": 0.7},
        {"programming": []},
        {"programming": [float("inf")]},
        {"retention": {"type": "magic"}},
        {"retention": {"type": "generic", "tau": 0}},
        {"retention": {"type": "generic", "B": 1}},
        {"retention": {"type": "table", "times": [2, 1], "std": [[1], [1]]}},
        {"retention": {"type": "table", "times": [1, 2], "std": [[1]]}},
        {"assumed": ["nothing"]},
        {"colour": "red"},
    ],
)
def test_wrong_device_values_name_field_value_and_what_is_allowed(wrong):
    with pytest.raises(ValueError, match=r"allowed|lacks") as error:
        device(**wrong)
    assert any(part in str(error.value) for part in (*wrong, "retention"))
