"""The fused host kernels of ``kernels.cpp``, called with tensors; ``eager.py`` does the same, bit for bit."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from backsketch.native import Source
from backsketch.rounding.eager import BLOCK

__all__ = ["SOURCE", "library"]

_PER_THREAD = 1 << 15  # entries that are worth a thread


class Kernels:
    """The compiled functions, called with tensors; float32, contiguous, on the host."""

    def __init__(self, compiled: ctypes.CDLL) -> None:
        self._library = compiled
        for name in ("pack", "unpack", "mask", "masked", "layer_norm", "row_sums", "row_affine"):
            getattr(self._library, f"backsketch_{name}").restype = None

    def pack(
        self, flat: Tensor, key: tuple[int, int], bits: int, group_size: int, twice: bool
    ) -> tuple[Tensor, Tensor]:
        """See :func:`backsketch.rounding.eager.pack`."""
        return self._pack(flat, None, int(twice), key, bits, group_size)

    def pack_slope(
        self,
        x: Tensor,
        y: Tensor,
        function: str,
        key: tuple[int, int],
        bits: int,
        group_size: int,
    ) -> tuple[Tensor, Tensor]:
        """See :func:`backsketch.rounding.eager.pack_slope`."""
        return self._pack(x, y, {"gelu": 2, "silu": 3}[function], key, bits, group_size)

    def _pack(
        self,
        x: Tensor,
        y: Tensor | None,
        what: int,
        key: tuple[int, int],
        bits: int,
        group_size: int,
    ) -> tuple[Tensor, Tensor]:
        n = x.shape[0]
        groups = -(-n // group_size)
        codes = torch.empty(groups, group_size * (bits + 2 * (what == 1)) // 8, dtype=torch.uint8)
        scales = torch.empty(groups, 2)
        self._library.backsketch_pack(
            _at(x), _at(y), what, _i64(n), _i64(group_size), bits, ctypes.c_uint32(key[0]),
            ctypes.c_uint32(key[1]), _at(codes), _at(scales), _threads(n),
        )  # fmt: skip
        return codes, scales

    def restore(
        self, codes: Tensor, scales: Tensor, n: int, bits: int, group_size: int, which: int
    ) -> Tensor:
        """See :func:`backsketch.rounding.eager.restore`."""
        out = torch.empty(n)
        self._unpack(codes, scales, None, out, bits, group_size, which)
        return out

    def times(
        self, cotangent: Tensor, codes: Tensor, scales: Tensor, bits: int, group_size: int
    ) -> Tensor:
        """See :func:`backsketch.rounding.eager.times`."""
        out = torch.empty_like(cotangent)
        self._unpack(codes, scales, cotangent, out, bits, group_size, -1)
        return out

    def _unpack(
        self, codes: Tensor, scales: Tensor, factor: Tensor | None, out: Tensor,
        bits: int, group_size: int, which: int,
    ) -> None:  # fmt: skip
        n = out.shape[0]
        self._library.backsketch_unpack(
            _at(codes), _at(scales), _i64(n), _i64(group_size), bits, which,
            _at(factor), _at(out), _threads(n),
        )  # fmt: skip

    def mask(self, flat: Tensor, low: float, high: float) -> Tensor:
        """See :func:`backsketch.rounding.eager.mask`."""
        n = flat.shape[0]
        out = torch.empty(-(-n // BLOCK) * (BLOCK // 8), dtype=torch.uint8)
        bounds = ctypes.c_float(low), ctypes.c_float(high)
        self._library.backsketch_mask(_at(flat), _i64(n), *bounds, _at(out), _threads(n))
        return out

    def masked(self, cotangent: Tensor, mask: Tensor, outside: float) -> Tensor:
        """See :func:`backsketch.rounding.eager.masked`."""
        n, out = cotangent.shape[0], torch.empty_like(cotangent)
        self._library.backsketch_masked(
            _at(cotangent), _at(mask), _i64(n), ctypes.c_float(outside), _at(out), _threads(n)
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
        by_column = torch.zeros(2, width)
        self._library.backsketch_layer_norm(
            _at(g), _at(weight), _at(mean), _at(rstd), _at(codes), _at(scales), _i64(rows), _i64(width),
            _i64(group_size), bits, _at(out), _at(by_column), _threads(g.numel()),
        )  # fmt: skip
        return out, by_column[0], by_column[1]

    def row_sums(
        self, g: Tensor, stats: Tensor, codes: Tensor, scales: Tensor, bits: int, group_size: int
    ) -> Tensor:
        """See :func:`backsketch.rounding.eager.row_sums`."""
        rows, width = g.shape
        out = torch.empty(rows, 3)
        self._library.backsketch_row_sums(
            _at(g), _at(stats), _at(codes), _at(scales), _i64(rows), _i64(width), _i64(group_size),
            bits, _at(out), _threads(g.numel()),
        )  # fmt: skip
        return out

    def row_affine(
        self,
        g: Tensor,
        stats: Tensor,
        factors: Tensor,
        codes: Tensor,
        scales: Tensor,
        bits: int,
        group_size: int,
    ) -> Tensor:
        """See :func:`backsketch.rounding.eager.row_affine`."""
        (rows, width), out = g.shape, torch.empty_like(g)
        self._library.backsketch_row_affine(
            _at(g), _at(stats), _at(factors), _at(codes), _at(scales), _i64(rows), _i64(width),
            _i64(group_size), bits, _at(out), _threads(g.numel()),
        )  # fmt: skip
        return out


_i64 = ctypes.c_int64


def _at(tensor: Tensor | None) -> ctypes.c_void_p | None:
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())


def _threads(n: int) -> int:
    return max(1, min(torch.get_num_threads(), n // _PER_THREAD))


SOURCE = Source(Path(__file__).with_name("kernels.cpp"), "-fopenmp")


@lru_cache(maxsize=1)
def library() -> Kernels | None:
    """The kernels, compiled and loaded if they are not; None where that is impossible."""
    compiled = SOURCE.library()
    return None if compiled is None else Kernels(compiled)
