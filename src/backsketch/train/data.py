"""Where data comes from: scikit-learn's digits, the hub, or a local folder."""

from __future__ import annotations

import numpy as np
import torch

from backsketch.train.errors import TrainError
from backsketch.train.hub import load_hub
from backsketch.train.images import ImageData, held_out


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
    return load_hub(name, label_column, image_size)


def _digits() -> ImageData:
    from sklearn.datasets import load_digits

    digits = load_digits()
    # Values are 0..16: times 15 they fill a byte without loss.
    images = torch.from_numpy((digits.images * 15).astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(digits.target.astype(np.int64))
    return held_out("digits", images, labels, num_classes=10)
