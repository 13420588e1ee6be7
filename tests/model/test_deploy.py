import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import prune

from hf_reram import ReRAMConfig, calibrate, crossbar_layers, deploy, digital, patch_model, unpatch_model
from hf_reram.model.cells import held_of
from hf_reram.nn import CrossbarLayer
from hf_reram.nn.array import bit_sum
from tests.samples.devices import SILENT, device
from tests.samples.layers import layer_of
from tests.samples.models import bert_batch


@pytest.fixture
def chip(tiny_bert):
    patch_model(tiny_bert, ReRAMConfig(device=device(read_noise=0.0)))
    return calibrate(tiny_bert, [bert_batch()])


def logits(model):
    with torch.no_grad():
        return model(**bert_batch()).logits


def test_without_spread_ageing_changes_nothing(tiny_bert):
    patch_model(tiny_bert, ReRAMConfig(device=device(read_noise=0.0, retention=SILENT)))
    calibrate(tiny_bert, [bert_batch()])
    clean = logits(tiny_bert)
    with deploy(tiny_bert, "10y", seed=3):
        torch.testing.assert_close(logits(tiny_bert), clean, rtol=1e-5, atol=1e-6)


def test_same_seed_same_chip_other_seed_other_chip(chip):
    found = []
    for seed in (1, 1, 2):
        with deploy(chip, "1d", seed=seed):
            found.append(logits(chip))
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2])


def test_a_chip_ages_along_one_continuous_curve(chip):
    def at(time):
        with deploy(chip, time, seed=5):
            return crossbar_layers(chip)["classifier"].chip.weight.clone()

    gap = (at("1d") - at("1s")).abs().max()
    previous = at(1.0)
    for time in torch.logspace(0, 4.93, 60).tolist():
        now = at(time)
        assert (now - previous).abs().max() < 0.2 * gap
        previous = now
    correlation = torch.corrcoef(torch.stack([(at(t) - at(None)).flatten() for t in ("1s", "1d")]))[0, 1]
    assert correlation > 0.9


def test_layer_spread_is_the_published_one():
    model = nn.Sequential(nn.Linear(400, 300, bias=False))
    cell = device(read_noise=0.0, floor_at_zero=False)
    with torch.no_grad():
        model[0].weight.fill_(0.5)
        model[0].weight[:, 0] = 1.0
    patch_model(model, ReRAMConfig(device=cell, weight_clip=None))
    with deploy(model, "1d", seed=0):
        error = (model[0].chip.weight - model[0].weight)[:, 1:] * cell.g_range
    expected = (cell.retention_std(20.0, "1d") ** 2 + cell.retention_std(0.0, "1d") ** 2).sqrt()
    assert float(error.detach().std() / expected) == pytest.approx(1, rel=0.01)


def test_heat_is_time():
    model = nn.Sequential(nn.Linear(30, 20))
    patch_model(model, ReRAMConfig(device=device(read_noise=0.0)))
    cell = model[0].crossbar.config.device
    with deploy(model, 60, temperature=330.0, seed=1):
        hot = model[0].chip.weight.clone()
    with deploy(model, cell.equivalent_time(60, 330.0), seed=1):
        torch.testing.assert_close(model[0].chip.weight, hot)


def test_nothing_is_left_behind_and_contexts_nest(chip):
    clean, keys = logits(chip), set(chip.state_dict())
    with deploy(chip, "1s", seed=1):
        first = logits(chip)
        with deploy(chip, "1d", seed=2):
            assert set(chip.state_dict()) == keys
        assert torch.equal(logits(chip), first)
    with pytest.raises(RuntimeError, match="inside"), deploy(chip, "1d"):
        raise RuntimeError("inside")
    assert torch.equal(logits(chip), clean)


def test_digital_is_the_digital_model(tiny_bert):
    before = logits(tiny_bert)
    twin = copy.deepcopy(tiny_bert)
    patch_model(twin, ReRAMConfig())
    calibrate(twin, [bert_batch()])
    with digital(twin):
        assert torch.equal(logits(twin), before)
    assert not torch.allclose(logits(twin), before)


def test_read_noise_is_drawn_anew_and_stuck_cells_do_not_move():
    model = nn.Sequential(nn.Linear(64, 64))
    cell = device(stuck_at_min=0.3, stuck_at_max=0.1, floor_at_zero=False)
    patch_model(model, ReRAMConfig(device=cell, weight_clip=None))
    x = torch.randn(50, 64)
    calibrate(model, [x])
    with torch.no_grad(), deploy(model, "1d", seed=1):
        assert not torch.equal(model(x), model(x))
        late = model[0].chip.weight.clone()
    with deploy(model, None, seed=1):
        same = (model[0].chip.weight == late).float().mean()
    assert float(same) == pytest.approx(0.4**2, abs=0.02)  # both cells of a pair stuck


@pytest.mark.parametrize("sharing", ["per_channel", "per_tile"])
def test_read_noise_has_its_standard_deviation(sharing):
    cell = device(read_noise=0.5, retention=SILENT)
    model = nn.Sequential(nn.Linear(16, 400, bias=False))
    options = {"weight_clip": None, "weight_scale": sharing, "tile_size": 4}
    patch_model(model, ReRAMConfig(device=cell, range_shrink=0.5, gain="small_signal", **options))
    x = torch.randn(300, 16)
    calibrate(model, [x])
    layer = model[0]
    with torch.no_grad():
        clean = model(x)
        with deploy(model, "1s"):
            noise = model(x) - clean
    # In currents: unit = range · scale / (shrink · Δg · read_voltage), four tiles add up.
    scales = layer.weight_scale.view(400, -1).expand(-1, 4)
    unit = float(layer.input_range) / (0.5 * cell.g_range * cell.read_voltage) * scales.square().sum(1).sqrt()
    assert float((noise / unit).std()) == pytest.approx(0.5, rel=0.01)


@pytest.mark.parametrize(
    "wrong", [{"seed": -1}, {"seed": 1.5}, {"time": "soon"}, {"time": -1}, {"temperature": 0}, {"temperature": "hot"}]
)
def test_bad_arguments(chip, wrong):
    with pytest.raises(ValueError, match="allowed"), deploy(chip, **wrong):
        pass


def test_contexts_may_end_in_another_order_than_they_began(chip):
    ideal = chip(**bert_batch()).logits
    first, second, off = deploy(chip, "1d", seed=1), deploy(chip, "1d", seed=2), digital(chip)
    with torch.no_grad():
        first.__enter__()
        one = chip(**bert_batch()).logits
        second.__enter__()
        two = chip(**bert_batch()).logits
        off.__enter__()
        plain = chip(**bert_batch()).logits
        first.__exit__(None, None, None)
        off.__exit__(None, None, None)
        assert torch.equal(chip(**bert_batch()).logits, two)
        second.__exit__(None, None, None)
        assert torch.equal(chip(**bert_batch()).logits, ideal)
    assert not torch.equal(one, two) and not torch.equal(plain, ideal)
    assert all(layer.chip is None for layer in crossbar_layers(chip).values())


def test_retention_does_not_depend_on_other_errors():
    """Nor do stuck cells: each has random numbers of its own."""
    found = {}
    for name, changes in {
        "alone": {"programming": [0.0]},
        "programmed": {"programming": [2.0]},
        "stuck": {"programming": [0.0], "stuck_at_max": 0.1},
        "all": {"programming": [2.0], "stuck_at_max": 0.1},
    }.items():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(40, 30))
        patch_model(model, ReRAMConfig(device=device(floor_at_zero=False, **changes), weight_clip=None))
        fresh, aged = deploy(model, None, seed=3), deploy(model, "1d", seed=3)
        with fresh:
            before = model[0].chip.weight.clone()
        with aged:
            found[name] = before, model[0].chip.weight - before
    moved = found["stuck"][1] != 0
    assert 0.97 < float(moved.float().mean()) < 1  # of a hundredth of the weights both cells are stuck
    torch.testing.assert_close(found["programmed"][1], found["alone"][1], rtol=1e-3, atol=1e-5)
    both_free = found["stuck"][1] == found["alone"][1]
    assert float(both_free.float().mean()) > 0.75
    torch.testing.assert_close(found["all"][1][both_free], found["alone"][1][both_free], rtol=1e-3, atol=1e-5)


def test_deploying_under_inference_mode_leaves_a_model_that_trains(chip):
    with torch.inference_mode(), deploy(chip, "1d", seed=1):
        chip(**bert_batch())
    chip.train()(**bert_batch()).loss.backward()
    assert all(float(layer.weight.grad.abs().sum()) > 0 for layer in crossbar_layers(chip).values())


def test_a_chip_whose_weights_have_changed_is_not_read(chip):
    layer = crossbar_layers(chip)["classifier"]
    weights = {name: tensor.clone() for name, tensor in chip.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"of no chip.*classifier"), deploy(chip, "1d"):
        with pytest.raises(RuntimeError, match="'classifier' is deployed as a chip"):
            layer.load_state_dict(layer.state_dict())
        with torch.no_grad():
            layer.weight.mul_(2)
        with pytest.raises(RuntimeError, match="'classifier' has changed since it was programmed"):
            chip(**bert_batch())
    chip.load_state_dict(weights)
    with deploy(chip, "1d"):
        chip(**bert_batch())


def test_a_chip_moves_with_its_model(chip):
    with deploy(chip, "1d"), torch.no_grad():
        expected = chip(**bert_batch()).logits
        chip.to(torch.bfloat16)
        torch.testing.assert_close(chip(**bert_batch()).logits.float(), expected, rtol=0.05, atol=0.02)


def test_a_chip_is_not_unpatched(chip):
    with deploy(chip, "1d"), pytest.raises(ValueError, match=r"unpatch it outside of hf_reram\.deploy"):
        unpatch_model(chip)
    assert isinstance(chip.classifier, CrossbarLayer)


def test_weights_that_hooks_compute_are_no_chip(chip):
    """They are made anew in a forward, after the chip was programmed."""
    prune.l1_unstructured(chip.classifier, "weight", 0.5)
    with pytest.raises(ValueError, match=r"computed by hooks in each forward.*: classifier"), deploy(chip, "1d"):
        pass
    prune.remove(chip.classifier, "weight")
    with deploy(chip, "1d"):
        chip(**bert_batch())


def test_a_chip_whose_model_moves_is_still_that_chip(chip):
    """Numbers of calibration stay as they are, whatever the dtype."""
    with deploy(chip, "1d"):
        chip.to(torch.bfloat16)
        chip(**bert_batch())
        chip.float()


def test_numbers_that_were_written_past_pytorch_count(chip):
    layer = crossbar_layers(chip)["classifier"]
    layer.input_range.data.mul_(0.1)
    with deploy(chip, "1d"):
        assert layer.scalars().input_range == pytest.approx(float(layer.input_range))


def test_a_replica_is_counted_and_is_the_chip(chip):
    """nn.DataParallel makes replicas on each further GPU."""
    layer = crossbar_layers(chip)["classifier"]
    x = torch.randn(3, layer.in_features)
    with deploy(chip, "1d"), torch.no_grad():
        replica = layer._replicate_for_data_parallel()
        replica.weight, replica.bias = layer.weight.clone(), layer.bias.clone()
        for name, buffer in layer._buffers.items():
            setattr(replica, name, buffer.clone())
        expected = layer(x)
        layer.calls = 0
        assert replica.chip is layer.chip and torch.equal(replica(x), expected) and layer.calls == 1


def test_what_stands_beside_a_chip_is_not_trained(chip):
    """No crossbar is on the way to the head."""
    unpatch_model(chip)
    patch_model(chip.train(), ReRAMConfig(modules_to_not_convert=["classifier"]))
    chip.bert.requires_grad_(False)
    with deploy(chip, "1d"), pytest.raises(RuntimeError, match="train outside of deploy"):
        chip(**bert_batch()).loss.backward()


def test_a_chip_in_training_mode_may_be_changed_in_place():
    model = nn.Sequential(nn.Linear(4, 3, bias=False)).train()
    patch_model(model, ReRAMConfig())
    with deploy(model, "1d"):
        y = model(torch.randn(2, 4))
        y += 1
        with pytest.raises(RuntimeError, match="train outside of deploy"):
            y.sum().backward()


def _merge_adapter(model):
    adapted = get_peft_model(model, LoraConfig(target_modules=["query"], r=2, init_lora_weights=False))
    adapted.merge_adapter()


CHANGES = {
    "in place, and moved": lambda m: (m.classifier.weight.detach().mul_(5), m.to("cpu")),
    "of .data": lambda m: m.classifier.weight.data.mul_(5),
    "of .data, and moved": lambda m: (m.classifier.weight.data.mul_(5), m.float()),
    "another tensor": lambda m: setattr(m.classifier, "weight", nn.Parameter(m.classifier.weight.detach() * 5)),
    "rows swapped": lambda m: setattr(m.classifier.weight, "data", m.classifier.weight.data.flip(0).clone()),
    "elements of a row swapped": lambda m: setattr(m.classifier.weight, "data", m.classifier.weight.data.flip(1)),
    "both": lambda m: setattr(m.classifier.weight, "data", m.classifier.weight.data.flip(0, 1)),
    "a merged adapter": _merge_adapter,
    "a range": lambda m: m.classifier.input_range.fill_(0.1),
    "a range's .data": lambda m: m.classifier.input_range.data.mul_(1.001),
    "scales of channels swapped": lambda m: m.classifier.weight_scale.copy_(m.classifier.weight_scale.flip(0)),
    "an offset, and moved": lambda m: (m.classifier.input_offset.data.add_(0.1), m.to(torch.bfloat16)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8])
def test_the_sum_of_bits_knows_each_element_and_its_place(dtype):
    torch.manual_seed(0)
    t = torch.randint(-100, 100, (7, 5)).to(dtype)
    before = bit_sum(t)
    assert torch.equal(bit_sum(t.clone()), before) and torch.equal(bit_sum(t.mT.contiguous().mT), before)
    for i in range(7):
        for j in range(5):
            other = t.clone()
            other[i, j] += 1
            assert not torch.equal(bit_sum(other), before)
            for place in ((i, (j + 1) % 5), ((i + 1) % 7, j)):
                other = t.clone()
                other[i, j], other[place] = t[place], t[i, j]
                assert torch.equal(bit_sum(other), before) == bool(t[place] == t[i, j])


def test_the_sum_of_bits_is_that_of_whole_numbers():
    """Of the largest patterns too, in Python's integers, which never overflow."""
    t = torch.full((3000, 40), -1e-45).view(torch.int32).fill_((1 << 31) - 1).view(torch.float32)
    pattern, prime = (1 << 31) - 1, (1 << 31) - 1
    rows, columns = [pattern * 40] * 3000, [pattern * 3000] * 40
    t.view(torch.int32)[7, 9] = -5
    rows[7], columns[9] = pattern * 39 - 5, pattern * 2999 - 5
    by_place = [sum(s % prime * (i + 1) % prime for i, s in enumerate(sums)) for sums in (rows, columns)]
    assert bit_sum(t).tolist() == [sum(rows), *by_place]
    for shape in ((), (0,), (3, 0), (0, 4)):
        assert bit_sum(torch.zeros(shape)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_weights_is_seen_at_the_end_at_the_latest(chip, change):
    with pytest.raises(RuntimeError, match="of no chip"), deploy(chip, "1d"):
        CHANGES[change](chip)


def test_a_change_below_a_parametrization_is_seen(chip):
    nn.utils.parametrizations.weight_norm(chip.classifier)
    with pytest.raises(RuntimeError, match="of no chip"), deploy(chip, "1d"):
        with torch.no_grad():
            chip.classifier.parametrizations.weight.original0.mul_(5)
        with pytest.raises(RuntimeError, match="'classifier' has changed"):
            chip(**bert_batch())
    with deploy(chip, "1d"):
        chip(**bert_batch())


def test_a_compiled_chip_with_other_weights_is_refused_at_the_end(chip):
    compiled = torch.compile(chip, backend="eager")
    with pytest.raises(RuntimeError, match="of no chip"), deploy(chip, "1d"):
        compiled(**bert_batch())
        with torch.no_grad():
            chip.classifier.weight.mul_(5)
        compiled(**bert_batch())


def test_a_functional_call_with_other_weights_is_refused(chip):
    weights = dict(chip.named_parameters())
    with deploy(chip, "1d"), torch.no_grad():
        expected = chip(**bert_batch()).logits
        found = torch.func.functional_call(chip, weights, (), bert_batch()).logits
        other = {"classifier.weight": 3 * weights["classifier.weight"].detach()}
        with pytest.raises(RuntimeError, match="'classifier' has changed since it was programmed, or is another"):
            torch.func.functional_call(chip, other, (), bert_batch())
    torch.testing.assert_close(found, expected)


def test_copies_of_a_layer_count_for_themselves(chip):
    chip.classifier.calls = 0
    with deploy(chip, "1d"):
        copied = copy.copy(chip.classifier)
        copied(torch.randn(3, copied.in_features))
    assert copied.calls == 1 and chip.classifier.calls == 0 and copied.chip is None


def test_a_model_made_under_inference_mode_is_a_chip():
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(6, 4))
        patch_model(model, ReRAMConfig())
        x = torch.randn(5, 6)
        calibrate(model, [x])
        with deploy(model, "1d"):
            aged = model(x)
        assert not torch.equal(aged, model(x))


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_several_pairs_without_error_are_the_ideal_crossbar(kind):
    """All pairs are at the same targets, which adding them up must leave as they are; outputs but for read noise."""
    layer, x = layer_of(kind)
    model = nn.Sequential(layer).eval()
    patch_model(model, ReRAMConfig(device=device(), tile_size=5, redundancy=1.0))
    calibrate(model, [x])
    assert model[0].pairs > 1 and device().read_noise > 0 and not any(device().programming)
    with torch.no_grad():
        ideal = model(x)
        with deploy(model, None, seed=3):
            torch.testing.assert_close(model[0].chip.weight, held_of(model[0]), rtol=1e-6, atol=1e-6)
            found = model(x)
    assert 0 < float((found - ideal).norm() / ideal.norm()) < 0.05
