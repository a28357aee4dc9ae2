"""``--sketch auto``: 8-bit products from the first step, more where there is time to find it, and never slower."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from statistics import median
from typing import Any, Protocol

from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

import backsketch as bs
from backsketch.planning import Budget, auto_plan
from backsketch.planning.control.sites import movable_sites, set_keeps
from backsketch.planning.measure import step as measure
from backsketch.planning.measure.timing import synchronize
from backsketch.torch_private import load_compiler

__all__ = ["AUTO", "Auto", "Run"]

AUTO = "auto"
SHARE = 0.03  # of the time of an exact run, for profile, looks and replays
PROFILE_COST = 100, 2.0  # exact steps, and seconds: 13.6 s for a ViT whose steps take 0.107 s
PROFILE_BATCHES = 2  # the controller measures the noise again, and goes on measuring it
SHARED_EVERY = 20  # steps between agreements of several processes on what was spent
INTERVAL = 300  # steps between its replays; a number, so that a resumed run is the same run
TARGET = 0.05

Rules = dict[str, str]


class Run(Protocol):
    """What `Auto` asks of a run.

    Attributes:
        core: the model.
        model: the model as it is called, wrapped where there are several processes.
    """

    core: nn.Module
    model: nn.Module

    @property
    def steps(self) -> int:
        """Optimizer steps so far."""

    def now(self) -> float:
        """Seconds, by the clock that times the steps."""

    def batch_of(self, step: int) -> Any:
        """This process's first micro-batch of a step, counted from the start of the run."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Loss as in training."""


class Auto:
    """Finds and controls the sketches of one run, within a budget.

    1. From the first step: 8-bit products where they are expected to be fast, which need no profile. A
       `SpeedGuard` times these steps and exact ones in turns. Without any, some exact steps are timed.
    2. Where the budget affords a profile: the sketches that it says save time, again under a guard.
    3. The faster of the two stays, or exact steps where neither is faster. A controller moves the keeps as long as
       the budget lasts.

    Attributes:
        target: extra variance that the controller aims at.
        rules: pattern to text of the sketch in force; empty where the run is exact, None before the first step.
        reason: why that.
        budget: of the time for profile, looks and replays; None until an exact step was timed.
        profile_seconds: what the profile took; they are part of the training's.
        steps_at: how many steps were made with which rules, at which keeps; exact ones apart.
    """

    def __init__(self, total_steps: int) -> None:
        load_compiler()  # seconds that belong to the preparation, not to the training
        self.total_steps = total_steps
        self.start = min(max(total_steps // 50, 2), 50)
        self.target = TARGET
        self.rules: Rules | None = None
        self.reason = ""
        self.budget: Budget | None = None
        self.profile_seconds = 0.0
        self.guard: bs.SpeedGuard | None = None
        self.controller: bs.Controller | None = None
        self.steps_at: Counter[tuple[int, tuple[float, ...]]] = Counter()
        self._used: list[Rules] = []  # that `steps_at` counts from
        self._first: tuple[Rules, float] | None = (
            None  # what paid before the profile, and its ratio
        )
        self._times: list[float] = []  # of the exact first steps, where there is nothing to try
        self._mark: float | None = None
        self._profile: bs.Profile | None = None  # until there is a controller that was told
        self._unshared = 0.0  # seconds of the controller that the other processes do not know of

    # --- the run calls ------------------------------------------------------------------------------

    def before(self, run: Run) -> None:
        """Call this before every step."""
        if self.rules is None:
            self._begin(run)
        if self.guard is not None:
            self.guard.step()
            self._heed(run, self.guard)
        elif self.budget is None:
            self._time_exact_steps(run)

    def after(self, run: Run) -> None:
        """Call this between the backward pass and the optimizer's step."""
        guarded = self.guard is not None and self.guard.is_exact
        if self.rules and not guarded:
            self.steps_at[self._used.index(self.rules), self._keeps()] += 1
        on_trial = self.guard is not None and self.guard.on_trial
        if self.controller is not None and self.budget is not None and not on_trial:
            self._control(run, self.controller, self.budget)

    def ended(self, run: Run) -> None:
        """Call this at the end of every step."""
        if self.guard is not None:
            self.guard.stop()
        elif self._mark is not None:
            synchronize()
            self._times.append(run.now() - self._mark)
            self._mark = None

    def mean_arithmetic(self, run: Run) -> float:
        """Mean over the steps of the run: matrix products of the backward pass over those of an exact one."""
        core, batch = bs.restore_(copy.deepcopy(run.core)), run.batch_of(0)
        exact = measure.backward_flops(core, batch, run.loss)
        arithmetic = float(run.steps - self.steps_at.total())
        for (number, keeps), count in self.steps_at.items():
            bs.sketch_(core, _parsed(self._used[number]))
            set_keeps(movable_sites(core), keeps)  # none before there is a controller
            arithmetic += count * measure.backward_flops(core, batch, run.loss) / exact
        return arithmetic / run.steps

    def result(self) -> dict[str, Any]:
        """What was chosen, changed and is advised, with plain values."""
        budget, guard = self.budget, self.guard
        found: dict[str, Any] = {
            "plan": self.rules or {},
            "reason": self.reason,
            "profile_seconds": self.profile_seconds,
            "exact_steps_before": self.start,
            "budget_seconds": None if budget is None else budget.share * budget.expected,
            "spent_seconds": 0.0 if budget is None else budget.spent,
            "measured_ratio": None if guard is None or not self.rules else guard.ratio,
        }
        if self.controller is not None:
            control = self.controller
            found |= {"keeps": control.keeps, "log": [str(change) for change in control.log]}
            found |= {"estimated_extra_variance": control.extra_variance, "advice": control.advice}
        return found

    # --- deciding -----------------------------------------------------------------------------------

    def _begin(self, run: Run) -> None:
        """8-bit products, where nothing is said against them."""
        self.rules = {}
        rules, why = _in_8_bits(run.core)
        if rules:
            self.start = 0
            self._apply(run, rules, "8-bit products need no profile")
            self.guard = bs.SpeedGuard(run.core, run.now)
        else:
            self.reason = why

    def _time_exact_steps(self, run: Run) -> None:
        if len(self._times) == self.start:
            self._seek(run, median(self._times))
        else:
            synchronize()
            self._mark = run.now()

    def _heed(self, run: Run, guard: bs.SpeedGuard) -> None:
        """Act on what the guard has found."""
        if guard.pays is None or not self.rules:
            return
        if self.budget is None:  # the first trial is over
            assert guard.exact_seconds is not None
            assert guard.ratio is not None
            if guard.pays:
                self._first = self.rules, guard.ratio
                self.reason = guard.verdict
            else:
                self._go_exact(guard.verdict)
            self._seek(run, guard.exact_seconds)
        elif not guard.pays:
            self._fall_back(run, guard.verdict)
        elif self._first and self.rules != self._first[0] and (guard.ratio or 1) > self._first[1]:
            self._fall_back(run, f"8-bit products take {self._first[1]:.2f}: {guard.verdict}")
        elif self.controller is None and movable_sites(run.core):
            self._control_keeps(run, self._profile)
            self._profile = None

    def _seek(self, run: Run, exact_seconds: float) -> None:
        """Find something better by a profile, if there is time for one, by the times of the first process."""
        (seconds,) = broadcast_object_list([exact_seconds])
        self.budget = Budget(seconds * self.total_steps, SHARE)
        cost = PROFILE_COST[0] * seconds + PROFILE_COST[1]
        if not self.budget.affords(cost):
            self.reason += (
                f"; a profile would take about {cost:.2g} s, over {SHARE:.0%} of the "
                f"{self.budget.expected:.2g} s that the run takes exactly"
            )
            return
        began = run.now()
        rules, reason, profile = self._planned(run)
        (took,) = broadcast_object_list([run.now() - began])
        self.profile_seconds = took
        self.budget.spent += took
        self._try(run, rules, reason, profile)

    def _planned(self, run: Run) -> tuple[Rules, str, bs.Profile | None]:
        bs.restore_(run.core)
        batches = [run.batch_of(run.steps + i) for i in range(PROFILE_BATCHES)]
        found: tuple[Rules, str, bs.Profile | None]
        try:
            profile = bs.profile(run.core, batches, run.loss, progress=False)
            plan = auto_plan(profile)
            found = dict(plan.texts), plan.reason or str(plan.predicted), profile
        except ValueError as error:  # nothing to sketch, say
            found = {}, str(error), None
        (found,) = broadcast_object_list([found])
        return found

    def _try(self, run: Run, rules: Rules, reason: str, profile: bs.Profile | None) -> None:
        """Another trial, if the plan is another."""
        paying = self._first[0] if self._first else {}
        if not rules or rules == paying:
            self.reason = f"{self.reason}; {reason}" if paying else reason
            if paying:
                self._apply(run, paying, self.reason)
            else:
                self._go_exact(reason)
            return
        self._apply(run, rules, reason)
        self._profile = profile
        self.guard = bs.SpeedGuard(run.core, run.now)
        self.guard.step()

    def _fall_back(self, run: Run, reason: str) -> None:
        """To what paid before, or to exact steps."""
        self._drop_controller()
        if self._first is None or self.rules == self._first[0]:
            self._first = None
            self._go_exact(reason)
            return
        bs.restore_(run.core)
        self._apply(run, self._first[0], reason)
        self.guard = bs.SpeedGuard(run.core, run.now)
        self.guard.step()

    def _go_exact(self, reason: str) -> None:
        self.rules, self.reason, self.guard = {}, reason, None

    def _apply(self, run: Run, rules: Rules, reason: str) -> None:
        self.rules, self.reason = rules, reason
        bs.sketch_(run.core, _parsed(rules))
        if rules not in self._used:
            self._used.append(rules)
        if any(isinstance(sketch, bs.Region) for sketch in _parsed(rules).values()):
            measure.warm(run.core, run.batch_of(0), run.loss)

    # --- controlling --------------------------------------------------------------------------------

    def _control_keeps(self, run: Run, profile: bs.Profile | None) -> None:
        self.controller = bs.Controller(run.model, self.target, profile=profile, interval=INTERVAL)

    def _control(self, run: Run, controller: bs.Controller, budget: Budget) -> None:
        """Let it look, or replay, while that can be paid for; then the keeps stay what they are."""
        if budget.left <= 0:
            return
        began = run.now()
        controller.step()
        self._unshared += run.now() - began
        if run.steps % SHARED_EVERY == 0:
            (took,) = broadcast_object_list([self._unshared])
            budget.spent, self._unshared = budget.spent + took, 0.0
            if budget.left <= 0:
                controller.close()
                self.reason += f"; the keeps stay since step {run.steps}: the budget is spent"

    def _drop_controller(self) -> None:
        if self.controller is not None:
            self.controller.close()
        self.controller = None

    def _keeps(self) -> tuple[float, ...]:
        return () if self.controller is None else tuple(self.controller.keeps.values())

    # --- state --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the run depends on."""
        control, guard, profile = self.controller, self.guard, self._profile
        return {
            **{name.lstrip("_"): copy.copy(getattr(self, name)) for name in _PLAIN},
            "budget": None if self.budget is None else asdict(self.budget),
            "steps_at": [[*where, count] for where, count in self.steps_at.items()],
            "guard": None if guard is None else guard.state_dict(),
            "controller": None if control is None else control.state_dict(),
            "profile": None if profile is None else json.dumps(profile.to_dict()),
        }

    def load_state_dict(self, run: Run, state: Mapping[str, Any]) -> None:
        """Continue a saved run. Regions are captured at once, as they were before their first step."""
        for name in _PLAIN:
            setattr(self, name, state[name.lstrip("_")])
        self.budget = None if state["budget"] is None else Budget(**state["budget"])
        self.steps_at = Counter({(i, tuple(keeps)): n for i, keeps, n in state["steps_at"]})
        if state["profile"] is not None:
            self._profile = bs.Profile.from_dict(json.loads(state["profile"]))
        if self.rules:
            self._apply(run, self.rules, self.reason)
        if state["guard"] is not None:
            self.guard = bs.SpeedGuard(run.core, run.now)
            self.guard.load_state_dict(state["guard"])
        if state["controller"] is not None:
            self._control_keeps(run, None)
            assert self.controller is not None
            self.controller.load_state_dict(state["controller"])
            if self.budget is not None and self.budget.left <= 0:
                self.controller.close()


_PLAIN = ("rules", "reason", "start", "profile_seconds", "_used", "_first", "_times", "_unshared")


def _parsed(rules: Rules) -> dict[str, Any]:
    return {pattern: bs.parse(text) for pattern, text in rules.items()}


def _in_8_bits(model: nn.Module) -> tuple[Rules, str]:
    """8-bit products for the layers whose report expects a gain of them, or why there are none."""
    try:
        report = bs.sketch_(model, bs.Int8())
    except ValueError as error:
        return {}, str(error)
    found = {site.name: str(site.sketch) for site in report.sketched if not site.reason}
    bs.restore_(model)
    reasons = [site.reason for site in report if site.reason]
    return found, "" if found else f"no 8-bit products: {reasons[0] if reasons else 'no layer'}"
