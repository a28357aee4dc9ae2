"""How a run ends early: an error that a user can set right, or a signal after which a checkpoint is written."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from backsketch.files import UserError
from backsketch.signals import asked


class TrainError(UserError):
    """An option, a dataset or a checkpoint that cannot be used."""


class Interrupted(Exception):
    """The run was stopped by a signal, after a checkpoint."""

    def __init__(self, checkpoint: Path, signum: int):
        super().__init__(f"stopped; the checkpoint is {checkpoint}")
        self.checkpoint = checkpoint
        self.exit_code = 128 + signum


class StopRequest:
    """Context in which the first SIGINT or SIGTERM is noted and the second acts as usual.

    Before :meth:`wait_for_steps` a SIGTERM acts as usual, even while this process waits for another one, and a
    SIGINT at once; it is noted since Python forgets an exception that comes within a finalizer.

    Attributes:
        signum: the signal; 0 before there was one.
    """

    def __init__(self) -> None:
        self.signum = asked()  # one whose exception was lost
        self._gently = False
        self._before: dict[int, Any] = {}

    def wait_for_steps(self) -> None:
        """From now on the first signal acts at the end of a step, which is for the training to see to."""
        self._gently = True
        if self._before:
            self._note_also(signal.SIGTERM)

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # the only one allowed to ask
            self._note_also(signal.SIGINT)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _note_also(self, signum: int) -> None:
        if signum not in self._before:
            self._before[signum] = signal.signal(signum, self._note)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        self._restore()
        if not self._gently:
            raise KeyboardInterrupt

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())
