"""The fused host kernels of ``int8.cpp``, called with tensors; ``eager.py`` does the same, bit for bit."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from backsketch.native import Source
from backsketch.products import convolution, eager
from backsketch.products.convolution import Geometry, is_channels_last, layout_of

__all__ = ["SOURCE", "Kernels", "library"]

_PER_THREAD = 1 << 20  # multiply-adds that are worth a thread

SOURCE = Source(Path(__file__).with_name("int8.cpp"), "-fopenmp")


class Kernels:
    """The compiled functions, called with tensors: contiguous, on the host, float32 or bfloat16."""

    def __init__(self, compiled: ctypes.CDLL) -> None:
        self._library = compiled
        self.is_fast = bool(compiled.backsketch_int8_is_fast())
        """Whether the processor has the instructions that make integer products faster than float ones."""
        self.with_tiles = self.use_tiles(True)
        """Whether products run in the processor's matrix registers (AMX), several times as fast as in vectors."""

    def use_tiles(self, wanted: bool) -> bool:
        """Allow or forbid the matrix registers, in the whole process; whether they are used from now on."""
        self.with_tiles = bool(self._library.backsketch_int8_tiles(int(wanted)))
        return self.with_tiles

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
        n, o = g.shape
        j = weight.shape[1] if weight is not None else _width(x, packed)
        grad_input = None if weight is None else torch.empty(n, j)
        grad_weight = None if x is None and packed is None else torch.empty(o, j)
        grad_bias = torch.empty(o) if with_bias else None
        codes, stats = packed or (None, None)
        done = self._library.backsketch_int8_vjps(
            _at(g), _at(x), _at(weight), _at(codes), _at(stats), _i64(n), _i64(o), _i64(j),
            _words(keys), _is_bfloat(g),
            _at(grad_input), _at(grad_weight), _at(grad_bias), _threads(n * o * max(j, 1)),
        )  # fmt: skip
        if not done:
            raise MemoryError("no memory for the codes of an 8-bit product")
        return grad_input, grad_weight, grad_bias

    def pack(self, x: Tensor, key: eager.Key) -> tuple[Tensor, Tensor]:
        """See :func:`backsketch.products.eager.pack`."""
        n, j = x.shape
        codes = torch.empty(eager.depth_of(n), eager.up(j, 16), dtype=torch.uint8)
        stats = torch.empty(-(-n // eager.BLOCK), 2, j)
        first, second = (ctypes.c_uint32(word) for word in key)
        self._library.backsketch_int8_pack(
            _at(x), _i64(n), _i64(j), first, second, _is_bfloat(x), _at(codes), _at(stats), _threads(64 * n * j)
        )  # fmt: skip
        return codes, stats

    def convolution_vjps(
        self,
        g: Tensor,
        x: Tensor | None,
        weight: Tensor | None,
        packed: tuple[Tensor, Tensor] | None,
        keys: tuple[eager.Key, ...],
        geometry: Geometry,
    ) -> tuple[Tensor | None, Tensor | None]:
        """See :func:`backsketch.products.convolution.convolution_vjps`; the results are float32.

        All tensors are contiguous, or g and x are channels last, as the gradient of the input is then.
        """
        n, o = g.shape[:2]
        codes, steps = packed or (None, None)
        inner = _inner_channels(x, weight, codes, geometry)
        c = inner * geometry.groups
        images = g if x is None else x
        below = None
        if weight is not None:
            below = torch.empty(n, c, *geometry.spatial, memory_format=layout_of(images))
        wanted = x is not None or packed is not None
        at_weight = torch.empty(o, inner, *geometry.kernel) if wanted else None
        done = self._library.backsketch_int8_convolution(
            _at(g), _at(x), _at(weight), _at(codes), _at(steps), _sizes(n, c, o, geometry), _words(keys),
            _is_bfloat(g), int(is_channels_last(images)), _at(below), _at(at_weight),
            _threads(g.numel() * inner * prod(geometry.kernel)),
        )  # fmt: skip
        if not done:
            raise MemoryError("no memory for the codes of an 8-bit convolution")
        return below, at_weight

    def pack_images(self, x: Tensor, key: eager.Key, geometry: Geometry) -> tuple[Tensor, Tensor]:
        """See :func:`backsketch.products.convolution.pack`; x is contiguous or channels last."""
        n, c = x.shape[:2]
        codes = torch.empty(x.shape, dtype=torch.uint8)
        steps = torch.empty(-(-n // geometry.samples_of_block()), c)
        first, second = (ctypes.c_uint32(word) for word in key)
        self._library.backsketch_int8_pack_images(
            _at(x), _sizes(n, c, 1, geometry), first, second, _is_bfloat(x), int(is_channels_last(x)),
            _at(codes), _at(steps), _threads(64 * x.numel()),
        )  # fmt: skip
        return codes, steps


_i64 = ctypes.c_int64


def _words(keys: tuple[eager.Key, ...]) -> ctypes.Array[ctypes.c_uint32]:
    return (ctypes.c_uint32 * 8)(*(word for key in keys for word in key))


def _inner_channels(
    x: Tensor | None, weight: Tensor | None, codes: Tensor | None, geometry: Geometry
) -> int:
    """Input channels of a group."""
    if weight is not None:
        return weight.shape[1]
    images = x if x is not None else codes
    return 0 if images is None else images.shape[1] // geometry.groups


def _sizes(n: int, c: int, o: int, geometry: Geometry) -> ctypes.Array[ctypes.c_int64]:
    axes = zip(
        geometry.spatial, geometry.outputs(), geometry.kernel,
        geometry.stride, geometry.padding, geometry.dilation,
    )  # fmt: skip
    return (_i64 * 16)(n, c, o, geometry.groups, *(size for axis in axes for size in axis))


def _at(tensor: Tensor | None) -> ctypes.c_void_p | None:
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())


def _is_bfloat(tensor: Tensor) -> int:
    return int(tensor.dtype == torch.bfloat16)


def _width(x: Tensor | None, packed: tuple[Tensor, Tensor] | None) -> int:
    return x.shape[1] if x is not None else packed[1].shape[2] if packed else 0


def _threads(work: int) -> int:
    return max(1, min(torch.get_num_threads(), work // _PER_THREAD))


@lru_cache(maxsize=1)
def library() -> Kernels | None:
    """The kernels, compiled and loaded if they are not; None where that is impossible or they compute wrongly."""
    compiled = SOURCE.library()
    if compiled is None:
        return None
    kernels = Kernels(compiled)
    if agrees(kernels) or (kernels.with_tiles and not kernels.use_tiles(False) and agrees(kernels)):
        return kernels
    return None


def agrees(kernels: Kernels) -> bool:
    """Whether the kernels compute what their twin does: processors differ in how they add products of bytes."""
    generator = torch.Generator().manual_seed(0)
    g, x, weight = (
        torch.randint(2, shape, generator=generator) * 2.0 - 1  # codes at both ends of their range
        for shape in ((261, 67), (261, 35), (67, 35))
    )
    keys = ((1, 2), (3, 4), (5, 6), (7, 8))
    cases = [(x, None), (None, kernels.pack(x, keys[2]))]
    geometry = Geometry((3, 2), (1, 2), (1, 0), (1, 1), (9, 12))
    extremes = (
        torch.randint(2, (2 * 9 * (9 * 12 + 33 * 6) + 33 * 9 * 6,), generator=generator) * 2.0 - 1
    )
    images, g4, w4 = extremes.split([2 * 9 * 9 * 12, 2 * 33 * 9 * 6, 33 * 9 * 6])
    convolved = g4.view(2, 33, 9, 6), images.view(2, 9, 9, 12), w4.view(33, 9, 3, 2), None, keys
    pairs = [
        *zip(
            kernels.convolution_vjps(*convolved, geometry),
            convolution.convolution_vjps(*convolved, geometry),
        )
    ]
    for own, packed in cases:
        arguments = g, own, weight, packed, keys, False
        pairs += zip(kernels.vjps(*arguments)[:2], eager.vjps(*arguments)[:2])
    return all(a is not None and b is not None and torch.equal(a, b) for a, b in pairs)
