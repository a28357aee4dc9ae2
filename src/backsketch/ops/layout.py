"""The memory format of images, for gradients to have that of their input."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["format_of", "in_format"]

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


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
        return x.contiguous()
    return x.movedim(1, -1).contiguous().movedim(-1, 1)
