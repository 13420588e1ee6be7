import io
from types import SimpleNamespace

import pytest
import torch
from PIL import Image as Pillow
from torch import nn

pytest.importorskip("torchvision")

from datasets import Dataset, Features, Image, Value

from hf_reram.evaluation.content import part_of
from hf_reram.tasks.image_classification import (
    ImageClassification,
    ImageDataset,
    MixUp,
    check_labels,
    find_columns,
    image_transforms,
    processor_transforms,
)
from tests.samples import images as image_sample


class Colours(nn.Module):
    """Tells the sample's colours apart by distance of the mean pixel."""

    def __init__(self, transform, classes: int = 4):
        super().__init__()
        flat = [Pillow.new("RGB", (40, 40), colour) for colour in list(image_sample.COLOURS.values())[:classes]]
        self.means = nn.Parameter(torch.stack([transform(image).mean((1, 2)) for image in flat]))

    def forward(self, pixel_values):
        means = pixel_values.mean((2, 3))
        return SimpleNamespace(logits=-torch.cdist(means, self.means))


def named(names):
    return SimpleNamespace(config=SimpleNamespace(id2label=dict(enumerate(names))))


@pytest.mark.parametrize("name", ["square", "crop"])
def test_accuracy_of_a_known_classifier(name):
    augmented, plain = processor_transforms(image_sample.processors()[name])
    data = image_sample.dataset(18)
    evaluate = ImageClassification(data, plain, batch_size=5)
    model = Colours(plain).train()
    model.frozen = nn.Dropout().eval()
    assert evaluate(model) == {"accuracy": 100.0} == evaluate(model)
    assert model.training and not model.frozen.training  # each part its own mode again
    wrong = data.remove_columns("label").add_column("label", [(k + (i < 9)) % 4 for i, k in enumerate(data["label"])])
    assert ImageClassification(wrong, plain)(model) == {"accuracy": 50.0}
    assert augmented(data[0]["image"]).shape == plain(data[0]["image"]).shape == (3, 32, 32)
    assert Colours(augmented)(augmented(data[1]["image"])[None]).logits.argmax() == 1


def test_what_changes_no_figure_makes_no_other_evaluation():
    plain = processor_transforms(image_sample.processors()["square"])[1]

    def content(count: int = 8, used: bool = False, **options) -> str:
        evaluate = ImageClassification(image_sample.dataset(count), plain, **options)
        if used:
            evaluate(Colours(plain))
        return part_of("evaluation", evaluate)

    assert content() == content(workers=2) == content(used=True) == content(batch_size=5)
    assert content() != content(count=9)


def test_top5_counts_the_five_best():
    class Ranked(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(()))

        def forward(self, pixel_values):
            return SimpleNamespace(logits=-torch.arange(8.0).repeat(len(pixel_values), 1))

    data = image_sample.dataset(8).remove_columns("label").add_column("label", list(range(8)))
    _, plain = processor_transforms(image_sample.processors()["square"])
    assert ImageClassification(data, plain)(Ranked()) == {"accuracy": 12.5, "top5_accuracy": 62.5}


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "I;16"])
def test_every_kind_of_image_becomes_three_channels(mode):
    _, plain = processor_transforms(image_sample.processors()["square"])
    image = Pillow.new(mode, (50, 30))
    data = [{"image": image, "label": 0}]
    assert ImageDataset(data, plain)[0]["pixel_values"].shape == (3, 32, 32)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"no image at all", lambda b: b""])
def test_a_broken_image_is_named(damage):
    file = io.BytesIO()
    image_sample.picture(0, 0, 200).save(file, "JPEG")
    rows = {"image": [{"bytes": damage(file.getvalue()), "path": "a.jpg"}], "label": [0]}
    data = Dataset.from_dict(rows, features=Features({"image": Image(), "label": Value("int64")}))
    _, plain = processor_transforms(image_sample.processors()["square"])
    with pytest.raises(ValueError, match="image 0 cannot be decoded"):
        ImageDataset(data, plain)[0]


def test_columns_and_labels_are_checked(caplog):
    data = image_sample.dataset(16)
    assert find_columns(data) == ("image", "label")
    assert find_columns(data.rename_columns({"image": "img", "label": "fine_label"})) == ("img", "fine_label")
    assert find_columns(data.remove_columns("label"), labels=False) == ("image", None)
    for bad, message in (
        (data.remove_columns("image"), "missing is an image column"),
        (data.remove_columns("label"), "missing is labels"),
        (data.select([]), "is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            find_columns(bad, "it")
    four, ten = (named(f"LABEL_{i}" for i in range(n)) for n in (4, 10))
    assert check_labels(data, four) == {i: i for i in range(4)}
    assert "no image" not in caplog.text
    check_labels(data.select([0, 1, 4, 5]), four)
    assert "no image of 2 of the 4 classes" in caplog.text
    with pytest.raises(ValueError, match="4 classes and the model 10"):
        check_labels(data, ten)
    with pytest.raises(ValueError, match=r"labels \[4\]: allowed are 0 to 3"):
        check_labels(data.remove_columns("label").add_column("label", [4] * 16), four)


def test_images_are_of_the_models_classes_by_name():
    _, plain = processor_transforms(image_sample.processors()["square"])
    data, right = image_sample.dataset(8), Colours(plain)
    turned = nn.Module()  # whose classes are in another order
    turned.p, turned.forward = (
        right.means,
        lambda pixel_values: SimpleNamespace(logits=right(pixel_values).logits[:, [2, 0, 3, 1]]),
    )
    classes = check_labels(data, named(["Blue", "RED", "grey ", "green"]))
    assert classes == {0: 1, 1: 3, 2: 0, 3: 2}
    assert ImageClassification(data, plain)(turned)["accuracy"] == 0
    assert ImageClassification(data, plain, classes=classes)(turned) == {"accuracy": 100}
    texts = data.cast_column("label", Value("int64")).map(
        lambda row: {"label": list(image_sample.COLOURS)[row["label"]]}
    )
    found = check_labels(texts, named(["Blue", "RED", "grey ", "green"]))
    assert found == {"red": 1, "green": 3, "blue": 0, "grey": 2}
    assert ImageClassification(texts, plain, classes=found)(turned) == {"accuracy": 100}
    with pytest.raises(
        ValueError, match=r"labels \['grey'\] among its .*'grey', 'red'\]: allowed .* \['blue', .*'violet'\]"
    ):
        check_labels(data, named(["violet", "red", "green", "blue"]))
    told = {"grey": "violet"}
    assert check_labels(data, named(["violet", "red", "green", "blue"]), label_names=told) == {0: 1, 1: 2, 2: 3, 3: 0}


def test_transforms_come_from_where_the_model_does(tmp_path):
    model = image_sample.save_model(tmp_path)
    _, plain = image_transforms(model, str(tmp_path))
    assert plain(image_sample.picture(0, 0)).shape == (3, 32, 32)
    _, sized = image_transforms(model, None, 24)
    assert sized(image_sample.picture(0, 0)).shape == (3, 24, 24)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="has no image processor"):
        image_transforms(model, str(tmp_path))


def test_timm_says_how_to_preprocess():
    pytest.importorskip("timm")
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    config = TimmWrapperConfig(architecture="mobilenetv3_small_050", num_labels=4)
    model = TimmWrapperForImageClassification(config)
    augmented, plain = image_transforms(model, None, 64)
    assert augmented(image_sample.picture(0, 0)).shape == plain(image_sample.picture(0, 0)).shape == (3, 64, 64)


def test_mixed_images_are_between_two_and_come_without_labels():
    rows = [{"image": Pillow.new("RGB", (4, 4), (v, v, v)), "label": 0} for v in (0, 255)]
    images = ImageDataset(
        rows, lambda image: torch.tensor(float(image.getpixel((0, 0))[0])).expand(3, 2, 2), label=None
    )
    mixed = MixUp(images, 1.0)
    values = torch.stack([mixed[i % 2]["pixel_values"][0, 0, 0] for i in range(400)])
    assert len(mixed) == 2 and mixed[0].keys() == {"pixel_values"}
    assert values.min() >= 0 and values.max() <= 255
    # Half of them mix an image with itself, and the others are uniform over the range.
    between = values[(values > 0) & (values < 255)]
    assert 130 < len(between) < 270 and abs(float(between.mean()) - 127.5) < 20
    with pytest.raises(ValueError, match="mixup=0"):
        MixUp(images, 0.0)
    with pytest.raises(ValueError, match="a teacher alone"):
        MixUp(ImageDataset(rows, lambda image: torch.zeros(3, 2, 2)), 1.0)
