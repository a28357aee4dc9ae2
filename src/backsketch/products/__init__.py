r"""Matrix products of stochastically rounded 8-bit operands: a tenth of the time, nearly none of the variance.

A group of entries with largest magnitude m is rounded to 255 levels of step :math:`\Delta = m/127`,

.. math:: \tilde x = \Delta \lfloor x/\Delta + u \rfloor, \qquad u \sim U[0,1), \qquad E[\tilde x] = x ,

and independent roundings multiply to the exact mean: :math:`E[\tilde A \tilde B] = A B`. The integer product is
exact. The two backward products of a linear layer share one rounding of the cotangent, by row:

.. math::
    G W &\approx \mathrm{diag}(s)\, Q\, \tilde W, \qquad G_{no} \approx s_n Q_{no}, \quad W \text{ by column} \\
    G^\top X &\approx Q^\top \widetilde{(\mathrm{diag}(s) X)}, \qquad \text{by blocks of 256 rows and by column}

where the sum over blocks is one of float32. A row of small cotangents has a small step of its own; a row of zeros
stays zero. Where the input was rounded in the forward pass (:func:`pack`), before s was known, the cotangent is
rounded a second time for ``grad_weight``, by block and column.

That is ``int8``. In ``float8`` the levels are floating-point numbers (e4m3), scales are powers of two, and one
block has all rows: :mod:`backsketch.products.numbers` holds both sets of numbers.

The uniforms come from a counter-based hash of a seed and have 16 bits: the bias of an entry is at most
:math:`2^{-17}` of the distance of its levels. A group that holds a NaN or an Inf becomes NaN as a
whole: it reaches the gradients.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from backsketch.products import eager, gpu, native
from backsketch.products.numbers import NUMBERS, has_float8_product
from backsketch.sampling import key_of, operator

__all__ = ["Products", "Source", "is_fast", "pack", "unpack", "vjps", "why_slow"]


class Source(Protocol):
    """Where a layer gets its backward products from; see :func:`vjps` for the arguments."""

    def vjps(
        self,
        g: Tensor,
        x: Tensor | None,
        weight: Tensor | None,
        *,
        packed: tuple[Tensor, Tensor] | None = None,
        with_bias: bool = False,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]: ...


class Products:
    """8-bit products, each call with roundings of its own.

    Args:
        seed: of the backward pass (:func:`backsketch.sampling.next_seed`).
        numbers: ``"int8"`` or ``"float8"``, what operands are rounded to.
    """

    def __init__(self, seed: Tensor, numbers: str = "int8") -> None:
        self._seed, self._stream, self._numbers = seed, _FIRST_STREAM, numbers

    def vjps(
        self,
        g: Tensor,
        x: Tensor | None,
        weight: Tensor | None,
        *,
        packed: tuple[Tensor, Tensor] | None = None,
        with_bias: bool = False,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """See :func:`vjps`."""
        self._stream += 1
        return vjps(
            g, x, weight, self._seed, packed=packed, with_bias=with_bias,
            stream=self._stream, numbers=self._numbers,
        )  # fmt: skip


def vjps(
    g: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    seed: Tensor,
    *,
    packed: tuple[Tensor, Tensor] | None = None,
    with_bias: bool = False,
    stream: int = 0,
    numbers: str = "int8",
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Unbiased estimates of ``(g @ weight, g.T @ x)`` from 8-bit operands, and exactly ``g.sum(0)``.

    Args:
        g: ``(rows, out)`` cotangent.
        x: ``(rows, in)``, or None where ``packed`` is given or ``grad_weight`` is not wanted.
        weight: ``(out, in)``, or None where ``grad_input`` is not wanted.
        seed: of the backward pass (:func:`backsketch.sampling.next_seed`).
        packed: what :func:`pack` returned of x.
        with_bias: whether the gradient of the bias is wanted.
        stream: an integer that makes several products from one seed independent.
        numbers: ``"int8"`` or ``"float8"``; the same as of ``packed``.

    Returns:
        ``(rows, in)``, ``(out, in)`` and ``(out,)`` in the dtype of g, None for what is not wanted.
    """
    codes, stats = packed or (None, None)
    wanted = weight is not None, x is not None or packed is not None, with_bias
    results = _OPERATORS[numbers][0](g, x, weight, codes, stats, seed, stream, with_bias)
    below, at_weight, at_bias = (r if want else None for r, want in zip(results, wanted))
    return below, at_weight, at_bias


def pack(x: Tensor, seed: Tensor, stream: int = 0, numbers: str = "int8") -> tuple[Tensor, Tensor]:
    """The codes of ``x`` ``(rows, in)``, rows > 0, as :func:`vjps` reads them, and their scales.

    Returns:
        uint8 ``(rows rounded up to 4, in rounded up to 16)`` and ``(ceil(rows / 256), 2, in)``; one block
        of all rows where the numbers are floats.
    """
    packed: tuple[Tensor, Tensor] = _OPERATORS[numbers][1](x, seed, stream)
    return packed


def unpack(packed: tuple[Tensor, Tensor], rows: int, numbers: str = "int8") -> Tensor:
    """``(rows, in)``: the rounded tensor of which :func:`pack` kept the codes, in the dtype of its scales."""
    codes, stats = packed
    own = NUMBERS[numbers]
    scales = stats[:, 0].repeat_interleave(min(own.block, rows), 0)[:rows]
    return eager.unpack(codes, rows, stats.shape[2], own) * scales


def is_fast(device: torch.device | str = "cpu", numbers: str = "int8") -> bool:
    """Whether 8-bit products are expected to beat those of float32 on this device."""
    return not why_slow(device, numbers)


def why_slow(device: torch.device | str = "cpu", numbers: str = "int8") -> str:
    """Why no gain in time is expected of 8-bit products on this device; empty if one is."""
    return _WHY_SLOW[numbers](torch.device(device))


def _why_int8_slow(device: torch.device) -> str:
    if device.type != "cpu":
        return gpu.why_not(device, "int8") or "8-bit products have not been measured on a GPU yet"
    kernels = native.library()
    if kernels is None:
        return native.SOURCE.why_not() or "the compiled kernels failed their self-test"
    return "" if kernels.is_fast else "this processor has no AVX-512 VNNI instructions"


def _why_float8_slow(device: torch.device) -> str:
    if has_float8_product(device):
        missing = gpu.why_not(device, "float8")
        return missing or "8-bit floats have not been measured on a GPU yet"
    return (
        "this device has no products of 8-bit floats: they are rounded, then multiplied as float32"
    )


_WHY_SLOW = {"int8": _why_int8_slow, "float8": _why_float8_slow}


# --------------------------------------------------------------------------------------------------
# Operators: opaque to compilers, native where that is possible
# --------------------------------------------------------------------------------------------------

_FIRST_STREAM = 1000  # beyond the streams of the draws that share a seed
_STREAMS = 4  # independent roundings of one call


class _Eager:
    """Plain PyTorch: any numbers, any device."""

    def __init__(self, numbers: str) -> None:
        self.vjps = partial(eager.vjps, numbers=NUMBERS[numbers])
        self.pack = partial(eager.pack, numbers=NUMBERS[numbers])


def _implementation(g: Tensor, numbers: str) -> tuple[Any, torch.dtype]:
    """Who computes it, and in which dtype its arguments have to be."""
    wide = torch.promote_types(g.dtype, torch.float32)
    own = (
        gpu.kernels(g.device, numbers)
        if g.device.type == "cuda" and wide == torch.float32
        else None
    )
    if own is not None:
        return own, g.dtype if g.dtype in (torch.bfloat16, torch.float16) else wide
    if numbers == "int8" and g.device.type == "cpu" and wide == torch.float32:
        kernels = native.library()
        if kernels is not None:
            return kernels, g.dtype if g.dtype == torch.bfloat16 else wide
    return _Eager(numbers), wide


def _vjps_impl(
    numbers: str, g: Tensor, x: Tensor | None, weight: Tensor | None, codes: Tensor | None, stats: Tensor | None,
    seed: Tensor, stream: int, with_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    run, dtype = _implementation(g, numbers)
    same = [None if t is None else t.to(dtype).contiguous() for t in (g, x, weight)]
    keys = tuple(key_of(seed, _STREAMS * stream + i) for i in range(_STREAMS))
    packed = None if codes is None else (codes, stats)
    if g.shape[0] == 0:
        return _nothing(g, x, weight, stats, with_bias)
    results = run.vjps(*same, packed, keys, with_bias)
    below, at_weight, at_bias = (g.new_empty(0) if r is None else r.to(g.dtype) for r in results)
    return below, at_weight, at_bias


def _nothing(
    g: Tensor, x: Tensor | None, weight: Tensor | None, stats: Tensor | None, with_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = _vjps_fake(g, x, weight, None, stats, g, 0, with_bias)
    below, at_weight, at_bias = (g.new_zeros(s.shape) for s in shapes)
    return below, at_weight, at_bias


def _vjps_fake(
    g: Tensor, x: Tensor | None, weight: Tensor | None, codes: Tensor | None, stats: Tensor | None,
    seed: Tensor, stream: int, with_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    n, o = g.shape
    below = g.new_empty(0) if weight is None else g.new_empty(n, weight.shape[1])
    width = x.shape[1] if x is not None else stats.shape[2] if stats is not None else None
    at_weight = g.new_empty(0) if width is None else g.new_empty(o, width)
    return below, at_weight, g.new_empty(o if with_bias else 0)


def _pack_impl(numbers: str, x: Tensor, seed: Tensor, stream: int) -> tuple[Tensor, Tensor]:
    run, dtype = _implementation(x, numbers)
    codes, stats = run.pack(x.to(dtype).contiguous(), key_of(seed, stream))
    return codes, stats


def _pack_fake(numbers: str, x: Tensor, seed: Tensor, stream: int) -> tuple[Tensor, Tensor]:
    n, j = x.shape
    codes = x.new_empty((n + 3) // 4 * 4, (j + 15) // 16 * 16, dtype=torch.uint8)
    return codes, x.new_empty(
        NUMBERS[numbers].num_blocks(n), 2, j, dtype=torch.promote_types(x.dtype, torch.float32)
    )


def _operators(numbers: str) -> tuple[Any, Any]:
    """The operators that multiply and pack."""
    return (
        operator(
            f"{numbers}_vjps(Tensor g, Tensor? x, Tensor? weight, Tensor? codes, Tensor? stats, Tensor seed,"
            " int stream, bool with_bias) -> (Tensor, Tensor, Tensor)",
            partial(_vjps_impl, numbers),
            _vjps_fake,
        ),
        operator(
            f"{numbers}_pack(Tensor x, Tensor seed, int stream) -> (Tensor, Tensor)",
            partial(_pack_impl, numbers),
            partial(_pack_fake, numbers),
        ),
    )


_OPERATORS = {numbers: _operators(numbers) for numbers in NUMBERS}
