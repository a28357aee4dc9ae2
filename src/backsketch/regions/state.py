"""What is mutable about a region: how its capture went, and which region a backward pass belongs to."""

from __future__ import annotations

import weakref
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from backsketch.regions.spec import Region

__all__ = ["RegionState", "state_of"]

Status = Literal["pending", "active", "exact"]


@dataclass(eq=False)
class RegionState:
    """The live side of one region.

    ``status`` is ``"pending"`` until the first backward pass has been checked, then ``"active"``, or
    ``"exact"`` with a ``reason`` where the region cannot be sketched without bias. ``trace``, where someone
    put one, collects the row norms of the cotangents that were sampled.
    """

    name: str = ""
    status: Status = "pending"
    reason: str | None = None
    spec: Region | None = None
    live_fraction: float | None = None
    trace: deque[Tensor] | None = None
    refused: bool = False
    runner: Any = None
    exhausted: list[Any] = field(default_factory=list)
    seen: set[Any] = field(default_factory=set)

    def settle(self, status: Status, reason: str | None = None) -> None:
        """Record the outcome of a guard."""
        self.status, self.reason = status, reason

    def refuse(self, reason: str) -> None:
        """Run exactly from now on."""
        self.refused = True
        self.settle("exact", reason)


_STATES: weakref.WeakKeyDictionary[nn.Module, RegionState] = weakref.WeakKeyDictionary()


def state_of(module: nn.Module, name: str = "") -> RegionState:
    """The state of a module's region, made on first use; a copied module starts afresh."""
    state = _STATES.get(module)
    if state is None:
        state = _STATES[module] = RegionState(name)
    return state


def forget(module: nn.Module) -> None:
    """Drop a module's state: guards are checked again if it becomes a region again."""
    _STATES.pop(module, None)


class Current:
    """The region whose forward pass is running, and whether one is being captured."""

    state: RegionState | None = None
    lead: tuple[int, ...] = ()
    inputs: Any = ((), {})
    depth = 0


CURRENT = Current()
