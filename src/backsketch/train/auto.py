"""``--sketch auto`` trains some exact steps, profiles the model, and lets a controller move the keeps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

import backsketch as bs
from backsketch.planning import auto_plan
from backsketch.planning.control.sites import MovableSite, movable_sites
from backsketch.planning.measure import step as measure
from backsketch.torch_private import load_compiler

__all__ = ["AUTO", "Auto", "Run"]

AUTO = "auto"
PROFILE_BATCHES = 2  # the controller measures the noise again, and goes on measuring it
INTERVAL = 300  # steps between its replays; a number, so that a resumed run is the same run
TARGET = 0.05


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

    def measure_cost(self) -> None:
        """Run one measured pass, in which the regions of the model are captured and verified."""


class Auto:
    """Finds and controls the sketches of one run.

    Attributes:
        target: extra variance that the controller aims at.
        rules: pattern to text of a sketch; empty where the run is exact, None before the profile.
        reason: why it is exact, or what the plan said.
        seconds: what the profile took; they are part of the training's.
        steps_at: how many steps were made at which keeps of the sketched places, the exact first ones apart.
    """

    def __init__(self, total_steps: int) -> None:
        load_compiler()  # seconds that belong to the preparation, not to the training
        self.start = min(max(total_steps // 50, 1), 50)
        self.target = TARGET
        self.rules: dict[str, str] | None = None
        self.reason = ""
        self.seconds = 0.0
        self.steps_at: Counter[tuple[float, ...]] = Counter()
        self.controller: bs.Controller | None = None

    def before(self, run: Run) -> None:
        """Call this before every step. The one after the exact first steps begins with the profile."""
        if self.rules is None and run.steps >= self.start:
            began = run.now()
            self._choose(run)
            self.seconds = run.now() - began

    def after(self) -> None:
        """Call this between the backward pass and the optimizer's step."""
        if self.rules:
            self.steps_at[self._keeps()] += 1
        if self.controller is not None:
            self.controller.step()

    def mean_arithmetic(self, run: Run) -> float:
        """Mean over the steps of the run: matrix products of the backward pass over those of an exact one."""
        core, batch = run.core, run.batch_of(0)
        with bs.exact(core):
            exact = measure.backward_flops(core, batch, run.loss)
        steps = run.steps
        arithmetic = float(steps - self.steps_at.total())
        sites, now = movable_sites(core), self._keeps()
        for keeps, count in self.steps_at.items():
            _set(sites, keeps)
            arithmetic += count * measure.backward_flops(core, batch, run.loss) / exact
        _set(sites, now)
        return arithmetic / steps

    def _keeps(self) -> tuple[float, ...]:
        return () if self.controller is None else tuple(self.controller.keeps.values())

    def _choose(self, run: Run) -> None:
        batches = [run.batch_of(run.steps + i) for i in range(PROFILE_BATCHES)]
        profile = None
        try:
            profile = bs.profile(run.core, batches, run.loss, progress=False)
            plan = auto_plan(profile)
            rules, reason = dict(plan.texts), plan.reason or str(plan.predicted)
        except ValueError as error:  # nothing to sketch, say
            rules, reason = {}, str(error)
        # Times differ between processes: all take those of the first.
        (found,) = broadcast_object_list([(rules, reason, profile)])
        self.rules, self.reason, profile = found
        if self.rules:
            self._apply(run, profile)

    def _apply(self, run: Run, profile: bs.Profile | None) -> None:
        assert self.rules is not None
        bs.sketch_(run.core, {pattern: bs.parse(text) for pattern, text in self.rules.items()})
        if movable_sites(run.core):  # rounding has no keep to move
            self.controller = bs.Controller(
                run.model, self.target, profile=profile, interval=INTERVAL
            )

    def result(self) -> dict[str, Any]:
        """What was chosen, changed and is advised, with plain values."""
        found: dict[str, Any] = {
            "plan": self.rules or {},
            "reason": self.reason,
            "profile_seconds": self.seconds,
            "exact_steps_before": self.start,
        }
        if self.controller is not None:
            control = self.controller
            found |= {"keeps": control.keeps, "log": [str(change) for change in control.log]}
            found |= {"estimated_extra_variance": control.extra_variance, "advice": control.advice}
        return found

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the run depends on."""
        control = self.controller
        return {
            "rules": self.rules,
            "reason": self.reason,
            "seconds": self.seconds,
            "steps_at": [[list(keeps), count] for keeps, count in self.steps_at.items()],
            "controller": None if control is None else control.state_dict(),
        }

    def load_state_dict(self, run: Run, state: Mapping[str, Any]) -> None:
        """Continue a saved run. Regions are captured at once, so that the next step uses them as it would have."""
        self.rules, self.reason, self.seconds = (state[k] for k in ("rules", "reason", "seconds"))
        self.steps_at = Counter({tuple(keeps): count for keeps, count in state.get("steps_at", [])})
        if self.rules:
            self._apply(run, None)
            run.measure_cost()
        if self.controller is not None:
            self.controller.load_state_dict(state["controller"])


def _set(sites: Sequence[MovableSite], keeps: Sequence[float]) -> None:
    for site, keep in zip(sites, keeps):  # none where nothing can be moved
        site.set_keep(keep)
