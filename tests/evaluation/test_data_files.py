"""Data that are named by path are told by what is in their files."""

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hf_reram.evaluation.content import content_of, described
from hf_reram.tasks.image_classification import ImageClassification


def draw(file, value):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(file)
    return str(file)


def column(*files):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict({"image": list(files), "label": [0] * len(files)}, features)


def test_images_that_a_data_set_names_are_read(tmp_path):
    files = [draw(tmp_path / f"{i}.png", i) for i in range(3)]
    rows = column(*files)
    kinds = {
        "rows": lambda: content_of(rows),
        "selected": lambda: content_of(rows.select([2, 0])),
        "task": lambda: described(ImageClassification(rows, len)),  # however many it would keep
        "listed": lambda: content_of(
            datasets.Dataset.from_dict({"x": [files]}, datasets.Features({"x": datasets.List(datasets.Image())}))
        ),
        "texts": lambda: content_of(datasets.Dataset.from_dict({"file": files})),
    }
    before = {kind: make() for kind, make in kinds.items()}
    assert before == {kind: make() for kind, make in kinds.items()}
    some = content_of(rows.select([1]))
    draw(tmp_path / "0.png", 99)
    assert all(make() != before[kind] for kind, make in kinds.items())
    assert content_of(rows.select([1])) == some
    draw(tmp_path / "0.png", 0)
    assert before == {kind: make() for kind, make in kinds.items()}


def test_images_in_the_table_need_no_file(tmp_path):
    file = draw(tmp_path / "a.png", 1)
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").unlink()
    made = [content_of(column({"path": file, "bytes": bytes_})) for bytes_ in (data, data, data[:-1])]
    assert made[0] == made[1] != made[2]


@pytest.mark.parametrize(
    "path, why", [("gone.png", "cannot be read"), ("https://a.org/x.png", "file elsewhere, which may change: x.png")]
)
def test_files_that_cannot_be_read_here_are_refused(path, why):
    with pytest.raises(ValueError, match=f"say with key=.*{why}"):
        content_of(column(path))
    pinned = column("hf://datasets/me/data@" + "0123456789" * 4 + "/x.png")
    assert content_of(pinned) == content_of(pinned)


class Folder(torch.utils.data.Dataset):
    """Reads as it is asked for rows; ``names`` are of files in ``root``."""

    def __init__(self, root, names):
        self.root, self.names = root, names

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        return {"pixel_values": torch.from_numpy(np.asarray(Image.open(f"{self.root}/{self.names[index]}")).copy())}


@pytest.mark.parametrize("kind", ["paths", "root", "Path"])
def test_files_that_another_data_set_reads_count(tmp_path, kind):
    names = ["a.png", "b.png"]
    for name in names:
        draw(tmp_path / "data" / name, 1)
    made = {
        "paths": lambda: [(str(tmp_path / "data" / name), 0) for name in names],
        "root": lambda: Folder(str(tmp_path / "data"), names),
        "Path": lambda: Folder(tmp_path / "data", names),
    }[kind]
    before = content_of(made())
    assert content_of(made()) == before
    draw(tmp_path / "data" / "a.png", 2)
    assert content_of(made()) != before


def test_a_file_that_a_metric_names_counts(tmp_path):
    """Wherever its path stands."""
    file = tmp_path / "labels.txt"

    def ways():
        path = str(file)
        spaces = {"__name__": "__main__", "PATH": path}
        exec(f"def outer(x): return open(PATH).read()\ndef inner(x): return open({path!r}).read()", spaces)
        return [spaces["outer"], spaces["inner"], lambda x: open(path).read(), Folder(file, []), {"at": [file]}]

    file.write_text("a")
    before = [described(way) for way in ways()]
    assert before == [described(way) for way in ways()]
    file.write_text("b")
    assert all(one != other for one, other in zip(before, [described(way) for way in ways()], strict=True))
    file.write_text("a")
    assert before == [described(way) for way in ways()]


def test_words_are_no_folders(tmp_path, monkeypatch):
    """A text of the data is a path only where it looks like one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    rows = [{"word": "out"}, {"word": "~"}, {"word": "."}, {"word": "/"}]
    before = content_of(rows), content_of([{"folder": "./out"}]), content_of([Path("out")])
    assert before == (content_of(rows), content_of([{"folder": "./out"}]), content_of([Path("out")]))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "log.txt").write_text("a")
    after = content_of(rows), content_of([{"folder": "./out"}]), content_of([Path("out")])
    assert after[0] == before[0] and after[1] != before[1] and after[2] != before[2]
