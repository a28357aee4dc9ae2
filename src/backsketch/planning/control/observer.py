"""What a controller sees of a training: calls that it records and replays, and row scores in between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from backsketch.planning.control.calibration import Measured, Unmeasurable, measure, over_ranks
from backsketch.planning.control.costs import StepCosts
from backsketch.planning.control.estimate import Estimate
from backsketch.planning.control.looks import Looks
from backsketch.planning.control.moves import Keeps
from backsketch.planning.control.ranks import gathered
from backsketch.planning.control.sites import MovableSite, set_keeps
from backsketch.planning.measure.replay import Recorder
from backsketch.planning.profiling.families import FINE_LADDER

__all__ = ["Observer"]


class Observer:
    """Puts hooks on a model for one step at a time, and keeps the picture that follows from what they saw.

    Args:
        model: the user's own module.
        called: the module that is called: the same, or its compiled form.
        sites: all of them.
        costs: of a step, where they were measured.

    Attributes:
        estimate: of the extra variance at any keeps.
        costs: of a step at any keeps; None until the arithmetic was counted.
        is_recording: whether the present step is to be replayed.
    """

    def __init__(
        self,
        model: nn.Module,
        called: nn.Module,
        sites: Sequence[MovableSite],
        costs: StepCosts | None,
    ) -> None:
        self._model, self._called, self._sites = model, called, sites
        self.costs = costs
        ladder = sorted({*FINE_LADDER, *(site.keep for site in sites)}, reverse=True)
        is_whole_model = len(sites) == 1 and not (sites[0].name or sites[0].is_layer)
        self.estimate = Estimate(tuple(ladder), len(sites), is_whole_model)
        self._looks = Looks(sites, ladder)
        self._recorder: Recorder | None = None

    @property
    def is_recording(self) -> bool:
        return self._recorder is not None

    def record(self) -> None:
        """Record the model's call in the next step."""
        self._recorder = Recorder(self._called)

    def watch(self, keeps: Keeps) -> None:
        """Look at the row scores of the next step; compiled code has no hooks."""
        if self._called is self._model:
            self._looks.watch(keeps)

    def forget(self) -> None:
        """Remove all hooks, and forget what was seen with them and without."""
        self._looks.forget()
        if self._recorder is not None:
            self._recorder.close()
            self._recorder = None

    def close(self) -> None:
        """Look at nothing any more."""
        self.forget()
        self._looks.close()

    def look(self, step: int) -> None:
        """Take the row scores of the last backward passes into account."""
        self.estimate.follow(self._looks.take(), step)

    def replay(self, keeps: Keeps, step: int) -> str:
        """Measure the recorded step, with what the other ranks measured.

        Args:
            keeps: in force.
            step: how many optimizer steps there were.

        Returns:
            Why nothing could be measured; empty where something was.
        """
        recorder, self._recorder = self._recorder, None
        assert recorder is not None
        recorder.close()
        # The plan in force is what has to be right; where that is exact, what it would be otherwise.
        base = tuple(site.keep for site in self._sites)
        probe = base if min(keeps) == 1 else keeps
        isolated = {
            i: base[i] if probe[i] == 1 else probe[i] for i in self.estimate.next_isolated()
        }
        try:
            measured, reason = self._measure(recorder, probe, isolated, step)
        finally:
            set_keeps(self._sites, keeps)
            self._looks.forget()
        found, counts = zip(*gathered((measured, recorder.count)))
        total = over_ranks(found)
        if total is None:
            return reason or "a gradient was not finite, or SGD's own variance is zero"
        self.costs = self.costs or StepCosts.from_work(total.work, self._sites)
        self.estimate.update(total, probe, isolated, max(sum(counts), 1), step)
        return ""

    def _measure(
        self, recorder: Recorder, keeps: Keeps, isolated: Mapping[int, float], step: int
    ) -> tuple[Measured | None, str]:
        """What a replay shows, or why it shows nothing."""
        ladder, with_work = self.estimate.ladder, self.costs is None
        try:
            found = measure(
                self._model, recorder, self._sites, keeps, isolated, ladder, step, with_work
            )
        except Unmeasurable as problem:
            return None, str(problem)
        return found, ""

    def state_dict(self) -> dict[str, Any]:
        """Plain data; every one of several ranks must call this: the scores since the last look are gathered."""
        costs = self.costs
        return {
            "estimate": self.estimate.state_dict(),
            "costs": None if costs is None else [list(costs.fixed), list(costs.live), costs.tiny],
            "traces": self._looks.state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.estimate.load_state_dict(state["estimate"])
        if state["costs"] is not None:
            fixed, live, tiny = state["costs"]
            self.costs = StepCosts(tuple(fixed), tuple(live), tiny)
        self.forget()
        self._looks.load(state.get("traces", []))
