"""How many steps of a training were made with which sketches, and what arithmetic that was."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import nn

from backsketch.convert import restore_, sketch_
from backsketch.planning.auto.proposals import Rules, parsed
from backsketch.planning.control.sites import movable_sites, set_keeps
from backsketch.planning.measure.passes import LossFn
from backsketch.planning.measure.step import backward_flops

__all__ = ["Usage"]


class Usage:
    """Counts the sketched steps.

    Attributes:
        rules: all that were used, in order.
        steps: how many were made with which of them, at which keeps; none before there is a controller.
    """

    def __init__(self) -> None:
        self.rules: list[Rules] = []
        self.steps: Counter[tuple[int, tuple[float, ...]]] = Counter()

    def add(self, rules: Rules, keeps: Mapping[str, float]) -> None:
        """One more step."""
        if rules not in self.rules:
            self.rules.append(rules)
        self.steps[self.rules.index(rules), tuple(keeps.values())] += 1

    def mean_arithmetic(
        self, model: nn.Module, batch: Any, loss_fn: LossFn[Any], steps: int
    ) -> float:
        """Mean over all steps: matrix products of the backward pass over those of an exact one.

        Args:
            model: as it is at the end; it stays what it is.
            batch: that is counted with.
            loss_fn: ``loss_fn(model, batch)``.
            steps: how many there were, the exact ones included.
        """
        core = restore_(copy.deepcopy(model))
        exact = backward_flops(core, batch, loss_fn)
        arithmetic = float(steps - self.steps.total())
        for (number, keeps), count in self.steps.items():
            sketch_(core, parsed(self.rules[number]))
            set_keeps(movable_sites(core), keeps)
            arithmetic += count * backward_flops(core, batch, loss_fn) / exact
        return arithmetic / steps

    def state_dict(self) -> dict[str, Any]:
        """Plain data."""
        steps = [[number, list(keeps), count] for (number, keeps), count in self.steps.items()]
        return {"rules": list(self.rules), "steps": steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.rules = list(state["rules"])
        self.steps = Counter({(i, tuple(keeps)): n for i, keeps, n in state["steps"]})
