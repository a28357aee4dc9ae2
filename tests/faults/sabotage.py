"""Faults put into the library on purpose, which the campaign has to find."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from backsketch.train import checkpoint, loop

__all__ = ["MUTATIONS"]


def _forget_random_state() -> None:
    """A resumed run draws other sketches than the one that went on."""
    loop.set_random_state = lambda device, state: None


def _forget_moments() -> None:
    """A resumed run begins with an optimizer that has seen nothing."""
    load = loop.Trainer.load_state_dict

    def forgetful(self: Any, state: Mapping[str, Any]) -> None:
        load(self, state)
        self.optimizer.optimizer.state.clear()

    loop.Trainer.load_state_dict = forgetful


def _write_in_place() -> None:
    """A checkpoint is written over the one before, and for a while there is half of it."""

    def write(path: Path, content: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            file.write(content[: len(content) // 2])
            file.flush()
            time.sleep(0.3)
            file.write(content[len(content) // 2 :])

    checkpoint.write_whole = write


MUTATIONS: Mapping[str, Callable[[], None]] = {
    "random state": _forget_random_state,
    "moments": _forget_moments,
    "torn file": _write_in_place,
}
