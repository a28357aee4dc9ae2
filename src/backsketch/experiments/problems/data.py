"""Data of the small problems: standardised rows in memory, found locally or on the hub."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from backsketch.train.data import load_data

__all__ = ["images", "located"]


def located(name: str) -> str:
    """A dataset's name, or its local copy: ``$BACKSKETCH_DATA/mnist`` for ``ylecun/mnist``."""
    root = os.environ.get("BACKSKETCH_DATA")
    local = Path(root) / name.rpartition("/")[2] if root else None
    return str(local) if local is not None and local.is_dir() else name


@lru_cache(maxsize=4)
def images(name: str, limit: int | None) -> tuple[Tensor, Tensor]:
    """``(n, channels, height, width)`` float32, standardised per channel, and ``(n,)`` labels."""
    data = load_data(located(name)).limited(limit)
    mean, std = (v.view(1, -1, 1, 1) for v in data.statistics())
    return (data.train_images.float() - mean) / std, data.train_labels
