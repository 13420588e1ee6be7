import json

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from hf_reram import ReRAMConfig, RobustnessReport, calibrate, crossbar_layers, patch_model
from hf_reram.cli import app
from hf_reram.cli.model import patched
from hf_reram.cli.output import console
from hf_reram.evaluation.report import Measurement
from hf_reram.hub.load import load_model
from hf_reram.model.find import crossbar_state
from hf_reram.tasks.flags import mapping_flags
from hf_reram.version import __version__
from tests.samples import images as image_sample
from tests.samples.experts import mixtral
from tests.samples.models import bert_batch, tiny_bert
from tests.samples.texts import WORDS, save_model


def test_version_and_help(python):
    assert __version__ in CliRunner().invoke(app, ["--version"]).output
    assert "demo" in CliRunner().invoke(app, ["--help"]).output
    assert python.run("-m", "hf_reram", "--version").stdout.strip() == __version__


def test_eval_and_inspect_of_a_plain_checkpoint(tmp_path):
    image_sample.save_model(tmp_path / "base")
    image_sample.dataset(16).to_parquet(tmp_path / "images.parquet")
    command = ["eval", str(tmp_path / "base"), "--dataset", str(tmp_path / "images.parquet"), "--chips", "2"]
    command += ["--times", "1s,10y", "--temperature", "300", "--temperature", "360", "--output", str(tmp_path / "out")]
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 1
    done = CliRunner().invoke(app, [*command, "--device", "cmo-hfox-ibm", "--redundancy", "0.1", "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out" / "robustness.json").read_text())
    assert report["config"]["redundancy"] == 0.1 and report["config"]["retention_times"] == ["1s", "10y"]
    assert len(report["measurements"]) == 8 and report["notes"][-1] == "calibrated on the evaluated inputs"
    assert (tmp_path / "out" / "robustness.png").stat().st_size > 1000
    assert "| accuracy | 360 K |" in (tmp_path / "out" / "robustness.md").read_text()
    shown = CliRunner().invoke(
        app, ["inspect", str(tmp_path / "base"), "--device", "cmo-hfox-ibm", "--json", "--top", "3"]
    )
    assert len(json.loads(shown.stdout)["layers"]) == 3


def test_numbers_of_crossbars_without_their_config_are_no_plain_checkpoint(tmp_path):
    """Parts that have no config of their own, as an encoder inside a model, were patched for a device each."""
    model = tiny_bert()
    patch_model(model.bert.encoder, ReRAMConfig(device="hfox-neurram"))
    patch_model(model.bert.pooler, ReRAMConfig(device="cmo-hfox-ibm"))
    calibrate(model, [bert_batch()])
    model.save_pretrained(tmp_path)
    for device in ([], ["--device", "generic"]):
        done = CliRunner().invoke(app, ["inspect", str(tmp_path), *device])
        assert done.exit_code == 1 and "parts without a config of their own were patched by themselves" in done.stderr


@pytest.mark.parametrize(("kind", "shown"), [("static", None), ("learned", "learned"), ("per_token", "per token")])
def test_inspect_says_which_kind_of_range_a_layer_has(tmp_path, monkeypatch, kind, shown):
    monkeypatch.setattr(console, "width", 400)
    model = patch_model(image_sample.save_model(tmp_path), ReRAMConfig(input_range=kind))
    batch = torch.randn(4, 3, 32, 32)
    calibrate(model, [batch]).save_pretrained(tmp_path)
    command = ["inspect", str(tmp_path), "--top", "2"]
    layers = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)["layers"]
    assert [layer["range_kind"] for layer in layers] == [kind] * 2
    assert all((layer["input_range"] is None) == (kind == "per_token") for layer in layers)
    table = CliRunner().invoke(app, command).stdout
    ranges = "" if kind == "per_token" else f"{layers[0]['input_range']:.3g}"
    assert f"{ranges} {shown or ''}".strip() in table and ("input range per token)" in table) == (kind == "per_token")
    assert ("learned" in table) == (kind == "learned")


def test_inspect_says_what_is_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(console, "width", 400)
    image_sample.save_model(tmp_path)
    command = ["inspect", str(tmp_path), "--top", "1", "--device", "rram-levy-c", "--time"]
    told = "retention at 3.15576e+08 s, 298.15 K is extrapolated beyond what was measured"
    assert told in CliRunner().invoke(app, [*command, "10y"]).stdout
    assert json.loads(CliRunner().invoke(app, [*command, "10y", "--json"]).stdout)["unmeasured"] == [told]
    assert json.loads(CliRunner().invoke(app, [*command, "1s", "--json"]).stdout)["unmeasured"] == []


@pytest.mark.parametrize("change", ["processor", "labels"])
def test_an_evaluation_with_another_preprocessing_or_config_is_another(tmp_path, change):
    base = image_sample.save_model(tmp_path / "base")
    image_sample.dataset(8).to_parquet(tmp_path / "images.parquet")
    command = ["eval", str(tmp_path / "base"), "--dataset", str(tmp_path / "images.parquet"), "--chips", "1", "--json"]
    command += ["--times", "1d", "--output", str(tmp_path / "out"), "--device", "cmo-hfox-ibm"]

    def logs():
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
        return len(list((tmp_path / "out").glob("chips-*.jsonl")))

    assert (logs(), logs()) == (1, 1)  # the second one reads what the first has done
    if change == "processor":  # the model sees other pixels
        image_sample.ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.1] * 3).save_pretrained(
            tmp_path / "base"
        )
    else:
        base.config.id2label = dict(enumerate(image_sample.COLOURS))
        base.config.save_pretrained(tmp_path / "base")
    assert logs() == 2


def test_an_evaluation_in_other_batches_is_another(tmp_path):
    """Read noise is drawn for each."""
    model = patch_model(image_sample.save_model(tmp_path / "base"), ReRAMConfig(device="cmo-hfox-ibm"))
    calibrate(model, [torch.randn(4, 3, 32, 32)]).save_pretrained(tmp_path / "base")
    image_sample.dataset(8).to_parquet(tmp_path / "images.parquet")
    command = ["eval", str(tmp_path / "base"), "--dataset", str(tmp_path / "images.parquet"), "--chips", "1"]
    command += ["--times", "1d", "--output", str(tmp_path / "out")]
    for size, logs in ((4, 1), (4, 1), (8, 2)):
        assert CliRunner().invoke(app, [*command, "--batch-size", str(size)]).exit_code == 0
        assert len(list((tmp_path / "out").glob("chips-*.jsonl"))) == logs


@pytest.mark.parametrize(
    "command",
    [
        ["eval", "{}", "--dataset", "{}/nothing.parquet", "--device", "cmo-hfox-ibm"],
        ["eval", "{}", "--dataset", "{}", "--device", "no-such-cell"],
        ["eval", "{}", "--dataset", "{}/images.parquet", "--times", ","],
        ["eval", "{}", "--dataset", "{}/images.parquet", "--lm-eval", " "],
        ["eval", "{}", "--lm-eval", "arc_easy", "--split", "train"],
        ["inspect", "{}", "--split", "train"],
        ["inspect", "{}/nowhere"],
        ["inspect", "{}", "--device", "cmo-hfox-ibm", "--time", "soon"],
        ["card", "{}/nowhere"],
        ["card", "{}"],
        ["push", "{}", "me/model"],
    ],
    ids=lambda command: " ".join(command),
)
def test_what_cannot_be_done_is_one_line_and_exit_code_1(tmp_path, command, capfd):
    image_sample.save_model(tmp_path)
    done = CliRunner().invoke(app, [part.replace("{}", str(tmp_path)) for part in command])
    assert done.exit_code == 1
    assert capfd.readouterr().err.startswith("error: ") or "error: " in done.output


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("eval x --chips 0", "eval: --chips 0: allowed is an integer from 1"),
        ("eval x --samples=0", "eval: --samples 0: allowed is an integer from 1"),
        ("eval x --chips 3 --batch-size 0", "eval: --batch-size 0: allowed is an integer from 1"),
        ("eval x --redundancy 9", "eval: --redundancy 9: allowed is a number from 0 to 4"),
        ("eval x --seed x", "eval: --seed x: allowed is an integer from 0"),
        ("eval x --seed 1 --seed -1", "eval: --seed -1: allowed is an integer from 0"),
        ("inspect x --top 0", "inspect: --top 0: allowed is an integer from 1"),
        ("demo --chips 1", "demo: --chips 1: allowed is an integer from 2"),
        ("eval", "eval: Missing argument 'MODEL'."),
        ("push x", "push: Missing argument 'REPO'."),
        ("eval x y", "eval: Got unexpected extra argument (y)"),
        ("eval x --chips", "eval: Option '--chips' requires an argument."),
        ("eval x --chip 3", "eval: No such option: --chip"),
        ("nothing", ": No such command 'nothing'."),
        ("--nothing", ": No such option: --nothing"),
    ],
)
def test_a_usage_error_is_one_line(command, told):
    done = CliRunner().invoke(app, command.split())
    (line,) = done.stderr.splitlines()
    assert done.exit_code == 2 and not done.stdout
    plain = line.lower().replace("argument(s)", "argument")  # as versions of typer have it
    assert plain.startswith(f"hf-reram{'' if told[0] == ':' else ' '}{told}".lower())


def test_help_is_no_usage_error():
    for command, exit_code in (([], 2), (["--help"], 0), (["eval", "--help"], 0)):
        done = CliRunner().invoke(app, command)
        assert done.exit_code == exit_code and "Usage:" in done.output and len(done.output.splitlines()) > 9


def test_no_package_and_no_place_is_one_line(python, tmp_path):
    """Each command without what it needs, in a process: one line on stderr, no traceback."""
    image_sample.save_model(tmp_path / "base")
    image_sample.dataset(8).to_parquet(tmp_path / "images.parquet")
    (tmp_path / "file").write_text("")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text("3")
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "config.json").write_text(json.dumps({"architecture": "resnet10t", "num_classes": 4}))
    blocked = "import sys; sys.modules[{!r}] = None; from hf_reram.cli import main; main()"
    images, out = str(tmp_path / "images.parquet"), ["--output", str(tmp_path / "out"), "--device", "cmo-hfox-ibm"]
    base = str(tmp_path / "base")
    for package, command, message in [
        ("sklearn", ["demo", str(tmp_path / "demo")], "pip install 'hf_reram[demo]'"),
        ("torchvision", ["eval", base, "--dataset", images, *out], "pip install 'hf_reram[vision]'"),
        ("timm", ["inspect", str(tmp_path / "timm")], "pip install 'hf_reram[vision]'"),
        ("nothing", ["demo", str(tmp_path / "file")], "no folder that can be written to"),
        ("nothing", ["eval", base, "--dataset", images, "--output", str(tmp_path / "file")], "can be written to"),
        ("nothing", ["eval", base, "--dataset", str(tmp_path / "file"), *out], ".parquet, .json"),
        ("nothing", ["inspect", str(tmp_path / "foreign")], "cannot be loaded"),
    ]:
        done = python.run("-c", blocked.format(package), *command)
        assert done.returncode == 1, (command, done.stderr)
        lines = done.stderr.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], (command, done.stderr)


def test_what_is_not_there_or_has_no_effect_is_named(tmp_path):
    base, images = tmp_path / "base", tmp_path / "images.parquet"
    image_sample.save_model(base)
    image_sample.dataset(8).to_parquet(images)
    more = ["--device", "generic", "--output", str(tmp_path / "out")]
    for command, told in [
        (["eval", "o/none", "--dataset", str(images), *more], "error: o/none is no folder, and on the Hub"),
        (["inspect", "o/none"], "error: o/none is no folder, and on the Hub"),
        (["inspect", str(tmp_path / "none")], f"error: {tmp_path / 'none'} is no folder"),
        (
            ["eval", str(base), "--dataset", str(images), "--split", "nosuch", *more],
            f"error: split='nosuch' of {images}: ",
        ),
        (["eval", str(base), "--dataset", str(images), "--times", ",", *more], "error: --times ,: allowed are words"),
    ]:
        done = CliRunner().invoke(app, command)
        (line,) = done.stderr.splitlines()
        assert done.exit_code == 1 and line.startswith(told)


def test_any_error_of_a_command_is_one_line(monkeypatch, capfd):
    from hf_reram.cli import output

    @output.reported
    def command():
        raise RuntimeError("two\nlines [/x]")

    with pytest.raises(typer.Exit):
        command()
    assert capfd.readouterr().err == "error: RuntimeError: two lines [/x]\n"
    monkeypatch.setenv(output.TRACEBACK, "1")
    with pytest.raises(RuntimeError):
        command()


def test_a_strangers_device_name_is_on_one_line(tmp_path):
    model = patch_model(image_sample.save_model(tmp_path / "model"), ReRAMConfig())
    calibrate(model, [torch.randn(4, 3, 32, 32)]).save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    data = json.loads(file.read_text())
    data["quantization_config"]["device"]["name"] = "two\nlines\x1b[2J"
    file.write_text(json.dumps(data))
    image_sample.dataset(8).to_parquet(tmp_path / "images.parquet")
    more = ["--dataset", str(tmp_path / "images.parquet"), "--output", str(tmp_path / "out"), "--chips", "1"]
    for command in (["inspect"], ["eval", *more, "--times", "1s"]):
        done = CliRunner().invoke(app, [command[0], str(tmp_path / "model"), *command[1:]])
        assert done.exit_code == 0, done.output
        (line,) = [line for line in done.stdout.splitlines() if "crossbar layers on" in line]
        assert "crossbar layers on two lines[2J (" in line and "\x1b[2J" not in done.stdout


@pytest.mark.parametrize("command", [["card"], ["push"]])
def test_a_malformed_report_is_one_line(tmp_path, python, command):
    model = patch_model(image_sample.save_model(tmp_path), ReRAMConfig())
    calibrate(model, [torch.randn(4, 3, 32, 32)]).save_pretrained(tmp_path)
    (tmp_path / "robustness.json").write_text('{"measurements": 3}')
    done = python.run("-m", "hf_reram", *command, str(tmp_path), *(["me/x"] if command == ["push"] else []))
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 1 and line.startswith("error: ") and "is no robustness report: missing are" in line


def test_commands_show_no_warnings_of_other_packages():
    import warnings

    from hf_reram.cli import output

    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        for category in (UserWarning, FutureWarning, RuntimeWarning):
            output.reported(lambda category=category: warnings.warn(category.__name__, category, stacklevel=1))()
    assert [warning.category for warning in shown] == [RuntimeWarning]


def test_names_are_no_markup(capsys):
    from hf_reram.cli import output

    output.say("a [/b] [red]c")
    output.show_table("[/t]", ["[red]x", "y"], [["[/r]", "1"]])
    shown = capsys.readouterr().out
    assert "a [/b] [red]c" in shown and "[/t]" in shown and "[/r]" in shown


def test_a_table_of_a_single_chip_shows_no_spread_and_counts_each_time(capsys):
    from hf_reram.cli.evaluate import _show

    chips = [
        Measurement(t, None, s, {"f1": 50.0 + s} | ({"em": 1.0} if t < 2 else {})) for t in (1.0, 9.0) for s in (0, 1)
    ]
    _show(RobustnessReport(chips, {"f1": 60.0}, {"f1": 55.0}), "em")
    shown = capsys.readouterr().out
    assert "over none: after" in shown.replace("\n", " ") and "1.000 ± 0.000" in shown and "nan" not in shown
    _show(RobustnessReport(chips[::2], {"f1": 60.0}, {"f1": 55.0}), "f1")
    shown = capsys.readouterr().out
    assert "of a single chip" in shown and "±" not in shown.split("95 %")[1].split("mean")[-1]


@pytest.fixture(scope="module")
def timm_folder(tmp_path_factory):
    """A checkpoint as timm has them on the Hub: its own config.json and names."""
    timm = pytest.importorskip("timm")
    folder = tmp_path_factory.mktemp("timm")
    model = timm.create_model("resnet10t", num_classes=4)
    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    seen = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "num_classes": 4, "classifier": "fc"}
    config = {"architecture": "resnet10t", "num_classes": 4, "num_features": 512, "pretrained_cfg": seen}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_experts_without_a_token_are_named_where_that_is_allowed(tmp_path):
    save_model(tmp_path / "base")  # for its tokenizer
    mixtral(experts=8, chosen=1, vocab_size=len(WORDS), max_position_embeddings=32).save_pretrained(tmp_path / "base")
    (tmp_path / "held.txt").write_text("the cell drifts .", encoding="utf-8")
    command = ["eval", str(tmp_path / "base"), "--dataset", str(tmp_path / "held.txt"), "--chips", "1", "--times", "1d"]
    command += ["--device", "cmo-hfox-ibm", "--output", str(tmp_path / "out")]
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 1 and "--allow-uncalled" in "".join(refused.output.split())
    done = CliRunner().invoke(app, [*command, "--allow-uncalled"])
    assert done.exit_code == 0, done.output
    silent = json.loads((tmp_path / "out" / "robustness.json").read_text())["uncalled"]
    assert len(silent) >= 2 * 3  # five tokens reach five experts at most
    assert "".join(silent[0].split()) in "".join(done.output.split())


def test_a_model_of_timm_is_evaluated(timm_folder, tmp_path):
    weights = load_file(timm_folder / "model.safetensors")
    image_sample.dataset(8).to_parquet(tmp_path / "images.parquet")
    command = ["--dataset", str(tmp_path / "images.parquet"), "--chips", "1", "--times", "1d", "--json"]
    command += ["--device", "cmo-hfox-ibm", "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(app, ["eval", str(timm_folder), *command])
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out" / "robustness.json").read_text())
    assert report["about"]["task"] == "image-classification" and len(report["measurements"]) == 1
    model = load_model(timm_folder)
    assert type(model).__name__ == "TimmWrapperForImageClassification" and model.config.num_labels == 4
    assert torch.equal(model.timm_model.fc.weight, weights["fc.weight"])
    again = tmp_path / "again"
    model.save_pretrained(again)
    assert torch.equal(load_model(again).timm_model.fc.weight, weights["fc.weight"])


def test_a_part_that_was_patched_alone_is_put_on_other_cells_alone(tmp_path):
    model = tiny_bert()
    patch_model(model.bert, ReRAMConfig(device="cmo-hfox-ibm"))
    calibrate(model, [bert_batch()]).save_pretrained(tmp_path)
    for device, options in [(None, {"range_shrink": 0.5}), (None, {"weight_clip": 3.0}), ("generic", {})]:
        found, fresh = patched(str(tmp_path), device, **options)
        assert fresh and len(crossbar_layers(found)) == 13 and type(found.classifier) is torch.nn.Linear
        config = crossbar_state(found).config
        assert config.device.name == (device or "cmo-hfox-ibm")
        assert {name: getattr(config, name) for name in options} == options
    assert not patched(str(tmp_path), "cmo-hfox-ibm")[1]


def test_an_explicit_default_counts_as_given(tmp_path):
    base = image_sample.save_model(tmp_path)
    given = {"range_shrink": 0.5, "weight_clip": 3.0, "redundancy": 0.1}
    patch_model(base, ReRAMConfig(device="cmo-hfox-ibm", **given))
    calibrate(base, [{"pixel_values": torch.randn(2, 3, 32, 32)}])
    base.save_pretrained(tmp_path)

    def config(*flags):
        model, fresh = patched(str(tmp_path), None, **mapping_flags(*flags))
        return crossbar_state(model).config, fresh

    kept, fresh = config()
    assert (kept.range_shrink, kept.weight_clip, kept.redundancy, fresh) == (0.5, 3.0, 0.1, False)
    assert not config("0.5", "3", 0.1)[1]
    for flags, field, value in [
        (("auto",), "range_shrink", "auto"),
        ((None, "auto"), "weight_clip", "auto"),
        ((None, "none"), "weight_clip", None),
        ((None, None, 0.0), "redundancy", 0.0),
    ]:
        found, fresh = config(*flags)
        assert getattr(found, field) == value and fresh
        others = {name: getattr(found, name) for name in given if name != field}
        assert others == {name: given[name] for name in given if name != field}
