"""Whole plans, measured before they are proposed: what sites save one by one may not add up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from backsketch.convert import restore_, sketch_
from backsketch.planning.measure.errors import ExtraVariance
from backsketch.planning.measure.passes import LossFn, has_region, passes
from backsketch.planning.measure.timing import compared
from backsketch.planning.plan.plan import Plan
from backsketch.planning.plan.search import make_plan
from backsketch.planning.profiling.records import ProfileData, Trial

__all__ = ["tried"]

_TRIALS = 2  # the plan for time, and the next best where that does not hold
_ROUNDS = (2, 6)


def tried(
    profile: ProfileData,
    model: nn.Module,
    data: Sequence[Any],
    loss_fn: LossFn[Any],
    exact: Sequence[Sequence[Tensor]],
    tick: Callable[[str], None],
) -> ProfileData:
    """The profile with measurements of the plan for time, and of the next one where the first does not hold.

    Args:
        profile: of this model.
        model: without sketches, ready for passes.
        data: batches.
        loss_fn: as for :func:`backsketch.profile`.
        exact: gradients of the first batches.
        tick: is told what is being done.
    """
    holds = False
    for _ in range(_TRIALS):
        tick("the plan as a whole")
        plan = None if holds else make_plan(profile, "time", None, None, None)
        holds = plan is None or plan.is_exact or any(plan.texts == t.rules for t in profile.trials)
        if plan is not None and not holds:
            trial = _trial(plan, profile, model, data, loss_fn, exact)
            profile = replace(profile, trials=(*profile.trials, trial))
    return profile


def _trial(
    plan: Plan,
    profile: ProfileData,
    model: nn.Module,
    data: Sequence[Any],
    loss_fn: LossFn[Any],
    exact: Sequence[Sequence[Tensor]],
) -> Trial:
    sketch_(model, plan.rules)
    try:
        with passes(model, loss_fn) as run:
            everything = [site.index for site in run.sites]
            if any(has_region(site) for site in run.sites):
                run.gradient(data[0], 0, everything)  # regions check their rows
            noise = ExtraVariance()
            for number, gradient in enumerate(exact):
                noise.add(gradient, [run.gradient(data[number], number, everything)])
            (difference,), base = compared(
                lambda: run.gradient(data[0], 0),
                [lambda: run.gradient(data[0], 0, everything)],
                rounds=_ROUNDS,
                warm=True,
            )
    finally:
        restore_(model)
    error = sum(noise.errors) / len(noise.errors)
    return Trial(
        dict(plan.texts),
        1 + difference.seconds / base.seconds,
        difference.error / base.seconds,
        error / profile.sgd_variance,
    )
