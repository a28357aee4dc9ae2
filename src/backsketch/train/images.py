"""Image-classification data in memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from backsketch.train.errors import TrainError

HELD_OUT = 0.25
HELD_OUT_SEED = 0  # not the training seed: runs with other seeds are tested on the same images


@dataclass(frozen=True)
class ImageData:
    """A train and a test split.

    Shapes: images `(count, channels, height, width)` uint8; labels `(count,)` int64 in
    `[0, num_classes)`; `mean` and `std` `(channels,)` of the train images in units of 0..255.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int
    test_split: str

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(channels, height, width)`."""
        channels, height, width = self.train_images.shape[1:]
        return channels, height, width

    @property
    def num_train(self) -> int:
        return len(self.train_labels)

    def summary(self) -> dict[str, Any]:
        """What `result.json` says about the data, and what a checkpoint must agree with."""
        return {
            "name": self.name,
            "num_train": self.num_train,
            "num_test": len(self.test_labels),
            "num_classes": self.num_classes,
            "image_shape": list(self.image_shape),
            "test_split": self.test_split,
        }

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel over the train split, `(channels,)`."""
        channels = self.train_images.shape[1]
        levels = torch.arange(256, dtype=torch.float64)
        flat = self.train_images.transpose(0, 1).reshape(channels, -1)
        counts = torch.stack([torch.bincount(row, minlength=256) for row in flat]).double()
        weights = counts / counts.sum(1, keepdim=True)
        mean = weights @ levels
        variance = weights @ levels**2 - mean**2
        # A constant channel has variance zero: leave it at zero rather than divide by it.
        std = torch.where(variance > 1e-6, variance, torch.ones_like(variance)).sqrt()
        return mean.float(), std.float()

    def limited(self, limit: int | None, seed: int = HELD_OUT_SEED) -> ImageData:
        """The same data with a seeded subset of `limit` training images.

        Raises:
            TrainError: there are fewer images than that.
        """
        if limit is None:
            return self
        if not 1 <= limit <= self.num_train:
            raise TrainError(
                f"the limit on training images must be in 1..{self.num_train}, got {limit}"
            )
        kept = torch.randperm(self.num_train, generator=torch.Generator().manual_seed(seed))[:limit]
        return replace(
            self, train_images=self.train_images[kept], train_labels=self.train_labels[kept]
        )


def held_out(name: str, images: Tensor, labels: Tensor, num_classes: int) -> ImageData:
    if len(labels) < 2:
        raise TrainError(f"the dataset {name} has {len(labels)} image: too few to hold some out")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(HELD_OUT_SEED))
    test, train = order.split([cut := max(1, int(HELD_OUT * len(labels))), len(labels) - cut])
    return ImageData(
        name, images[train], labels[train], images[test], labels[test], num_classes,
        test_split=f"held out, {HELD_OUT:.0%} of train",
    )  # fmt: skip
