"""SGD with a constant step size until a target: how many steps, on average over seeds, and their cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import backsketch as bs
from backsketch.experiments.problems.objective import Objective, objective

__all__ = ["Descent", "run"]

CURVE_POINTS = 20


@dataclass(frozen=True)
class Descent:
    """One arm at one step size.

    Attributes:
        data, limit: dataset and how many of its training images.
        widths: of the MLP; empty for logistic regression.
        l2: of the regulariser.
        sketch: text for :func:`backsketch.parse`, or ``"none"``.
        lr: constant step size.
        batch_size: rows per step, drawn with replacement.
        target: the gap ``F − F*`` to reach; for the MLP the loss itself.
        max_steps: give up there.
        seeds: runs; the mean of their gaps is what has to reach the target, as in the theorems.
    """

    data: str
    sketch: str
    lr: float
    target: float
    limit: int | None = None
    widths: Sequence[int] = ()
    l2: float = 0.0
    batch_size: int = 64
    max_steps: int = 4000
    seeds: int = 4


def run(options: Descent) -> dict[str, Any]:
    """Mean gap at some steps, the steps to the target (None if not reached) and the cost of a step."""
    task = objective(options.data, options.limit, options.l2, tuple(options.widths))
    seeds = [_Run(task, options, seed) for seed in range(options.seeds)]
    steps, gaps, errors = [0], [_mean([r.gap() for r in seeds])], [0.0]
    for step in schedule(options.max_steps):
        found = torch.tensor([r.until(step) for r in seeds], dtype=torch.float64)
        steps.append(step)
        gaps.append(float(found.mean()))
        errors.append(float(found.std() / len(seeds) ** 0.5))
        if gaps[-1] <= options.target or not gaps[-1] <= 10 * gaps[0]:
            break
    shown = slice(None, None, max(1, len(steps) // CURVE_POINTS))
    return {
        "reached": _crossing(steps, gaps, options.target),
        "last_gap": gaps[-1],
        "last_gap_error": errors[-1],
        "step": steps[shown],
        "gap": gaps[shown],
        "cost": step_cost(task, options),
        "smoothness": task.smoothness,
        "strong_convexity": task.strong_convexity,
    }


class _Run:
    """One seed: the same rows in every arm, draws of its own."""

    def __init__(self, task: Objective, options: Descent, seed: int) -> None:
        self.task, self.options, self.step = task, options, 0
        self.model = task.build(seed)
        sketch_(self.model, options.sketch)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), options.lr, weight_decay=options.l2
        )
        self.rows = torch.Generator().manual_seed(1000 + seed)
        bs.seed(seed)
        self.draws = bs.get_rng_state()

    def gap(self) -> float:
        return self.task.gap(self.model)

    def until(self, step: int) -> float:
        """Go on to a step; the gap there."""
        bs.set_rng_state(self.draws)
        while self.step < step:
            rows = torch.randint(len(self.task.y), (self.options.batch_size,), generator=self.rows)
            self.optimizer.zero_grad()
            self.task.loss(self.model, rows).backward()
            self.optimizer.step()
            self.step += 1
        self.draws = bs.get_rng_state()
        return self.gap()


def sketch_(model: nn.Module, text: str) -> None:
    """Sketch a model from text; ``none`` leaves it exact."""
    if text != "none":
        bs.sketch_(model, bs.parse(text))


def step_cost(task: Objective, options: Descent) -> float:
    """Matrix products of a step over those of the exact step, counted by PyTorch."""
    return _flops(task, options, options.sketch) / _flops(task, options, "none")


def _flops(task: Objective, options: Descent, sketch: str) -> int:
    model = task.build(0)
    sketch_(model, sketch)
    rows = torch.arange(options.batch_size) % len(task.y)
    state = bs.get_rng_state()
    with FlopCounterMode(display=False) as counter:
        task.loss(model, rows).backward()
    bs.set_rng_state(state)
    return counter.get_total_flops()


def schedule(last: int) -> list[int]:
    """Steps at which the gap is looked at: 6 % apart."""
    steps = {round(1.06**i) for i in range(1, 1 + int(math.log(last) / math.log(1.06)))}
    return sorted(s for s in steps | {last} if s > 0)


def _crossing(steps: list[int], gaps: list[float], target: float) -> float | None:
    """Where the curve first meets the target, log-linear in between."""
    for i, gap in enumerate(gaps):
        if gap <= target:
            if i == 0:
                return 0.0
            share = math.log(gaps[i - 1] / target) / math.log(gaps[i - 1] / max(gap, 1e-300))
            return steps[i - 1] + share * (steps[i] - steps[i - 1])
    return None


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
