"""PEFT's adapters as digital side paths beside frozen crossbars."""

import copy
import json
import logging
import shutil
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    RobertaModel,
    TrainingArguments,
)

from hf_reram import (
    ReRAMConfig,
    ReRAMTrainer,
    calibrate,
    crossbar_layers,
    deploy,
    evaluate_robustness,
    noise_to_signal,
    patch_model,
    report_of,
    sampled_drift,
    unpatch_model,
)
from hf_reram.hub.load import load_model
from hf_reram.model.digest import model_digest
from tests.samples.models import bert_batch, tiny_bert


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """A calibrated checkpoint on crossbars."""
    torch.manual_seed(0)
    model, folder = tiny_bert(), tmp_path_factory.mktemp("base")
    patch_model(model, ReRAMConfig(device="hfox-neurram", retention_loss="output+drift", retention_times=["1d"]))
    calibrate(model, [bert_batch()])
    model.save_pretrained(folder)
    return str(folder)


def with_lora(base: str) -> PeftModel:
    torch.manual_seed(0)
    model = BertForSequenceClassification.from_pretrained(base)
    return get_peft_model(model, LoraConfig(r=4, target_modules=["query", "value", "dense"], task_type="SEQ_CLS"))


@torch.no_grad()
def logits(model, batch, chip: bool) -> torch.Tensor:
    with deploy(model, "1d", seed=2) if chip else nullcontext():
        torch.manual_seed(0)  # of the read noise
        return model(**batch).logits


def trained(base: str, folder, **options) -> ReRAMTrainer:
    batch = bert_batch(32)
    data = [{key: value[i] for key, value in batch.items()} for i in range(32)]
    args = TrainingArguments(
        folder, max_steps=8, learning_rate=1e-2, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True
    )
    trainer = ReRAMTrainer(with_lora(base), args, train_dataset=data, **options)
    trainer.train()
    return trainer


def test_adapters_are_trained_beside_frozen_crossbars(base, tmp_path):
    before = BertForSequenceClassification.from_pretrained(base)
    trainer = trained(base, tmp_path)
    model, batch = trainer.model, bert_batch()
    after = dict(model.get_base_model().named_parameters())
    for name, value in before.named_parameters():
        name = (
            name
            if name in after
            else name.replace(".weight", ".base_layer.weight").replace(".bias", ".base_layer.bias")
        )
        if "classifier" not in name:  # trained whole, as task_type says
            assert torch.equal(after[name], value), name
    assert all(torch.any(p != 0) for n, p in model.named_parameters() if "lora_B" in n)
    assert noise_to_signal(model)  # the crossbars' errors were on in training
    # An ordinary adapter: PEFT saves and loads it.
    model.eval().save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(BertForSequenceClassification.from_pretrained(base), tmp_path / "adapter").eval()
    assert len(crossbar_layers(again)) == len(crossbar_layers(before))
    for chip in (True, False):
        one, other, plain = (logits(m, batch, chip) for m in (model, again, before.eval()))
        torch.testing.assert_close(one, other)
        assert not torch.allclose(one, plain)


def test_chips_spoil_the_crossbars_but_not_the_side_paths(base):
    model, batch = with_lora(base).eval(), bert_batch()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "base_layer.weight" in name:
                parameter.zero_()  # what is left is the side path
            if "lora_B" in name:
                parameter.normal_()
    layer = model.get_base_model().bert.encoder.layer[0].attention.self.query
    x = torch.randn(4, 16)

    @torch.no_grad()
    def parts() -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)  # of the read noise
        whole = layer(x)
        torch.manual_seed(0)
        crossbar = layer.base_layer(x)
        return crossbar, whole - crossbar

    with deploy(model, "1d", seed=1):
        spoilt, side = parts()
    crossbar, expected = parts()
    assert not torch.allclose(spoilt, crossbar)
    torch.testing.assert_close(side, expected, rtol=1e-4, atol=1e-5)
    report = evaluate_robustness(model, lambda m: float(m(**batch).loss), ["1d"], seeds=2, progress=False)
    assert len(report.measurements) == 2


def test_adapters_merge_into_the_crossbars(base, tmp_path):
    model, batch = trained(base, tmp_path).model.eval(), bert_batch()
    with torch.no_grad():
        for layer in crossbar_layers(model).values():
            layer.weight_scale.mul_(100)  # far from clipping, which merged weights may meet and side paths do not
        expected = model(**batch).logits
        merged = copy.deepcopy(model).merge_and_unload()
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert len(crossbar_layers(merged)) == len(crossbar_layers(model))
    with torch.no_grad():
        found = merged(**batch).logits
    # The side path sees the input as it is, the crossbar through its sinh and its input range.
    assert torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), 0) > 0.99
    merged.save_pretrained(tmp_path / "merged")
    again = BertForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(again(**batch).logits, found)


@pytest.mark.parametrize("loss", ["output", "weight", "sensitivity", "drift", "output+drift", "noise"])
def test_frozen_crossbars_get_no_gradient_but_the_side_paths_do(base, tmp_path, loss):
    model = with_lora(base)
    config = ReRAMConfig(device="hfox-neurram", retention_loss=loss)
    batch = bert_batch(16)
    data = [{key: value[i] for key, value in batch.items()} for i in range(16)]
    args = TrainingArguments(tmp_path, max_steps=1, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True)
    trainer = ReRAMTrainer(model, args, train_dataset=data, reram_config=config)
    trainer.optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    seen = {}

    def look(name: str, grad: torch.Tensor) -> None:
        seen[name] = bool(torch.isfinite(grad).all())

    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(partial(look, name))
    trainer.train()
    assert seen and all(seen.values()) and any("lora_B" in name for name in seen)
    assert not any("base_layer" in name for name in seen)


def test_frozen_crossbars_keep_no_activations_of_their_own(tiny_bert):
    """What autograd saves of the batch: no more than beside digital layers."""
    batch = bert_batch(64)

    def saved(model: torch.nn.Module) -> int:
        kept = {}

        def keep(t: torch.Tensor) -> torch.Tensor:
            if 64 in t.shape or 64 * 6 in t.shape:  # activations, not weights
                kept[t.untyped_storage().data_ptr()] = t  # held, so that no storage takes the place of another
            return t

        model = get_peft_model(model, LoraConfig(r=4, target_modules=["query", "value", "dense"]))
        drift = sampled_drift(model) if crossbar_layers(model) else nullcontext()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), drift:
            model.train()(**batch).loss.backward()
        return sum(t.untyped_storage().nbytes() for t in kept.values())

    digital = saved(copy.deepcopy(tiny_bert))
    calibrate(patch_model(tiny_bert, ReRAMConfig(retention_loss="drift")), [batch])
    assert 0 < saved(tiny_bert) <= digital


def test_a_model_with_adapters_is_patched_around_them(tiny_bert):
    """The same layers, names and chips as without adapters."""
    plain = patch_model(copy.deepcopy(tiny_bert), ReRAMConfig(target_modules=["query", "dense"]))
    model = get_peft_model(copy.deepcopy(tiny_bert), LoraConfig(r=2, target_modules=["query", "value", "dense"]))
    patch_model(model, ReRAMConfig(target_modules=["query", "dense"]))
    assert list(crossbar_layers(model)) == list(crossbar_layers(plain))
    batch = bert_batch()
    for m in (plain, model):
        calibrate(m, [batch])
    torch.testing.assert_close(logits(model.eval(), batch, True), logits(plain, batch, True))
    unpatch_model(model)
    assert not crossbar_layers(model)
    torch.testing.assert_close(model(**batch).logits, tiny_bert(**batch).logits)


def heads(base: str, patched: bool):
    model = BertForSequenceClassification.from_pretrained(base)
    if not patched:
        unpatch_model(model)
    config = LoraConfig(r=4, target_modules=["query"], modules_to_save=["classifier"])
    model = get_peft_model(model, config).eval()
    if not patched:
        patch_model(model, ReRAMConfig())
    model.add_adapter("other", config)
    return model


def test_heads_are_chips_whichever_is_switched_to(base):
    model, batch = heads(base, patched=True), bert_batch()
    head = model.base_model.model.classifier
    with deploy(model, "1d", seed=2):
        cells = [layer.chip.weight for layer in (head.original_module, *head.modules_to_save.values())]
        assert all(torch.equal(cells[0], one) for one in cells[1:])  # of one weight, on one chip
        chip = logits(model, batch, chip=False)
        model.set_adapter("other")
        torch.testing.assert_close(logits(model, batch, chip=False), chip)
    assert not any(layer.chip for layer in (head.original_module, *head.modules_to_save.values()))


def test_a_head_that_is_digital_beside_one_on_a_crossbar_is_named(base):
    model, batch = heads(base, patched=False), bert_batch()
    evaluate = partial(evaluate_robustness, times=["1d"], seeds=1, progress=False)

    def score(model) -> float:
        return float(logits(model, batch, chip=False).sum())

    assert evaluate(model, score).uncalled == []
    model.set_adapter("other")
    with pytest.raises(RuntimeError, match=r": classifier\. Keep"):
        evaluate(model, score)


@pytest.fixture
def digital_base(tmp_path) -> str:
    """A checkpoint without crossbars."""
    torch.manual_seed(0)
    tiny_bert().save_pretrained(tmp_path / "digital")
    return str(tmp_path / "digital")


@pytest.mark.parametrize("first", ["adapters", "crossbars", "crossbars on disk"])
def test_adapters_open_again_on_the_crossbars_that_they_were_trained_beside(first, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hf_reram.hub.crossbars"), "propagate", True)
    batch, folder = bert_batch(32), tmp_path / "digital"
    tiny_bert().save_pretrained(folder)
    config = ReRAMConfig(device="cmo-hfox-ibm", modules_to_not_convert=["key"])
    model = BertForSequenceClassification.from_pretrained(folder)
    if first != "adapters":
        calibrate(patch_model(model, config), [batch])
    if first == "crossbars on disk":
        model.save_pretrained(folder)
        model = BertForSequenceClassification.from_pretrained(folder)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["query", "dense"], task_type="SEQ_CLS"))
    data = [{key: value[i] for key, value in batch.items()} for i in range(32)]
    args = TrainingArguments(
        tmp_path / "out", max_steps=4, learning_rate=1e-2, use_cpu=True, report_to=[], save_steps=2, disable_tqdm=True
    )
    trainer = ReRAMTrainer(model, args, train_dataset=data, eval_dataset=data, reram_config=config)
    trainer.train()
    report = trainer.evaluate_robustness(["1d"], seeds=1, progress=False)
    trainer.save_model(tmp_path / "adapter")
    said = [record.getMessage() for record in caplog.records if "PEFT alone opens" in record.getMessage()]
    assert len(said) == (0 if first == "crossbars on disk" else 1)
    again = load_model(tmp_path / "adapter")
    layers = crossbar_layers(again)
    assert list(layers) == list(crossbar_layers(trainer.model)) and not any("key" in name for name in layers)
    assert all(layer.calibrated and layer.crossbar.config.device.name == "cmo-hfox-ibm" for layer in layers.values())
    for chip in (True, False):
        torch.testing.assert_close(logits(again.eval(), batch, chip), logits(trainer.model.eval(), batch, chip))
    assert report_of(again).weights == report.weights  # the very same model
    middle = load_model(tmp_path / "out" / "checkpoint-2")  # checkpoints too
    assert all(layer.calibrated for layer in crossbar_layers(middle).values()) and len(crossbar_layers(middle)) > 4


@pytest.mark.parametrize("first", ["adapters", "crossbars"])
def test_adapters_saved_without_a_trainer_have_their_crossbars_beside_them(digital_base, tmp_path, first):
    model = BertForSequenceClassification.from_pretrained(digital_base)
    lora, config = LoraConfig(r=4, target_modules=["query"], init_lora_weights=False), ReRAMConfig(dac_bits=8)
    if first == "crossbars":
        patch_model(model, config)
    model = get_peft_model(model, lora)
    if first == "adapters":
        patch_model(model, config)
    calibrate(model, [bert_batch()])
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other" / "crossbars.safetensors").exists()
    model.save_pretrained(tmp_path / "adapter")
    again = load_model(tmp_path / "adapter").eval()
    assert len(crossbar_layers(again)) == len(crossbar_layers(model)) == 14
    for chip in (True, False):
        torch.testing.assert_close(logits(again, bert_batch(), chip), logits(model.eval(), bert_batch(), chip))
    other = load_model(tmp_path / "adapter", quantization_config=ReRAMConfig(device="cmo-hfox-ibm").to_dict())
    layers = crossbar_layers(other).values()
    assert len(layers) == 14 and not any(layer.calibrated for layer in layers)
    assert {layer.crossbar.config.device.name for layer in layers} == {"cmo-hfox-ibm"}


def test_adapters_that_lack_weights_are_refused(digital_base, tmp_path):
    """A head that they bring may be missing from their base."""
    model = get_peft_model(BertForSequenceClassification.from_pretrained(digital_base), LoraConfig(task_type="SEQ_CLS"))
    with torch.no_grad():
        model.classifier.modules_to_save["default"].weight.fill_(0.5)
    model.save_pretrained(tmp_path / "adapter")
    file, folder = tmp_path / "adapter" / "adapter_config.json", tmp_path / "headless"
    shutil.copytree(digital_base, folder)
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": str(folder)}))

    def drop(place, *lost):
        tensors = load_file(place)
        assert all(any(key.endswith(end) for key in tensors) for end in lost)
        save_file({key: t for key, t in tensors.items() if not key.endswith(lost)}, place, {"format": "pt"})

    drop(folder / "model.safetensors", "classifier.weight")
    assert bool((load_model(tmp_path / "adapter").classifier.modules_to_save["default"].weight == 0.5).all())
    drop(folder / "model.safetensors", "layer.0.output.dense.bias")
    with pytest.raises(ValueError, match=r"headless lacks weights of Bert.*: bert\.encoder\.layer\.0\.output\.dense"):
        load_model(tmp_path / "adapter")
    shutil.copy(f"{digital_base}/model.safetensors", folder)
    for lost in ("layer.1.attention.self.query.lora_A.weight", "classifier.bias"):
        drop(tmp_path / "adapter" / "adapter_model.safetensors", lost)
        with pytest.raises(ValueError, match=f"adapter (lacks weights of|cannot be loaded).*{lost}"):
            load_model(tmp_path / "adapter")


def test_adapters_on_embeddings_that_lack_weights_are_refused(tmp_path):
    """PEFT saves the embeddings themselves beside these."""
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    LlamaForCausalLM(LlamaConfig(vocab_size=60, **shape)).save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, LoraConfig(target_modules=["q_proj", "embed_tokens"])).save_pretrained(tmp_path / "adapter")
    load_model(tmp_path / "adapter")
    place, lost = tmp_path / "adapter" / "adapter_model.safetensors", "q_proj.lora_A.weight"
    tensors = load_file(place)
    assert any("embed_tokens.base_layer" in key for key in tensors)
    save_file({key: t for key, t in tensors.items() if not key.endswith(lost)}, place, {"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks weights of PeftModel.*{lost}"):
        load_model(tmp_path / "adapter")


def test_adapters_with_a_head_of_another_task_than_their_base_s(tmp_path):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    RobertaForMaskedLM(RobertaConfig(vocab_size=60, **shape)).save_pretrained(tmp_path / "base")
    inputs = torch.arange(4, 12)[None]
    for task in ("SEQ_CLS", None):
        base = RobertaForSequenceClassification.from_pretrained(tmp_path / "base")
        config = LoraConfig(target_modules=["query"], task_type=task, modules_to_save=["classifier"])
        model = get_peft_model(base, config).eval()
        model.save_pretrained(tmp_path / "adapter")
        again = load_model(tmp_path / "adapter").eval()
        torch.testing.assert_close(again(inputs)[0], model(inputs)[0])


def test_adapters_go_where_their_weights_fit(tmp_path):
    """Whatever their task's class is; where they fit nowhere they are refused."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    whole = RobertaForMaskedLM(RobertaConfig(vocab_size=60, **shape))
    whole.save_pretrained(tmp_path / "base")
    inputs = torch.arange(4, 12)[None]
    for cls in (RobertaForMaskedLM, RobertaModel):
        options = {} if cls is RobertaForMaskedLM else {"add_pooling_layer": False}
        base = cls.from_pretrained(tmp_path / "base", **options)
        config = LoraConfig(target_modules=["query"], task_type="FEATURE_EXTRACTION", init_lora_weights=False)
        model = get_peft_model(base, config).eval()
        model.save_pretrained(tmp_path / "adapter")
        again = load_model(tmp_path / "adapter").eval()
        assert type(again.get_base_model()) is cls
        torch.testing.assert_close(again(inputs)[0], model(inputs)[0])
    place = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = {key.replace("encoder", "decoder"): t for key, t in load_file(place).items()}
    save_file(tensors, place, {"format": "pt"})
    with pytest.raises(ValueError, match=r"adapter holds weights that have no place beside a Roberta.*decoder"):
        load_model(tmp_path / "adapter")


def test_a_digital_model_with_adapters_is_saved_as_by_peft(digital_base, tmp_path):
    model = get_peft_model(BertForSequenceClassification.from_pretrained(digital_base), LoraConfig())
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "crossbars.safetensors").exists()


@pytest.mark.parametrize("older", [False, True])
def test_adapters_are_not_resumed_on_other_hardware(digital_base, tmp_path, older):
    """A checkpoint of adapters has no config.json."""
    batch = bert_batch(16)
    data = [{key: value[i] for key, value in batch.items()} for i in range(16)]
    for device in ("hfox-neurram", "cmo-hfox-ibm"):
        model = with_lora(digital_base)
        args = TrainingArguments(
            tmp_path / "out", max_steps=2, save_steps=1, use_cpu=True, report_to=[], disable_tqdm=True
        )
        trainer = ReRAMTrainer(model, args, train_dataset=data, reram_config=ReRAMConfig(device=device))
        if device == "hfox-neurram":
            trainer.train()
            assert not (tmp_path / "out" / "checkpoint-1" / "config.json").exists()
    if older:
        (tmp_path / "out" / "checkpoint-1" / "hf_reram.json").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-1 was calibrated with another device"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))


def test_a_foreign_file_beside_adapters_is_a_clear_error(digital_base, tmp_path):
    model = get_peft_model(BertForSequenceClassification.from_pretrained(digital_base), LoraConfig())
    model.save_pretrained(tmp_path / "adapter")
    save_file({"a": torch.zeros(1)}, tmp_path / "adapter" / "crossbars.safetensors")
    with pytest.raises(ValueError, match="safetensors holds no crossbars of hf_reram"):
        load_model(tmp_path / "adapter")


def test_digests_tell_which_adapter_is_in_use(base, tmp_path):
    lora = LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)
    model, batch = get_peft_model(BertForSequenceClassification.from_pretrained(base), lora).eval(), bert_batch()
    single = model_digest(model)
    with model.disable_adapter():
        assert model_digest(model) != single
    assert model_digest(model) == single
    model.add_adapter("other", lora)
    score = partial(evaluate_robustness, evaluate=lambda m: float(logits(m, batch, False).sum()), progress=False)
    options = {"times": ["1d"], "seeds": 1, "resume": tmp_path / "runs"}
    report = score(model, **options)
    assert report_of(model) is report
    digests = {model_digest(model)}
    model.set_adapter("other")
    digests.add(model_digest(model))
    assert report_of(model) is None
    with pytest.raises(ValueError, match="holds runs of other weights"):
        score(model, **options)
    model.base_model.set_adapter(["default", "other"])
    digests.add(model_digest(model))
    with model.disable_adapter():
        digests.add(model_digest(model))
    assert len(digests) == 4
    model.set_adapter("default")
    assert score(model, **options).measurements == report.measurements


def test_a_report_is_of_its_adapters_scale(base, tmp_path):
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=["query"], init_lora_weights=False)
    model, batch = get_peft_model(BertForSequenceClassification.from_pretrained(base), lora).eval(), bert_batch()
    report = evaluate_robustness(model, lambda m: float(logits(m, batch, False).sum()), ["1d"], seeds=1, progress=False)
    model.save_pretrained(tmp_path)
    report.to_json(tmp_path / "robustness.json")
    assert report_of(load_model(tmp_path)) is not None
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 40}))
    assert report_of(load_model(tmp_path)) is None


def test_figures_beside_adapters_are_held_against_the_state_that_is_saved(base, tmp_path):
    model, batch = with_lora(base).eval(), bert_batch()
    report = evaluate_robustness(model, lambda m: float(logits(m, batch, False).sum()), ["1d"], seeds=1, progress=False)
    model.save_pretrained(tmp_path)
    report.to_json(tmp_path / "robustness.json")
    trained = ("lora_", "modules_to_save")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    mine = {name: tensor for name, tensor in state.items() if any(part in name for part in trained)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(1)
    theirs = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=mine)
    assert report_of(load_model(tmp_path)).measurements == report.measurements
    model.load_state_dict(mine, strict=False)
    model.save_pretrained(tmp_path, state_dict=theirs)
    assert not (tmp_path / "robustness.json").exists() and report_of(model) is report


def test_adapters_that_nothing_wraps_are_told_apart_too(base):
    model = BertForSequenceClassification.from_pretrained(base)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["query"]), model)
    before = model_digest(model)
    for enabled in (False, True):
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.enable_adapters(enabled)
        assert (model_digest(model) == before) == enabled


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({"bert.pooler.dense.weight": torch.zeros(16, 16)}), "no crossbar"),
        (lambda t: t.update({key: t[key] * torch.nan for key in list(t)[:1]}), "NaN or infinite"),
        (
            lambda t: t.update({k: t[k] + 99 for k in t if k.endswith("per_weight")}),
            "pairs_per_weight=100 .* from 1 to 64",
        ),
        (lambda t: t.pop(next(key for key in t if key.endswith("input_range"))), "lacks numbers"),
    ],
)
def test_what_a_strangers_crossbars_file_may_hold(tmp_path, change, message):
    """Numbers of crossbars alone, all of them, and finite."""
    torch.manual_seed(0)
    digital = tmp_path / "digital"
    tiny_bert().save_pretrained(digital)
    trained(str(digital), tmp_path, reram_config=ReRAMConfig()).save_model(tmp_path / "adapter")
    file = tmp_path / "adapter" / "crossbars.safetensors"
    with safe_open(file, "pt") as opened:
        about = opened.metadata()
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata=about)
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "adapter")
