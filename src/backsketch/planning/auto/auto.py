"""``bs.Auto``: 8-bit products from the first step, more where there is time to find it, and never slower."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

from torch import nn

from backsketch.convert import restore_, sketch_
from backsketch.nn.swap import is_swapped
from backsketch.planning.auto import proposals
from backsketch.planning.auto.budget import Budget, Stopwatch
from backsketch.planning.auto.guard import SpeedGuard
from backsketch.planning.auto.proposals import PROFILE_COST, Proposal, Rules, parsed
from backsketch.planning.auto.usage import Usage
from backsketch.planning.control.controller import TARGET, Controller
from backsketch.planning.control.ranks import of_first
from backsketch.planning.control.sites import movable_sites
from backsketch.planning.facade import Profile
from backsketch.planning.measure.passes import LossFn
from backsketch.planning.measure.step import warm
from backsketch.regions import Region
from backsketch.report import Report
from backsketch.rules import unwrap
from backsketch.torch_private import load_compiler

__all__ = ["INTERVAL", "TARGET", "Auto"]

INTERVAL = 300  # a number, so that a resumed run is the same run
_SETTLED_EVERY = 20  # steps between agreements of several ranks on what was spent


class Auto:
    r"""Finds, times and controls the sketches of a training: one call before each of its steps.

    1. From the first step: 8-bit products where they are expected to be fast, which need no profile. A
       :class:`backsketch.SpeedGuard` times these steps and exact ones in turns. Where there are no such products,
       some exact steps are timed: 2 % of them, at least 2 and at most 50.
    2. Where the budget affords a profile: the sketches that it says save time, again under a guard.
    3. What was faster stays: the plan, the 8-bit products, or exact steps. A :class:`backsketch.Controller` moves
       the keeps as long as the budget lasts.

    Every step is unbiased, whatever is being tried. It works under gradient accumulation and on several ranks,
    which all take the times of the first.

    Args:
        model: without sketches, in the form that is called.
        batches: an iterable of at least two batches, as training draws them: a list, or the loader itself. It is
            iterated anew when something is measured.
        loss_fn: ``loss_fn(model, batch)`` returns the scalar mean loss of a batch, under autocast if training is.
            It is called for a profile, and where a region is captured.
        total_steps: optimizer steps of the training; None where nobody knows, which counts as many.
        target_extra_variance: that the controller aims at, in units of SGD's variance.
        share: of the time that the whole training would take exactly, for profile, looks and replays.
        interval: optimizer steps between two replays of the controller.
        clock: seconds.

    Attributes:
        rules: pattern to text of the sketch in force; empty where steps are exact, None before the first one.
        reason: why that.
        report: of these sketches; None where steps are exact.
        steps: that have ended.
        exact_steps_before: so many first steps are exact, where there is nothing to try.
        budget: None until an exact step was timed.
        profile_seconds: what the profile took.
        guard: that times the present sketches; None where steps are exact.
        controller: None until sketches with keeps are known to be faster.
        target: of the controller.
        usage: how many steps were made with which sketches.
        called: the module whose calls the controller is to follow: ``model``, or a part of it.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: the model is sketched already, or ``total_steps`` is not positive.

    Example:
        >>> import torch, backsketch as bs
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> batches = [torch.randn(128, 64) for _ in range(4)]
        >>> loss_fn = lambda model, batch: model(batch).square().mean()
        >>> with bs.Auto(model, batches, loss_fn, total_steps=4) as auto:
        ...     for batch in batches:
        ...         auto.step()
        ...         loss_fn(model, batch).backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        >>> auto.steps
        4
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        loss_fn: LossFn[Any],
        total_steps: int | None = None,
        *,
        target_extra_variance: float = TARGET,
        share: float = 0.03,
        interval: int = INTERVAL,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._core = unwrap(model)
        if any(is_swapped(m) for m in self._core.modules()):
            raise ValueError("Auto: the model is sketched already; call bs.restore_(model) first")
        if total_steps is not None and total_steps < 1:
            raise ValueError(
                f"Auto: total_steps must be at least 1, or None where nobody knows; got {total_steps!r}"
            )
        load_compiler()  # seconds that belong to the preparation, not to the training
        self.called, self._batches, self._loss_fn = model, batches, loss_fn
        self.target, self._share, self._interval = target_extra_variance, share, interval
        self._clock = clock
        self._total = float("inf") if total_steps is None else total_steps
        self.exact_steps_before = int(min(max(self._total / 50, 2), 50))
        self.rules: Rules | None = None
        self.reason = ""
        self.report: Report | None = None
        self.steps = 0
        self.budget: Budget | None = None
        self.profile_seconds = 0.0
        self.guard: SpeedGuard | None = None
        self.controller: Controller | None = None
        self.usage = Usage()
        self._exact = Stopwatch(clock)  # of the first steps, where there is nothing to try
        self._first: tuple[Rules, float] | None = None  # paid before the profile, and its ratio
        self._profile: Profile | None = None  # until there is a controller that was told
        self._is_under_way = self._is_controlled = False

    # --- in the training loop -----------------------------------------------------------------------

    def step(self) -> None:
        """To be called at the beginning of every optimizer step, by every one of several ranks.

        Raises:
            ValueError: when a profile is due: there are fewer than two batches, or the loss function returns no
                loss.
        """
        self.stop()
        if self.rules is None:
            self._begin()
        if self.guard is not None:
            self.guard.step()
            self._heed(self.guard)
        elif self.budget is None:
            self._time_exact_steps()
        self._is_under_way, self._is_controlled = True, False

    def control(self) -> None:
        """Let the controller look at a step. To be called, or not, between the backward pass and the update.

        Otherwise this is done at the end of the step, when the weights are no longer those that the gradient
        belongs to: the controller's measurements are then off by what one update changes.
        """
        if not self._is_under_way or self._is_controlled:
            return
        self._count()
        if self.controller is not None and self.budget is not None and self.budget.left > 0:
            self._control(self.controller, self.budget)

    def stop(self) -> None:
        """To be called at the end of a step that something else follows, such as a look at the test data.

        Otherwise the beginning of the next step is the end of this one.
        """
        if not self._is_under_way:
            return
        if self.guard is not None:
            self.guard.stop()
        self._exact.stop()
        self.control()
        self._is_under_way = False
        self.steps += 1

    def close(self) -> None:
        """End the training: no trial and no hook is left. The sketches stay until :func:`backsketch.restore_`.

        Nothing is measured any more, for a training may end by an error, and on one of several ranks alone.
        """
        if self._is_under_way:
            self._count()
            self._is_under_way = False
            self.steps += 1
        if self.guard is not None:
            self.guard.close()
        if self.controller is not None:
            self.controller.close()

    def _count(self) -> None:
        if self.rules and not (self.is_exact or self._is_controlled):
            self.usage.add(self.rules, {} if self.controller is None else self.controller.keeps)
        self._is_controlled = True

    def __enter__(self) -> Auto:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def is_exact(self) -> bool:
        """Whether the present step is exact: in turns while sketched ones are timed."""
        return not self.rules or (self.guard is not None and self.guard.is_exact)

    def mean_arithmetic(self, batch: Any) -> float:
        """Mean over the steps so far: matrix products of the backward pass over those of an exact one."""
        return self.usage.mean_arithmetic(self._core, batch, self._loss_fn, self.steps)

    def result(self) -> dict[str, Any]:
        """What was chosen, changed and is advised, with plain values."""
        budget, guard = self.budget, self.guard
        seconds = None if budget is None else budget.share * budget.expected
        found: dict[str, Any] = {
            "plan": dict(self.rules or {}),
            "reason": self.reason,
            "profile_seconds": self.profile_seconds,
            "exact_steps_before": self.exact_steps_before,
            "budget_seconds": None if seconds == float("inf") else seconds,
            "spent_seconds": 0.0 if budget is None else budget.spent,
            "measured_ratio": None if guard is None or not self.rules else guard.ratio,
        }
        if self.controller is not None:
            control = self.controller
            found |= {"keeps": control.keeps, "log": [str(change) for change in control.log]}
            found |= {"estimated_extra_variance": control.extra_variance, "advice": control.advice}
        return found

    def __str__(self) -> str:
        chosen = [
            f"{pattern or '(model)':<32} {text}" for pattern, text in (self.rules or {}).items()
        ]
        return "\n".join([f"after {self.steps} steps", *(chosen or ["exact steps"]), self.reason])

    # --- deciding -----------------------------------------------------------------------------------

    def _begin(self) -> None:
        """8-bit products, where nothing is said against them."""
        found = proposals.in_8_bits(self._core)
        self.rules, self.reason = {}, found.reason
        if found.rules:
            self.exact_steps_before = 0
            self._apply(found)
            self.guard = SpeedGuard(self._core, self._clock)

    def _time_exact_steps(self) -> None:
        if len(self._exact.seconds) == self.exact_steps_before:
            self._seek(self._exact.median)
        else:
            self._exact.start()

    def _heed(self, guard: SpeedGuard) -> None:
        """Act on what the guard has found."""
        if guard.pays is None or not self.rules:
            return
        if self.budget is None:  # the first trial is over
            self._end_first_trial(guard)
        elif not guard.pays:
            self._fall_back(guard.verdict)
        elif self._first and self.rules != self._first[0] and (guard.ratio or 1) > self._first[1]:
            self._fall_back(f"8-bit products take {self._first[1]:.2f}: {guard.verdict}")
        elif self.controller is None:
            if movable_sites(self._core):
                self._control_keeps(self._profile)
            self._profile = None

    def _end_first_trial(self, guard: SpeedGuard) -> None:
        assert self.rules is not None
        assert guard.exact_seconds is not None
        assert guard.ratio is not None
        if guard.pays:
            self._first, self.reason = (self.rules, guard.ratio), guard.verdict
        else:
            self._go_exact(guard.verdict)
        self._seek(guard.exact_seconds)

    def _seek(self, exact_seconds: float) -> None:
        """Find something better by a profile, if there is time for one, by the times of the first rank."""
        seconds = of_first(exact_seconds)
        self.budget = budget = Budget(seconds * self._total, self._share)
        cost = PROFILE_COST[0] * seconds + PROFILE_COST[1]
        if not budget.affords(cost):
            self.reason += (
                f"; a profile would take about {cost:.2g} s, over {budget.share:.0%} of the "
                f"{budget.expected:.2g} s that the run takes exactly"
            )
            return
        began = self._clock()
        found = proposals.planned(self._core, self._batches, self._loss_fn)
        budget.pending += self._clock() - began
        self.profile_seconds = budget.settle()
        self._try(found)

    def _try(self, found: Proposal) -> None:
        """Begin another trial, if what was found is something else."""
        paying = self._first[0] if self._first else {}
        if found.rules and found.rules != paying:
            self._profile = found.profile
            self._begin_trial(found)
        elif paying:
            self._apply(Proposal(paying, f"{self.reason}; {found.reason}"))
        else:
            self._go_exact(found.reason)

    def _fall_back(self, reason: str) -> None:
        """To what paid before, or to exact steps."""
        if self.controller is not None:
            self.controller.close()
        self.controller = self._profile = None
        if self._first is None or self.rules == self._first[0]:
            self._first = None
            self._go_exact(reason)
        else:
            restore_(self._core)
            self._begin_trial(Proposal(self._first[0], reason))

    def _begin_trial(self, found: Proposal) -> None:
        self._apply(found)
        self.guard = SpeedGuard(self._core, self._clock)
        self.guard.step()

    def _go_exact(self, reason: str) -> None:
        self.rules, self.reason, self.report, self.guard = {}, reason, None, None

    def _apply(self, found: Proposal) -> None:
        """Sketch the model. Regions are captured at once: that is no part of a step."""
        self.rules, self.reason = dict(found.rules), found.reason
        sketches = parsed(found.rules)
        self.report = sketch_(self._core, sketches)
        if any(isinstance(sketch, Region) for sketch in sketches.values()):
            batch = next(iter(self._batches), None)
            if batch is not None:
                warm(self._core, batch, self._loss_fn)

    # --- controlling --------------------------------------------------------------------------------

    def _control_keeps(self, profile: Profile | None) -> None:
        self.controller = Controller(
            self.called, self.target, profile=profile, interval=self._interval
        )

    def _control(self, controller: Controller, budget: Budget) -> None:
        """Let it look, or replay; when the budget is spent, the keeps stay what they are."""
        if self.guard is not None and self.guard.on_trial:
            controller.skip()
            return
        began = self._clock()
        controller.step()
        budget.pending += self._clock() - began
        if self.steps % _SETTLED_EVERY == 0:
            budget.settle()
            if budget.left <= 0:
                controller.close()
                self.reason += f"; the keeps stay since step {self.steps}: the budget is spent"

    # --- state --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the training depends on, as plain data that ``torch.save`` and JSON hold.

        To be called between two optimizer steps, and by every one of several ranks. What was decided by a clock is
        in it and is not decided again: a training that resumes is the one that went on.
        """
        self.stop()
        guard, control, profile = self.guard, self.controller, self._profile
        return {
            "rules": self.rules,
            "reason": self.reason,
            "steps": self.steps,
            "exact_steps_before": self.exact_steps_before,
            "profile_seconds": self.profile_seconds,
            "first": None if self._first is None else list(self._first),
            "times": list(self._exact.seconds),
            "usage": self.usage.state_dict(),
            "budget": None if self.budget is None else asdict(self.budget),
            "guard": None if guard is None else guard.state_dict(),
            "controller": None if control is None else control.state_dict(),
            "profile": None if profile is None else json.dumps(profile.to_dict()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`, on the model as it was then, without sketches."""
        self.rules, self.reason, self.steps = state["rules"], state["reason"], state["steps"]
        self.exact_steps_before = state["exact_steps_before"]
        self.profile_seconds = state["profile_seconds"]
        self._first = None if state["first"] is None else (state["first"][0], state["first"][1])
        self._exact = Stopwatch(self._clock, list(state["times"]))
        self.usage.load_state_dict(state["usage"])
        self.budget = None if state["budget"] is None else Budget(**state["budget"])
        if state["profile"] is not None:
            self._profile = Profile.from_dict(json.loads(state["profile"]))
        if self.rules:
            self._apply(Proposal(self.rules, self.reason))
        if state["guard"] is not None:
            self.guard = SpeedGuard(self._core, self._clock)
            self.guard.load_state_dict(state["guard"])
        if state["controller"] is not None:
            self._control_keeps(None)
            assert self.controller is not None
            self.controller.load_state_dict(state["controller"])
            if self.budget is not None and self.budget.left <= 0:
                self.controller.close()
