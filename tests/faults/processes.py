"""Processes that start warm: forked from one that has imported everything, so that a run takes a second or two."""

from __future__ import annotations

import os
import resource
import selectors
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

__all__ = ["Process", "children"]

SIGNALS = {signal.SIGINT, signal.SIGTERM}


class Process:
    """A forked process in a session of its own, whose output is kept.

    Args:
        work: what it does; its result, or the code of the SystemExit that it raises, is the exit code.
        folder: where it works.
        environment: variables beside those of this process.
    """

    def __init__(
        self, work: Callable[[], int | None], folder: Path, environment: Mapping[str, str]
    ) -> None:
        reading, writing = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        signal.pthread_sigmask(
            signal.SIG_BLOCK, SIGNALS
        )  # none may come before the child is itself
        self.pid = os.fork()
        if self.pid == 0:
            _become(work, folder, environment, writing)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        os.close(writing)
        os.set_blocking(reading, False)
        self._pipe, self._said = reading, b""
        self._ready = selectors.DefaultSelector()
        self._ready.register(reading, selectors.EVENT_READ)
        self.code: int | None = None
        self.seconds = (
            0.0  # that it has lived, without those in which this process stood still itself
        )
        self.signalled: int | None = None  # when it had said so many bytes
        self._polled = time.monotonic()

    @property
    def said(self) -> str:
        """Its standard output and error so far."""
        return self._said.decode(errors="replace")

    def poll(self, seconds: float = 0.0) -> int | None:
        """Wait so long, or until there is output; the exit code, negative after a signal, None while it runs."""
        if self.code is None:
            self._ready.select(seconds)
            self._drain()
            now = time.monotonic()
            self.seconds += min(now - self._polled, 0.1)
            self._polled = now
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._end(os.waitstatus_to_exitcode(status))
        return self.code

    def wait(self, limit: float) -> int | None:
        """The exit code, or None if it still runs after so many seconds."""
        end = self.seconds + limit
        while self.poll(0.02) is None and self.seconds < end:
            if not self._ready.get_map():  # it closed its output: do not spin
                time.sleep(0.02)
        return self.code

    @property
    def said_after_signal(self) -> str:
        """What it went on to say; empty if it never got one."""
        return (
            "" if self.signalled is None else self._said[self.signalled :].decode(errors="replace")
        )

    def send(self, signum: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, signum)
            self.signalled = len(self._said)

    def fill_disk(self, free: int) -> None:
        """From now on no file of it grows beyond so many bytes: the writes fail as on a full disk."""
        if self.poll() is None:
            resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (free, free))

    def end(self) -> None:
        """Kill it and what it started."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)
            self.wait(10)

    def _drain(self) -> None:
        while self._ready.get_map():
            try:
                part = os.read(self._pipe, 65536)
            except BlockingIOError:
                return
            if not part:
                self._ready.unregister(self._pipe)
                os.close(self._pipe)
            self._said += part

    def _end(self, code: int) -> None:
        self._drain()
        self.code = code
        if self._ready.get_map():  # a process that it started still holds the other end
            self._ready.unregister(self._pipe)
            os.close(self._pipe)


def _become(
    work: Callable[[], int | None], folder: Path, environment: Mapping[str, str], output: int
) -> None:
    """What the child does; it does not return."""
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(folder)
        os.environ.update(environment)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        code = work() or 0
    except SystemExit as asked:
        code = asked.code if isinstance(asked.code, int) else int(asked.code is not None)
    except KeyboardInterrupt:  # before the command had begun
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def children(pid: int) -> list[int]:
    """Process ids of a process's children; none where the system has no such list."""
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for found in lists for child in found.read_text().split()]
