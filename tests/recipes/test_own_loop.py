import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification

from hf_reram import RobustnessReport, crossbar_layers, report_of
from tests.samples import squad as squad_sample

RECIPE = Path(__file__).parents[2] / "recipes" / "own_loop.py"


def files(folder):
    base = squad_sample.write(folder)["--model_name_or_path"]
    texts = [f"where does {name} live" for name in squad_sample.PEOPLE] + [f"{p} is fine" for p in squad_sample.PLACES]
    rows = Dataset.from_dict({"text": texts * 2, "label": [0] * 6 + [1] * 6 + [0] * 6 + [1] * 6})
    rows.to_parquet(folder / "texts.parquet")
    given = {"model_name_or_path": base, "train_file": folder / "texts.parquet", "output_dir": folder / "out"}
    given |= {"validation_file": folder / "texts.parquet", "epochs": 4, "chips": 2, "learning_rate": 2e-2}
    return [text for name, value in given.items() for text in (f"--{name}", str(value))]


@pytest.mark.parametrize("processes", [1, 2])
def test_it_learns_on_crossbars_and_saves_them_with_their_report(python, tmp_path, processes):
    command = [str(RECIPE), *files(tmp_path), "--batch_size", str(2 // processes)]
    options = {"CUDA_VISIBLE_DEVICES": ""}  # run_two: as accelerate launch does
    done = [python.run(*command, **options)] if processes == 1 else python.run_two(*command, **options)
    for each in done:
        assert each.returncode == 0, each.stderr[-3000:]
    printed = "".join(each.stdout for each in done)  # by the first process alone
    losses = [float(found) for found in re.findall(r"step \d+ of 24: loss ([\d.]+), retention loss 0\.0[\d]+", printed)]
    assert len(losses) == 24 and losses[-1] < 0.3 * losses[0], printed
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert len(crossbar_layers(model)) == 8 and all(layer.calibrated for layer in crossbar_layers(model).values())
    for layer in crossbar_layers(model).values():
        assert (layer.weight.abs() <= layer.held_scale() * (1 + 1e-6)).all()
    report = RobustnessReport.from_json(tmp_path / "out" / "robustness.json")
    assert report_of(model).measurements == report.measurements and len(report.measurements) == 3 * 2
    assert report.statistic("accuracy", "1s").mean > 0.9
    assert torch.isfinite(model(torch.tensor([[2, 3]])).logits).all()
