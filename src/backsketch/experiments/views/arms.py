"""The arms of an equal-cost comparison: each at its own best learning rate, over seeds."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from backsketch.experiments.config import SweepError
from backsketch.experiments.problems.step_time import PARTS
from backsketch.experiments.problems.training import sketch_text
from backsketch.experiments.store import Sweep

__all__ = [
    "Arm",
    "Goal",
    "Run",
    "arms",
    "best_exact",
    "ends_level",
    "mean_error",
    "reached",
    "relative_step",
    "relative_time",
]


@dataclass(frozen=True)
class Run:
    """One finished training run."""

    options: Mapping[str, Any]
    result: Mapping[str, Any]

    @property
    def step_key(self) -> tuple[str, int, str]:
        """What decides how long a step takes."""
        return _step_key({**self.options, "batch_size": self.result["batch_size"]})


@dataclass(frozen=True)
class Goal:
    """What the arms of a comparison have to reach on the test split.

    Attributes:
        value: an accuracy, to be reached from below, or a loss in nats, from above.
        key: ``"accuracy"`` or ``"loss"``.
    """

    value: float
    key: str = "accuracy"

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Goal | None:
        """The goal that the settings of a sweep name: ``target`` or ``target_loss``."""
        if "target_loss" in settings:
            return cls(float(settings["target_loss"]), "loss")
        return cls(float(settings["target"])) if "target" in settings else None

    @property
    def is_loss(self) -> bool:
        """Whether less is better."""
        return self.key == "loss"

    @property
    def name(self) -> str:
        """With the unit, for axes."""
        return "test loss, nats" if self.is_loss else "test accuracy, %"

    @property
    def scale(self) -> float:
        """What a value is multiplied by to be shown."""
        return 1.0 if self.is_loss else 100.0

    @property
    def form(self) -> str:
        """How it is shown then."""
        return "{:.4f}" if self.is_loss else "{:.2f} %"

    def shortfall(self, value: float) -> float:
        """How far a value is from the goal; at most 0 where it is reached."""
        return value - self.value if self.is_loss else self.value - value

    def __str__(self) -> str:
        if self.is_loss:
            return f"a test loss of {self.value:g} nats"
        return f"{100 * self.value:g} % test accuracy"


@dataclass(frozen=True)
class Arm:
    """All runs of an arm at the learning rate that was best on its first seed.

    Attributes:
        step_seconds: of a step on a quiet machine where it was measured, else of the runs themselves.
        quiet: which of the two.
        own_seconds: of a step in the runs themselves, all that the loop does included.
        saved_bytes: kept for the backward pass of a step.
        goal: what it has to reach.
        parts: quiet seconds of forward, backward and optimizer, where they were measured.
        is_twin: whether it makes the steps of another arm at a price of its own: compiled or checkpointed.
    """

    name: str
    runs: Sequence[Run]
    lr: float
    step_seconds: float
    quiet: bool
    saved_bytes: float
    goal: Goal
    own_seconds: float
    parts: Mapping[str, float] = field(default_factory=dict)
    is_twin: bool = False

    @property
    def first(self) -> Run:
        return self.runs[0]

    @property
    def is_sketched(self) -> bool:
        """Whether its gradients are randomized."""
        return self.first.options.get("sketch", "none") != "none"

    @property
    def is_exact(self) -> bool:
        """Whether its gradients are those of float32. Those of autocast are rounded, and not at random."""
        return not self.is_sketched and self._train.get("precision", "fp32") == "fp32"

    @property
    def is_even(self) -> bool:
        """Whether all of its steps have the same arithmetic."""
        return not self.is_twin and self.first.options.get("sketch") != "auto"

    @property
    def model(self) -> str:
        """What else was changed: arms of other models are not compared with each other."""
        rest = {key: value for key, value in self._train.items() if key != "precision"}
        return json.dumps(rest, sort_keys=True)

    @property
    def _train(self) -> Mapping[str, Any]:
        return self.first.options.get("train") or {}

    @property
    def steps(self) -> dict[int, float | None]:
        """Steps to the target by seed; None where it was not reached."""
        return {r.options.get("seed", 0): reached(r.result, self.goal) for r in self.runs}

    @property
    def seconds(self) -> dict[int, float] | None:
        """Seconds to the target by seed; None unless every seed reached it."""
        found = {seed: s * self.step_seconds for seed, s in self.steps.items() if s is not None}
        return found if len(found) == len(self.runs) else None

    @property
    def own(self) -> dict[int, float]:
        """Seconds of a step in the runs themselves, by seed."""
        return {
            r.options.get("seed", 0): r.result["seconds"] / r.result["steps"] for r in self.runs
        }

    @property
    def finals(self) -> list[float]:
        """What the goal is measured by, at the end of training."""
        return [run.result["evaluations"][self.goal.key][-1] for run in self.runs]


def reached(result: Mapping[str, Any], goal: Goal) -> float | None:
    """The step at which the goal is first met, linear between evaluations."""
    # Before the first step nothing is right, and the loss is about that of the first steps.
    before = (0, result["curve"]["train_loss"][0] if goal.is_loss else 0.0)
    looks = result["evaluations"]
    for step, value in zip(looks["step"], looks[goal.key]):
        if goal.shortfall(value) <= 0:
            left = goal.shortfall(before[1])
            share = left / (left - goal.shortfall(value)) if left > 0 else 1.0
            return float(before[0] + share * (step - before[0]))
        before = (step, value)
    return None


def arms(sweep: Sweep) -> list[Arm]:
    """Every arm of a sweep, in its order; a twin follows the arm whose steps it makes.

    Raises:
        SweepError: there is no run, or no target in the settings.
    """
    goal = Goal.of(sweep.settings)
    if goal is None:
        raise SweepError(f"{sweep.name}: an equal-cost report needs a target in its settings")
    runs: dict[str, list[Run]] = {}
    for options, result in sweep.done("training"):
        runs.setdefault(options["arm"], []).append(Run(options, result))
    if not runs:
        raise SweepError(f"{sweep.name}: there is no training run")
    quiet, twins = _quiet_steps(sweep)
    found = []
    for name, own in runs.items():
        made = _arm(name, own, goal, quiet)
        found.append(made)
        for other, entry in twins:
            if made.first.step_key == _step_key(entry["options"]):
                found.append(_twin(made, other, entry))
        twins = [t for t in twins if t[0] not in {a.name for a in found}]
    return found


def best_exact(found: Iterable[Arm], model: str) -> Arm | None:
    """The arm with exact gradients that reaches the target first, by the seeds that all of them have."""
    timed = [
        (arm, arm.seconds)
        for arm in found
        if arm.is_exact and arm.model == model and arm.seconds is not None
    ]
    if not timed:
        return None
    shared = set.intersection(*(set(seconds) for _, seconds in timed))

    def mean(seconds: Mapping[int, float]) -> float:
        return statistics.fmean(s for seed, s in seconds.items() if seed in shared or not shared)

    return min(timed, key=lambda pair: mean(pair[1]))[0]


def relative_step(arm: Arm, base: Arm) -> float:
    """Seconds of a step over those of another arm, both by the same clock, of the seeds that both have."""
    if arm.quiet and base.quiet:
        return arm.step_seconds / base.step_seconds
    own, other = arm.own, base.own
    shared = own.keys() & other.keys()
    if not shared:
        return arm.own_seconds / base.own_seconds
    return statistics.median(own[s] for s in shared) / statistics.median(other[s] for s in shared)


def relative_time(arm: Arm, base: Arm) -> tuple[float, float] | None:
    """Time to the target over that of another arm, seed by seed: mean and standard error."""
    own, other = arm.steps, base.steps
    ratios = [
        steps / reference
        for seed, steps in sorted(own.items())
        if steps is not None and (reference := other.get(seed)) is not None
    ]
    if not ratios or arm.seconds is None or base.seconds is None:
        return None
    mean, error = mean_error(ratios)
    cost = relative_step(arm, base)
    return cost * mean, cost * error


def ends_level(arm: Arm, other: Arm) -> bool:
    """Whether training ends no worse than with another arm, within both standard errors, on the seeds of both."""
    shared = arm.steps.keys() & other.steps.keys()
    ends = [
        [end for seed, end in zip(a.steps, a.finals) if seed in shared or not shared]
        for a in (arm, other)
    ]
    if any(end is None or math.isnan(end) for end in ends[0] + ends[1]):
        return arm is other  # a training that diverged
    (own, error), (reference, its_error) = map(mean_error, ends)
    room = sum(e for e in (error, its_error) if not math.isnan(e))
    return arm.goal.shortfall(own) - arm.goal.shortfall(reference) <= room + 1e-12


def mean_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; the error of one value is not a number."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def _arm(name: str, runs: list[Run], goal: Goal, quiet: Mapping[Any, Mapping[str, Any]]) -> Arm:
    first = min(run.options.get("seed", 0) for run in runs)
    tuned = [run for run in runs if run.options.get("seed", 0) == first]
    lr = min(tuned, key=lambda run: _rank(run.result, goal)).result["lr"]
    own = sorted(
        (run for run in runs if run.result["lr"] == lr), key=lambda r: r.options.get("seed", 0)
    )
    entry = quiet.get(own[0].step_key)
    seconds = statistics.median(run.result["seconds"] / run.result["steps"] for run in own)
    return Arm(
        name, own, lr, entry["seconds"] if entry else seconds, entry is not None,
        own[0].result["saved_bytes"], goal, seconds, _parts(entry or {}),
    )  # fmt: skip


def _parts(entry: Mapping[str, Any]) -> dict[str, float]:
    return {part: entry[part] for part in PARTS if part in entry}


def _rank(result: Mapping[str, Any], goal: Goal) -> tuple[float, float]:
    """Sooner at the goal first; of those that do not arrive, the one that ends nearest."""
    steps = reached(result, goal)
    last = result["evaluations"][goal.key][-1]
    return (
        math.inf if steps is None else steps,
        math.inf if last is None else goal.shortfall(last),
    )


def _twin(arm: Arm, name: str, entry: Mapping[str, Any]) -> Arm:
    return replace(
        arm, name=name, step_seconds=entry["seconds"], saved_bytes=entry["saved_bytes"],
        quiet=True, parts=_parts(entry), is_twin=True,
    )  # fmt: skip


def _quiet_steps(sweep: Sweep) -> tuple[dict[Any, Any], list[tuple[str, dict[str, Any]]]]:
    """Quiet step times by what decides them, and those of twins by name."""
    plain, twins = {}, []
    for options, result in sweep.done("step_time"):
        for name, entry in result["arms"].items():
            given = {"train": options.get("train", {}), **options["arms"][name]}
            if given.get("checkpoint") or given.get("compile"):
                twins.append((name, {**entry, "options": given}))
            else:
                plain[_step_key(given)] = entry
    return plain, twins


def _step_key(options: Mapping[str, Any]) -> tuple[str, int, str]:
    text = sketch_text(options.get("sketch", "none"))
    return text, options["batch_size"], json.dumps(options.get("train", {}), sort_keys=True)
