"""Exact passes: gradients, row scores, times, and the noise of sketches put on the graph of one of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from backsketch.memory import kept_by
from backsketch.planning.measure.errors import squared_norm
from backsketch.planning.measure.passes import LossFn, Passes, passes
from backsketch.planning.measure.recorder import Call, backward, vjp, watching
from backsketch.planning.measure.rows import RowCurve, row_curve
from backsketch.planning.measure.timing import timed
from backsketch.planning.profiling.families import LADDER
from backsketch.planning.profiling.noise import (
    Curves,
    Noise,
    curves,
    mask_noise,
    mask_weights,
    region_noise,
)
from backsketch.planning.profiling.sites import Site, is_inside
from backsketch.regions.rows import scores
from backsketch.theory.noise import GradientSums
from backsketch.untouched import repeatable

__all__ = ["Observed", "observe"]

_CLOSELY = 2  # batches that are watched
_STEPS = 3  # timed


@dataclass
class Observed:
    """What exact passes showed.

    ``exact``, ``energies`` (squared gradients by parameter) and ``curves`` have an entry per batch that was
    watched. The noise of sketches, of the mask on the output and the calls are those of the first.
    """

    device: str
    saved_bytes: int = 0
    step_seconds: float = 0.0
    forward_seconds: float = 0.0
    sums: GradientSums = field(default_factory=GradientSums)
    exact: list[list[Tensor]] = field(default_factory=list)
    energies: list[dict[str, float]] = field(default_factory=list)
    curves: list[Curves] = field(default_factory=list)
    noise: dict[str, Noise] = field(default_factory=dict)
    mask: float | None = None
    output: RowCurve | None = None
    calls: dict[str, Call] = field(default_factory=dict)

    def energy(self, site: str) -> list[float]:
        """Of each batch that was watched, the squared norm of the gradients of a site's parameters."""
        return [sum(e for n, e in found.items() if is_inside(n, site)) for found in self.energies]


def observe(
    model: nn.Module,
    loss_fn: LossFn[Any],
    data: Sequence[Any],
    sites: Sequence[Site],
    tick: Callable[[str], None],
) -> Observed:
    seen = Observed(str(next(model.parameters()).device))
    times: list[tuple[float, float]] = []
    with passes(model, loss_fn, among=()) as run:
        for number, batch in enumerate(data):
            tick("exact passes")
            if number < _CLOSELY:
                gradient = _watched(run, sites, batch, number, seen)
            else:
                gradient = _timed(run, batch, number, times)
            seen.sums.add(gradient)
        while len(times) < _STEPS:  # those above were watched
            _timed(run, data[0], 0, times)
    seen.forward_seconds = statistics.median(forward for forward, _ in times)
    seen.step_seconds = statistics.median(forward + backward for forward, backward in times)
    with repeatable(model, 0):
        seen.saved_bytes = kept_by(model, lambda: loss_fn(model, data[0])).total
    return seen


def _timed(run: Passes, batch: Any, number: int, times: list[tuple[float, float]]) -> list[Tensor]:
    """An exact pass, the seconds of whose forward and backward part are added to ``times``."""
    with ExitStack() as graph:
        forward, loss = timed(lambda: graph.enter_context(run.loss(batch, number)))
        backward, gradient = timed(lambda: vjp(loss, list(run.parameters.values())))
    times.append((forward, backward))
    return gradient


def _watched(
    run: Passes, sites: Sequence[Site], batch: Any, number: int, seen: Observed
) -> list[Tensor]:
    """An exact pass with its row curves; on the graph of the first the noise of single sites."""
    names = {"", *(s.name for s in sites), *(name for s in sites for name in s.layers)}
    with watching(run.model, names) as calls, run.loss(batch, number) as loss:
        first = not seen.exact
        gradient = backward(loss, list(run.parameters.values()), calls, retain_graph=first)
        weights: dict[float, Tensor] = {}
        if first:
            seen.calls = {name: c[0] for name, c in calls.items() if c and c[0].cotangents}
            seen.noise = region_noise(run, calls, sites, number)
            output = _maskable(calls[""], sites)
            if output:
                seen.mask = mask_noise(run, output, number)
                seen.output = row_curve(scores(output.cotangents, 1), LADDER, live_only=False)
                weights = mask_weights(output.cotangents[0])
    seen.curves.append(curves(run.model, sites, calls, weights))
    seen.exact.append(gradient)
    seen.energies.append({n: squared_norm([g]) for n, g in zip(run.parameters, gradient)})
    return gradient


def _maskable(calls: list[Call], sites: Sequence[Site]) -> Call | None:
    """The model's call, if its output is one tensor with a row per sample.

    Not where the whole model is one site: a region over it is that mask, and saves time as well.
    """
    if len(calls) != 1 or len(calls[0].cotangents) != 1 or any(not site.name for site in sites):
        return None
    g = calls[0].cotangents[0]
    return calls[0] if g.ndim > 1 and g.shape[0] > 1 else None
