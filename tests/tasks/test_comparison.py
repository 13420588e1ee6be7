"""What the compared methods differ in."""

from hf_reram import ReRAMConfig
from hf_reram.tasks.comparison import METHODS, OURS


def test_methods_differ_from_ours_in_what_their_names_say():
    options = {"weight_clip": 2.5, "range_shrink": 0.5, "equalize_inputs": True}
    options |= {"weight_scale": "per_tile", "tile_size": 64, "redundancy": 0.1}
    config = ReRAMConfig(device="cmo-hfox-ibm", retention_loss="output", **options)
    ours = config.to_dict()
    found = {}
    for method in METHODS:
        theirs = method.config(config).to_dict()
        found[method.label] = {key: theirs[key] for key in ours if theirs[key] != ours[key]}
    naive = {"range_shrink": 1.0, "weight_clip": None, "retention_loss": "none"}
    naive |= {"center_inputs": False, "equalize_inputs": False, "weight_scale": "per_channel", "redundancy": 0.0}
    assert found.pop("naive crossbar") == naive
    assert found.pop("finetuned with noise injection") == {"retention_loss": "noise"}
    assert found.pop(OURS.label) == {}
    assert all(changes == {"retention_loss": "none"} for changes in found.values()) and len(found) == 2
