"""What a controller sees of a training: calls that it records and replays, and row scores in between."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from backsketch.planning.control.calibration import Unmeasurable, measure, over_ranks
from backsketch.planning.control.costs import StepCosts
from backsketch.planning.control.estimate import Estimate
from backsketch.planning.control.moves import Keeps
from backsketch.planning.control.ranks import added, gathered, own
from backsketch.planning.control.schedule import MOST_LOOKS
from backsketch.planning.control.sites import MovableSite, Watch, set_keeps
from backsketch.planning.measure.replay import Recorder
from backsketch.planning.measure.rows import RowCurve, row_curve
from backsketch.planning.profiling.families import FINE_LADDER
from backsketch.regions import ignore_scores, record_scores

__all__ = ["Observer"]


class Observer:
    """Puts hooks on a model for one step at a time, and keeps the picture that follows from what they saw.

    Args:
        model: the user's own module.
        called: the module that is called: the same, or its compiled form.
        sites: all of them.
        costs: of a step, where they were measured.
        traced_rows: of a region, all its vectors of scores together: as many of the last ones are kept.

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
        traced_rows: int = 2**20,
    ) -> None:
        self._model, self._called, self._sites = model, called, sites
        self.costs, self._traced_rows = costs, traced_rows
        ladder = sorted({*FINE_LADDER, *(site.keep for site in sites)}, reverse=True)
        is_whole_model = len(sites) == 1 and not (sites[0].name or sites[0].is_layer)
        self.estimate = Estimate(tuple(ladder), len(sites), is_whole_model)
        self._recorder: Recorder | None = None
        self._watches: dict[int, Watch] = {}
        self._traces: dict[int, deque[Tensor]] = {}  # scores that regions compute anyway
        for i in range(len(sites)):
            self._trace(i, MOST_LOOKS)

    @property
    def is_recording(self) -> bool:
        return self._recorder is not None

    def record(self) -> None:
        """Record the model's call in the next step."""
        self._recorder = Recorder(self._called)

    def watch(self, keeps: Keeps) -> None:
        """Put hooks on the sites where no region computes scores, for one step; compiled code has no hooks."""
        if self._called is not self._model:
            return
        for i, (site, keep) in enumerate(zip(self._sites, keeps)):
            if i not in self._watches and (keep == 1 or not site.is_region):
                self._watches[i] = Watch(site)

    def forget(self) -> None:
        """Remove all hooks, and forget what was seen with them and without."""
        for hooked in (*self._watches.values(), self._recorder):
            if hooked is not None:
                hooked.close()
        self._recorder = None
        self._watches.clear()
        for trace in self._traces.values():
            trace.clear()

    def close(self) -> None:
        """Look at nothing any more, and let the regions collect no more."""
        self.forget()
        for i in self._traces:
            ignore_scores(self._sites[i].module)

    def look(self, step: int) -> None:
        """Take the row scores of the last backward passes into account, those of all ranks, and forget them."""
        seen = {i: self._seen(i) for i in range(len(self._sites))}
        curves = added(gathered({i: c for i, c in seen.items() if c is not None}))
        self._watches.clear()
        finite = {i: c for i, c in curves.items() if math.isfinite(c.energy + sum(c.errors))}
        self.estimate.follow(finite, step)

    def _seen(self, index: int) -> RowCurve | None:
        """What the last backward passes showed of a site: the scores that it traced, or those of a hook."""
        if index in self._watches:
            self._watches[index].close()
            return self._watches[index].curve(self.estimate.ladder)
        trace = self._traces.get(index)
        if not trace:
            return None
        last = trace[-1]
        scores = torch.stack([t.to(last) for t in trace if t.shape == last.shape])
        trace.clear()
        length = min(max(self._traced_rows // last.shape[0], 1), MOST_LOOKS)
        if trace.maxlen != length:
            self._trace(index, length)
        return row_curve(scores, self.estimate.ladder)

    def _trace(self, index: int, length: int) -> None:
        site = self._sites[index]
        if site.is_region:
            self._traces[index] = record_scores(site.module, length)

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
        ladder, measured, reason = self.estimate.ladder, None, ""
        try:
            measured = measure(
                self._model,
                recorder,
                self._sites,
                probe,
                isolated,
                ladder,
                step,
                self.costs is None,
            )
        except Unmeasurable as problem:
            reason = str(problem)
        finally:
            set_keeps(self._sites, keeps)
            self.forget()
        found, counts = zip(*gathered((measured, recorder.count)))
        total = over_ranks(found)
        if total is None:
            return reason or "a gradient was not finite, or SGD's own variance is zero"
        self.costs = self.costs or StepCosts.from_work(total.work, self._sites)
        self.estimate.update(total, probe, isolated, max(sum(counts), 1), step)
        return ""

    def state_dict(self) -> dict[str, Any]:
        """Plain data; every one of several ranks must call this: the scores since the last look are gathered."""
        costs = self.costs
        traces = [[i, t.maxlen, [s.tolist() for s in t]] for i, t in self._traces.items()]
        return {
            "estimate": self.estimate.state_dict(),
            "costs": None if costs is None else [list(costs.fixed), list(costs.live), costs.tiny],
            "traces": gathered(traces),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`; scores are put back where there were as many ranks."""
        self.estimate.load_state_dict(state["estimate"])
        if state["costs"] is not None:
            fixed, live, tiny = state["costs"]
            self.costs = StepCosts(tuple(fixed), tuple(live), tiny)
        self.forget()
        for index, length, vectors in own(state.get("traces", [])) or []:
            self._trace(index, length)
            if (trace := self._traces.get(index)) is not None:
                # In float64, which holds them exactly whatever type they had.
                trace.extend(torch.tensor(v, dtype=torch.float64) for v in vectors)
