"""A line on the terminal about a capture that takes long."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["told_if_slow"]

_SECONDS = 2.0


@contextmanager
def told_if_slow(name: str) -> Iterator[None]:
    """Say on a terminal's stderr that a region is captured, if that takes over two seconds."""
    stream = sys.stderr
    if stream is None or not stream.isatty():
        yield
        return
    line = f"backsketch: capturing {name or 'the model'} as a region, once"
    told = threading.Event()

    def tell() -> None:
        told.set()
        print(f"{line} ...", end="", file=stream, flush=True)

    began = time.perf_counter()
    timer = threading.Timer(_SECONDS, tell)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()  # a line that has begun is ended
        if told.is_set():
            print(f"\r{line}: {time.perf_counter() - began:.1f} s", file=stream, flush=True)
