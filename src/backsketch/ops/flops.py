"""What the opaque operators compute, for PyTorch's counter of operations, which cannot see inside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from types import MappingProxyType
from typing import Any

import torch

from backsketch.estimators import Int8
from backsketch.sampling import num_kept

__all__ = ["COUNTS"]

Shape = tuple[int, ...]


def _eight_bit_vjps(
    g: Shape, x: Shape | None, weight: Shape | None, codes: Shape | None, stats: Shape | None,
    *_: Any, **__: Any,
) -> int:  # fmt: skip
    """Multiplications of bytes count as the fraction of exact ones that the report predicts for them."""
    width = next(s[-1] for s in (weight, x, stats) if s is not None)
    products = (weight is not None) + (x is not None or codes is not None)
    return int(Int8().work()[0] * 2 * g[0] * g[1] * width * products)


def _eight_bit_convolution(
    g: Shape, x: Shape | None, weight: Shape | None, codes: Shape | None, scales: Shape | None, seed: Any,
    stream: Any, kernel: Sequence[int], stride: Any, padding: Any, dilation: Any, spatial: Any, groups: int,
    **_: Any,
) -> int:  # fmt: skip
    inputs = (x, groups), (codes, groups), (weight, 1)
    channels = next(shape[1] // parts for shape, parts in inputs if shape is not None)
    products = (weight is not None) + (x is not None or codes is not None)
    return int(Int8().work()[0] * 2 * prod(g) * channels * prod(kernel) * products)


def _head_gradients(
    cotangent: Shape, x: Shape, weight: Shape, bias: Any, targets: Any, lse: Any, scores: Any, seed: Any,
    keep: float, is_int8: bool, need_x: bool, need_weight: bool, *_: Any, **__: Any,
) -> int:  # fmt: skip
    """The logits of the kept rows again, and their products; rows that are ignored count, too."""
    each = 2 * num_kept(x[0], keep) * weight[0] * weight[1]
    cost = Int8().work()[0] if is_int8 else 1.0
    return int(each * (1 + cost * (need_x + need_weight)))


COUNTS: Mapping[Any, Callable[..., int]] = MappingProxyType(
    {
        torch.ops.backsketch.int8_vjps: _eight_bit_vjps,
        torch.ops.backsketch.float8_vjps: _eight_bit_vjps,
        torch.ops.backsketch.int8_convolution: _eight_bit_convolution,
        torch.ops.backsketch.float8_convolution: _eight_bit_convolution,
        torch.ops.backsketch.head_gradients: _head_gradients,
    }
)
