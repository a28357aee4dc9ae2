"""Operators of captured graphs that compute products from 8-bit operands, opaque to compilers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from backsketch import products, sampling

__all__ = ["bmm_operator", "next_seed_operator", "pointwise_operator", "vjps_operator"]

assert products  # it defines the operator
vjps_operator = torch.ops.backsketch.int8_vjps.default
next_seed_operator = torch.ops.backsketch.next_seed.default
_SLICE = 1 << 20  # streams of two slices of a batched product are that far apart


def _pointwise(
    g: Tensor, x: Tensor, weight: Tensor, seed: Tensor, stream: int, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """The vector-Jacobian products of a convolution whose kernels have one position, rounded."""
    flat_g, flat_x = g.movedim(1, -1).flatten(0, -2), x.movedim(1, -1).flatten(0, -2)
    below, at_weight, _ = vjps_operator(
        flat_g, flat_x if wanted[1] else None, weight.flatten(1) if wanted[0] else None, None, None,
        seed, stream, False,
    )  # fmt: skip
    if wanted[0]:
        at_positions = below.view(*g.movedim(1, -1).shape[:-1], -1).movedim(-1, 1)
        below = torch.empty_like(x).copy_(at_positions)
    return below, at_weight.view(weight.shape) if wanted[1] else at_weight


def _pointwise_fake(
    g: Tensor, x: Tensor, weight: Tensor, seed: Tensor, stream: int, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    below = torch.empty_like(x) if wanted[0] else x.new_empty(0)
    return below, weight.new_empty(weight.shape) if wanted[1] else weight.new_empty(0)


def _bmm(a: Tensor, b: Tensor, by_row: bool, seed: Tensor, stream: int) -> Tensor:
    """``a @ b`` slice by slice; ``by_row``: a is the cotangent, and rounded by row, else b is."""
    out = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    for i in range(a.shape[0]):
        own = stream + i * _SLICE
        if by_row:
            out[i] = vjps_operator(a[i], None, b[i], None, None, seed, own, False)[0]
        else:
            out[i] = vjps_operator(b[i], a[i].t(), None, None, None, seed, own, False)[1].t()
    return out


def _bmm_fake(a: Tensor, b: Tensor, by_row: bool, seed: Tensor, stream: int) -> Tensor:
    return a.new_empty(a.shape[0], a.shape[1], b.shape[2])


pointwise_operator = sampling.operator(
    "int8_pointwise_vjps(Tensor g, Tensor x, Tensor weight, Tensor seed, int stream, bool[] wanted)"
    " -> (Tensor, Tensor)",
    _pointwise,
    _pointwise_fake,
)
bmm_operator = sampling.operator(
    "int8_bmm(Tensor a, Tensor b, bool by_row, Tensor seed, int stream) -> Tensor", _bmm, _bmm_fake
)
