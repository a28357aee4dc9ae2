"""Operators of captured graphs that compute products from 8-bit operands, opaque to compilers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from backsketch import products, sampling
from backsketch.ops.norm import BatchNorm, ChannelNorm, GroupNorm
from backsketch.products import Geometry
from backsketch.rounding import Rounding
from backsketch.torch_private import layout_of

__all__ = [
    "GROUP",
    "PACKERS",
    "bmm_operator",
    "convolution_operator",
    "grouped_operator",
    "mask_operator",
    "masked_operator",
    "next_seed_operator",
    "pack_operator",
    "pack_slope_operator",
    "product_pack_operator",
    "restore_operator",
    "saved_batch_norm_operator",
    "saved_group_norm_operator",
    "saved_layer_norm_operator",
    "saved_mm_operator",
    "times_operator",
    "vjps_operator",
]

GROUP = 64  # entries that share a scale
vjps_operator = torch.ops.backsketch.int8_vjps.default
next_seed_operator = torch.ops.backsketch.next_seed.default
_SLICE = 1 << 20  # streams of two slices of a batched product are that far apart


def _convolution(
    g: Tensor, x: Tensor, weight: Tensor, seed: Tensor, stream: int, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], groups: int, wanted: Sequence[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The vector-Jacobian products of a convolution, rounded; the first in the layout of ``x``."""
    kernel = tuple(weight.shape[2:])
    moves = tuple(stride), tuple(padding), tuple(dilation)
    geometry = Geometry(kernel, *moves, tuple(x.shape[2:]), groups)
    below, at_weight = products.convolution_vjps(
        g, x if wanted[1] else None, weight if wanted[0] else None, geometry, seed, stream=stream
    )
    if below is not None and below.stride() != x.stride():
        below = torch.empty_like(x).copy_(below)
    nothing = x.new_empty(0)
    return nothing if below is None else below, nothing.clone() if at_weight is None else at_weight


def _convolution_fake(
    g: Tensor, x: Tensor, weight: Tensor, seed: Tensor, stream: int, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], groups: int, wanted: Sequence[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
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


def _grouped(
    x: Tensor, weight: Tensor, ends: Tensor, g: Tensor, seed: Tensor, stream: int
) -> tuple[Tensor, Tensor]:
    """Both products of rows that are sorted by expert, whose weights are ``(experts, in, out)``."""
    below, at_weight = torch.zeros_like(x), torch.zeros_like(weight)
    start = 0
    for i, end in enumerate(ends.tolist()):
        if start < end:
            rows, own = slice(start, end), stream + i * _SLICE
            first, second, _ = vjps_operator(
                g[rows], x[rows], weight[i].t(), None, None, seed, own, False
            )
            below[rows], at_weight[i], start = first, second.t(), end
    return below, at_weight


def _grouped_fake(
    x: Tensor, weight: Tensor, ends: Tensor, g: Tensor, seed: Tensor, stream: int
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


convolution_operator = sampling.operator(
    "int8_convolution_vjps(Tensor g, Tensor x, Tensor weight, Tensor seed, int stream, int[] stride,"
    " int[] padding, int[] dilation, int groups, bool[] wanted) -> (Tensor, Tensor)",
    _convolution,
    _convolution_fake,
)
bmm_operator = sampling.operator(
    "int8_bmm(Tensor a, Tensor b, bool by_row, Tensor seed, int stream) -> Tensor", _bmm, _bmm_fake
)
grouped_operator = sampling.operator(
    "int8_grouped(Tensor x, Tensor weight, Tensor ends, Tensor g, Tensor seed, int stream)"
    " -> (Tensor, Tensor)",
    _grouped,
    _grouped_fake,
)


# --- what a forward graph keeps in a few bits -------------------------------------------------------

pack_operator = torch.ops.backsketch.pack.default
pack_slope_operator = torch.ops.backsketch.pack_slope.default
product_pack_operator = torch.ops.backsketch.int8_pack.default
times_operator = torch.ops.backsketch.times.default
mask_operator = torch.ops.backsketch.mask.default
masked_operator = torch.ops.backsketch.masked.default
PACKERS = frozenset({pack_operator, pack_slope_operator, product_pack_operator, mask_operator})


def _restored(codes: Tensor, scales: Tensor, shape: Sequence[int], bits: int) -> Tensor:
    """A rounded tensor."""
    return Rounding(bits, GROUP).restore((codes, scales), tuple(shape), codes)


def _restored_fake(codes: Tensor, scales: Tensor, shape: Sequence[int], bits: int) -> Tensor:
    return scales.new_empty(shape)


def _saved_mm(g: Tensor, codes: Tensor, scales: Tensor, width: int, bits: int) -> Tensor:
    """``g.T @ x`` with a rounded ``(rows, width)`` x."""
    x = Rounding(bits, GROUP).restore((codes, scales), (g.shape[0], width), g)
    return g.t() @ x.to(g.dtype)


def _saved_mm_fake(g: Tensor, codes: Tensor, scales: Tensor, width: int, bits: int) -> Tensor:
    return g.new_empty(g.shape[1], width)


def _saved_layer_norm(
    g: Tensor, weight: Tensor | None, mean: Tensor | None, rstd: Tensor, codes: Tensor, scales: Tensor,
    bits: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of input, weight and bias of a norm over the last dimensions, from two roundings of its input."""
    width = g.numel() // rstd.numel()
    wide = scales.dtype
    w, m = (None if t is None else t.reshape(-1).to(wide) for t in (weight, mean))
    rows, r = g.reshape(-1, width).to(wide), rstd.reshape(-1).to(wide)
    below, at_weight, at_bias = Rounding(bits, GROUP).layer_norm(rows, w, m, r, (codes, scales))
    shape = g.shape[g.dim() - 1 :] if weight is None else weight.shape
    below = below.to(g.dtype).reshape(g.shape)
    return below, at_weight.to(g.dtype).reshape(shape), at_bias.to(g.dtype).reshape(shape)


def _saved_layer_norm_fake(
    g: Tensor, weight: Tensor | None, mean: Tensor | None, rstd: Tensor, codes: Tensor, scales: Tensor,
    bits: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    shape = g.shape[g.dim() - 1 :] if weight is None else weight.shape
    return g.new_empty(g.shape), g.new_empty(shape), g.new_empty(shape)


def _saved_channel_norm(
    norm: ChannelNorm, g: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, codes: Tensor,
    scales: Tensor, bits: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of input, weight and bias of a norm of channels, from two roundings of its input."""
    wide = scales.dtype
    w = None if weight is None else weight.to(wide)
    below, at_weight, at_bias = norm.vjp(
        Rounding(bits, GROUP), g.to(wide), w, mean.to(wide), rstd.to(wide), (codes, scales)
    )
    below = below.view(g.shape).to(g.dtype).contiguous(memory_format=layout_of(g))
    return below, at_weight.to(g.dtype), at_bias.to(g.dtype)


def _saved_channel_norm_fake(g: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(g), g.new_empty(g.shape[1]), g.new_empty(g.shape[1])


def _saved_group_norm(
    g: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, codes: Tensor, scales: Tensor,
    groups: int, bits: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    norm = GroupNorm(groups, 0.0)
    return _saved_channel_norm(norm, g, weight, mean, rstd, codes, scales, bits)


def _saved_batch_norm(
    g: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, codes: Tensor, scales: Tensor,
    bits: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _saved_channel_norm(BatchNorm(0.0, 0.0), g, weight, mean, rstd, codes, scales, bits)


restore_operator = sampling.operator(
    "saved_restore(Tensor codes, Tensor scales, SymInt[] shape, int bits) -> Tensor",
    _restored,
    _restored_fake,
)
saved_mm_operator = sampling.operator(
    "saved_mm(Tensor g, Tensor codes, Tensor scales, SymInt width, int bits) -> Tensor",
    _saved_mm,
    _saved_mm_fake,
)
saved_layer_norm_operator = sampling.operator(
    "saved_layer_norm(Tensor g, Tensor? weight, Tensor? mean, Tensor rstd, Tensor codes, Tensor scales,"
    " int bits) -> (Tensor, Tensor, Tensor)",
    _saved_layer_norm,
    _saved_layer_norm_fake,
)
_CHANNEL_NORM = "Tensor g, Tensor? weight, Tensor mean, Tensor rstd, Tensor codes, Tensor scales"
saved_group_norm_operator = sampling.operator(
    f"saved_group_norm({_CHANNEL_NORM}, int groups, int bits) -> (Tensor, Tensor, Tensor)",
    _saved_group_norm,
    _saved_channel_norm_fake,
)
saved_batch_norm_operator = sampling.operator(
    f"saved_batch_norm({_CHANNEL_NORM}, int bits) -> (Tensor, Tensor, Tensor)",
    _saved_batch_norm,
    _saved_channel_norm_fake,
)
