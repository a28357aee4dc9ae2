"""8-bit products on a GPU: operands rounded by Triton kernels, multiplied by PyTorch's library products.

The codes are those of ``eager.py`` bit for bit; products of integers are the same too, those of floats up to the
order in which the library sums. An operand is read twice (once for its largest magnitudes) and written once, in
the layout that the product wants: contractions along the rows of both operands, dimensions in multiples of 16.

No GPU was at hand when this was written: it is tested in Triton's interpreter, and nothing is known of its speed.
"""

from __future__ import annotations

import importlib.util
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from backsketch.products import eager
from backsketch.products.numbers import BLOCK, FLOAT8, NUMBERS, Numbers, has_float8_product, up
from backsketch.torch_private import float8_matmul, int8_matmul

__all__ = ["Kernels", "agrees", "kernels", "why_not"]

Codes = tuple[Tensor | None, Tensor | None]  # by rows, by columns
_TILE = {"ROWS": 32, "COLUMNS": 128}
_EXACT = {"enable_fp_fusion": False}  # x * rate + half is two roundings, as in the definition
_LEAST = 32  # rows of the first operand: _int_mm wants more than 16


class Kernels:
    """The products with one set of numbers; tensors are contiguous, float32, bfloat16 or float16."""

    def __init__(self, numbers: str) -> None:
        from backsketch.products import triton_kernels

        self._triton: Any = triton_kernels
        self.numbers: Numbers = NUMBERS[numbers]

    def vjps(
        self,
        g: Tensor,
        x: Tensor | None,
        weight: Tensor | None,
        packed: tuple[Tensor, Tensor] | None,
        keys: tuple[eager.Key, ...],
        with_bias: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """See :func:`backsketch.products.eager.vjps`; the results are float32."""
        with _on(g.device):
            return self._vjps(g, x, weight, packed, keys, with_bias)

    def pack(self, x: Tensor, key: eager.Key) -> tuple[Tensor, Tensor]:
        """See :func:`backsketch.products.eager.pack`: in the layout of the host, which is slow to make here."""
        with _on(x.device):
            return self._pack(x, key)

    def _vjps(
        self,
        g: Tensor,
        x: Tensor | None,
        weight: Tensor | None,
        packed: tuple[Tensor, Tensor] | None,
        keys: tuple[eager.Key, ...],
        with_bias: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        grad_input = grad_weight = None
        if weight is not None or x is not None:
            largest = torch.linalg.vector_norm(g, torch.inf, 1, keepdim=True, dtype=torch.float32)
            scale, rate = self.numbers.scale(largest)
            codes, turned = self._round(
                g, rate, keys[0], wants=(weight is not None, x is not None), by_row=True
            )
            if weight is not None:
                grad_input = self._input_vjp(codes, scale, weight, keys[1])
            if x is not None:
                grad_weight = self._weight_vjp(turned, scale, x, keys[2], g.shape[1])
        if x is None and packed is not None:
            grad_weight = self._packed_weight_vjp(g, *packed, keys[3])
        return grad_input, grad_weight, g.sum(0, dtype=torch.float32) if with_bias else None

    def _pack(self, x: Tensor, key: eager.Key) -> tuple[Tensor, Tensor]:
        n, j = x.shape
        scale, rate = self.numbers.scale(self._largest(x, None))
        codes = self._values(self._round(x, rate, key, wants=(True, False))[0])[:n, :j]
        parts = [codes[block] for block in self.numbers.blocks(n)]
        sums = torch.stack([part.sum(0).to(scale.dtype) for part in parts])
        flat = torch.cat([self.numbers.to_bytes(part) for part in parts])
        return flat.view(eager.depth_of(n), up(j, 16)), torch.stack([scale, sums], 1)

    def _input_vjp(
        self, codes: Tensor | None, scale: Tensor, weight: Tensor, key: eager.Key
    ) -> Tensor:
        assert codes is not None
        largest = self._largest(weight, None).amax(0, keepdim=True)
        column, rate = self.numbers.scale(largest)
        turned = self._round(weight, rate, key, wants=(False, True), in_blocks=False)[1]
        assert turned is not None
        out = weight.new_empty(scale.shape[0], weight.shape[1], dtype=torch.float32)
        depth = min(self.numbers.depth, codes.shape[1])
        for start in range(0, codes.shape[1], depth):
            part = slice(start, start + depth)
            product = self._product(codes[:, part], turned[:, part])
            self._rescale(product, column, scale, out, adds=start > 0)
        return out

    def _weight_vjp(
        self, turned: Tensor | None, scale: Tensor, x: Tensor, key: eager.Key, width: int
    ) -> Tensor:
        """The rows of x take the scales of the rows of g with them, relative to the largest of their block."""
        assert turned is not None
        n = x.shape[0]
        block = min(self.numbers.block, n)
        largest = F.pad(scale[:, 0], (0, -n % block)).view(-1, block).amax(1)
        of_rows = largest.repeat_interleave(block)[:n, None]
        factor = torch.where(of_rows == 0, 0.0, scale / of_rows)
        column, rate = self.numbers.scale(self._largest(x, factor))
        of_x = self._round(x, rate, key, wants=(False, True), factor=factor)[1]
        return self._sum(turned, of_x, (width, x.shape[1]), column * largest[:, None], None)

    def _packed_weight_vjp(self, g: Tensor, codes: Tensor, stats: Tensor, key: eager.Key) -> Tensor:
        n, j = g.shape[0], stats.shape[2]
        scale, rate = self.numbers.scale(self._largest(g, None))
        turned = self._round(g, rate, key, wants=(False, True))[1]
        values = eager.unpack(codes, n, j, self.numbers)
        assert turned is not None
        of_x = values.new_zeros(_padded(j), turned.shape[1])
        of_x[:j, :n] = values.T
        return self._sum(turned, self._bytes(of_x), (g.shape[1], j), stats[:, 0], scale)

    def _sum(
        self, a: Tensor | None, b: Tensor | None, shape: tuple[int, int], column: Tensor, row: Tensor | None
    ) -> Tensor:  # fmt: skip
        """Products of blocks of columns of a ``(m, n)`` and b ``(k, n)``, each scaled, summed in float32."""
        assert a is not None
        assert b is not None
        out = column.new_empty(shape)
        for number, block in enumerate(self.numbers.blocks(a.shape[1])):
            product = self._product(a[:, block], b[:, block])
            of_row = None if row is None else row[number].contiguous()
            self._rescale(product, column[number].contiguous(), of_row, out, adds=number > 0)
        return out

    # Kernels and library products ----------------------------------------------------------------

    def _largest(self, x: Tensor, factor: Tensor | None) -> Tensor:
        """``(blocks, k)``: largest magnitudes of the columns of ``x * factor``."""
        n, k = x.shape
        out = x.new_empty(-(-n // BLOCK), k, dtype=torch.int32)
        self._triton.largest_of_columns[(out.shape[0], -(-k // 32))](
            x, factor, out, n, k,
            HAS_FACTOR=factor is not None, ROWS=BLOCK, COLUMNS=32, **_EXACT,
        )  # fmt: skip
        largest = out if self.numbers.block == BLOCK else out.amax(0, keepdim=True)
        return largest.view(torch.float32)

    def _round(
        self,
        x: Tensor,
        rate: Tensor,
        key: eager.Key,
        wants: tuple[bool, bool],
        *,
        by_row: bool = False,
        in_blocks: bool = True,
        factor: Tensor | None = None,
    ) -> Codes:
        """Codes by rows ``(n, k)`` and by columns ``(k, n)``, as bytes, filled up with zeros."""
        n, k = x.shape
        deep, wide = _padded(n), _padded(k)
        codes = x.new_empty(deep, wide, dtype=torch.uint8) if wants[0] else None
        turned = x.new_empty(wide, deep, dtype=torch.uint8) if wants[1] else None
        block = BLOCK if in_blocks and self.numbers.block == BLOCK else 0
        self._triton.round_to_codes[(-(-deep // _TILE["ROWS"]), -(-wide // _TILE["COLUMNS"]))](
            x, factor, rate, codes, turned, n, k, deep, wide, up(k, 32) // 2, *map(_signed, key),
            BY_ROW=by_row, BLOCK=block, FLOATS=self.numbers is FLOAT8, HAS_FACTOR=factor is not None,
            HAS_CODES=wants[0], HAS_TURNED=wants[1], **_TILE, **_EXACT,
        )  # fmt: skip
        return codes, turned

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        """``a @ b.T`` for codes ``(m, n)`` and ``(k, n)``: int32, or float32 for floats."""
        if self.numbers is not FLOAT8:
            product = int8_matmul(a.view(torch.int8), b.view(torch.int8).T)
        elif a.device.type == "cpu" or has_float8_product(a.device):
            product = float8_matmul(a.view(torch.float8_e4m3fn), b.view(torch.float8_e4m3fn).T)
        else:
            product = None
        if product is None:
            product = self.numbers.product(self._values(a), self._values(b).T, torch.float32)
        return product

    def _rescale(
        self, product: Tensor, column: Tensor, row: Tensor | None, out: Tensor, adds: bool
    ) -> None:
        n, k = out.shape
        self._triton.rescale[(-(-n // _TILE["ROWS"]), -(-k // _TILE["COLUMNS"]))](
            product, column, row, out, n, k, product.stride(0),
            HAS_ROW=row is not None, ADDS=adds, **_TILE, **_EXACT,
        )  # fmt: skip

    def _values(self, codes: Tensor | None) -> Tensor:
        """Bytes as the numbers that they stand for."""
        assert codes is not None
        if self.numbers is FLOAT8:
            return codes.view(torch.float8_e4m3fn).to(torch.float32)
        return codes.view(torch.int8).to(torch.int32)

    def _bytes(self, values: Tensor) -> Tensor:
        kind = torch.float8_e4m3fn if self.numbers is FLOAT8 else torch.int8
        return values.to(kind).view(torch.uint8)


def _signed(word: int) -> int:
    """The same 32 bits: Triton would take a larger number for one of 64."""
    return word - (1 << 32) if word >> 31 else word


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _padded(n: int) -> int:
    return max(up(n, 16), _LEAST)


@lru_cache
def kernels(device: torch.device, numbers: str) -> Kernels | None:
    """The kernels, compiled for this device; None where that is impossible or they compute wrongly."""
    return None if why_not(device, numbers) else Kernels(numbers)


@lru_cache
def why_not(device: torch.device, numbers: str) -> str:
    """Why these kernels cannot be used on this device; empty if they can."""
    if device.type != "cuda" or torch.version.hip:
        return "8-bit products have kernels for the CPU and for NVIDIA GPUs only"
    if importlib.util.find_spec("triton") is None:
        return "the kernels for GPUs need Triton, which is not installed"
    try:
        works = agrees(Kernels(numbers), device)
    except Exception as error:
        return f"the kernels for GPUs do not compile or run here ({type(error).__name__})"
    return "" if works else "the kernels for GPUs failed their self-test"


def agrees(own: Kernels, device: torch.device | str) -> bool:
    """Whether the kernels compute what their twin does."""
    generator = torch.Generator().manual_seed(0)
    g, x, weight = (
        torch.randn(shape, generator=generator).to(device)
        for shape in ((261, 67), (261, 35), (67, 35))
    )
    keys = ((1, 0xF0000002), (0xF0000003, 4), (5, 6), (7, 8))
    pairs = zip(
        own.vjps(g, x, weight, None, keys, False)[:2],
        eager.vjps(g, x, weight, None, keys, False, own.numbers)[:2],
    )
    tolerance = 2.0**-10 if own.numbers is FLOAT8 else 0.0
    return all(
        bool((a - b).abs().max() <= tolerance * b.abs().max())
        for a, b in pairs
        if a is not None and b is not None
    )
