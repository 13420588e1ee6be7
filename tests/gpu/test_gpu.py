"""Crossbars on a GPU: the values of the CPU in every precision, and steps that do not wait for the device.

    pytest -m gpu

Skipped where PyTorch finds no GPU. Models are tiny, with random weights.
"""

import copy
import warnings

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    TrainingArguments,
)

from hf_reram import (
    DeviceConfig,
    ReRAMConfig,
    ReRAMTrainer,
    add_retention_loss,
    calibrate,
    crossbar_layers,
    deploy,
    digital,
    evaluate_robustness,
    hold_weights,
    noise_to_signal,
    patch_model,
    sampled_drift,
    use_fused_kernels,
)

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda")
CONVERTERS = {"dac_bits": 8, "adc_bits": 8}

# All deterministic: a GPU draws other noise than a CPU.
OPTIONS = {
    "no loss": {"retention_loss": "none"},
    "output": {"retention_loss": "output"},
    "weight": {"retention_loss": "weight"},
    "sensitivity": {"retention_loss": "sensitivity"},
    "converters": {"retention_loss": "output", **CONVERTERS},
    "tiles": {"retention_loss": "output", "weight_scale": "per_tile", "tile_size": 8},
    "learned ranges": {"retention_loss": "output", "learn_input_range": True},
    "per token": {"retention_loss": "output", "input_range": "per_token"},
    "equalized, redundant": {"retention_loss": "output", "equalize_inputs": True, "redundancy": 1.0},
}


@pytest.fixture(autouse=True)
def _full_precision(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def bert(layers: int = 2) -> nn.Module:
    shape = {"hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 64}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=3, **shape, **still))


def gpt2() -> nn.Module:
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=2, **still))


def llama() -> nn.Module:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, num_key_value_heads=2, tie_word_embeddings=True, **shape))


class Images(nn.Module):
    """Convolutions as in MobileNet, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.Hardswish(), nn.Conv2d(16, 16, 3, groups=16), nn.ReLU(inplace=True)
        )
        self.classifier = nn.Linear(16 * 7 * 7, 3)

    def forward(self, pixel_values, labels):
        logits = self.classifier(self.features(pixel_values).flatten(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def images() -> nn.Module:
    return Images()


def channels_last() -> nn.Module:
    return Images().to(memory_format=torch.channels_last)


MODELS = [bert, gpt2, llama, images, channels_last]


def batch_of(model: nn.Module, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(3, (8,), generator=generator)
    if isinstance(model, Images):
        pixels = torch.rand(8, 3, 9, 9, generator=generator)
        return {"pixel_values": pixels.contiguous(memory_format=torch.channels_last), "labels": classes}
    ids = torch.randint(1, 50, (8, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[::2, -3:] = 0
    labels = classes if isinstance(model, BertForSequenceClassification) else ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def on_gpu(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.to(GPU) for key, value in batch.items()}


def patched(make=bert, calibrated: bool = True, **options) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A patched model on the CPU in training mode, and its batch."""
    model = make()
    batch = batch_of(model)
    patch_model(model, ReRAMConfig(**{"device": "hfox-neurram", "retention_times": ["1d"], **options}))
    if calibrated:
        calibrate(model, [batch])
    return model.train(), batch


def quiet(**changes) -> DeviceConfig:
    """The NeuRRAM preset without read noise, which is another one on a GPU."""
    return DeviceConfig.from_dict({**DeviceConfig.from_preset("hfox-neurram").to_dict(), "read_noise": 0.0, **changes})


def step(model: nn.Module, batch: dict[str, torch.Tensor], call=None) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Whole loss, retention loss and gradients of one training step without an optimizer."""
    with sampled_drift(model):
        task_loss = (model if call is None else call)(**batch)["loss"]
    loss, retention = add_retention_loss(task_loss, model)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), retention, gradients


def distance(found, expected) -> float:
    """Norm of the difference over that of the expected tensor or tensors."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        found, expected = (torch.cat([t.detach().cpu().flatten() for t in d.values()]) for d in (found, expected))
    found, expected = (torch.as_tensor(t).detach().cpu().double() for t in (found, expected))
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


def logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch)["logits"]


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_loss_and_gradients_are_those_of_the_cpu(make, options):
    model, batch = patched(make, **options)
    twin = copy.deepcopy(model).to(GPU)
    loss, retention, gradients = step(model, batch)
    found_loss, found_retention, found_gradients = step(twin, on_gpu(batch))
    assert found_loss.device.type == GPU.type
    tolerance = 5e-2 if "adc_bits" in options else 1e-3  # half-way between two codes, rounding decides
    assert float(found_loss) == pytest.approx(float(loss), rel=tolerance)
    assert float(found_retention) == pytest.approx(float(retention), rel=tolerance)
    assert distance(found_gradients, gradients) < tolerance
    if options["retention_loss"] == "output":
        assert noise_to_signal(twin) == pytest.approx(noise_to_signal(model), rel=tolerance)


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("options", [{}, CONVERTERS, OPTIONS["equalized, redundant"]], ids=str)
def test_calibration_finds_the_numbers_of_the_cpu(make, options):
    model, batch = patched(make, calibrated=False, **options)
    twin = copy.deepcopy(model).to(GPU)
    before = copy.deepcopy(model.state_dict())
    calibrate(model, [batch])
    calibrate(twin, [on_gpu(batch)])
    found, changed = twin.state_dict(), 0
    for key, expected in model.state_dict().items():
        assert found[key].device.type == GPU.type
        changed += not torch.equal(expected, before[key])
        # Of two clips with nearly the same error either one may be taken.
        assert distance(found[key], expected) < (5e-2 if key.endswith("weight_scale") else 1e-3), key
    assert changed >= len(crossbar_layers(model))


@pytest.mark.parametrize("make", MODELS)
def test_a_seed_is_the_same_chip_as_on_the_cpu(make):
    model, batch = patched(make, device=quiet(stuck_at_min=0.02, stuck_at_max=0.01), **CONVERTERS)
    twin = copy.deepcopy(model).to(GPU).eval()
    model.eval()
    chips = {}
    for seed, time in ((0, "1s"), (1, "1s"), (1, "1d")):
        with deploy(model, time, seed=seed), deploy(twin, time, seed=seed):
            chips[seed, time] = logits(twin, on_gpu(batch))
            assert distance(chips[seed, time], logits(model, batch)) < 1e-2, (seed, time)
    assert distance(chips[1, "1s"], chips[0, "1s"]) > 2e-2
    assert distance(chips[1, "1d"], chips[1, "1s"]) > 2e-2


def test_the_digital_model_inside_is_the_same():
    model, batch = patched()
    twin = copy.deepcopy(model).to(GPU).eval()
    with digital(model.eval()), digital(twin):
        assert distance(logits(twin, on_gpu(batch)), logits(model, batch)) < 1e-5


def line(**options) -> tuple[nn.Module, torch.Tensor]:
    """One layer with a straight I-V curve, and one input for each of its rows."""
    model, x = nn.Sequential(nn.Linear(256, 256, bias=False)), torch.eye(256)
    device = DeviceConfig.from_dict({**DeviceConfig.from_preset("hfox-neurram").to_dict(), "v0": 1e6})
    config = {"device": device, "retention_times": ["1d"], "weight_clip": None, "center_inputs": False}
    patch_model(model, ReRAMConfig(**{**config, **options}))
    calibrate(model, [x])
    return model, x


@pytest.mark.parametrize("loss", ["drift", "noise"])
def test_sampled_drift_is_as_large_as_on_the_cpu(loss):
    errors = {}
    for device in ("cpu", GPU):
        model, x = line(retention_loss=loss)
        model, x = model.to(device).train(), x.to(device)
        with torch.no_grad():
            plain = model(x)
            torch.manual_seed(3)
            with sampled_drift(model):
                errors[device] = model(x) - plain
            torch.manual_seed(3)
            with sampled_drift(model):
                assert torch.equal(model(x) - plain, errors[device])
            with sampled_drift(model):
                assert not torch.allclose(model(x) - plain, errors[device], rtol=0.1)
    on_cpu, found = errors["cpu"], errors[GPU].cpu()
    assert float(found.std()) == pytest.approx(float(on_cpu.std()), rel=0.03)
    assert float(found.mean()) == pytest.approx(float(on_cpu.mean()), abs=0.03 * float(on_cpu.std()))


def test_read_noise_is_as_large_as_on_the_cpu():
    spread = {}
    for device in ("cpu", GPU):
        model, x = line()
        model, x = model.to(device).eval(), x.to(device)
        with torch.no_grad(), deploy(model, "1s"):
            spread[device] = float((model(x) - model(x)).std())
    assert spread[GPU] == pytest.approx(spread["cpu"], rel=0.03)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("name", ["no loss", "output", "sensitivity", "converters", "learned ranges"])
def test_autocast_and_loss_scaling_keep_gradients(make, name, dtype):
    model, batch = patched(make, **OPTIONS[name])
    model, batch = model.to(GPU), on_gpu(batch)
    expected_loss, _, expected = step(model, batch)
    before = copy.deepcopy(model.state_dict())
    scaler = torch.amp.GradScaler(GPU.type, init_scale=256.0, enabled=dtype == torch.float16)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with sampled_drift(model), torch.autocast(GPU.type, dtype):
        outputs = model(**batch)
    assert outputs["logits"].dtype == dtype
    loss, _ = add_retention_loss(outputs["loss"].float(), model)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    scaler.step(optimizer)
    scaler.update()
    assert float(loss.detach()) == pytest.approx(float(expected_loss), rel=5e-3)
    assert distance(gradients, expected) < (0.15 if name == "converters" else 0.1)
    assert not scaler.is_enabled() or scaler.get_scale() == 256.0  # no step was skipped
    moved = {key: before[key] - 1e-2 * grad for key, grad in gradients.items()}
    assert distance({key: model.state_dict()[key] for key in moved}, moved) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("make", MODELS)
def test_models_in_half_precision(make, dtype):
    model, batch = patched(make, retention_loss="none")
    twin = copy.deepcopy(model).to(GPU, dtype).eval()
    halves = {key: v.to(dtype) if v.is_floating_point() else v for key, v in on_gpu(batch).items()}
    with torch.no_grad():
        outputs = twin(**halves)["logits"]
    assert outputs.dtype == dtype
    assert distance(outputs, logits(model.eval(), batch)) < 5e-2
    with deploy(model, "1d", seed=1), deploy(twin, "1d", seed=1):
        assert distance(logits(twin, halves), logits(model, batch)) < 0.2  # two draws of read noise


def test_robustness_is_that_of_the_cpu():
    model, batch = patched(device=quiet())
    twin, there = copy.deepcopy(model).to(GPU), on_gpu(batch)
    expected, found = (
        evaluate_robustness(m.eval(), lambda m, b=b: float(m(**b).loss.detach()), ["1s", "1d"], seeds=3, progress=False)
        for m, b in ((model, batch), (twin, there))
    )
    assert found.digital == pytest.approx(expected.digital, rel=1e-4)
    assert found.ideal == pytest.approx(expected.ideal, rel=1e-4)
    assert len(found.measurements) == 6
    for one, other in zip(found.measurements, expected.measurements, strict=True):
        assert (one.time, one.seed) == (other.time, other.seed)
        assert one.metrics == pytest.approx(other.metrics, rel=1e-3)


def test_read_noise_is_the_same_in_every_evaluation():
    model, batch = patched()
    model, batch = model.to(GPU).eval(), on_gpu(batch)
    first, again = (
        evaluate_robustness(model, lambda m: float(m(**batch).loss.detach()), ["1d"], seeds=3, progress=False)
        for _ in range(2)
    )
    losses, repeated = ([one.metrics["metric"] for one in report.measurements] for report in (first, again))
    assert repeated == pytest.approx(losses, rel=1e-6) and len(set(losses)) == 3


@pytest.mark.parametrize("load", [{}, {"device_map": "cuda"}], ids=["to", "device_map"])
def test_saving_and_loading(load, tmp_path):
    model, batch = patched(device=quiet(), **CONVERTERS)
    model, batch = model.to(GPU).eval(), on_gpu(batch)
    model.save_pretrained(tmp_path)
    loaded = BertForSequenceClassification.from_pretrained(tmp_path, **load).to(GPU).eval()
    assert len(crossbar_layers(loaded)) == len(crossbar_layers(model)) > 0
    assert distance(logits(loaded, batch), logits(model, batch)) < 1e-5
    with digital(model):
        plain = logits(model, batch)
    with deploy(loaded, "1d", seed=2), deploy(model, "1d", seed=2):
        assert distance(logits(loaded, batch), logits(model, batch)) < 1e-5
        assert distance(logits(loaded, batch), plain) > 1e-2


def synchronizations(run) -> list[str]:
    """Where the host waits for the GPU."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sorted(f"{w.filename}:{w.lineno}" for w in caught if "called a synchronizing" in str(w.message))


def test_waiting_is_noticed():
    x = torch.ones(3, device=GPU)
    assert synchronizations(lambda: float(x.sum()))
    assert synchronizations(lambda: x.new_tensor(2.0))
    assert synchronizations(lambda: x.new_full((), 2.0) + x) == []


STEPS = {
    **OPTIONS,
    "drift": {"retention_loss": "drift"},
    "noise": {"retention_loss": "noise"},
    "output+drift": {"retention_loss": "output+drift"},
    "drift, two times": {"retention_loss": "sensitivity+drift", "retention_times": ["1s", "1d"]},
    "drift, converters": {"retention_loss": "drift", **CONVERTERS},
    "drift, converters, learned ranges": {"retention_loss": "drift", "learn_input_range": True, **CONVERTERS},
}


@pytest.mark.parametrize("make", [bert, llama, images])
@pytest.mark.parametrize("options", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
def test_a_training_step_waits_for_nothing_that_a_digital_one_does_not(make, options, precision):
    plain = make().to(GPU).train()
    model, batch = patched(make, **options)
    calibrate(model.to(GPU), [batch := on_gpu(batch)])  # as for a model that is on the GPU from the start
    model.train()
    optimizers = {m: torch.optim.SGD(m.parameters(), lr=1e-3) for m in (plain, model)}

    def train(m: nn.Module) -> None:
        if m is plain:
            with torch.autocast(GPU.type, torch.bfloat16, enabled=precision == torch.bfloat16):
                loss = m(**batch)["loss"]
        else:
            with sampled_drift(m), torch.autocast(GPU.type, torch.bfloat16, enabled=precision == torch.bfloat16):
                loss = m(**batch)["loss"]
            loss, _ = add_retention_loss(loss, m)
        loss.backward()
        optimizers[m].step()
        if m is model:
            hold_weights(m)
        optimizers[m].zero_grad()

    for m in (plain, model):
        train(m), train(m)  # reads what calibration has changed
    assert synchronizations(lambda: train(model)) == synchronizations(lambda: train(plain))


@pytest.mark.parametrize("loss", ["drift", "output+drift", "consistency"])
def test_steps_leave_no_memory_behind(loss):
    model, batch = patched(retention_loss=loss, **CONVERTERS)
    model, batch = model.to(GPU), on_gpu(batch)
    held = []
    for _ in range(6):
        with sampled_drift(model, "drift"):
            loss_ = model(**batch).loss
        if loss != "consistency":
            loss_, _ = add_retention_loss(loss_, model)
        loss_.backward()
        model.zero_grad()
        del loss_
        held.append(torch.cuda.memory_allocated())
    assert held[2:] == [held[2]] * 4


@pytest.mark.parametrize("loss", ["drift", "output+drift"])
def test_gradient_checkpointing_draws_the_same_drift_again(loss):
    model, batch = patched(retention_loss=loss)
    model, batch = model.to(GPU), on_gpu(batch)
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(7)
        found.append(step(model, batch))
    (loss_, _, gradients), (again, _, recomputed) = found
    assert float(again) == pytest.approx(float(loss_), rel=1e-6)
    assert distance(recomputed, gradients) < 1e-5


@pytest.mark.parametrize("name", ["output", "converters"])
def test_compiled_to_one_graph(name):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, batch = patched(lambda: bert(1), **OPTIONS[name])
    model, batch = model.to(GPU), on_gpu(batch)
    expected_loss, expected_retention, expected = step(model, batch)
    twin = copy.deepcopy(model)
    loss, retention, gradients = step(twin, batch, torch.compile(twin, fullgraph=True))
    tolerance = 5e-2 if name == "converters" else 2e-3
    assert float(loss) == pytest.approx(float(expected_loss), rel=tolerance)
    assert float(retention) == pytest.approx(float(expected_retention), rel=tolerance)
    assert distance(gradients, expected) < tolerance
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_compiled_drift_is_drawn_anew_by_one_graph():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, batch = patched(lambda: bert(1), retention_loss="drift")
    model, batch = model.to(GPU), on_gpu(batch)
    call, losses = torch.compile(model, fullgraph=True), []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        losses.append(float(step(model, batch, call)[0]))
    assert losses[2] == pytest.approx(losses[0], rel=1e-6)
    assert abs(losses[1] - losses[0]) > 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("make", [bert, images])
@pytest.mark.parametrize("name", ["no loss", "output", "converters"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
def test_fused_kernels(make, name, precision):
    model, batch = patched(make, **OPTIONS[name])
    model, batch = model.to(GPU), on_gpu(batch)

    def run():
        with torch.autocast(GPU.type, torch.bfloat16, enabled=precision == torch.bfloat16):
            return step(model, batch)

    expected_loss, _, expected = run()
    try:
        use_fused_kernels()
        loss, _, gradients = run()
    finally:
        use_fused_kernels(False)
    tolerance = 0.1 if precision == torch.bfloat16 else 5e-2 if name == "converters" else 1e-3
    assert float(loss) == pytest.approx(float(expected_loss), rel=tolerance)
    assert distance(gradients, expected) < tolerance


@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"fp16": True}], ids=str)
def test_the_trainer(precision, tmp_path):
    model = bert()
    batch = batch_of(model)
    data = [{key: batch[key][i] for key in batch} for i in range(8)] * 4
    before = copy.deepcopy(model.state_dict())
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **precision,
    )
    config = ReRAMConfig(device="hfox-neurram", retention_loss="output+drift", retention_times=["1d"])

    def mean_logit(prediction):  # the loss is rounded to half precision, in which chips may agree
        return {"logit": float(prediction.predictions.astype("float64").mean())}

    trainer = ReRAMTrainer(
        model, arguments, train_dataset=data, eval_dataset=data[:8], compute_metrics=mean_logit, reram_config=config
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "retention_loss" in entry]
    assert len(logs) == 3
    for entry in logs:
        assert 0 < entry["task_loss"] < 5
        assert 0 < entry["noise_to_signal"] < 1
        assert entry["retention_loss"] == pytest.approx(entry["noise_to_signal"], rel=1e-2)
    for name, layer in crossbar_layers(model).items():
        assert layer.weight.device.type == GPU.type
        assert not torch.equal(layer.weight.cpu(), before[f"{name}.weight"]), name
        assert (layer.weight.abs() <= layer.weight_scale[:, None] * (1 + 1e-5)).all(), name
    report = trainer.evaluate_robustness(times=["1s"], seeds=2, progress=False)
    metrics = [report.digital, *(one.metrics for one in report.measurements)]
    assert len({one["logit"] for one in metrics}) == 3 and all(0 < one["loss"] < 5 for one in metrics)
