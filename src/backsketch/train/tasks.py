"""What a run trains for: images or text. A task is one row, and all else follows from its data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from backsketch.train.config import recipe_of
from backsketch.train.images import ImageData
from backsketch.train.load import load_data
from backsketch.train.loop import Data
from backsketch.train.text import load_text

__all__ = ["TASKS", "TaskData", "data_of"]


class TaskData(Data, Protocol):
    """Data that know how much of them there is.

    Attributes:
        num_train: images, or rows of text, to train on.
    """

    @property
    def num_train(self) -> int: ...


def _images(options: Mapping[str, Any], stored: Path | None) -> ImageData:
    data = load_data(
        options.get("data", "digits"),
        label_column=options.get("label_column"),
        image_size=options.get("image_size"),
    )
    return data.of_classes(options.get("classes")).limited(options.get("limit_train"))


TASKS: Mapping[str, Callable[[Mapping[str, Any], Path | None], TaskData]] = MappingProxyType(
    {"images": _images, "text": load_text}
)


def data_of(options: Mapping[str, Any], stored: Path | None = None) -> TaskData:
    """The data that a run's options name.

    Args:
        options: fields of `TrainConfig`.
        stored: the folder of the run that is continued, if there is one.

    Raises:
        TrainError: no such model or data.
    """
    return TASKS[recipe_of(options.get("model", "mlp")).task](options, stored)
