"""Signals that are not lost: Python forgets an exception that comes within a finalizer or a callback."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["asked", "noted"]

_asked: list[int] = []


@contextmanager
def noted(*signums: int) -> Iterator[None]:
    """Context in which these signals raise KeyboardInterrupt and are remembered; SIGINT by default.

    Blocks nest, and what came in an outer one is remembered in an inner one.
    """
    if threading.current_thread() is not threading.main_thread():  # the only one allowed to ask
        yield
        return
    is_outermost = signal.getsignal(signal.SIGINT) is not _note
    before = {signum: signal.signal(signum, _note) for signum in signums or (signal.SIGINT,)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        if is_outermost:
            _asked.clear()


def asked() -> int:
    """The signal that came in the blocks that are open, whether or not its exception arrived; 0 if none did."""
    return _asked[0] if _asked else 0


def _note(signum: int, frame: FrameType | None) -> None:
    _asked.append(signum)
    raise KeyboardInterrupt
