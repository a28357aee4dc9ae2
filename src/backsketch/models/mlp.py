"""Multilayer perceptron on flattened images."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from math import prod

from torch import nn


def mlp(
    in_features: int, num_classes: int, widths: Sequence[int] = (512, 512, 512)
) -> nn.Sequential:
    """ReLU network `flatten -> (fc, relu) per width -> head`.

    Shapes: input `(batch, *)` with `in_features` numbers per sample, output `(batch, num_classes)`.

    Raises:
        ValueError: a size is not positive.

    Example:
        >>> import torch
        >>> model = mlp(64, 10, widths=(32, 16))
        >>> model(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """
    if min(in_features, num_classes, *widths) < 1:
        raise ValueError(f"every size must be positive, got {in_features}, {widths}, {num_classes}")
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    size = in_features
    for number, width in enumerate(widths, start=1):
        layers[f"fc{number}"] = nn.Linear(size, width)
        layers[f"relu{number}"] = nn.ReLU()
        size = width
    layers["head"] = nn.Linear(size, num_classes)
    return nn.Sequential(layers)


def mlp_for_images(
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    widths: Sequence[int] = (512, 512, 512),
) -> nn.Sequential:
    """`mlp` on images of shape `(channels, height, width)`."""
    return mlp(prod(image_shape), num_classes, widths)
