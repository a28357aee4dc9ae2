"""Reference models, in plain PyTorch: they know nothing of sketches.

`build` makes one by name for images of a given shape. Adding a model is one file and one row of
`BUILDERS`: a function of `(image_shape, num_classes, *, options)`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import nn

from backsketch.models.bagnet import BagNet as BagNet
from backsketch.models.bagnet import bagnet as bagnet
from backsketch.models.bagnet import bagnet_for_images
from backsketch.models.gpt import GPT as GPT
from backsketch.models.gpt import gpt as gpt
from backsketch.models.mlp import mlp as mlp
from backsketch.models.mlp import mlp_for_images
from backsketch.models.vit import ViT as ViT
from backsketch.models.vit import vit as vit

BUILDERS: Mapping[str, Callable[..., nn.Module]] = MappingProxyType(
    {"mlp": mlp_for_images, "bagnet": bagnet_for_images, "vit": vit}
)


def options(name: str) -> tuple[str, ...]:
    """Names of the options that `build(name, ...)` takes.

    Raises:
        ValueError: there is no such model.
    """
    if name not in BUILDERS:
        raise ValueError(f"no model named {name!r}; there are {', '.join(BUILDERS)}")
    parameters = inspect.signature(BUILDERS[name]).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


def build(
    name: str, image_shape: tuple[int, int, int], num_classes: int, **overrides: Any
) -> nn.Module:
    """Model `name` for images of shape `(channels, height, width)`.

    Raises:
        ValueError: an unknown model, an option that it does not have, or sizes that do not fit.

    Example:
        >>> model = build("vit", (3, 32, 32), 10, dim=192, depth=6, patch=4)
    """
    known = options(name)
    if unknown := [key for key in overrides if key not in known]:
        raise ValueError(f"model {name} has no option {unknown[0]!r}; it has {', '.join(known)}")
    return BUILDERS[name](image_shape, num_classes, **overrides)
