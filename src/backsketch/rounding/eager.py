"""Stochastic rounding in plain PyTorch: the definition, on any device and in any floating-point type.

``kernels.cpp`` does the same arithmetic in one pass over memory; both agree bit for bit in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backsketch.gpu import signed

__all__ = [
    "grouped",
    "layer_norm",
    "mask",
    "masked",
    "pack",
    "pack_slope",
    "restore",
    "row_affine",
    "row_sums",
    "scales",
    "times",
]

Key = tuple[int, int]
BLOCK = 512  # entries of a mask that are packed together


def mix(counter: Tensor, key: Key) -> Tensor:
    """Counter to 32 random bits (int32): the lowbias32 mixer (Wellons 2018) with two keys, in place."""
    first, second = (signed(word) for word in key)
    x = counter.add_(first)
    x.bitwise_xor_(_shifted(x, 16)).mul_(signed(0x7FEB352D)).bitwise_xor_(second)
    x.bitwise_xor_(_shifted(x, 15)).mul_(signed(0x846CA68B))
    return x.bitwise_xor_(_shifted(x, 16))


def _shifted(x: Tensor, places: int) -> Tensor:
    """Logical shift: PyTorch's int32 shift is arithmetic."""
    return (x >> places).bitwise_and_((1 << (32 - places)) - 1)


def _sixteen_bits(counter: Tensor, key: Key) -> tuple[Tensor, Tensor]:
    """Two random integers below 65536 for each counter (int32)."""
    bits = mix(counter, key)
    return bits & 0xFFFF, _shifted(bits, 16)


def grouped(flat: Tensor, group_size: int) -> Tensor:
    """``(groups, group_size)``, the last group filled up with the last entry."""
    short = -flat.shape[0] % group_size
    if short:
        flat = torch.cat([flat, flat[-1:].expand(short)])
    return flat.view(-1, group_size)


def scales(groups: Tensor, intervals: int) -> tuple[Tensor, Tensor]:
    """``(groups, 2)`` lowest entry and step, NaN where an entry is not finite; ``(groups, 1)`` 65536/step."""
    low, high = groups.aminmax(dim=1, keepdim=True)
    extent = high - low
    # Tensors on both sides: a number PyTorch would turn into its reciprocal, on some device or other.
    pair = torch.cat([low, extent / torch.full_like(extent, intervals)], 1)
    pair.masked_fill_(~extent.isfinite(), torch.nan)
    rate = torch.full_like(extent, intervals * 65536) / extent
    rate.masked_fill_(~(extent.isfinite() & (extent > 1e-30)), 0.0)
    return pair, rate


def pack(flat: Tensor, key: Key, bits: int, group_size: int, twice: bool) -> tuple[Tensor, Tensor]:
    """``(codes, scales)`` of a non-empty ``(n,)`` tensor; see :func:`backsketch.rounding.pack`."""
    groups = grouped(flat, group_size)
    top = 2**bits - (not twice)
    pair, rate = scales(groups, top)
    distance = (groups - pair[:, :1].nan_to_num(0.0)).mul_(rate).add_(0.5)
    # 65536 to a step; at 8 bits a rounding error of float32 is one, and would lead beyond the last level.
    units = distance.nan_to_num_(0.0).to(torch.int32).clamp_(max=top * 65536)
    count, half = groups.shape[0], group_size // 2
    wide = group_size if twice else half
    counter = torch.arange(count * wide, dtype=torch.int32, device=flat.device)
    first, second = (u.view(count, wide) for u in _sixteen_bits(counter, key))
    bad = pair[:, :1].isnan()
    if not twice:
        units[:, :half] += first
        units[:, half:] += second
        codes = _squeeze((units >> 16).to(torch.uint8), bits)
    else:
        whole = (units >> 16).clamp_(max=2**bits - 1)
        rest = units.sub_(whole << 16)
        ups = [(u.add_(rest) >> 16).to(torch.uint8) for u in (first, second)]
        parts = [_squeeze(whole.to(torch.uint8), bits), _squeeze(ups[0] | ups[1] << 1, 2)]
        codes = torch.cat(parts, 1)
    return codes.masked_fill_(bad, 0), pair


def pack_slope(
    x: Tensor, y: Tensor, function: str, key: Key, bits: int, group_size: int
) -> tuple[Tensor, Tensor]:
    """:func:`pack` of the slope of ``"gelu"`` or ``"silu"`` at ``x``, ``y`` being its values."""
    backward = torch.ops.aten.gelu_backward if function == "gelu" else torch.ops.aten.silu_backward
    return pack(backward(torch.ones_like(x), x), key, bits, group_size, False)


def restore(
    codes: Tensor, scales: Tensor, n: int, bits: int, group_size: int, which: int
) -> Tensor:
    """``(n,)``: what :func:`pack` packed, in the dtype of ``scales``."""
    width = group_size * bits // 8
    levels = _stretch(codes[:, :width], bits).to(scales.dtype)
    if which >= 0:
        levels += (_stretch(codes[:, width:], 2) >> which) & 1
    return levels.mul_(scales[:, 1:]).add_(scales[:, :1]).flatten()[:n]


def times(cotangent: Tensor, codes: Tensor, scales: Tensor, bits: int, group_size: int) -> Tensor:
    """``(n,)``: a flat cotangent times what was packed."""
    factor = restore(codes, scales, cotangent.shape[0], bits, group_size, -1)
    return (cotangent * factor).to(cotangent.dtype)


def _normalised(
    stats: Tensor, codes: Tensor, scales: Tensor, shape: torch.Size, bits: int, group_size: int
) -> tuple[Tensor, Tensor]:
    """Both roundings, less the row's mean, times its rstd."""
    pair = (restore(codes, scales, shape.numel(), bits, group_size, i).view(shape) for i in (0, 1))
    first, second = (x.sub_(stats[:, :1]).mul_(stats[:, 1:]) for x in pair)
    return first, second


def layer_norm(
    g: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    codes: Tensor,
    scales: Tensor,
    bits: int,
    group_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (input, weight, bias) of a layer norm; of an RMS norm where ``mean`` is None.

    Args:
        g: ``(rows, width)``, in the dtype of ``scales``. weight: ``(width,)``. mean, rstd: ``(rows,)``.
        codes, scales: of the input, packed twice.
    """
    center = torch.zeros_like(rstd) if mean is None else mean
    stats = torch.stack([center, rstd], 1)
    first, second = _normalised(stats, codes, scales, g.shape, bits, group_size)
    gw = g if weight is None else g * weight
    slope = (gw * second).mean(1, keepdim=True)
    grad = torch.addcmul(gw, first, slope, value=-1)
    if mean is not None:
        grad -= gw.mean(1, keepdim=True)
    of_weight = first.add_(second).mul_(0.5).mul_(g).sum(0)
    return grad.mul_(rstd[:, None]), of_weight, g.sum(0)


def row_sums(
    g: Tensor, stats: Tensor, codes: Tensor, scales: Tensor, bits: int, group_size: int
) -> Tensor:
    """``(rows, 3)``: sums over each row of g, of g times the first and g times the second rounding.

    Args:
        g: ``(rows, width)``. stats: ``(rows, 2)``, mean and rstd by which the roundings are normalised.
    """
    first, second = _normalised(stats, codes, scales, g.shape, bits, group_size)
    return torch.stack([g.sum(1), first.mul_(g).sum(1), second.mul_(g).sum(1)], 1)


def row_affine(
    g: Tensor,
    stats: Tensor,
    factors: Tensor,
    codes: Tensor,
    scales: Tensor,
    bits: int,
    group_size: int,
) -> Tensor:
    """``a g + b x + c`` with x the first rounding, normalised, and ``(a, b, c)`` of each row in ``factors``."""
    first, _ = _normalised(stats, codes, scales, g.shape, bits, group_size)
    a, b, c = (f[:, None] for f in factors.unbind(1))
    return first.mul_(b).addcmul_(g, a).add_(c)


def _squeeze(codes: Tensor, bits: int) -> Tensor:
    per_byte = 8 // bits
    parts = codes.view(codes.shape[0], per_byte, -1)
    packed = parts[:, 0].clone()
    for i in range(1, per_byte):
        packed |= parts[:, i] << (i * bits)
    return packed


def _stretch(packed: Tensor, bits: int) -> Tensor:
    top = 2**bits - 1
    return torch.cat([(packed >> (i * bits)) & top for i in range(8 // bits)], 1)


def mask(flat: Tensor, low: float, high: float) -> Tensor:
    """``(64 * ceil(n / 512),)`` bytes, one bit an entry: ``low < x < high``, or NaN.

    Byte j of a block of 64 holds the entries j, j + 64, ... of a block of 512.
    """
    inside = ~((flat <= low) | (flat >= high))
    padded = torch.nn.functional.pad(inside.to(torch.uint8), (0, -flat.shape[0] % BLOCK))
    return _squeeze(padded.view(-1, BLOCK), 1).flatten()


def masked(cotangent: Tensor, bits: Tensor, outside: float) -> Tensor:
    """``(n,)``: a flat cotangent, times ``outside`` where the bit is 0 (zero even if it is not finite)."""
    inside = _stretch(bits.view(-1, BLOCK // 8), 1).flatten()[: cotangent.shape[0]]
    return torch.where(inside.bool(), cotangent, cotangent * outside if outside else 0.0)
