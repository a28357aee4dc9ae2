"""Rounding on an NVIDIA GPU, each function one Triton kernel; ``eager.py`` does the same in some twenty passes."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from backsketch.gpu import on, signed, why_not
from backsketch.rounding import eager
from backsketch.rounding.eager import BLOCK, Key

__all__ = ["Kernels", "agrees", "fits", "kernels"]

_EXACT = {"enable_fp_fusion": False}
_ENTRIES = 2048  # of a program
_PROGRAMS = 528  # that share the rows of a norm: four for each processor of a large GPU
_WIDEST = 16384  # rows of norms that fit into the registers of a program


class Kernels:
    """The compiled functions, with the arguments of ``eager.py``: contiguous tensors, groups that fit."""

    def __init__(self) -> None:
        from backsketch.rounding import triton_kernels

        self._triton: Any = triton_kernels

    def pack(
        self, flat: Tensor, key: Key, bits: int, group_size: int, twice: bool
    ) -> tuple[Tensor, Tensor]:
        """See :func:`backsketch.rounding.eager.pack`; also of tensors in half precision."""
        return self._pack(flat, key, bits, group_size, twice, 0)

    def pack_slope(
        self, x: Tensor, y: Tensor, function: str, key: Key, bits: int, group_size: int
    ) -> tuple[Tensor, Tensor]:
        """See :func:`backsketch.rounding.eager.pack_slope`."""
        slope = {"gelu": 1, "silu": 2}[function]
        return self._pack(x, key, bits, group_size, False, slope)

    def _pack(
        self, flat: Tensor, key: Key, bits: int, group_size: int, twice: bool, slope: int
    ) -> tuple[Tensor, Tensor]:
        n = flat.shape[0]
        groups = -(-n // group_size)
        together = max(1, _ENTRIES // group_size)
        codes = flat.new_empty(groups, group_size * (bits + 2 * twice) // 8, dtype=torch.uint8)
        scales = flat.new_empty(groups, 2, dtype=torch.float32)
        with on(flat.device):
            self._triton.pack[(-(-groups // together),)](
                flat, codes, scales, n, groups, *map(signed, key),
                BITS=bits, SIZE=group_size, TWICE=twice, SLOPE=slope, GROUPS=together, **_EXACT,
            )  # fmt: skip
        return codes, scales

    def restore(
        self, codes: Tensor, scales: Tensor, n: int, bits: int, group_size: int, which: int
    ) -> Tensor:
        """See :func:`backsketch.rounding.eager.restore`."""
        return self._restore(codes, scales, None, scales.new_empty(n), bits, group_size, which)

    def times(
        self, cotangent: Tensor, codes: Tensor, scales: Tensor, bits: int, group_size: int
    ) -> Tensor:
        """See :func:`backsketch.rounding.eager.times`."""
        out = torch.empty_like(cotangent)
        return self._restore(codes, scales, cotangent, out, bits, group_size, -1)

    def _restore(
        self, codes: Tensor, scales: Tensor, factor: Tensor | None, out: Tensor,
        bits: int, group_size: int, which: int,
    ) -> Tensor:  # fmt: skip
        n = out.shape[0]
        with on(out.device):
            self._triton.restore[(-(-n // _ENTRIES),)](
                codes, scales, factor, out, n,
                HAS_FACTOR=factor is not None, WHICH=which, BITS=bits, SIZE=group_size,
                TWICE=codes.shape[1] > group_size * bits // 8, ENTRIES=_ENTRIES, **_EXACT,
            )  # fmt: skip
        return out

    def mask(self, flat: Tensor, low: float, high: float) -> Tensor:
        """See :func:`backsketch.rounding.eager.mask`."""
        n = flat.shape[0]
        blocks, together = -(-n // BLOCK), _ENTRIES // BLOCK
        out = flat.new_empty(blocks * (BLOCK // 8), dtype=torch.uint8)
        low, high = torch.tensor([low, high], dtype=flat.dtype).tolist()  # as PyTorch compares
        with on(flat.device):
            self._triton.mask[(-(-blocks // together),)](
                flat, out, n, blocks, low, high, BLOCKS=together
            )
        return out

    def masked(self, cotangent: Tensor, bits: Tensor, outside: float) -> Tensor:
        """See :func:`backsketch.rounding.eager.masked`."""
        n, out = cotangent.shape[0], torch.empty_like(cotangent)
        with on(out.device):
            self._triton.masked[(-(-n // _ENTRIES),)](
                cotangent, bits, out, n, float(outside), HAS_OUTSIDE=outside != 0, ENTRIES=_ENTRIES
            )
        return out

    def layer_norm(
        self,
        g: Tensor,
        weight: Tensor | None,
        mean: Tensor | None,
        rstd: Tensor,
        codes: Tensor,
        scales: Tensor,
        bits: int,
        group_size: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :func:`backsketch.rounding.eager.layer_norm`."""
        (rows, width), out = g.shape, torch.empty_like(g)
        if width > _WIDEST:
            return eager.layer_norm(g, weight, mean, rstd, codes, scales, bits, group_size)
        programs = min(rows, _PROGRAMS)
        parts = g.new_empty(programs, 2, width, dtype=torch.float32)
        with on(g.device):
            self._triton.layer_norm[(programs,)](
                g, weight, mean, rstd, codes, scales, out, parts, rows, width, programs,
                HAS_WEIGHT=weight is not None, HAS_MEAN=mean is not None, BITS=bits, SIZE=group_size,
                WIDTH=1 << (width - 1).bit_length(),
            )  # fmt: skip
        of_weight, of_bias = parts.sum(0)
        return out, of_weight, of_bias

    row_sums = staticmethod(eager.row_sums)
    row_affine = staticmethod(eager.row_affine)


def fits(group_size: int) -> bool:
    """Whether the kernels know groups of this size: powers of two."""
    return group_size & (group_size - 1) == 0


@lru_cache
def kernels(device: torch.device) -> Kernels | None:
    """The kernels, compiled for this device; None where that is impossible or they compute wrongly."""
    return None if why_not(device, _self_test) else Kernels()


def _self_test(device: torch.device) -> bool:
    return agrees(Kernels(), device)


def agrees(own: Kernels, device: torch.device | str) -> bool:
    """Whether the kernels compute what their twin does, on the CPU."""
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    there = x.to(device)
    for bits, twice in ((4, False), (4, True), (8, False)):
        ours = own.pack(there, (1, 0xF0000002), bits, 64, twice)
        expected = eager.pack(x, (1, 0xF0000002), bits, 64, twice)
        if not all(torch.equal(a.cpu(), b) for a, b in zip(ours, expected)):
            return False
        rest = 1000, bits, 64, 1 if twice else -1
        if not torch.equal(own.restore(*ours, *rest).cpu(), eager.restore(*expected, *rest)):
            return False
    inside = own.mask(there, -0.5, 1.0)
    return torch.equal(inside.cpu(), eager.mask(x, -0.5, 1.0))
