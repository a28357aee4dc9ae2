"""What is mutable about a region: how it went, for anybody to read, and what it needs to run."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from backsketch.regions.spec import Region

__all__ = [
    "RegionState",
    "RunsExactly",
    "Runtime",
    "forget",
    "ignore_scores",
    "record_scores",
    "runtime_of",
    "scores_of",
    "state_of",
]

Status = Literal["pending", "active", "exact"]


class RunsExactly(UserWarning):
    """A region runs exactly, because its backward pass cannot be sketched without bias."""


@dataclass(eq=False)
class RegionState:
    """How a region is doing; to be read, its region alone writes it.

    ``status`` is ``"pending"`` until the first backward pass has been checked, then ``"active"``, or
    ``"exact"`` with a ``reason`` where the region cannot be sketched without bias. ``note`` tells what was found
    about an active one.
    """

    name: str = ""
    status: Status = "pending"
    reason: str | None = None
    note: str = ""


@dataclass(eq=False)
class Runtime:
    """What a region needs to run: caches that may be dropped at any time, at the price of a capture.

    ``spec`` is the sketch of the current forward pass, ``runner`` the compiled call that fits it,
    ``exhausted`` holds runners that were recompiled too often, ``seen`` the signatures of arguments that
    were captured. ``live_fraction`` is the share of rows with a cotangent, where counting them would
    wait for an accelerator. ``scores``, where somebody records, collects the row norms of cotangents;
    ``told`` holds the reasons for exact execution that were warned of.
    """

    state: RegionState
    spec: Region | None = None
    refused: bool = False
    runner: Any = None
    exhausted: list[Any] = field(default_factory=list)
    seen: set[Any] = field(default_factory=set)
    live_fraction: float | None = None
    scores: deque[Tensor] | None = None
    told: set[str] = field(default_factory=set)

    def settle(
        self, status: Status, reason: str | None = None, note: str = "", instead: str = ""
    ) -> None:
        """Write down the outcome of a guard; a new reason for exact execution is warned of, once.

        The warning ends with what to write ``instead``.
        """
        self.state.status, self.state.reason, self.state.note = status, reason, note
        if status == "exact" and reason and reason not in self.told:
            self.told.add(reason)
            name = self.state.name or "the model"
            told = f"the region {name} runs exactly: {reason}" + (f". {instead}" if instead else "")
            warnings.warn(told, RunsExactly, stacklevel=3)

    def refuse(self, reason: str, instead: str = "") -> None:
        """Run exactly from now on."""
        self.refused = True
        self.settle("exact", reason, instead=instead)


_RUNTIMES: weakref.WeakKeyDictionary[nn.Module, Runtime] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


def runtime_of(module: nn.Module, name: str = "") -> Runtime:
    """The run-time side of a module's region, made on first use; a copied module starts afresh."""
    runtime = _RUNTIMES.get(module)
    if runtime is None:
        with _LOCK:
            runtime = _RUNTIMES.setdefault(module, Runtime(RegionState(name)))
    return runtime


def state_of(module: nn.Module, name: str = "") -> RegionState:
    """The state of a module's region, made on first use; a copied module starts afresh."""
    return runtime_of(module, name).state


def forget(module: nn.Module) -> None:
    """Drop a module's state: guards are checked again if it becomes a region again."""
    _RUNTIMES.pop(module, None)


def record_scores(module: nn.Module, length: int) -> deque[Tensor]:
    """Collect the row norms of the cotangents that a region samples, the last ``length`` of them.

    Args:
        module: a region.
        length: how many backward passes to remember.

    Returns:
        A queue of float ``(rows,)``, which grows with each sketched backward pass.
    """
    runtime = runtime_of(module)
    runtime.scores = deque(maxlen=length)
    return runtime.scores


def scores_of(module: nn.Module) -> deque[Tensor] | None:
    """The queue that :func:`record_scores` returned last for a region, None where nobody records."""
    return runtime_of(module).scores


def ignore_scores(module: nn.Module) -> None:
    """Stop what :func:`record_scores` began."""
    runtime_of(module).scores = None
