"""Looks at the row scores between two replays: those that regions compute anyway, and hooks elsewhere."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from backsketch.planning.control.ranks import added, gathered, own
from backsketch.planning.control.schedule import MOST_LOOKS
from backsketch.planning.control.sites import MovableSite, Watch
from backsketch.planning.measure.rows import RowCurve, row_curve
from backsketch.regions import ignore_scores, record_scores

__all__ = ["Looks"]


class Looks:
    """What the last backward passes showed of each site.

    Args:
        sites: that are looked at.
        ladder: keeps of the row curves.
        traced_rows: of a region, all its vectors of scores together: as many of the last ones are kept.
    """

    def __init__(
        self, sites: Sequence[MovableSite], ladder: Sequence[float], traced_rows: int = 2**20
    ) -> None:
        self._sites, self._ladder, self._traced_rows = sites, ladder, traced_rows
        self._watches: dict[int, Watch] = {}
        self._traces: dict[int, deque[Tensor]] = {}
        for i in range(len(sites)):
            self._trace(i, MOST_LOOKS)

    def watch(self, keeps: Sequence[float]) -> None:
        """Put hooks on the sites where no region computes scores, for one step."""
        for i, (site, keep) in enumerate(zip(self._sites, keeps)):
            if i not in self._watches and (keep == 1 or not site.is_region):
                self._watches[i] = Watch(site)

    def take(self) -> dict[int, RowCurve]:
        """The curves of all that was seen, summed over the ranks; what was seen is forgotten."""
        seen = {i: self._seen(i) for i in range(len(self._sites))}
        curves = added(gathered({i: c for i, c in seen.items() if c is not None}))
        self._watches.clear()
        return {i: c for i, c in curves.items() if math.isfinite(c.energy + sum(c.errors))}

    def forget(self) -> None:
        """Remove all hooks, and forget what was seen with them and without."""
        for watch in self._watches.values():
            watch.close()
        self._watches.clear()
        for trace in self._traces.values():
            trace.clear()

    def close(self) -> None:
        """Forget everything, and let the regions collect no more."""
        self.forget()
        for i in self._traces:
            ignore_scores(self._sites[i].module)

    def _seen(self, index: int) -> RowCurve | None:
        """What the last backward passes showed of a site: the scores that it traced, or those of a hook."""
        if index in self._watches:
            self._watches[index].close()
            return self._watches[index].curve(self._ladder)
        trace = self._traces.get(index)
        if not trace:
            return None
        last = trace[-1]
        scores = torch.stack([t.to(last) for t in trace if t.shape == last.shape])
        trace.clear()
        length = min(max(self._traced_rows // last.shape[0], 1), MOST_LOOKS)
        if trace.maxlen != length:
            self._trace(index, length)
        return row_curve(scores, self._ladder)

    def _trace(self, index: int, length: int) -> None:
        site = self._sites[index]
        if site.is_region:
            self._traces[index] = record_scores(site.module, length)

    def state(self) -> list[Any]:
        """The scores since the last look, plain data, of every rank."""
        return gathered([[i, t.maxlen, [s.tolist() for s in t]] for i, t in self._traces.items()])

    def load(self, state: Sequence[Any]) -> None:
        """Put back what :meth:`state` found; nothing where there were more ranks or fewer."""
        self.forget()
        for index, length, vectors in own(state) or []:
            self._trace(index, length)
            if (trace := self._traces.get(index)) is not None:
                # In float64, which holds them exactly whatever type they had.
                trace.extend(torch.tensor(v, dtype=torch.float64) for v in vectors)
