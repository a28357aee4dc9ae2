"""The call that is running in this thread: whose forward pass it is, and with which arguments.

A captured graph is shared by all regions of one class, and PyTorch calls it, and the code that captures
it, with tensors only. So the call is kept beside the arguments: one for each thread, put in place and
taken away by :func:`run_as`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from backsketch.regions.state import Runtime
from backsketch.torch_private import traced_as_constant

__all__ = ["Call", "current", "inside", "run_as"]

T = TypeVar("T")


class Call(NamedTuple):
    """One forward pass of a region; ``lead`` are the leading sizes that count rows.

    ``lead`` and ``inputs`` (arguments and keyword arguments) are needed while a graph is captured.
    """

    region: Runtime
    lead: tuple[int, ...] = ()
    inputs: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})


class _Thread(threading.local):
    call: Call | None = None


_THREAD = _Thread()


def current() -> Call | None:
    """The region's call that runs in this thread, if any."""
    return _THREAD.call


@traced_as_constant
def inside() -> bool:
    """Whether a region's forward pass runs, or is captured, in this thread: those inside it are exact."""
    return _THREAD.call is not None


def run_as(call: Call, function: Callable[..., T], *arguments: Any) -> T:
    """``function(*arguments)`` as part of ``call``; the one before is current again afterwards."""
    before, _THREAD.call = _THREAD.call, call
    try:
        return function(*arguments)
    finally:
        _THREAD.call = before
