"""What the kernels for NVIDIA GPUs need: Triton, the right device, integers as Triton takes them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch

__all__ = ["on", "signed", "why_not"]


@lru_cache
def why_not(device: torch.device, agrees: Callable[[torch.device], bool]) -> str:
    """Why some kernels cannot be used on this device; empty if they can.

    Args:
        device: any.
        agrees: the self-test of the kernels, which is run once: whether they compute what their twin does.
    """
    if device.type != "cuda" or torch.version.hip:
        return "there are kernels for the CPU and for NVIDIA GPUs only"
    if find_spec("triton") is None:
        return "the kernels for GPUs need Triton, which is not installed"
    try:
        works = agrees(device)
    except Exception as error:
        return f"the kernels for GPUs do not compile or run here ({type(error).__name__})"
    return "" if works else "the kernels for GPUs failed their self-test"


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Launches go to the current device: inside the block that is this one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def signed(word: int) -> int:
    """The same 32 bits as a number below 2^31: int32 tensors hold no larger one, Triton takes it for 64 bits."""
    return word - (1 << 32) if word >> 31 else word
