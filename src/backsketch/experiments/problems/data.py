"""Data of the small problems: in memory, found locally or on the hub."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from backsketch.train.config import recipe_of
from backsketch.train.images import ImageData
from backsketch.train.load import load_data
from backsketch.train.tasks import TaskData
from backsketch.train.text import TextData, load_text

__all__ = ["data_for", "dataset", "images", "located"]


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


class _Job(Protocol):
    """What decides the data of a run; see :class:`backsketch.experiments.problems.training.Training`."""

    @property
    def model(self) -> str: ...
    @property
    def data(self) -> str: ...
    @property
    def limit(self) -> int | None: ...
    @property
    def limit_test(self) -> int | None: ...
    @property
    def train(self) -> Mapping[str, Any]: ...


def data_for(job: _Job) -> TaskData:
    """The data of a run, by the task of its model."""
    if recipe_of(job.model).task == "images":
        return dataset(job.data, job.limit, job.limit_test)
    options = json.dumps({"model": job.model, **job.train}, sort_keys=True)
    return _text(options, job.data, job.limit, job.limit_test)


@lru_cache(maxsize=2)
def _text(options: str, name: str, limit: int | None, limit_test: int | None) -> TextData:
    """The first ``limit`` tokens to train on and the first ``limit_test`` to test on."""
    data = load_text({**json.loads(options), "data": located(name)}).limited(limit)
    end = None if limit_test is None else limit_test + 1
    return replace(data, name=name, test_tokens=data.test_tokens[:end].clone())


@lru_cache(maxsize=4)
def images(name: str, limit: int | None) -> tuple[Tensor, Tensor]:
    """``(n, channels, height, width)`` float32, standardised per channel, and ``(n,)`` labels."""
    data = load_data(located(name)).limited(limit)
    mean, std = (v.view(1, -1, 1, 1) for v in data.statistics())
    return (data.train_images.float() - mean) / std, data.train_labels
