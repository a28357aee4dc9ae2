"""8-bit products on a GPU: operands rounded by Triton kernels, multiplied by one of Triton or by the library's.

The codes are those of ``eager.py`` bit for bit; products of integers are the same too, those of floats up to the
order in which the library sums. Each operand is read as few times as its scales allow and written once, in the
layout that products want: contractions along the rows of both operands, dimensions in multiples of 16.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from backsketch import gpu as launches
from backsketch.gpu import on, signed
from backsketch.products import eager
from backsketch.products.numbers import (
    BLOCK,
    FLOAT8,
    NUMBERS,
    Numbers,
    has_float8_product,
    padded,
    up,
)
from backsketch.torch_private import float8_matmul, scaled_float8_matmul

__all__ = ["Kernels", "agrees", "kernels", "why_not"]

_EXACT = {"enable_fp_fusion": False}  # x * rate + half is two roundings, as in the definition
_OF_ROWS = {"ROWS": 32, "COLUMNS": 128}
_OF_COLUMNS = {"ROWS": BLOCK, "COLUMNS": 32}
_OF_ENTRIES = {"ROWS": 32, "COLUMNS": 128}
_TILES = {"DEPTH": 128, "GROUP": 8, "num_stages": 2}
_LARGE = 160 * 1024  # bytes of shared memory of a program, which the larger tiles need


class Kernels:
    """The products with one set of numbers; tensors are contiguous, float32, bfloat16 or float16."""

    def __init__(self, numbers: str) -> None:
        from backsketch.products import triton_kernels

        self._triton: Any = triton_kernels
        self.numbers: Numbers = NUMBERS[numbers]
        self._floats = self.numbers is FLOAT8

    def vjps(
        self,
        g: Tensor,
        x: Tensor | None,
        weight: Tensor | None,
        packed: tuple[Tensor, Tensor] | None,
        keys: tuple[eager.Key, ...],
        with_bias: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """See :func:`backsketch.products.eager.vjps`; the results have the dtype of g."""
        with on(g.device):
            return self._vjps(g, x, weight, packed, keys, with_bias)

    def pack(self, x: Tensor, key: eager.Key) -> tuple[Tensor, Tensor]:
        """See :func:`backsketch.products.eager.pack`, of which this is the layout by columns."""
        with on(x.device):
            codes, scale = self._by_columns(x, key, in_blocks=True)
        return codes, scale[:, None]

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
            codes, turned, row = self._by_rows(g, keys[0], weight is not None, x is not None)
            if weight is not None:
                of_weight, column = self._by_columns(weight, keys[1], in_blocks=False)
                grad_input = self._product(codes, of_weight, row, column[0], g)
            if x is not None:
                of_x, column = self._by_columns(x, keys[2], in_blocks=True, rows=row)
                grad_weight = self._sum(turned, of_x, None, column, g)
        if x is None and packed is not None:
            turned, row = self._by_columns(g, keys[3], in_blocks=True)
            grad_weight = self._sum(turned, packed[0], row, packed[1][:, 0], g)
        return grad_input, grad_weight, g.sum(0, dtype=torch.float32) if with_bias else None

    # Rounding ------------------------------------------------------------------------------------

    def _by_rows(
        self, g: Tensor, key: eager.Key, wants_codes: bool, wants_turned: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Codes by rows ``(n, k)`` and by columns ``(k, n)``, filled up, and the scales of the rows ``(n,)``."""
        n, k = g.shape
        deep, wide = padded(n), padded(k)
        codes = g.new_empty(deep, wide, dtype=torch.uint8) if wants_codes else None
        turned = g.new_empty(wide, deep, dtype=torch.uint8) if wants_turned else None
        scale = g.new_empty(n, dtype=torch.float32)
        self._triton.round_rows[(-(-deep // _OF_ROWS["ROWS"]),)](
            g, codes, turned, scale, n, k, deep, wide, up(k, 32) // 2, *map(signed, key),
            FLOATS=self._floats, HAS_CODES=wants_codes, HAS_TURNED=wants_turned, **_OF_ROWS, **_EXACT,
        )  # fmt: skip
        return codes, turned, scale

    def _by_columns(
        self, x: Tensor, key: eager.Key, *, in_blocks: bool, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Codes by columns ``(k, n)``, filled up, and scales ``(blocks, k)`` of ``diag(rows) x``."""
        n, k = x.shape
        deep, wide = padded(n), padded(k)
        turned = x.new_empty(wide, deep, dtype=torch.uint8)
        sizes = n, k, deep, wide, up(k, 32) // 2, *map(signed, key)
        grid = (-(-deep // BLOCK), -(-wide // _OF_COLUMNS["COLUMNS"]))
        options = {"HAS_ROWS": rows is not None, **_OF_COLUMNS, **_EXACT}
        if in_blocks and self.numbers.block == BLOCK:
            scale = x.new_empty(self.numbers.num_blocks(n), k, dtype=torch.float32)
            self._triton.round_blocks[grid](x, rows, turned, scale, *sizes, **options)
            return turned, scale
        scale = x.new_empty(1, k, dtype=torch.float32)
        bits = x.new_empty(-(-n // BLOCK), k, dtype=torch.int32)
        largest = None if rows is None else rows.amax()
        self._triton.largest_of_columns[(len(bits), grid[1])](
            x, rows, largest, bits, n, k, **options
        )
        bits = bits if len(bits) == 1 else bits.amax(0)
        self._triton.round_columns[grid](
            x, rows, largest, bits, turned, scale, *sizes, FLOATS=self._floats, **options
        )
        return turned, scale

    # Products ------------------------------------------------------------------------------------

    def _product(
        self, a: Tensor | None, b: Tensor, row: Tensor, column: Tensor, like: Tensor
    ) -> Tensor:
        """``diag(row) (a @ b.T) diag(column)`` in the dtype of ``like``, from codes that are filled up."""
        assert a is not None
        if self._floats:
            return self._of_floats(a, b, row, column, like.dtype)
        out = like.new_empty(row.shape[0], column.shape[0])
        self._launch("product_of_rows", a, b, row, column, out, PART=self.numbers.depth)
        return out

    def _sum(
        self, a: Tensor | None, b: Tensor, row: Tensor | None, column: Tensor, like: Tensor
    ) -> Tensor:
        """The same as a sum over blocks with scales of their own: ``(blocks, m)`` and ``(blocks, n)``."""
        assert a is not None
        if self._floats:
            return self._of_floats(
                a, b, None if row is None else row[0], column[0], like.dtype, like.shape[1]
            )
        out = like.new_empty(like.shape[1], column.shape[1])
        self._launch(
            "product_of_blocks", a, b, row, column, out, HAS_ROW=row is not None, DEPTH=BLOCK
        )
        return out

    def _launch(
        self, name: str, a: Tensor, b: Tensor, row: Tensor | None, column: Tensor, out: Tensor, **options: Any
    ) -> None:  # fmt: skip
        m, n = out.shape
        shape = {**_tiles(a.device), **options}
        grid = (-(-m // shape["ROWS"]) * -(-n // shape["COLUMNS"]),)
        getattr(self._triton, name)[grid](
            a.view(torch.int8), b.view(torch.int8), row, column, out, m, n, a.shape[1], b.shape[1],
            a.shape[1], **shape, **_EXACT,
        )  # fmt: skip

    def _of_floats(
        self, a: Tensor, b: Tensor, row: Tensor | None, column: Tensor, dtype: torch.dtype, m: int = 0
    ) -> Tensor:  # fmt: skip
        m, n = m or row.shape[0], column.shape[0]  # type: ignore[union-attr]
        left, right = a.view(torch.float8_e4m3fn), b.view(torch.float8_e4m3fn)
        product: Tensor | None = None
        if dtype == torch.bfloat16 and _scales_products(a.device):
            scaled = scaled_float8_matmul(left, right.T, row, column)
            return scaled[:m, :n].contiguous()
        if a.device.type == "cpu" or has_float8_product(a.device):
            product = float8_matmul(left, right.T)
        if product is None:
            product = left.float() @ right.float().T
        out = product.new_empty(m, n, dtype=dtype)
        grid = (-(-m // _OF_ENTRIES["ROWS"]), -(-n // _OF_ENTRIES["COLUMNS"]))
        self._triton.rescale[grid](
            product, row, column, out, m, n, product.stride(0),
            HAS_ROW=row is not None, **_OF_ENTRIES, **_EXACT,
        )  # fmt: skip
        return out


@lru_cache
def _scales_products(device: torch.device) -> bool:
    """Whether the library multiplies 8-bit floats and scales rows and columns in one call, and rightly so."""
    if device.type != "cuda" or not has_float8_product(device):
        return False
    codes = torch.ones(32, 16, device=device, dtype=torch.float8_e4m3fn)
    row, column = (torch.arange(1.0, 33.0, device=device) for _ in range(2))
    try:
        product = scaled_float8_matmul(codes, codes.T, row, column)
    except (RuntimeError, ValueError, NotImplementedError):
        return False
    return torch.equal(product, (16 * row[:, None] * column).to(product.dtype))


@lru_cache
def _tiles(device: torch.device) -> dict[str, int]:
    """Tiles of the products, and how they are computed, by the shared memory of the device."""
    properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    memory = getattr(properties, "shared_memory_per_block_optin", 0)
    if memory < _LARGE:
        return {**_TILES, "ROWS": 64, "COLUMNS": 64, "num_warps": 4}
    stages = 3 if memory > 3 * 2 * 128 * BLOCK else 2
    return {**_TILES, "ROWS": 128, "COLUMNS": 128, "num_warps": 8, "num_stages": stages}


@lru_cache
def kernels(device: torch.device, numbers: str) -> Kernels | None:
    """The kernels, compiled for this device; None where that is impossible or they compute wrongly."""
    return None if why_not(device, numbers) else Kernels(numbers)


def why_not(device: torch.device, numbers: str) -> str:
    """Why these kernels cannot be used on this device; empty if they can."""
    return launches.why_not(device, _SELF_TESTS[numbers])


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


def _self_test(numbers: str) -> Callable[[torch.device], bool]:
    return lambda device: agrees(Kernels(numbers), device)


_SELF_TESTS = {numbers: _self_test(numbers) for numbers in NUMBERS}
