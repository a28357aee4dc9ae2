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
from backsketch.planning.plan.plan import CAUTION, LEAST_GAIN, CostEstimate, Plan, measured_ratio
from backsketch.planning.plan.prediction import chosen, everywhere_in_8_bits
from backsketch.planning.plan.search import make_plan
from backsketch.planning.profiling.records import ProfileData, Trial

__all__ = ["tried"]

_PLANS = 2  # that for time, and the next best or 8 bits everywhere


def tried(
    profile: ProfileData,
    model: nn.Module,
    data: Sequence[Any],
    loss_fn: LossFn[Any],
    exact: Sequence[Sequence[Tensor]],
    tick: Callable[[str], None],
) -> ProfileData:
    """The profile with measurements of the plan for time, and of another one.

    Where the plan draws no rows, 8-bit products everywhere come first: what they save at a single site may be less
    than the noise of its timing. Where a plan does not hold, the next one is measured.

    Args:
        profile: of this model.
        model: without sketches, ready for passes.
        data: batches.
        loss_fn: as for :func:`backsketch.profile`.
        exact: gradients of the first batches.
        tick: is told what is being done.
    """
    for _ in range(_PLANS):
        tick("the plan as a whole")
        plan = _next(profile)
        if plan is not None:
            trial = _trial(plan, profile, model, data, loss_fn, exact)
            profile = replace(profile, trials=(*profile.trials, trial))
    return profile


def _next(profile: ProfileData) -> Plan | None:
    """What to measure, None where the plan for time was measured and holds."""
    measured = [trial.rules for trial in profile.trials]
    plan = make_plan(profile, "time", None, None, None)
    if _only_rounds(plan, profile):
        everywhere = everywhere_in_8_bits(profile)
        if everywhere.texts not in measured and not _is_hopeless(everywhere.predicted):
            return everywhere
    return None if plan.is_exact or plan.texts in measured else plan


def _only_rounds(plan: Plan, profile: ProfileData) -> bool:
    """Whether nothing in a plan draws rows."""
    options = [o for o in chosen(profile, plan.texts) if o is not None and o.keep == 1]
    return plan.texts.keys() == {pattern for o in options for pattern in o.rules}


def _is_hopeless(cost: CostEstimate) -> bool:
    """Whether it gains too little even where all timings of sites err to its disadvantage."""
    return cost.time_ratio - CAUTION * cost.time_error > 1 - LEAST_GAIN


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
        if _only_rounds(plan, profile):  # next to nothing, and known from the sites
            omega = plan.predicted.extra_variance
            extra_variance(
                model, data[:1], loss_fn, 1, exact[:1]
            )  # what compiles and packs does so now
        else:
            noise = extra_variance(model, data[: len(exact)], loss_fn, 1, exact)
            omega = fmean(noise.errors) / profile.sgd_variance
        ratio, error = measured_ratio(model, data[0], loss_fn, OF_A_TRIAL)
    finally:
        restore_(model)
    return Trial(dict(plan.texts), ratio, error, omega)
