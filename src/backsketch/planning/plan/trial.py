"""Whole plans, measured before they are proposed: what sites save one by one may not add up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from torch import Tensor, nn

from backsketch.convert import restore_, sketch_
from backsketch.planning.measure.errors import extra_variance
from backsketch.planning.measure.passes import LossFn
from backsketch.planning.measure.timing import OF_A_TRIAL
from backsketch.planning.plan.plan import Plan, measured_ratio
from backsketch.planning.plan.search import make_plan
from backsketch.planning.profiling.records import ProfileData, Trial

__all__ = ["tried"]

_PLANS = 2  # that for time, and the next best where it does not hold


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
    for _ in range(_PLANS):
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
        noise = extra_variance(model, data[: len(exact)], loss_fn, 1, exact)
        ratio, error = measured_ratio(model, data[0], loss_fn, OF_A_TRIAL)
    finally:
        restore_(model)
    return Trial(dict(plan.texts), ratio, error, fmean(noise.errors) / profile.sgd_variance)
