"""The search for a plan: one option for each site and one mask, for an objective and within limits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from backsketch.planning.plan.choices import choose, frontier
from backsketch.planning.plan.plan import CAUTION, LEAST_GAIN, CostEstimate, Plan
from backsketch.planning.plan.prediction import (
    assembled,
    exact_plan,
    measured_plans,
    option_variance,
)
from backsketch.planning.profiling.records import ProfileData, SiteProfile

__all__ = ["SANE_EXTRA_VARIANCE", "make_plan"]

SANE_EXTRA_VARIANCE = 1.0
"""The most that is proposed unasked: there a sketched batch is as noisy as an exact one of half its size."""

_OBJECTIVES = {
    "time": lambda cost: cost.cautious_rho,
    "memory": lambda cost: cost.saved_bytes,
    "variance": lambda cost: cost.extra_variance,
}
_SEARCHES = 3  # as choices change what sites do to each other
_FREE = 0.01  # extra variance that no training notices: 8-bit products have a tenth of it


@dataclass(frozen=True)
class _Limits:
    variance: float
    saved_bytes: float
    time: float

    def hold(self, cost: CostEstimate) -> bool:
        return (
            cost.extra_variance <= self.variance * (1 + 1e-9)
            and cost.saved_bytes <= self.saved_bytes
            and cost.time_ratio <= self.time * (1 + 1e-9)
        )


def make_plan(
    profile: ProfileData,
    objective: str,
    max_extra_variance: float | None,
    max_saved_bytes: float | None,
    max_time: float | None,
) -> Plan:
    """See :meth:`backsketch.planning.Profile.plan`."""
    if objective not in _OBJECTIVES:
        raise ValueError(
            f"plan: objective must be one of {', '.join(_OBJECTIVES)}; got {objective!r}"
        )
    limits = {
        "max_extra_variance": max_extra_variance,
        "max_saved_bytes": max_saved_bytes,
        "max_time": max_time,
    }
    for name, limit in limits.items():
        if limit is not None and not limit > 0:
            raise ValueError(f"plan: {name} must be positive; got {limit!r}")
    if objective == "variance" and max_saved_bytes is None and max_time is None:
        raise ValueError(
            "plan: objective='variance' needs max_saved_bytes or max_time; exact has none"
        )
    if objective == "memory":
        max_extra_variance = 0.1 if max_extra_variance is None else max_extra_variance
        max_time = 1.1 if max_time is None else max_time
    upper = (math.inf if x is None else x for x in (max_extra_variance, max_saved_bytes, max_time))
    found = _best(profile, objective, _Limits(*upper))
    if found is None:
        raise ValueError(
            f"plan: nothing meets {', '.join(f'{n}={v}' for n, v in limits.items() if v)}"
        )
    if objective == "time" and max_saved_bytes is None and max_time is None:
        return _or_free(profile, found)
    return found


def _best(profile: ProfileData, objective: str, limits: _Limits) -> Plan | None:
    unasked = objective == "time" and math.isinf(limits.variance)
    most = SANE_EXTRA_VARIANCE if unasked else math.inf
    masks = (None, *range(len(profile.masks)))
    searched = (plan for mask in masks for plan in _below(profile, mask, objective, limits))
    plans = [
        plan
        for plan in (*searched, *measured_plans(profile))
        if limits.hold(plan.predicted) and plan.predicted.extra_variance <= most
    ]
    return min(plans, key=lambda plan: _OBJECTIVES[objective](plan.predicted), default=None)


def _below(
    profile: ProfileData, mask: int | None, objective: str, limits: _Limits
) -> Iterator[Plan]:
    """Plans below one mask. Each search knows from the last how much the noise above adds at each site."""
    factors = [1.0] * len(profile.sites)
    for _ in range(_SEARCHES):
        plans = []
        for picked in _choices(profile, mask, objective, limits, factors):
            options = [s.options[i - 1] if i else None for s, i in zip(profile.sites, picked)]
            plans.append(assembled(profile, mask, options))
        if not plans:
            return
        yield from (plan for plan, _ in plans)
        _, after = min(plans, key=lambda p: (not limits.hold(p[0].predicted), p[0].predicted.rho))
        if max((abs(a - b) for a, b in zip(after, factors)), default=0.0) < 0.01:
            return
        factors = after


def _choices(
    profile: ProfileData,
    mask: int | None,
    objective: str,
    limits: _Limits,
    factors: Sequence[float],
) -> list[list[int]]:
    costs = [_costs(profile, site, mask, factor) for site, factor in zip(profile.sites, factors)]
    found = [picked for picked, _, _ in frontier(costs)] if objective == "time" else []
    if objective == "time" and all(
        map(math.isinf, (limits.variance, limits.saved_bytes, limits.time))
    ):
        return found
    above = 0.0 if mask is None else profile.masks[mask].variance
    if limits.variance < above:
        return found
    time, size = (limits.time - 1) * profile.step_seconds, limits.saved_bytes - profile.saved_bytes

    def rho(sums: Tensor) -> Tensor:
        ratio = (1 + sums[:, 0] / profile.step_seconds).clamp(min=profile.least_ratio)
        beta = profile.noise_scale
        weight = 1.0 if math.isinf(beta) else beta / (1 + beta)
        return ratio * (1 + weight * (above + sums[:, 1]))

    scores = {
        "time": (rho, (0, 1)),
        "variance": (lambda sums: sums[:, 1], (1,)),
        "memory": (lambda sums: sums[:, 2], (2,)),
    }
    solved = choose(costs, *scores[objective], (time, limits.variance - above, size))
    return found if solved is None else [*found, solved]


def _costs(
    profile: ProfileData, site: SiteProfile, mask: int | None, factor: float
) -> list[tuple[float, float, float]]:
    """Seconds, variance, bytes of each option; the first is exact.

    Seconds are those that the timing leaves possible: of many noisy ones the best is too good.
    """
    live = 1.0 if mask is None else profile.masks[mask].keep
    options = [
        (
            site.seconds(o, live) + CAUTION * o.error_seconds,
            factor * option_variance(profile, o, mask),
            float(o.saved_bytes),
        )
        for o in site.options
    ]
    return [(0.0, 0.0, 0.0), *options]


def _or_free(profile: ProfileData, plan: Plan) -> Plan:
    """The plan, or what saves time without variance where exact training or a smaller batch is as good.

    A smaller batch is no rival of the latter: it saves the same part of its time, too.
    """
    best, (b, rho) = plan.predicted.cautious_rho, plan.predicted.smaller_batch
    if best < min(rho, 1.0) - LEAST_GAIN and not plan.is_exact:
        return plan
    if b < 1 and rho < 1 - LEAST_GAIN:
        reason = (
            f"a batch of {b:g} of the size reaches a target in {rho:.2f} of the time (noise scale "
            f"{profile.noise_scale:.3g}), the best sketches in {best:.2f}: use the smaller batch"
        )
    else:
        reason = f"no sketch beats exact training here (the best has rho {best:.2f})"
    free = _best(_rounding_only(profile), "time", _Limits(_FREE, math.inf, math.inf))
    if free is None or free.predicted.cautious_ratio > 1 - LEAST_GAIN:
        return exact_plan(profile, f"exact: {reason}")
    if free.texts == plan.texts:
        return replace(plan, reason=f"beside it, {reason}")
    return replace(free, reason=f"only what adds no variance: {reason}")


def _rounding_only(profile: ProfileData) -> ProfileData:
    """Without masks and what draws rows."""
    sites = (replace(s, options=tuple(o for o in s.options if o.keep == 1)) for s in profile.sites)
    return replace(profile, sites=tuple(sites), masks=())
