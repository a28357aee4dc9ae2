"""Datasets: columns found by type, splits, decoding, and one clear sentence for what cannot be read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

datasets = pytest.importorskip("datasets")
from PIL import Image  # noqa: E402

from backsketch.train import TrainError, load_data  # noqa: E402

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"

pytestmark = pytest.mark.usefixtures("own_cache")


def pixels(seed: int, size: tuple[int, int] = (6, 5), channels: int = 3) -> np.ndarray:
    shape = (*size, channels) if channels > 1 else size
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def image_folder(
    root: Path, splits=("train", "test"), classes=("cat", "dog"), each: int = 3, **how
):
    for s, split in enumerate(splits):
        for c, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(each):
                array = pixels(100 * s + 10 * c + i, **how)
                Image.fromarray(array).save(root / split / name / f"{i}.png")
    return str(root)


def parquet(root: Path, columns: dict, features: dict, split: str = "train") -> str:
    root.mkdir(exist_ok=True)
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    table.to_parquet(root / f"{split}-00000-of-00001.parquet")
    return str(root)


def images(count: int, **how) -> list[Image.Image]:
    return [Image.fromarray(pixels(i, **how)) for i in range(count)]


def test_digits_come_with_a_held_out_split_without_overlap():
    data = load_data("digits")
    assert (data.num_train, len(data.test_labels), data.num_classes) == (1348, 449, 10)
    assert data.image_shape == (1, 8, 8)
    assert data.train_images.dtype == torch.uint8
    assert int(data.train_images.max()) == 240
    everything = torch.cat([data.train_images, data.test_images]).flatten(1)
    assert len(everything.unique(dim=0)) == len(everything)


def test_statistics_are_those_of_the_train_pixels():
    data = load_data("digits")
    mean, std = data.statistics()
    train = data.train_images.double()
    assert mean.item() == pytest.approx(train.mean().item())
    assert std.item() == pytest.approx(train.std(correction=0).item())


def test_image_folder_keeps_every_pixel_and_the_own_test_split(tmp_path):
    data = load_data(image_folder(tmp_path / "pets"))
    assert data.image_shape == (3, 6, 5)
    assert (data.num_train, len(data.test_labels), data.num_classes) == (6, 6, 2)
    assert data.test_split == "test"
    assert data.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    np.testing.assert_array_equal(data.train_images[0].permute(1, 2, 0).numpy(), pixels(0))
    np.testing.assert_array_equal(data.test_images[4].permute(1, 2, 0).numpy(), pixels(111))


def test_one_split_is_divided_the_same_way_every_time(tmp_path):
    folder = image_folder(tmp_path / "pets", splits=("train",), each=10)
    first, second = load_data(folder), load_data(folder)
    assert (first.num_train, len(first.test_labels)) == (15, 5)
    assert first.test_split == "held out, 25% of train"
    assert torch.equal(first.test_images, second.test_images)


def test_validation_serves_where_the_test_labels_are_withheld(tmp_path):
    features = {"pic": datasets.Image(), "kind": datasets.ClassLabel(names=["a", "b"])}
    for split, labels in (("train", [0, 1]), ("validation", [1, 0]), ("test", [-1, -1])):
        parquet(tmp_path / "d", {"pic": images(2), "kind": labels}, features, split)
    data = load_data(str(tmp_path / "d"))
    assert (data.test_split, data.test_labels.tolist()) == ("validation", [1, 0])


@pytest.mark.parametrize(
    ("feature", "values", "expected"),
    [
        (datasets.ClassLabel(names=["x", "y", "z"]), [2, 0, 0, 2], [2, 0, 0, 2]),
        (datasets.Value("int64"), [7, 3, 3, 7], [1, 0, 0, 1]),
        (datasets.Value("string"), ["b", "a", "a", "b"], [1, 0, 0, 1]),
    ],
)
def test_labels_of_any_type_become_classes(tmp_path, feature, values, expected):
    columns = {"extra": [1, 2, 3, 4], "photo": images(4), "label": values}
    features = {"extra": datasets.Value("int64"), "photo": datasets.Image(), "label": feature}
    folder = parquet(tmp_path / "d", columns, features)
    parquet(tmp_path / "d", columns, features, "test")
    data = load_data(folder)
    assert data.train_labels.tolist() == data.test_labels.tolist() == expected
    assert data.num_classes == (3 if isinstance(feature, datasets.ClassLabel) else 2)


def test_label_column_chooses_between_two(tmp_path):
    features = {
        "img": datasets.Image(),
        "fine": datasets.ClassLabel(names=list("abcd")),
        "coarse": datasets.ClassLabel(names=list("xy")),
    }
    columns = {"img": images(4), "fine": [0, 1, 2, 3], "coarse": [0, 0, 1, 1]}
    folder = parquet(tmp_path / "d", columns, features)
    assert load_data(folder).num_classes == 4
    assert load_data(folder, label_column="coarse").num_classes == 2
    with pytest.raises(TrainError, match="no column 'middle'; it has img, fine, coarse"):
        load_data(folder, label_column="middle")


def test_some_classes_keep_their_numbers():
    data = load_data("digits")
    some = data.of_classes([7, 2, 2])
    assert some.train_labels.unique().tolist() == some.test_labels.unique().tolist() == [2, 7]
    assert some.num_classes == 10
    kept = torch.isin(data.train_labels, torch.tensor([2, 7]))
    assert torch.equal(some.train_images, data.train_images[kept])
    assert data.of_classes(None) is data


@pytest.mark.parametrize("classes", [[3, 10], [-1], []], ids=str)
def test_classes_that_do_not_exist_are_refused(classes):
    with pytest.raises(TrainError, match=r"classes must be in 0..9 of digits, got"):
        load_data("digits").of_classes(classes)


def test_grey_stays_grey_and_mixed_becomes_colour(tmp_path):
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    grey = parquet(
        tmp_path / "g", {"image": images(4, channels=1), "label": [0, 1, 0, 1]}, features
    )
    assert load_data(grey).image_shape == (1, 6, 5)
    mixed = [*images(3, channels=1), *images(1)]
    for split in ("train", "test"):
        parquet(tmp_path / "m", {"image": mixed, "label": [0, 1, 0, 1]}, features, split)
    data = load_data(str(tmp_path / "m"))
    assert data.image_shape == (3, 6, 5)
    assert torch.equal(data.train_images[0, 0], data.train_images[0, 2])
    np.testing.assert_array_equal(data.train_images[0, 0].numpy(), pixels(0, channels=1))
    np.testing.assert_array_equal(data.train_images[3].permute(1, 2, 0).numpy(), pixels(0))


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / "d" / split / name).mkdir(parents=True)
            deep = (pixels(0, channels=1).astype(np.uint16) << 8) + 7
            Image.fromarray(deep).save(tmp_path / "d" / split / name / "0.png")
    data = load_data(str(tmp_path / "d"))
    np.testing.assert_array_equal(data.train_images[0, 0].numpy(), pixels(0, channels=1))


def test_images_of_several_sizes_need_a_size(tmp_path):
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    several = [*images(2, size=(6, 5)), *images(2, size=(9, 12))]
    folder = parquet(tmp_path / "d", {"image": several, "label": [0, 1, 0, 1]}, features)
    with pytest.raises(TrainError, match=r"several sizes .* give --image-size"):
        load_data(folder)
    assert load_data(folder, image_size=8).image_shape == (3, 8, 8)


def test_limit_is_a_seeded_subset_of_the_train_split_only():
    data = load_data("digits")
    small = data.limited(100)
    assert (small.num_train, len(small.test_labels)) == (100, 449)
    assert torch.equal(small.train_images, data.limited(100).train_images)
    assert data.limited(None) is data
    with pytest.raises(TrainError, match=r"must be in 1..1348, got 0"):
        data.limited(0)


def _no_images(root: Path) -> str:
    root.mkdir()
    (root / "words.txt").write_text("hello\n")
    return str(root)


def _no_labels(root: Path) -> str:
    root.mkdir()
    for i, image in enumerate(images(3)):
        image.save(root / f"{i}.png")
    return str(root)


def _empty(root: Path) -> str:
    root.mkdir()
    return str(root)


def _damaged(root: Path) -> str:
    folder = image_folder(root)
    (root / "train" / "cat" / "1.png").write_bytes(b"not an image")
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (str, "does not exist"),
        (_empty, "is empty"),
        (_no_images, "has no images: its columns are text"),
        (_no_labels, "images but no labels.*one subfolder per class"),
        (_damaged, "cannot be decoded"),
    ],
)
def test_what_cannot_be_read_is_one_clear_sentence(tmp_path, make, message):
    with pytest.raises(TrainError, match=message) as caught:
        load_data(make(tmp_path / "data"))
    assert "\n" not in str(caught.value)


def test_unknown_name_says_where_it_was_looked_for():
    with pytest.raises(
        TrainError, match="as a folder here or on the hub, the dataset no-such-data"
    ):
        load_data("no-such-data")


@pytest.mark.parametrize(
    ("name", "count", "shape"), [("mnist", 60000, (1, 28, 28)), ("cifar10", 50000, (3, 32, 32))]
)
def test_public_datasets_in_their_hub_layout(name, count, shape):
    if not (SHARED / name).is_dir():
        pytest.skip(f"needs the dataset at {SHARED / name}")
    data = load_data(str(SHARED / name))
    assert (data.num_train, len(data.test_labels), data.num_classes) == (count, 10000, 10)
    assert data.image_shape == shape
    assert data.test_split == "test"
