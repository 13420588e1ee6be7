import dataclasses
import json
import math

import numpy as np
import pytest

from hf_reram import DeviceConfig, ReRAMConfig
from hf_reram.device import preset_names
from hf_reram.device.cell import logger
from hf_reram.device.temperature import parse_temperature
from hf_reram.device.time import parse_time
from hf_reram.tasks.demo import CORNER
from tests.samples.devices import SILENT, device

STEEP = {"type": "table", "times": [1.0], "std": [[300.0]]}


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
        {"retention": {"type": "generic"}},
        {"retention": {"type": "generic", "tau": 2.0}},
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


@pytest.mark.parametrize(
    ("text", "kelvin"),
    [("85C", 358.15), ("85 °C", 358.15), ("-40C", 233.15), ("300K", 300), ("300", 300), (330, 330)],
)
def test_temperatures_as_people_write_them(text, kelvin):
    assert parse_temperature(text) == pytest.approx(kelvin)


@pytest.mark.parametrize("wrong", [85, "85", "hot", "85F", None, True, float("nan"), 3000, "-100C"])
def test_temperatures_that_are_none(wrong):
    with pytest.raises(ValueError, match="allowed is 200 to 2000 K"):
        parse_temperature(wrong)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"g_min": 1e-6, "g_max": 5e-5}, "are these in S?"),
        ({"g_min": 1e3, "g_max": 5e4}, "are these in nS?"),
        ({"g_min": 1.0, "g_max": 50.0, "programming": (40.0,)}, "errors of up to 40 µS, of a window of 49 µS"),
        ({"g_min": 100, "g_max": 5000}, "are these in nS?"),
        (
            {"g_min": 1.0, "g_max": 50.0, "v0": 250.0, "read_voltage": 200.0},
            "v0=250 V, read_voltage=200 V: voltages are in V; are these in mV?",
        ),
        ({"g_min": 1.0, "g_max": 50.0, "v0": 250.0}, "v0=250 V: voltages are in V; is this in mV?"),
        ({"g_min": 1.0, "g_max": 50.0, "programming": (-5.0,)}, "a standard deviation of -5 µS within the window"),
        ({"g_min": 1.0, "g_max": 50.0, "read_noise": 5.0}, "read_noise=5 µA, where a cell that is all on adds 9.8 µA"),
        ({"g_min": 1.0, "g_max": 50.0, "retention": STEEP}, "errors of up to 300 µS, of a window of 49 µS"),
        ({"g_min": 1.0, "g_max": 50.0, "retention": {**STEEP, "std": [[-1.0]]}}, "a standard deviation of -1 µS"),
        (
            {"g_min": 1.0, "g_max": 50.0, "retention": {**STEEP, "std": [[1.0]], "mean": [[-99.0]]}},
            "mean shift: errors of up to 99 µS",
        ),
    ],
)
def test_what_is_hardly_meant_is_told(fields, told, caplog):
    name = f"doubted: {fields}"  # each is told once
    with caplog.at_level("WARNING", "hf_reram"):
        DeviceConfig.from_dict({"retention": SILENT, **fields, "name": name})
    assert told in caplog.text and name in caplog.text


@pytest.mark.parametrize("name", preset_names())
def test_presets_and_the_demos_device_are_not_doubted(name, caplog):
    logger.warning_once.cache_clear()
    with caplog.at_level("WARNING", "hf_reram"):
        DeviceConfig.from_preset(name)
        dataclasses.replace(CORNER, name="again")
    assert not caplog.text


@pytest.mark.parametrize("std", [0.8, 0.02])
def test_conductances_in_siemens_beside_errors_in_microsiemens_are_refused(std):
    with pytest.raises(ValueError, match=r"device\.retention=.*is g_max=5e-05 in S\?"):
        DeviceConfig(g_min=1e-6, g_max=5e-5, retention={**STEEP, "std": [[std]]})


def made_of_a_dict(**fields):
    return DeviceConfig.from_dict(fields)


@pytest.mark.parametrize("make", [DeviceConfig, made_of_a_dict])
def test_a_device_without_retention_drifts_as_the_generic_preset_and_says_so(make, caplog):
    with caplog.at_level("WARNING", "hf_reram"):
        cell = make(g_min=1.0, g_max=50.0, name=f"undrifting {make.__name__}")
    assert "has no retention: it is taken to drift as the preset 'generic'" in caplog.text and cell.name in caplog.text
    generic = DeviceConfig.from_preset("generic")
    assert cell.retention == generic.retention and cell.assumed == ("retention",)
    assert float(cell.retention_std(20.0, "10y")) == pytest.approx(0.3 + 0.04 * math.log1p(parse_time("10y")))
    assert float(cell.retention_mean(20.0, "10y")) == pytest.approx(-0.002 * 19 * math.log1p(parse_time("10y")))
    caplog.clear()
    assert DeviceConfig.from_dict(json.loads(json.dumps(cell.to_dict()))) == cell  # in full, so that nobody assumes
    assert not caplog.text


def test_a_device_that_does_not_drift_says_so():
    cell = DeviceConfig(g_min=2.0, g_max=50.0, retention={"type": "generic", "A": 0})
    assert float(cell.retention_std(20.0, "10y")) == float(cell.retention_mean(20.0, "10y")) == 0.0
    assert cell.assumed == ()


def test_numpy_numbers_are_numbers():
    cell = DeviceConfig(g_min=np.float32(1), g_max=np.int64(50), programming=list(np.array([0.5, 0.01])))
    assert (cell.g_min, cell.g_max, cell.programming) == (1.0, 50.0, (0.5, 0.01))
    config = ReRAMConfig(
        device=cell, retention_weight=np.float32(0.5), dac_bits=np.int64(8), retention_times=list(np.array([1, 60]))
    )
    assert (config.retention_weight, config.dac_bits, config.retention_times) == (0.5, 8, [1, 60])
    assert ReRAMConfig.from_dict(json.loads(json.dumps(config.to_dict()))).to_dict() == config.to_dict()
    table = {"type": "table", "times": np.array([1.0, 10.0]), "std": np.ones((2, 2)), "extrapolate": np.bool_(True)}
    formula = {"type": "generic", "A": np.float64(0), "saturates": np.bool_(False)}
    for retention in (table, formula):
        cell = DeviceConfig(
            g_min=1, g_max=50, retention=retention, reference_temperature=np.int64(300), programming=np.array([0.1])
        )
        assert DeviceConfig.from_dict(json.loads(json.dumps(cell.to_dict()))) == cell
    assert cell.equivalent_time(np.int64(60), np.float32(300)) == 60.0 and cell.programming == (0.1,)
    assert ReRAMConfig(retention_times=np.array([5, 6])).retention_times == [5, 6]


@pytest.mark.parametrize("number", [np.float32(300), np.int64(300), np.float16(300)])
def test_numpy_temperatures_and_times_are_plain_numbers(number):
    for found in (
        parse_temperature(number),
        parse_time(number),
        device(reference_temperature=number).reference_temperature,
        ReRAMConfig(temperature=number).temperature,
    ):
        assert found == 300.0 and type(found) is float
    for wrong in (np.float32("nan"), np.float64("inf"), np.bool_(True), np.int64(-1)):
        with pytest.raises(ValueError, match="allowed"):
            parse_temperature(wrong)
        with pytest.raises(ValueError, match="allowed"):
            parse_time(wrong)


def test_numpy_booleans_are_stored_as_pythons():
    table = {"type": "table", "times": [np.int64(1)], "std": [[np.float32(1)]], "extrapolate": np.bool_(True)}
    for retention in ({"type": "generic", "A": 0, "saturates": np.bool_(False)}, table):
        cell = device(retention=retention, floor_at_zero=np.bool_(False))
        config = ReRAMConfig(device=cell, center_inputs=np.bool_(False))
        config.redundancy = np.float32(0.5)
        again = json.loads(json.dumps(config.to_dict()))
        assert ReRAMConfig.from_dict(again).to_dict() == config.to_dict()
        assert again["redundancy"] == 0.5 and again["device"]["floor_at_zero"] is again["center_inputs"] is False
    with pytest.raises(ValueError, match=r"saturates=.*: allowed is True or False"):
        device(retention={"type": "generic", "A": 0, "saturates": np.int64(1)})
