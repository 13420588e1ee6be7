import json
from pathlib import Path

from datasets import Dataset

from tests.samples import squad as squad_sample

RECIPE = Path(__file__).parents[2] / "recipes" / "new_head.py"


def test_it_compares_the_plain_trainer_with_crossbars_and_chips(python, tmp_path):
    files = squad_sample.write(tmp_path)
    words = [f"{word} {rest}" for word in ("what", "who", "when", "how") for rest in ("is it", "was this", "did he")]
    Dataset.from_dict({"question": words}).to_parquet(tmp_path / "questions.parquet")
    questions = str(tmp_path / "questions.parquet")
    command = [str(RECIPE), "--model_name_or_path", files["--model_name_or_path"], "--train_file", questions]
    command += [
        "--validation_file",
        questions,
        "--examples",
        "16",
        "--batch_size",
        "4",
        "--epochs",
        "1",
        "--chips",
        "2",
    ]
    for flags, keys in (([], 4), (["--plain", "False", "--digital_epochs", "1"], 3)):
        done = python.run(*command, *flags)
        assert done.returncode == 0, done.stderr[-3000:]
        found = json.loads(done.stdout.splitlines()[-1])
        assert len(found) == keys and {"ideal crossbar", "chips after 1d", "± over chips"} <= found.keys()
        assert all(0 < found[name] < 5 for name in found if name != "± over chips")
