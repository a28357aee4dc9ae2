"""What the kernels for NVIDIA GPUs need: Triton, the right device, integers as Triton takes them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch

__all__ = ["has_triton", "on", "signed"]


@lru_cache
def has_triton() -> bool:
    """Whether Triton is there, for NVIDIA GPUs."""
    return torch.version.hip is None and find_spec("triton") is not None


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Launches go to the current device: inside the block that is this one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def signed(word: int) -> int:
    """The same 32 bits as a number below 2^31: Triton would take a larger one for one of 64 bits."""
    return word - (1 << 32) if word >> 31 else word
