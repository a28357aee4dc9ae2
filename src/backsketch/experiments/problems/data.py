"""Data of the small problems: in memory, found locally or on the hub."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from backsketch.train.images import ImageData
from backsketch.train.load import load_data

__all__ = ["dataset", "images", "located"]


def located(name: str) -> str:
    """A dataset's name, or its local copy: ``$BACKSKETCH_DATA/mnist`` for ``ylecun/mnist``."""
    root = os.environ.get("BACKSKETCH_DATA")
    local = Path(root) / name.rpartition("/")[2] if root else None
    return str(local) if local is not None and local.is_dir() else name


@lru_cache(maxsize=2)
def dataset(name: str, limit: int | None, limit_test: int | None = None) -> ImageData:
    """A seeded subset of the training images, and the first ``limit_test`` of the test images."""
    data = replace(load_data(located(name)).limited(limit), name=name)
    return replace(
        data,
        test_images=data.test_images[:limit_test].clone(),
        test_labels=data.test_labels[:limit_test].clone(),
    )


@lru_cache(maxsize=4)
def images(name: str, limit: int | None) -> tuple[Tensor, Tensor]:
    """``(n, channels, height, width)`` float32, standardised per channel, and ``(n,)`` labels."""
    data = load_data(located(name)).limited(limit)
    mean, std = (v.view(1, -1, 1, 1) for v in data.statistics())
    return (data.train_images.float() - mean) / std, data.train_labels
