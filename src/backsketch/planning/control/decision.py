"""Which keeps to use now: the cheapest within a target, or those that reach a loss soonest."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from backsketch.planning.control.costs import StepCosts
from backsketch.planning.control.estimate import Estimate
from backsketch.planning.control.sites import MovableSite
from backsketch.planning.plan.frontier import frontier
from backsketch.theory.cost import time_to_target_ratio

__all__ = ["LEAST_SAVING", "Choice", "choose_keeps", "reason_to_move"]

LEAST_SAVING = 0.02
"""Of a step's cost: less is not worth a sketch or a change."""

_QUIET = 0.01  # noise scale
_MARGIN = 0.01
_ROOM = 0.15  # of the target, above it: the ladder of a single site is coarse, and below would be further away
BAND = (0.75, 1.25)
"""Of the target, within which a change must save something."""


@dataclass(frozen=True)
class Choice:
    """Keeps, what they are expected to do, and why they are exact where they are."""

    keeps: tuple[float, ...]
    extra_variance: float
    cost: float
    rho: float
    refusal: str = ""


def choose_keeps(
    estimate: Estimate,
    costs: StepCosts,
    sites: Sequence[MovableSite],
    fixed: Mapping[int, str],
    target: float | None,
    is_exact: bool,
) -> Choice:
    """The keeps to use now.

    Args:
        estimate: of the extra variance at any keeps.
        costs: of a step at any keeps.
        sites: all of them.
        fixed: sites that run exactly anyway, with the reason.
        target: the most extra variance, or None for the least time to a target loss.
        is_exact: whether nothing is sketched at present; to begin takes a little more than to go on.
    """
    beta = estimate.noise_scale
    if reason := costs.tiny:
        return _exact(
            sites,
            f"{reason}: the draws cost more than they save; use a larger batch or wider layers",
        )
    if len(fixed) == len(sites):
        return _exact(sites, next(iter(fixed.values())))
    found = list(_candidates(estimate, costs, sites, fixed, target))
    if target is not None:
        best = min(found, key=lambda c: (c.cost, c.extra_variance))
    else:
        best = min(found, key=lambda c: (c.rho, c.extra_variance))
    most = (1.0 if target is None else 1 + _MARGIN) - _MARGIN * is_exact
    if beta < _QUIET:
        return _exact(
            sites,
            f"the noise scale is {beta:.2g}: noise hardly matters, a smaller batch is cheaper",
        )
    if best.cost > 1 - LEAST_SAVING:
        limit = "" if target is None else f" within an extra variance of {target:g}"
        return _exact(
            sites, f"no sketch saves {LEAST_SAVING:.0%} of a step{limit}: the rows matter alike"
        )
    if best.rho > most:
        return _exact(
            sites,
            f"sketches would take {best.rho:.2f} of the time to a target that exact training takes (noise scale "
            f"{beta:.2g})",
        )
    return best


def _exact(sites: Sequence[MovableSite], reason: str) -> Choice:
    return Choice((1.0,) * len(sites), 0.0, 1.0, 1.0, reason)


def _candidates(
    estimate: Estimate,
    costs: StepCosts,
    sites: Sequence[MovableSite],
    fixed: Mapping[int, str],
    target: float | None,
) -> Iterator[Choice]:
    """The frontier below every keep of the masks, which share one keep."""
    limit = math.inf if target is None else (1 + _ROOM / len(sites)) * target
    masks = [i for i, s in enumerate(sites) if s.is_mask and i not in fixed]
    for mask_keep in estimate.ladder if masks else (1.0,):
        used = math.fsum(estimate.variance(i, mask_keep) for i in masks) if mask_keep < 1 else 0.0
        if used > limit:
            continue
        left = mask_keep ** len(masks)
        options = []
        for i in range(len(sites)):
            movable = i not in fixed and i not in masks
            keeps = [k for k in estimate.ladder if k < 1] if movable else []
            rest = [(costs.of(sites, i, k, left), estimate.variance(i, k)) for k in keeps]
            options.append([(0.0, 0.0), *rest])
        below = [k for k in estimate.ladder if k < 1]
        for picked, cost, variance in frontier(options, limit - used):
            keeps_ = tuple(
                mask_keep if i in masks else below[p - 1] if p else 1.0
                for i, p in enumerate(picked)
            )
            c, v = max(1 + cost, 0.0), used + variance
            yield Choice(keeps_, v, c, time_to_target_ratio(c, 1 + v, estimate.noise_scale))


def reason_to_move(
    estimate: Estimate,
    costs: StepCosts,
    sites: Sequence[MovableSite],
    now: tuple[float, ...],
    then: tuple[float, ...],
    target: float | None,
) -> str:
    """Why other keeps are worth a change; empty where they are not."""
    if all(k == 1 for k in now):
        return "sketches pay"
    omega, next_omega = estimate.total(now), estimate.total(then)
    cost, next_cost = costs.step(sites, now), costs.step(sites, then)
    if target is None:
        beta = estimate.noise_scale
        before = time_to_target_ratio(cost, 1 + omega, beta)
        after = time_to_target_ratio(next_cost, 1 + next_omega, beta)
        if before - after >= LEAST_SAVING:
            return f"time to a target falls from {before:.3f} to {after:.3f} of exact"
        return ""
    low, high = (f * target for f in BAND)
    if not low <= omega <= high and abs(next_omega - target) < abs(omega - target):
        return f"extra variance {omega:.3f} left the band {low:.3g} to {high:.3g}"
    if cost - next_cost >= LEAST_SAVING:
        return f"a step costs {next_cost:.3f} of exact instead of {cost:.3f}"
    return ""
