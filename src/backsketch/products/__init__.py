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
rounded a second time for ``grad_weight``, by block and column. What a convolution does is told in
:mod:`backsketch.products.convolution`.

That is ``int8``. In ``float8`` the levels are floating-point numbers (e4m3), scales are powers of two, and one
block has all rows: :mod:`backsketch.products.numbers` holds both sets of numbers.

The uniforms come from a counter-based hash of a seed and have 16 bits: the bias of an entry is at most
:math:`2^{-17}` of the distance of its levels. A group that holds a NaN or an Inf becomes NaN as a
whole: it reaches the gradients.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from backsketch.products import convolution as images
from backsketch.products import eager, gpu, native
from backsketch.products.convolution import Geometry
from backsketch.products.numbers import NUMBERS, depth_of, has_float8_product, padded, up
from backsketch.sampling import key_of, operator

__all__ = [
    "Geometry",
    "Packed",
    "Products",
    "Source",
    "convolution_vjps",
    "is_fast",
    "pack",
    "pack_images",
    "unpack",
    "unpack_images",
    "vjps",
    "why_slow",
]


class Packed(NamedTuple):
    """An input as the codes that a product reads, with the scales of its blocks (and what else it needs)."""

    codes: Tensor
    scales: Tensor


class Source(Protocol):
    """Where a layer gets its backward products from: the functions of these names, without the seed."""

    def vjps(
        self, g: Tensor, x: Tensor | Packed | None, weight: Tensor | None, with_bias: bool = False
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]: ...

    def convolution_vjps(
        self, g: Tensor, x: Tensor | Packed | None, weight: Tensor | None, geometry: Geometry
    ) -> tuple[Tensor | None, Tensor | None]: ...


class Products:
    """8-bit products, each call with roundings of its own.

    Args:
        seed: of the backward pass (:func:`backsketch.sampling.next_seed`).
        numbers: ``"int8"`` or ``"float8"``, what operands are rounded to.
        saved: whether inputs were rounded in the forward pass.
    """

    def __init__(self, seed: Tensor, numbers: str = "int8", saved: bool = False) -> None:
        self._seed, self._stream, self._numbers = seed, _FIRST_STREAM, numbers
        self._saved = saved

    def vjps(
        self, g: Tensor, x: Tensor | Packed | None, weight: Tensor | None, with_bias: bool = False
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """See :func:`vjps`."""
        return vjps(g, x, weight, self._seed, with_bias=with_bias, **self._next())

    def convolution_vjps(
        self, g: Tensor, x: Tensor | Packed | None, weight: Tensor | None, geometry: Geometry
    ) -> tuple[Tensor | None, Tensor | None]:
        """See :func:`convolution_vjps`."""
        own = {"saved": self._saved, **self._next()}
        return convolution_vjps(g, x, weight, geometry, self._seed, **own)

    def _next(self) -> dict[str, Any]:
        self._stream += 1
        return {"stream": self._stream, "numbers": self._numbers}


def vjps(
    g: Tensor,
    x: Tensor | Packed | None,
    weight: Tensor | None,
    seed: Tensor,
    *,
    with_bias: bool = False,
    stream: int = 0,
    numbers: str = "int8",
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Unbiased estimates of ``(g @ weight, g.T @ x)`` from 8-bit operands, and exactly ``g.sum(0)``.

    Args:
        g: ``(rows, out)`` cotangent.
        x: ``(rows, in)`` or what :func:`pack` made of it; None where ``grad_weight`` is not wanted.
        weight: ``(out, in)``, or None where ``grad_input`` is not wanted.
        seed: of the backward pass (:func:`backsketch.sampling.next_seed`).
        with_bias: whether the gradient of the bias is wanted.
        stream: an integer that makes several products from one seed independent.
        numbers: ``"int8"`` or ``"float8"``; the same as of a packed x.

    Returns:
        ``(rows, in)``, ``(out, in)`` and ``(out,)`` in the dtype of g, None for what is not wanted.
    """
    wanted = weight is not None, x is not None, with_bias
    x, codes, scales = _three(x)
    results = _OPERATORS[numbers].vjps(g, x, weight, codes, scales, seed, stream, with_bias)
    below, at_weight, at_bias = (r if want else None for r, want in zip(results, wanted))
    return below, at_weight, at_bias


def convolution_vjps(
    g: Tensor,
    x: Tensor | Packed | None,
    weight: Tensor | None,
    geometry: Geometry,
    seed: Tensor,
    *,
    stream: int = 0,
    numbers: str = "int8",
    saved: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Unbiased estimates of both products of a convolution from 8-bit operands.

    Args:
        g: ``(samples, out, *positions)`` cotangent.
        x: ``(samples, in, *spatial)`` or what :func:`pack_images` made of it; None where ``grad_weight`` is not
            wanted.
        weight: ``(out, in / groups, *kernel)``, or None where ``grad_input`` is not wanted.
        geometry: of the convolution.
        seed, stream, numbers: as in :func:`vjps`.
        saved: whether g is rounded as for packed inputs though there is none.

    Returns:
        ``(samples, in, *spatial)`` and ``(out, in / groups, *kernel)`` in the dtype of g, None for what is not
        wanted.
    """
    if (dense := geometry.dense()) is not None:
        if isinstance(x, Tensor):
            x = geometry.read(x)
        below, at_weight = convolution_vjps(
            g, x, weight, dense, seed, stream=stream, numbers=numbers, saved=saved
        )
        return None if below is None else geometry.place(below), at_weight
    if not (saved or isinstance(x, Packed)) and geometry.is_over_positions(g, x):
        matrices = partial(vjps, seed=seed, stream=stream, numbers=numbers)
        return images.over_positions(matrices, g, x, weight, geometry)
    wanted = weight is not None, x is not None
    x, codes, scales = _three(x)
    below, at_weight = _OPERATORS[numbers].convolution(
        g, x, weight, codes, scales, seed, stream, *_lists(geometry)
    )
    return below if wanted[0] else None, at_weight if wanted[1] else None


def _three(x: Tensor | Packed | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return (None, *x) if isinstance(x, Packed) else (x, None, None)


def _lists(geometry: Geometry) -> tuple[Any, ...]:
    lists = (
        geometry.kernel, geometry.stride, geometry.padding, geometry.dilation, geometry.spatial,
    )  # fmt: skip
    return (*map(list, lists), geometry.groups)


def pack(x: Tensor, seed: Tensor, stream: int = 0, numbers: str = "int8") -> Packed:
    """The codes of ``x`` ``(rows, in)`` as :func:`vjps` reads them, and their scales.

    Returns:
        uint8 ``(rows rounded up to 4, in rounded up to 16)`` and ``(ceil(rows / 256), 2, in)``; one block
        of all rows where the numbers are floats.
    """
    return Packed(*_OPERATORS[numbers].pack(x, seed, stream))


def unpack(packed: Packed, rows: int, numbers: str = "int8") -> Tensor:
    """``(rows, in)``: the rounded tensor of which :func:`pack` kept the codes, in the dtype of its scales."""
    codes, stats = packed
    own = NUMBERS[numbers]
    scales = stats[:, 0].repeat_interleave(min(own.block, max(rows, 1)), 0)[:rows]
    return eager.unpack(codes, rows, stats.shape[2], own) * scales


def pack_images(
    x: Tensor, geometry: Geometry, seed: Tensor, stream: int = 0, numbers: str = "int8"
) -> Packed:
    """The codes of ``x`` ``(samples, in, *spatial)`` as :func:`convolution_vjps` reads them.

    Returns:
        uint8 in the shape of what the convolution reads of x, and the scales, ``(blocks of samples, in)``.
    """
    if (dense := geometry.dense()) is not None:
        return pack_images(geometry.read(x), dense, seed, stream, numbers)
    return Packed(*_OPERATORS[numbers].pack_images(x, seed, stream, *_lists(geometry)))


def unpack_images(packed: Packed, geometry: Geometry, numbers: str = "int8") -> Tensor:
    """The rounded tensor of which :func:`pack_images` kept the codes, in the dtype of its scales."""
    if (dense := geometry.dense()) is not None:
        return geometry.place(unpack_images(packed, dense, numbers))
    codes, scales = packed
    each = scales.repeat_interleave(geometry.samples_of_block(), 0)[: codes.shape[0]]
    values = NUMBERS[numbers].decode(codes).to(scales.dtype)
    return values * each.view(*each.shape, *[1] * (codes.ndim - 2))


def is_fast(device: torch.device | str = "cpu", numbers: str = "int8") -> bool:
    """Whether 8-bit products are expected to beat those of float32 on this device."""
    return not why_slow(device, numbers)


def why_slow(device: torch.device | str = "cpu", numbers: str = "int8") -> str:
    """Why no gain in time is expected of 8-bit products on this device; empty if one is."""
    return _WHY_SLOW[numbers](torch.device(device))


_ON_A_GPU = "on an H200 they gain against TF32 in layers of thousands of features, and lose against bfloat16"


def _why_int8_slow(device: torch.device) -> str:
    if device.type != "cpu":
        return gpu.why_not(device, "int8") or _ON_A_GPU
    kernels = native.library()
    if kernels is None:
        return native.SOURCE.why_not() or "the compiled kernels failed their self-test"
    return "" if kernels.is_fast else "this processor has no AVX-512 VNNI instructions"


def _why_float8_slow(device: torch.device) -> str:
    if has_float8_product(device):
        return gpu.why_not(device, "float8") or _ON_A_GPU
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
        self.convolution_vjps = partial(images.convolution_vjps, numbers=NUMBERS[numbers])
        self.pack_images = partial(images.pack, numbers=NUMBERS[numbers])


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


def _images_implementation(g: Tensor, numbers: str, fits: bool) -> tuple[Any, torch.dtype]:
    """The same for convolutions, which have kernels on the CPU alone."""
    run, dtype = _implementation(g, numbers)
    if fits and g.device.type == "cpu":
        return run, dtype
    return _Eager(numbers), torch.promote_types(g.dtype, torch.float32)


def _vjps_impl(
    numbers: str, g: Tensor, x: Tensor | None, weight: Tensor | None, codes: Tensor | None, stats: Tensor | None,
    seed: Tensor, stream: int, with_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if g.shape[0] == 0:
        shapes = _vjps_fake(g, x, weight, codes, stats, seed, stream, with_bias)
        below, at_weight, at_bias = map(torch.zeros_like, shapes)
        return below, at_weight, at_bias
    run, dtype = _implementation(g, numbers)
    same = [None if t is None else t.to(dtype).contiguous() for t in (g, x, weight)]
    packed = None if codes is None else (codes, stats)
    results = run.vjps(*same, packed, _keys(seed, stream), with_bias)
    below, at_weight, at_bias = (g.new_empty(0) if r is None else r.to(g.dtype) for r in results)
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
    if not x.numel():
        codes, stats = map(torch.zeros_like, _pack_fake(numbers, x, seed, stream))
        return codes, stats
    run, dtype = _implementation(x, numbers)
    codes, stats = run.pack(x.to(dtype).contiguous(), key_of(seed, stream))
    return codes, stats


def _pack_fake(numbers: str, x: Tensor, seed: Tensor, stream: int) -> tuple[Tensor, Tensor]:
    n, j = x.shape
    by_columns = eager.is_by_columns(x.device)
    shape = (padded(j), padded(n)) if by_columns else (depth_of(n), up(j, 16))
    statistics = (NUMBERS[numbers].num_blocks(n), 1 if by_columns else 2, j)
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(shape, dtype=torch.uint8), x.new_empty(statistics, dtype=dtype)


def _convolution_impl(
    numbers: str, g: Tensor, x: Tensor | None, weight: Tensor | None, codes: Tensor | None, scales: Tensor | None,
    seed: Tensor, stream: int, *lists: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    below, at_weight = _convolution_fake(g, x, weight, codes, scales, seed, stream, *lists)
    if not g.numel():
        return below.zero_(), at_weight.zero_()
    layout = _layout_of(g, x)
    geometry = Geometry(*lists).plane()
    run, dtype = _images_implementation(g, numbers, geometry.fits_integers(g.shape[1]))
    codes, x = (t if t is None else geometry.inputs_of(t) for t in (codes, x))
    weight = weight if weight is None else geometry.taps(weight)
    layouts = (layout, layout, torch.contiguous_format)
    same = [
        None if t is None else t.to(dtype).contiguous(memory_format=own)
        for t, own in zip((geometry.cotangents_of(g), x, weight), layouts)
    ]
    packed = None if codes is None else (codes, scales)
    first, second = run.convolution_vjps(*same, packed, _keys(seed, stream), geometry)
    if first is not None:
        first = first.to(below.dtype).view(below.shape).contiguous(memory_format=layout)
    if second is not None:
        second = second.to(at_weight.dtype).contiguous().view(at_weight.shape)
    return below if first is None else first, at_weight if second is None else second


def _layout_of(g: Tensor, x: Tensor | None) -> torch.memory_format:
    """The memory format of the gradient of an input."""
    return images.layout_of(g if x is None else x)


def _convolution_fake(
    g: Tensor, x: Tensor | None, weight: Tensor | None, codes: Tensor | None, scales: Tensor | None,
    seed: Tensor, stream: int, kernel: list[int], stride: list[int], padding: list[int],
    dilation: list[int], spatial: list[int], groups: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    n, o = g.shape[:2]
    whole = x if x is not None else codes
    below = at_weight = g.new_empty(0)
    if weight is not None:
        shape = n, weight.shape[1] * groups, *spatial
        below = torch.empty(shape, dtype=g.dtype, device=g.device, memory_format=_layout_of(g, x))
    if whole is not None:
        at_weight = g.new_empty(o, whole.shape[1] // groups, *kernel)
    return below, at_weight


def _pack_images_impl(
    numbers: str, x: Tensor, seed: Tensor, stream: int, *lists: Any
) -> tuple[Tensor, Tensor]:
    if not x.numel():
        codes, scales = map(torch.zeros_like, _pack_images_fake(x, seed, stream, *lists))
        return codes, scales
    geometry = Geometry(*lists).plane()
    planes = geometry.inputs_of(x)
    run, dtype = _images_implementation(x, numbers, planes.ndim == 4)
    codes, scales = run.pack_images(
        planes.to(dtype).contiguous(memory_format=images.layout_of(planes)),
        key_of(seed, stream),
        geometry,
    )
    return codes.contiguous().view(x.shape), scales


def _pack_images_fake(x: Tensor, seed: Tensor, stream: int, *lists: Any) -> tuple[Tensor, Tensor]:
    together = Geometry(*lists).samples_of_block()
    blocks = (x.shape[0] + together - 1) // together
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.empty_like(
        x, dtype=torch.uint8, memory_format=torch.contiguous_format
    ), x.new_empty(blocks, x.shape[1], dtype=wide)


def _keys(seed: Tensor, stream: int) -> tuple[eager.Key, eager.Key, eager.Key, eager.Key]:
    first, second, third, fourth = (key_of(seed, _STREAMS * stream + i) for i in range(_STREAMS))
    return first, second, third, fourth


class _Operators(NamedTuple):
    """Those of one set of numbers."""

    vjps: Any
    pack: Any
    convolution: Any
    pack_images: Any


_GEOMETRY = (
    "int[] kernel, int[] stride, int[] padding, int[] dilation, SymInt[] spatial, int groups"
)


def _operators(numbers: str) -> _Operators:
    return _Operators(
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
        operator(
            f"{numbers}_convolution(Tensor g, Tensor? x, Tensor? weight, Tensor? codes, Tensor? scales,"
            f" Tensor seed, int stream, {_GEOMETRY}) -> (Tensor, Tensor)",
            partial(_convolution_impl, numbers),
            _convolution_fake,
        ),
        operator(
            f"{numbers}_pack_images(Tensor x, Tensor seed, int stream, {_GEOMETRY}) -> (Tensor, Tensor)",
            partial(_pack_images_impl, numbers),
            _pack_images_fake,
        ),
    )


_OPERATORS = {numbers: _operators(numbers) for numbers in NUMBERS}
