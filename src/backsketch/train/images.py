"""Image-classification data in memory, and the batches that training draws from it.

Order, augmentation and normalisation of a batch are pure functions of the seed, the epoch and the step
(:mod:`backsketch.train.order`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backsketch import models
from backsketch.train.config import TrainConfig
from backsketch.train.errors import TrainError
from backsketch.train.history import History
from backsketch.train.order import AUGMENT, Shares, stream

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

    @property
    def num_test(self) -> int:
        return len(self.test_labels)

    def summary(self) -> dict[str, Any]:
        """What `result.json` says about the data, and what a checkpoint must agree with."""
        return {
            "name": self.name,
            "num_train": self.num_train,
            "num_test": self.num_test,
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

    def build(self, config: TrainConfig) -> nn.Module:
        """A new model for these images and classes.

        Raises:
            ValueError: the model has no such option, or does not fit the images.
        """
        return models.build(
            config.model, self.image_shape, self.num_classes, **config.model_options
        )

    def batches(self, config: TrainConfig, device: torch.device, rank: int, world: int) -> Batches:
        """The batches of one process; see `Batches`."""
        return Batches(self, config, device, rank, world)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy of a batch, in float32."""
        return F.cross_entropy(model(batch.images).float(), batch.labels)

    def score(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Number of images classified correctly, and the sum of their losses."""
        logits = model(batch.images).float()
        correct = (logits.argmax(1) == batch.labels).sum()
        return correct, F.cross_entropy(logits, batch.labels, reduction="sum")

    def outcome(self, config: TrainConfig, core: nn.Module, history: History) -> dict[str, Any]:
        """Nothing beyond what every result has."""
        return {}

    def keep(self, out: Path) -> None:
        """Nothing is kept: the images lie where they came from."""

    def keep_model(self, core: nn.Module, out: Path) -> None:
        """Nothing beyond the checkpoint."""

    def of_classes(self, classes: Sequence[int] | None) -> ImageData:
        """The images of some classes, which keep their numbers: `num_classes` stays.

        Raises:
            TrainError: there is no such class, or a split has no image of them.
        """
        if classes is None:
            return self
        wanted = sorted(set(classes))
        if not wanted or not 0 <= wanted[0] <= wanted[-1] < self.num_classes:
            raise TrainError(
                f"classes must be in 0..{self.num_classes - 1} of {self.name}, got {wanted}"
            )
        train, test = (
            torch.isin(labels, torch.tensor(wanted))
            for labels in (self.train_labels, self.test_labels)
        )
        for split, rows in (("train", train), ("test", test)):
            if not rows.any():
                raise TrainError(f"no {split} image of {self.name} is of the classes {wanted}")
        return replace(
            self, train_images=self.train_images[train], train_labels=self.train_labels[train],
            test_images=self.test_images[test], test_labels=self.test_labels[test],
        )  # fmt: skip

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


ON_DEVICE_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Batch:
    """`images` (rows, channels, height, width) float32, normalised; `labels` (rows,) int64."""

    images: Tensor
    labels: Tensor


class Batches:
    """The batches that one process sees.

    Args:
        data: uint8 images; moved to the device once where they fit.
        config: batch size, accumulation, augmentation and seed.
        device: where the batches are wanted.
        rank: this process.
        world: how many processes share each batch.

    Raises:
        TrainError: the batch is larger than the data, or cannot be shared out evenly.
    """

    def __init__(
        self, data: ImageData, config: TrainConfig, device: torch.device, rank: int, world: int
    ):
        self.config, self.device = config, device
        self._shares = Shares(config, data.num_train, "train images", rank, world)
        self.steps_per_epoch = self._shares.steps_per_epoch
        size = data.train_images.numel() + data.test_images.numel()
        home = device if size <= ON_DEVICE_BYTES else torch.device("cpu")
        self._train = data.train_images.to(home), data.train_labels.to(home)
        self._test = data.test_images.to(home), data.test_labels.to(home)
        mean, std = (v.to(device).view(1, -1, 1, 1) for v in data.statistics())
        self._mean, self._std = mean, std

    def train(self, epoch: int, first_step: int = 0) -> Iterator[list[Batch]]:
        """The optimizer steps of an epoch, each a list of this process's micro-batches."""
        images, labels = self._train
        order = self._shares.order(epoch)
        for step in range(first_step, self.steps_per_epoch):
            rows = self._shares.of_step(order, step)
            draws = self._draw_augmentation(epoch, step)
            yield [
                self._batch(images, labels, rows[part], draws[part] if draws is not None else None)
                for part in self._shares.parts()
            ]

    def test(self) -> Iterator[Batch]:
        """This process's share of the test split, in order."""
        images, labels = self._test
        for rows in self._shares.of_test(len(labels)):
            yield self._batch(images, labels, rows, None)

    def _draw_augmentation(self, epoch: int, step: int) -> Tensor | None:
        """Vertical shift, horizontal shift and flip per image, `(batch, 3)` in [0, 1)."""
        if not self.config.augment:
            return None
        generator = stream(self.config.seed, AUGMENT, epoch, step)
        return torch.rand(self.config.batch_size, 3, generator=generator)

    def _batch(self, images: Tensor, labels: Tensor, rows: Tensor, draws: Tensor | None) -> Batch:
        rows = rows.to(images.device)
        pixels = images[rows].to(self.device, non_blocking=True)
        if draws is not None:
            pixels = crop_and_flip(pixels, draws.to(self.device))
        # Convolutions keep the layout of their input, and channels last is the fast one.
        pixels = pixels.float().contiguous(memory_format=torch.channels_last)
        return Batch(
            pixels.sub_(self._mean).div_(self._std),
            labels[rows].to(self.device, non_blocking=True),
        )


def crop_and_flip(images: Tensor, draws: Tensor) -> Tensor:
    """Random crop of the reflection-padded image (an eighth on each side), random mirror image.

    One gather with index arithmetic instead of padding: position `p` shifted by `d` reads pixel
    `p + d`, reflected at both borders.

    Shapes: images `(n, c, h, w)`, draws `(n, 3)` uniform in [0, 1), returns `(n, c, h, w)`.
    """
    count, _, height, width = images.shape
    y = _shifted(draws[:, 0], height)
    x = _shifted(draws[:, 1], width)
    x = torch.where(draws[:, 2:] < 0.5, x.flip(1), x)
    n = torch.arange(count, device=images.device)
    # Advanced indices around a slice put the channels last.
    return images[n[:, None, None], :, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)


def _shifted(draw: Tensor, size: int) -> Tensor:
    pad = size // 8
    shift = (draw * (2 * pad + 1)).long() - pad
    index = (torch.arange(size, device=draw.device) + shift[:, None]).abs()
    return (size - 1) - (size - 1 - index).abs()
