"""Which keeps to use now: the cheapest within a target, or those that reach a loss soonest."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from backsketch.planning.control.costs import StepCosts
from backsketch.planning.control.estimate import Estimate
from backsketch.planning.control.moves import Keeps, Moves
from backsketch.planning.control.observer import Observer
from backsketch.planning.control.ranks import gathered
from backsketch.planning.control.sites import MovableSite
from backsketch.planning.plan.choices import frontier
from backsketch.planning.plan.plan import LEAST_GAIN, LEAST_SAVING
from backsketch.regions import state_of
from backsketch.theory.cost import time_to_target_ratio

__all__ = ["Refused", "Situation"]

_QUIET = 0.01  # noise scale
_ROOM = 0.15  # of the target, above it: the ladder of a single site is coarse, and below would be further away
_BAND = (0.75, 1.25)  # of the target, within which a change must save something


class Refused(Exception):
    """Why all sites are to be exact."""


@dataclass(frozen=True)
class _Choice:
    """Keeps, and what they are expected to do."""

    keeps: Keeps
    extra_variance: float
    cost: float
    rho: float


@dataclass(frozen=True)
class Situation:
    """What decisions go by.

    Attributes:
        observer: what was seen.
        moves: of the keeps, so far.
        sites: all of them.
        target: the most extra variance, or None for the least time to a target loss.
        max_plans: so many different keeps may be used; None is no limit.
    """

    observer: Observer
    moves: Moves
    sites: Sequence[MovableSite]
    target: float | None
    max_plans: int | None

    def decide(self, step: int) -> None:
        """Move the keeps, after so many steps, where that is worth it; not before something was measured."""
        if self.observer.costs is None or not self._estimate.is_known:
            return
        fixed = self._running_exactly()
        try:
            keeps, reason = self._chosen(fixed)
        except Refused as problem:
            self.moves.refuse(str(problem), step)
            return
        if reason:
            self.moves.move(keeps, reason, step)

    @property
    def _estimate(self) -> Estimate:
        return self.observer.estimate

    @property
    def _costs(self) -> StepCosts:
        assert self.observer.costs is not None
        return self.observer.costs

    def _running_exactly(self) -> dict[int, str]:
        """Regions that run exactly whatever their keep, on one of the ranks at least: the others wait for it."""
        found = {}
        for i, site in enumerate(self.sites):
            if site.is_region and (state := state_of(site.module)).status == "exact":
                found[i] = f"{site.name or 'the model'} runs exactly: {state.reason}"
        return {i: reason for of_rank in gathered(found) for i, reason in of_rank.items()}

    def _chosen(self, fixed: Mapping[int, str]) -> tuple[Keeps, str]:
        """The keeps to use, and why they are worth a change; no reason where those in force stay.

        Raises:
            Refused: nothing that could be sketched pays.
        """
        if reason := self._costs.tiny:
            raise Refused(
                f"{reason}: the draws cost more than they save; use a larger batch or wider layers"
            )
        if len(fixed) == len(self.sites):
            raise Refused(next(iter(fixed.values())))
        first = "rho" if self.target is None else "cost"
        best = min(self._candidates(fixed), key=lambda c: (getattr(c, first), c.extra_variance))
        self._check(best)
        keeps, plans = best.keeps, self.moves.plans
        if self.max_plans is not None and len(plans) >= self.max_plans and keeps not in plans:
            keeps = self._nearest(best, plans)
        return keeps, "" if keeps == self.moves.keeps else self._reason(keeps)

    def _check(self, best: _Choice) -> None:
        """Refuse what gains nothing over exact training; to begin takes a little more than to go on."""
        beta = self._estimate.noise_scale
        most = (1.0 if self.target is None else 1 + LEAST_GAIN) - LEAST_GAIN * (
            min(self.moves.keeps) == 1
        )
        if beta < _QUIET:
            raise Refused(
                f"the noise scale is {beta:.2g}: noise hardly matters, a smaller batch is cheaper"
            )
        if best.cost > 1 - LEAST_SAVING:
            limit = "" if self.target is None else f" within an extra variance of {self.target:g}"
            raise Refused(
                f"no sketch saves {LEAST_SAVING:.0%} of a step{limit}: the rows matter alike"
            )
        if best.rho > most:
            raise Refused(
                f"sketches would take {best.rho:.2f} of the time to a target that exact training takes (noise "
                f"scale {beta:.2g})"
            )

    def _candidates(self, fixed: Mapping[int, str]) -> Iterator[_Choice]:
        """The frontier below every keep of the masks, which share one keep."""
        ladder, variance = self._estimate.ladder, self._estimate.variance
        limit = math.inf if self.target is None else (1 + _ROOM / len(self.sites)) * self.target
        masks = [i for i, s in enumerate(self.sites) if s.is_mask and i not in fixed]
        below = [k for k in ladder if k < 1]
        for mask_keep in ladder if masks else (1.0,):
            used = math.fsum(variance(i, mask_keep) for i in masks) if mask_keep < 1 else 0.0
            if used > limit:
                continue
            left = mask_keep ** len(masks)
            options = []
            for i in range(len(self.sites)):
                keeps = [] if i in fixed or i in masks else below
                rest = [(self._costs.of(self.sites, i, k, left), variance(i, k)) for k in keeps]
                options.append([(0.0, 0.0), *rest])
            for picked, cost, omega in frontier(options, limit - used):
                found = [below[p - 1] if p else 1.0 for p in picked]
                keeps = [mask_keep if i in masks else k for i, k in enumerate(found)]
                c, v = max(1 + cost, 0.0), used + omega
                yield _Choice(tuple(keeps), v, c, self._rho(c, v))

    def _rho(self, cost: float, omega: float) -> float:
        return time_to_target_ratio(cost, 1 + omega, self._estimate.noise_scale)

    def _nearest(self, best: _Choice, plans: Sequence[Keeps]) -> Keeps:
        """Where no new keeps are allowed: the cheapest of the old ones in the target, or as costly as the best."""
        total = self._estimate.total
        most = math.inf if self.target is None else _BAND[1] * self.target
        fitting = [keeps for keeps in plans if total(keeps) <= most]
        wanted = best.cost if self.target is None else 0.0
        if not fitting:
            return min(plans, key=total)
        return min(fitting, key=lambda keeps: abs(self._costs.step(self.sites, keeps) - wanted))

    def _reason(self, then: Keeps) -> str:
        """Why other keeps are worth a change; empty where they are not."""
        now = self.moves.keeps
        if min(now) == 1:
            return "sketches pay"
        omega, next_omega = (self._estimate.total(keeps) for keeps in (now, then))
        cost, next_cost = (self._costs.step(self.sites, keeps) for keeps in (now, then))
        if self.target is None:
            before, after = self._rho(cost, omega), self._rho(next_cost, next_omega)
            if before - after >= LEAST_SAVING:
                return f"time to a target falls from {before:.3f} to {after:.3f} of exact"
            return ""
        low, high = (f * self.target for f in _BAND)
        if not low <= omega <= high and abs(next_omega - self.target) < abs(omega - self.target):
            return f"extra variance {omega:.3f} left the band {low:.3g} to {high:.3g}"
        if cost - next_cost >= LEAST_SAVING:
            return f"a step costs {next_cost:.3f} of exact instead of {cost:.3f}"
        return ""
