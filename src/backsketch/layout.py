"""The memory format of images: which one a tensor has, and copies from one to the other.

PyTorch copies between the two entry by entry. ``layout.cpp`` transposes squares, several times as fast.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backsketch.native import Source
from backsketch.sampling import is_readable

__all__ = [
    "SOURCE",
    "channels_first",
    "format_of",
    "in_format",
    "in_memory_order",
    "positions_as_rows",
    "rows_as_positions",
]

SOURCE = Source(Path(__file__).with_name("layout.cpp"), "-fopenmp")
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_PER_THREAD = 1 << 15  # entries that are worth a thread


def format_of(x: Tensor) -> torch.memory_format:
    """Channels last where the channels of images lie next to each other, else contiguous.

    By the strides, which compilers and function transforms let one read inside an autograd Function.
    """
    if x.ndim not in _CHANNELS_LAST or x.shape[1] == 1:
        return torch.contiguous_format
    is_last = x.stride(1) == 1 and x.stride(-1) == x.shape[1]
    return _CHANNELS_LAST[x.ndim] if is_last else torch.contiguous_format


def in_format(x: Tensor, wanted: torch.memory_format) -> Tensor:
    """``x`` in a format that :func:`format_of` returns. ``vmap`` refuses to be asked for most of them by name."""
    if wanted is torch.contiguous_format:
        return channels_first(x)
    last = x.movedim(1, -1)
    if not last.is_contiguous() and x.is_contiguous() and (copy := _library(x)) is not None:
        made = x.new_empty(last.shape)
        n, channels, *positions = x.shape
        copy(x, n, channels, prod(positions), made)
        return made.movedim(-1, 1)
    return last.contiguous().movedim(-1, 1)


def in_memory_order(x: Tensor, layout: torch.memory_format) -> Tensor:
    """A view of images, in a format that :func:`format_of` returns, whose entries come as they lie in memory.

    Entry by entry nothing has to be copied then. ``movedim(-1, 1)`` is the way back where channels are last.
    """
    return x if layout is torch.contiguous_format else x.movedim(1, -1)


def positions_as_rows(x: Tensor) -> Tensor:
    """``(samples, channels, *positions)`` as ``(samples * positions, channels)``: a view of channels last."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def rows_as_positions(rows: Tensor, samples: int, positions: Sequence[int]) -> Tensor:
    """Undo :func:`positions_as_rows`. The result is a view, and channels last."""
    return rows.view(samples, *positions, rows.shape[1]).movedim(-1, 1)


def channels_first(x: Tensor) -> Tensor:
    """``x.contiguous()``."""
    if x.ndim not in _CHANNELS_LAST or x.is_contiguous() or not x.movedim(1, -1).is_contiguous():
        return x.contiguous()
    if (copy := _library(x)) is None:
        return x.contiguous()
    made = x.new_empty(x.shape)
    n, channels, *positions = x.shape
    copy(x, n, prod(positions), channels, made)
    return made


def _library(x: Tensor) -> Any:
    """What transposes matrices of entries like those of ``x``, if anything does."""
    if x.element_size() not in (2, 4) or not is_readable(x) or not x.numel():
        return None
    return _transpose if _compiled() is not None else None


@lru_cache(maxsize=1)
def _compiled() -> ctypes.CDLL | None:
    return SOURCE.library()


def _transpose(x: Tensor, n: int, rows: int, columns: int, made: Tensor) -> None:
    library = _compiled()
    assert library is not None
    sizes = (ctypes.c_int64(size) for size in (n, rows, columns))
    library.backsketch_transpose(
        ctypes.c_void_p(x.data_ptr()), *sizes, x.element_size(), ctypes.c_void_p(made.data_ptr()),
        max(1, min(torch.get_num_threads(), x.numel() // _PER_THREAD)),
    )  # fmt: skip
