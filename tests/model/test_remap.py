"""Parts that were patched by themselves go on other cells each for itself."""

import pytest
import torch
from torch import nn

from hf_reram import ReRAMConfig, calibrate, crossbar_layers, patch_model
from hf_reram.model.find import crossbar_states
from hf_reram.model.remap import put_on, remap
from tests.samples.models import bert_batch, tiny_bert


class Towers(nn.Module):
    """Two of them, and a head."""

    def __init__(self):
        super().__init__()
        self.left, self.right = (nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)) for _ in range(2))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.left(x) + self.right(x))


DEVICES = {"left": "cmo-hfox-ibm", "right": "hfox-neurram"}
LAYERS = {f"{tower}.{place}" for tower in DEVICES for place in (0, 2)}


def towers() -> Towers:
    model = Towers()
    for tower, device in DEVICES.items():
        patch_model(getattr(model, tower), ReRAMConfig(device=device))
    return calibrate(model, [torch.randn(8, 4)])


def devices(model) -> dict[str, str]:
    return {name: layer.crossbar.config.device.name for name, layer in crossbar_layers(model).items()}


def changed(model, **changes) -> list[ReRAMConfig]:
    return [ReRAMConfig.from_dict({**state.config.to_dict(), **changes}) for state in crossbar_states(model)]


def test_each_part_keeps_its_device_where_none_is_asked_for():
    model = towers()
    before = devices(model)
    move = remap(model, changed(model, range_shrink=0.5))
    assert devices(model) == before and set(before) == LAYERS and type(model.head) is nn.Linear
    assert [state.config.range_shrink for state in crossbar_states(model)] == [0.5, 0.5]
    assert not any(layer.calibrated for layer in crossbar_layers(model).values())
    assert (move.devices, move.differs) == (["cmo-hfox-ibm", "hfox-neurram"], ["range_shrink"])
    assert (move.added, move.removed, move.layers("before")) == ([], [], "")


@pytest.mark.parametrize("device", sorted(DEVICES.values()))
def test_parts_that_are_on_the_device_stay_there_with_their_calibration(device):
    model = towers()
    scales = {name: layer.weight_scale.clone() for name, layer in crossbar_layers(model).items()}
    move = put_on(model, ReRAMConfig(device=device, retention_times=["10y"]))
    assert devices(model) == dict.fromkeys(LAYERS, device) and move.differs == ["device"]
    assert [state.config.retention_times for state in crossbar_states(model)] == [["10y"], ["10y"]]
    for name, layer in crossbar_layers(model).items():
        stays = DEVICES[name.partition(".")[0]] == device
        assert layer.calibrated == stays and (not stays or torch.equal(layer.weight_scale, scales[name]))


def test_a_part_keeps_the_layers_that_it_was_patched_with():
    """Those of a config that names none are all others' own."""
    model = tiny_bert()
    patch_model(model.bert, ReRAMConfig(target_modules=["query", "key"]))
    names = list(crossbar_layers(model))
    move = put_on(model, ReRAMConfig(device="generic"))
    assert list(crossbar_layers(model)) == names and len(names) == 4 and move.differs == ["device"]
    (state,) = crossbar_states(model)
    assert state.config.target_modules == ["query", "key"] and state.root is model.bert
    assert model.bert.config.quantization_config.device.name == "generic"


def test_layers_that_are_asked_for_are_named():
    model = tiny_bert()
    patch_model(model.bert, ReRAMConfig())
    move = put_on(model, ReRAMConfig(modules_to_not_convert=["pooler"]))
    assert (move.added, move.removed, move.differs) == (["classifier"], ["bert.pooler.dense"], ["layers"])
    assert move.layers("before") == (
        "these layers were digital before, and are on crossbars now: classifier; "
        "these layers were on crossbars before, and are digital now: bert.pooler.dense"
    )
    calibrate(model, [bert_batch()])
    assert put_on(model, ReRAMConfig(target_modules=list(crossbar_layers(model)))).differs == []
    assert all(layer.calibrated for layer in crossbar_layers(model).values())


def test_a_part_inside_of_a_part_goes_along():
    model = Towers()
    patch_model(model, ReRAMConfig(target_modules=["head", "right.0"]))
    patch_model(model.left, ReRAMConfig(device="generic"))
    names = set(crossbar_layers(model))
    remap(model, changed(model, gain="full_scale"))
    assert set(crossbar_layers(model)) == names == {"head", "right.0", "left.0", "left.2"}
    assert {state.root for state in crossbar_states(model)} == {model, model.left}
    assert devices(model) == {"left.0": "generic", "left.2": "generic"} | dict.fromkeys(
        ("head", "right.0"), "hfox-neurram"
    )


def test_a_part_whose_model_was_patched_is_put_on_other_cells_alone():
    model = patch_model(Towers(), ReRAMConfig())
    put_on(model.left, ReRAMConfig(device="generic"))
    assert devices(model) == {
        name: "generic" if name.startswith("left") else "hfox-neurram" for name in (*LAYERS, "head")
    }
