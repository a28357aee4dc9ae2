"""Loading image-classification data: scikit-learn's digits, and what `datasets.load_dataset` reads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from backsketch.train.errors import TrainError
from backsketch.train.images import ImageData, held_out

if TYPE_CHECKING:
    import datasets as hf

CHUNK = 1000  # images that are decoded at a time
TEST_SPLITS = ("test", "validation", "valid", "val", "dev", "eval")
LABEL_NAMES = ("label", "labels", "class", "target")


def load_data(
    name: str, *, label_column: str | None = None, image_size: int | None = None
) -> ImageData:
    """Load a dataset by name, hub id or local folder.

    The image column is the one of feature type `Image`. The label column is `label_column`, else
    the first `ClassLabel`, else a column of whole numbers or text called label, labels, class or
    target. The test split is the dataset's own (a split without labels does not count), else 25 %
    held out with a fixed seed.

    Args:
        name: `"digits"`, or what `datasets.load_dataset` takes.
        label_column: which column holds the classes, where the choice above is not the wanted one.
        image_size: resize and centre-crop to this many pixels square.

    Raises:
        TrainError: no such dataset, no images, no labels, or images of several sizes.
    """
    if name == "digits":
        if label_column or image_size:
            raise TrainError("the digits data takes neither a label column nor an image size")
        return _digits()
    return _from_splits(name, load_splits(name), label_column, image_size)


def _digits() -> ImageData:
    from sklearn.datasets import load_digits

    digits = load_digits()
    # Values are 0..16: times 15 they fill a byte without loss.
    images = torch.from_numpy((digits.images * 15).astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(digits.target.astype(np.int64))
    return held_out("digits", images, labels, num_classes=10)


def load_splits(
    name: str,
    configuration: str | None = None,
    *,
    files: str | None = None,
    called: str | None = None,
) -> hf.DatasetDict:
    """`datasets.load_dataset` with its many errors turned into one sentence.

    Args:
        name: a hub id, a local folder, or the format of `files`.
        configuration: of a dataset that has several.
        files: a data file.
        called: what to call it in messages.

    Raises:
        TrainError: there is no such dataset, or it cannot be read.
    """
    import datasets as hf

    folder, called = Path(name).expanduser(), called or name
    looks_local = name.startswith((".", "~", os.sep)) or name.count("/") > 1
    if looks_local and not folder.exists():
        raise TrainError(f"the data folder {name} does not exist")
    if folder.is_file() and files is None:
        raise TrainError(
            f"{name} is a file, and images are read from a folder or a dataset; for text say --model gpt"
        )
    if folder.is_dir() and not any(folder.iterdir()):
        raise TrainError(f"the data folder {name} is empty")
    is_local = folder.exists() or files is not None
    try:
        with _quiet():
            where = str(folder) if folder.exists() and files is None else name
            loaded = hf.load_dataset(where, configuration, data_files=files)
    except Exception as error:  # the loader raises a dozen types, all about the user's dataset
        reason = _first_cause(error)
        done = "read" if is_local else "find, as a folder here or on the hub,"
        raise TrainError(f"could not {done} the dataset {called}: {reason}") from error
    return loaded


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _first_cause(error: BaseException) -> str:
    """The first line of the error that began it: the loader wraps it in ones that say nothing."""
    while error.__cause__ is not None or error.__context__ is not None:
        error = error.__cause__ or error.__context__ or error
    return _first_line(error)


def _from_splits(
    name: str, splits: hf.DatasetDict, label_column: str | None, image_size: int | None
) -> ImageData:
    train_name = "train" if "train" in splits else next(iter(splits))
    train = splits[train_name]
    image_column = _image_column(name, train)
    label_column = label_column or _label_column(name, train)
    if label_column not in train.column_names:
        has = ", ".join(train.column_names)
        raise TrainError(f"the dataset {name} has no column {label_column!r}; it has {has}")
    classes, train_labels = _train_labels(name, train, label_column)
    if len(classes) < 2:
        raise _single_class(name, f"{len(classes)} in column {label_column!r}")
    train_images = _decode(name, train, image_column, image_size)
    for test_name in (n for n in TEST_SPLITS if n in splits and n != train_name):
        test = splits[test_name]
        if (test_labels := _test_labels(name, test_name, test, label_column, classes)) is None:
            continue
        test_images = _decode(name, test, image_column, image_size)
        train_images, test_images = _same_shape(name, train_images, test_images)
        return ImageData(
            name, train_images, train_labels, test_images, test_labels, len(classes), test_name
        )
    return held_out(name, train_images, train_labels, len(classes))


def _image_column(name: str, split: hf.Dataset) -> str:
    import datasets as hf

    for column, feature in split.features.items():
        if isinstance(feature, hf.Image):
            return column
    has = ", ".join(split.column_names)
    raise TrainError(f"the dataset {name} has no images: its columns are {has}")


def _label_column(name: str, split: hf.Dataset) -> str:
    import datasets as hf

    features = split.features
    for column, feature in features.items():
        if isinstance(feature, hf.ClassLabel):
            return column
    for column in LABEL_NAMES:
        dtype = str(getattr(features.get(column), "dtype", ""))
        if dtype.startswith(("int", "uint", "string", "large_string")):
            return column
    if (found := _class_folders(name)) and len(found) == 1:
        raise _single_class(name, f"the subfolder {found[0]!r} alone")
    has = ", ".join(split.column_names)
    raise TrainError(
        f"the dataset {name} has images but no labels: its columns are {has} (a folder needs one "
        "subfolder per class; another column can be named with --label-column)"
    )


def _class_folders(name: str) -> list[str]:
    """Names of the innermost folders that hold images, where `name` is a local folder."""
    images = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
    root = Path(name).expanduser()
    found = {p.parent for p in root.rglob("*") if p.suffix.lower() in images}
    return sorted({folder.name for folder in found if folder != root})


def _single_class(name: str, found: str) -> TrainError:
    return TrainError(
        f"the dataset {name} has fewer than two classes ({found}): there is nothing to tell apart"
    )


def _values(split: hf.Dataset, column: str) -> np.ndarray[Any, Any]:
    return np.asarray(split.select_columns([column]).with_format("arrow")[:][column].to_pylist())


def _train_labels(name: str, train: hf.Dataset, column: str) -> tuple[np.ndarray[Any, Any], Tensor]:
    """The sorted class values, and the train labels as indices into them."""
    import datasets as hf

    values, feature = _values(train, column), train.features[column]
    classes = np.arange(feature.num_classes) if isinstance(feature, hf.ClassLabel) else None
    for row, value in enumerate(values.tolist()):
        if reason := _not_a_label(value, classes):
            raise TrainError(
                f"column {column!r} of the dataset {name} cannot serve as labels: row {row} of the "
                f"train split {reason}"
            )
    if classes is not None:
        return classes, torch.from_numpy(values.astype(np.int64))
    classes, indices = np.unique(values, return_inverse=True)
    return classes, torch.from_numpy(indices.astype(np.int64))


def _not_a_label(value: Any, classes: np.ndarray[Any, Any] | None) -> str:
    """What is wrong with a label, in words; empty where nothing is."""
    if value is None:
        return "has none"
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        return f"has {value!r}, neither a whole number nor a text"
    if isinstance(value, int) and value < 0:
        return f"has the negative label {value}"
    if classes is not None and (not isinstance(value, int) or value >= len(classes)):
        return f"has the label {value}, of {len(classes)} classes that count from 0"
    return ""


def _test_labels(
    name: str, split: str, test: hf.Dataset, column: str, classes: np.ndarray[Any, Any]
) -> Tensor | None:
    """Labels of another split as class indices; None where they are withheld or all unknown.

    Raises:
        TrainError: some are known and others are not.
    """
    if column not in test.column_names or len(test) == 0:
        return None
    index = {value: i for i, value in enumerate(classes.tolist())}
    found = [index.get(value) for value in _values(test, column).tolist()]
    unknown = [row for row, label in enumerate(found) if label is None]
    if len(unknown) == len(found):
        return None
    if unknown:
        raise TrainError(
            f"row {unknown[0]} of the split {split} of the dataset {name} has no label of the train "
            f"split's in column {column!r}, as {len(unknown)} of its {len(found)} rows"
        )
    return torch.tensor(found, dtype=torch.int64)


def _decode(name: str, split: hf.Dataset, column: str, image_size: int | None) -> Tensor:
    """All images of a split, `(count, channels, height, width)` uint8."""
    from PIL import Image

    if len(split) == 0:
        raise TrainError(f"the dataset {name} has an empty split")
    images: np.ndarray[Any, Any] | None = None
    done = 0
    try:
        for batch in split.select_columns([column]).iter(batch_size=CHUNK):
            chunk = [_to_array(image, image_size) for image in batch[column]]
            channels = max(array.shape[-1] for array in chunk)
            if images is None:
                images = np.empty((len(split), *chunk[0].shape[:2], channels), np.uint8)
            if channels > images.shape[-1]:  # a colour image after grey ones
                images = np.repeat(images, channels, axis=-1)
            for array in chunk:
                if array.shape[:2] != images.shape[1:3]:
                    raise _several_sizes(name, array.shape[:2], images.shape[1:3])
                images[done] = array  # one grey channel broadcasts to three
                done += 1
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, TrainError):
            raise
        row = _undecodable(split, column, done)
        raise TrainError(
            f"image {row} of the dataset {name} cannot be decoded: {_first_line(error)}"
        ) from error
    except MemoryError as error:
        raise TrainError(
            f"the images of the dataset {name} do not fit into memory: give --image-size"
        ) from error
    assert images is not None
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def _undecodable(split: hf.Dataset, column: str, first: int) -> int:
    """The first row from `first` whose image cannot be decoded."""
    for row in range(first, min(first + CHUNK, len(split))):
        try:
            _to_array(split[row][column], None)
        except Exception:
            return row
    return first


def _to_array(image: Any, image_size: int | None) -> np.ndarray[Any, Any]:
    """A PIL image as `(height, width, 1 or 3)` uint8."""
    from PIL import Image, ImageOps

    if image is None:
        raise OSError("there is none in this row")
    if image.mode.startswith("I;16"):  # PIL would clip 16 bits instead of scaling them
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode == "F" and not np.isfinite(np.asarray(image)).all():
        raise OSError("it holds values that are not finite")
    if image.mode in ("I", "F"):
        raise OSError(f"mode {image.mode}, neither 8 nor 16 bits per channel")
    grey = image.mode in ("1", "L", "LA")
    image = image.convert("L" if grey else "RGB")
    if image_size is not None:
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BILINEAR)
    array = np.asarray(image)
    return array[..., None] if grey else array


def _several_sizes(name: str, one: tuple[int, ...], other: tuple[int, ...]) -> TrainError:
    return TrainError(
        f"the dataset {name} has images of several sizes ({other[1]}x{other[0]} and "
        f"{one[1]}x{one[0]}): give --image-size, for example 32 or 224"
    )


def _same_shape(name: str, train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    if train.shape[2:] != test.shape[2:]:
        raise _several_sizes(name, tuple(test.shape[2:]), tuple(train.shape[2:]))
    channels = max(train.shape[1], test.shape[1])
    return tuple(x.expand(-1, channels, -1, -1).contiguous() for x in (train, test))  # type: ignore[return-value]


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of the dataset library beside our own."""
    import datasets as hf

    if not hf.is_progress_bar_enabled():
        yield
        return
    hf.disable_progress_bars()
    try:
        yield
    finally:
        hf.enable_progress_bars()
