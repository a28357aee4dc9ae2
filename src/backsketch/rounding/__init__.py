r"""Stochastic rounding to a few bits, packed: how a tensor is kept small without bias.

In each group of consecutive entries, with lowest entry a and step :math:`\Delta` of ``2^b - 1`` equal intervals,

.. math:: \tilde x = a + \Delta \lfloor (x-a)/\Delta + u \rfloor, \qquad E[\tilde x] = x .

The uniforms u come from a counter-based hash of a seed, so that every function here is *pure*: a compiler
may move it, and the backward pass of a checkpoint draws its own. They have 16 bits, and (x-a)/Δ is rounded
to as many: the bias of an entry is at most :math:`2^{-17}\Delta` beside the rounding of float32.

``twice`` makes two roundings that are independent given x and share their floor (b bits, then one bit for
each): :math:`E[\tilde x_1 \tilde x_2] = x^2` entry by entry, for backward passes quadratic in what they save.

A NaN or an Inf makes its whole group NaN: it reaches the gradients. Groups whose entries differ by
less than 1e-30 count as constant.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from backsketch.layout import channels_first
from backsketch.rounding import eager, gpu, native
from backsketch.sampling import key_of, operator

__all__ = ["Rounding", "mask", "masked", "units"]


@dataclass(frozen=True)
class Rounding:
    """How a tensor is rounded: ``bits`` per entry, in groups of ``group_size`` consecutive entries."""

    bits: int
    group_size: int

    def pack(
        self, x: Tensor, seed: Tensor, stream: int = 0, twice: bool = False
    ) -> tuple[Tensor, Tensor]:
        """What is kept of ``x``.

        Args:
            x: any shape, not empty.
            seed: of the forward pass (:func:`backsketch.sampling.next_seed`).
            stream: an integer that makes several roundings from one seed independent.
            twice: two roundings, independent of each other.

        Returns:
            Codes, uint8 ``(groups, bytes)``, and scales ``(groups, 2)``: lowest entry and step, in float32
            or better.
        """
        return _pack(x, seed, stream, self.bits, self.group_size, twice)

    def pack_slope(
        self, x: Tensor, y: Tensor, function: str, seed: Tensor, stream: int = 0
    ) -> tuple[Tensor, Tensor]:
        """What is kept of the slope of ``"gelu"`` or ``"silu"`` at ``x``, whose values are ``y``."""
        return _pack_slope(x, y, function, seed, stream, self.bits, self.group_size)

    def restore(
        self,
        packed: tuple[Tensor, Tensor],
        shape: tuple[int, ...],
        anchor: Tensor,
        which: int = -1,
    ) -> Tensor:
        """A rounded tensor of the given shape, in the dtype of the scales.

        Args:
            packed: what :meth:`pack` returned.
            anchor: a tensor of the backward pass. Without one a compiler would restore in the forward
                pass and keep the result.
            which: 0 or 1 for the two roundings of ``twice``.
        """
        n = math.prod(shape)
        return _restore(*packed, anchor, n, self.bits, self.group_size, which).view(shape)

    def times(self, cotangent: Tensor, packed: tuple[Tensor, Tensor]) -> Tensor:
        """``cotangent`` times the rounded tensor, entry by entry, of the cotangent's shape and dtype."""
        return _times(cotangent, *packed, self.bits, self.group_size)

    def layer_norm(
        self,
        g: Tensor,
        weight: Tensor | None,
        mean: Tensor | None,
        rstd: Tensor,
        packed: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :func:`backsketch.rounding.eager.layer_norm`; ``packed`` twice."""
        return _layer_norm(g, weight, mean, rstd, *packed, self.bits, self.group_size)

    def row_sums(self, g: Tensor, stats: Tensor, packed: tuple[Tensor, Tensor]) -> Tensor:
        """See :func:`backsketch.rounding.eager.row_sums`; ``packed`` twice."""
        return _row_sums(g, stats, *packed, self.bits, self.group_size)

    def row_affine(
        self, g: Tensor, stats: Tensor, factors: Tensor, packed: tuple[Tensor, Tensor]
    ) -> Tensor:
        """See :func:`backsketch.rounding.eager.row_affine`; ``packed`` twice."""
        return _row_affine(g, stats, factors, *packed, self.bits, self.group_size)

    def share(self, twice: bool = False) -> float:
        """Bytes kept, as a fraction of float32."""
        return (self.bits + 2 * twice) / 32 + 2 / self.group_size


def mask(x: Tensor, low: float, high: float) -> Tensor:
    """One bit an entry, uint8 (in blocks of 512 entries): whether ``low < x < high`` (or NaN)."""
    return _mask(x, low, high)


def masked(cotangent: Tensor, bits: Tensor, outside: float) -> Tensor:
    """``cotangent`` where the bit is set, ``outside`` times it elsewhere."""
    return _masked(cotangent, bits, outside)


def units(x: Tensor, rounding: Rounding, twice: bool = False) -> tuple[Tensor, Tensor]:
    """Step of each entry, and its distance from the lowest one in steps, both ``(n,)``: for closed forms."""
    flat = _flat(x).to(torch.promote_types(x.dtype, torch.float32))
    groups = eager.grouped(flat, rounding.group_size)
    pair, rate = eager.scales(groups, 2**rounding.bits - (not twice))
    step = pair[:, 1:].expand_as(groups).flatten()
    levels = ((groups - pair[:, :1]) * rate / 65536).flatten()
    return step[: len(flat)], levels[: len(flat)]


# --------------------------------------------------------------------------------------------------
# Operators: opaque to compilers, native where that is possible
# --------------------------------------------------------------------------------------------------


_HALF = (torch.bfloat16, torch.float16)


def _kernels(*tensors: Tensor, group_size: int = 64) -> Any:
    """What computes in one pass over these tensors, if anything does."""
    device, dtypes = tensors[0].device, {t.dtype for t in tensors} - {torch.uint8}
    if device.type == "cuda" and dtypes <= {torch.float32, *_HALF}:
        return gpu.kernels(device) if gpu.fits(group_size) else None
    return native.library() if device.type == "cpu" and dtypes <= {torch.float32} else None


def _to_pack(x: Tensor, group_size: int) -> Tensor:
    """``(n,)``, in a dtype that is packed: on a GPU half precision as it is."""
    flat = _flat(x)
    if x.dtype in _HALF and _kernels(flat, group_size=group_size) is not None:
        return flat
    return flat.to(torch.promote_types(x.dtype, torch.float32))


def _flat(x: Tensor) -> Tensor:
    return channels_first(x.detach()).reshape(-1)


def _pack_impl(
    x: Tensor, seed: Tensor, stream: int, bits: int, group_size: int, twice: bool
) -> tuple[Tensor, Tensor]:
    flat = _to_pack(x, group_size)
    run = _kernels(flat, group_size=group_size) or eager
    return run.pack(flat, key_of(seed, stream), bits, group_size, twice)


def _pack_fake(
    x: Tensor, seed: Tensor, stream: int, bits: int, group_size: int, twice: bool
) -> tuple[Tensor, Tensor]:
    groups = (x.numel() + group_size - 1) // group_size
    codes = x.new_empty(groups, group_size * (bits + 2 * twice) // 8, dtype=torch.uint8)
    return codes, x.new_empty(groups, 2, dtype=torch.promote_types(x.dtype, torch.float32))


def _pack_slope_impl(
    x: Tensor, y: Tensor, function: str, seed: Tensor, stream: int, bits: int, group_size: int
) -> tuple[Tensor, Tensor]:
    x, y = (_to_pack(t, group_size) for t in (x, y))
    run = _kernels(x, y, group_size=group_size) or eager
    return run.pack_slope(x, y, function, key_of(seed, stream), bits, group_size)


def _layer_norm_impl(
    g: Tensor, weight: Tensor | None, mean: Tensor | None, rstd: Tensor, codes: Tensor, scales: Tensor,
    bits: int, group_size: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    tensors = [
        None if t is None else t.contiguous() for t in (g, weight, mean, rstd, codes, scales)
    ]
    there = [t for t in tensors if t is not None]
    run = _kernels(*there, group_size=group_size) or eager
    return run.layer_norm(*tensors, bits, group_size)


def _row_sums_impl(
    g: Tensor, stats: Tensor, codes: Tensor, scales: Tensor, bits: int, group_size: int
) -> Tensor:
    tensors = [t.contiguous() for t in (g, stats, codes, scales)]
    return (_kernels(*tensors, group_size=group_size) or eager).row_sums(*tensors, bits, group_size)


def _row_affine_impl(
    g: Tensor,
    stats: Tensor,
    factors: Tensor,
    codes: Tensor,
    scales: Tensor,
    bits: int,
    group_size: int,
) -> Tensor:
    tensors = [t.contiguous() for t in (g, stats, factors, codes, scales)]
    return (_kernels(*tensors, group_size=group_size) or eager).row_affine(
        *tensors, bits, group_size
    )


def _restore_impl(
    codes: Tensor, scales: Tensor, anchor: Tensor, n: int, bits: int, group_size: int, which: int
) -> Tensor:
    codes, scales = codes.contiguous(), scales.contiguous()
    run = _kernels(codes, scales, group_size=group_size) or eager
    return run.restore(codes, scales, n, bits, group_size, which)


def _times_impl(
    cotangent: Tensor, codes: Tensor, scales: Tensor, bits: int, group_size: int
) -> Tensor:
    codes, scales = codes.contiguous(), scales.contiguous()
    run = _kernels(cotangent, codes, scales, group_size=group_size) or eager
    return run.times(_flat(cotangent), codes, scales, bits, group_size).view(cotangent.shape)


def _mask_impl(x: Tensor, low: float, high: float) -> Tensor:
    return (_kernels(x) or eager).mask(_flat(x), low, high)


def _masked_impl(cotangent: Tensor, bits: Tensor, outside: float) -> Tensor:
    run = _kernels(cotangent, bits) or eager
    return run.masked(_flat(cotangent), bits.contiguous(), outside).view(cotangent.shape)


def _like(cotangent: Tensor, *_: object) -> Tensor:
    return torch.empty_like(cotangent, memory_format=torch.contiguous_format)


_pack = operator(
    "pack(Tensor x, Tensor seed, int stream, int bits, int group_size, bool twice)"
    " -> (Tensor, Tensor)",
    _pack_impl,
    _pack_fake,
)
_restore = operator(
    "restore(Tensor codes, Tensor scales, Tensor anchor, SymInt n, int bits, int group_size, int which)"
    " -> Tensor",
    _restore_impl,
    lambda codes, scales, anchor, n, *_: scales.new_empty(n),
)
_times = operator(
    "times(Tensor cotangent, Tensor codes, Tensor scales, int bits, int group_size) -> Tensor",
    _times_impl,
    _like,
)
_pack_slope = operator(
    "pack_slope(Tensor x, Tensor y, str function, Tensor seed, int stream, int bits, int group_size)"
    " -> (Tensor, Tensor)",
    _pack_slope_impl,
    lambda x, y, function, seed, stream, bits, size: _pack_fake(x, seed, stream, bits, size, False),
)
_layer_norm = operator(
    "layer_norm(Tensor g, Tensor? weight, Tensor? mean, Tensor rstd, Tensor codes, Tensor scales, int bits,"
    " int group_size) -> (Tensor, Tensor, Tensor)",
    _layer_norm_impl,
    lambda g, *_: (_like(g), g.new_empty(g.shape[1]), g.new_empty(g.shape[1])),
)
_row_sums = operator(
    "row_sums(Tensor g, Tensor stats, Tensor codes, Tensor scales, int bits, int group_size) -> Tensor",
    _row_sums_impl,
    lambda g, *_: g.new_empty(g.shape[0], 3),
)
_row_affine = operator(
    "row_affine(Tensor g, Tensor stats, Tensor factors, Tensor codes, Tensor scales, int bits,"
    " int group_size) -> Tensor",
    _row_affine_impl,
    _like,
)
_mask = operator(
    "mask(Tensor x, float low, float high) -> Tensor",
    _mask_impl,
    lambda x, low, high: x.new_empty(
        (x.numel() + eager.BLOCK - 1) // eager.BLOCK * (eager.BLOCK // 8), dtype=torch.uint8
    ),
)
_masked = operator(
    "masked(Tensor cotangent, Tensor bits, float outside) -> Tensor", _masked_impl, _like
)
