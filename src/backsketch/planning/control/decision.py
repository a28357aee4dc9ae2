"""Which keeps: the cheapest within a target, those of the least time to a target loss, or exact and why."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from backsketch.estimators import Estimator, Split
from backsketch.planning.control.calibration import Work
from backsketch.planning.control.estimate import Estimate
from backsketch.planning.control.sites import Site, with_keep
from backsketch.planning.plan.frontier import frontier
from backsketch.planning.profiling.records import Option, Profile
from backsketch.regions import Region
from backsketch.theory.cost import time_to_target_ratio

__all__ = ["Choice", "Costs", "choose_keeps"]

_TINY = 2**20  # multiply-adds of a backward pass below which the draws cost what they save
_QUIET = 0.01  # noise scale
_LEAST = 0.02  # of a step's cost, worth a sketch or a change
_MARGIN = 0.01
_ROOM = 0.15  # of the target, above it: the ladder of a single site is coarse, and below would be further away


@dataclass(frozen=True)
class Costs:
    """What a site saves of an exact step: ``fixed + live * share`` for every site, negative where it saves.

    The share of the work is the keep, or less below a mask (:meth:`Site.share`); ``tiny`` says why nothing can be
    gained anywhere.
    """

    fixed: tuple[float, ...]
    live: tuple[float, ...]
    tiny: str = ""

    def of(self, sites: Sequence[Site], index: int, keep: float, left: float) -> float:
        """Change of a step's cost by one site, a fraction ``left`` of the rows being left by a mask."""
        if keep >= 1:
            return 0.0
        return self.fixed[index] + self.live[index] * sites[index].share(keep, left)

    def step(self, sites: Sequence[Site], keeps: Sequence[float]) -> float:
        """A step's cost, exact = 1."""
        left = math.prod(k for s, k in zip(sites, keeps) if s.is_mask)
        return max(1 + math.fsum(self.of(sites, i, k, left) for i, k in enumerate(keeps)), 0.0)

    @classmethod
    def from_profile(cls, profile: Profile, sites: Sequence[Site]) -> Costs:
        """From measured seconds.

        Raises:
            ValueError: the profile does not have one of the sites.
        """
        options = {(slot.name, o.family): o for slot in profile.slots for o in slot.options}
        owners = {layer: slot for slot in profile.slots for layer in slot.layers}
        pairs = []
        for site in sites:
            if site.is_mask:
                pairs.append((0.0, 0.0))
                continue
            family = site.base.mode if isinstance(site.base, Region) else "weights"
            owner = owners.get(site.name)
            name = owner.name if family == "weights" and owner else site.name
            option = options.get((name, family))
            if option is None:
                known = ", ".join(sorted({s.name or "(model)" for s in profile.slots}))
                raise ValueError(
                    f"Controller: the profile has no {family} sketch at {site.name or '(model)'!r}; it has {known}"
                )
            share = 1 / len(owner.layers) if family == "weights" and owner else 1.0
            pairs.append(_affine(option, share / profile.step_seconds))
        return cls(tuple(a for a, _ in pairs), tuple(b for _, b in pairs))

    @classmethod
    def from_work(cls, work: Mapping[str, Work], sites: Sequence[Site]) -> Costs:
        """From counted arithmetic: each site's share of the products of a step."""
        total = math.fsum(w.size * (1 + w.products) for w in work.values())
        fixed, live, backward = [], [], 0.0
        for site in sites:
            inside = [w for name, w in work.items() if _below(name, site.name)]
            products = math.fsum(w.size * w.products for w in inside)
            forward = math.fsum(w.size for w in inside)
            if site.is_mask:
                fixed.append(0.0)
                live.append(0.0)
                continue
            backward += products
            if isinstance(site.base, Region):
                again = forward if site.base.mode == "recompute" else 0.0
                at_zero, slope = -products, products + again
            else:
                at_zero, slope = _layer(site, inside)
            fixed.append(at_zero / total if total else 0.0)
            live.append(slope / total if total else 0.0)
        if not total:  # modules of unknown kinds: the model as one, shared out evenly
            n = max(sum(not s.is_mask for s in sites), 1)
            share = [0.0 if s.is_mask else 2 / 3 / n for s in sites]
            return cls(tuple(-s for s in share), tuple(share))
        tiny = f"the sketched layers have {backward:.2g} multiply-adds in a backward pass"
        return cls(tuple(fixed), tuple(live), tiny if backward < _TINY else "")


def _affine(option: Option, scale: float) -> tuple[float, float]:
    return option.fixed_seconds * scale, option.live_seconds / option.keep * scale


def _below(name: str, top: str) -> bool:
    return not top or name == top or name.startswith(f"{top}.")


def _layer(site: Site, inside: Sequence[Work]) -> tuple[float, float]:
    """Arithmetic at keep 0, relative to exact, and its slope in keep."""
    assert isinstance(site.base, Estimator)
    if isinstance(site.base, Split):
        low, high = (_work(with_keep(site.base, k)) for k in (0.5, 1.0))
    else:
        low, high = _work(with_keep(site.base, 0.5)), (1.0, 1.0)
    slope = [2 * (b - a) for a, b in zip(low, high)]
    size = math.fsum(w.size * slope[1] + w.size * slope[0] * (w.products > 1) for w in inside)
    return -size, size


def _work(sketch: object) -> tuple[float, float]:
    assert isinstance(sketch, Estimator)
    return sketch.work()


# --- the choice -------------------------------------------------------------------------------------


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
    costs: Costs,
    sites: Sequence[Site],
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
    if best.cost > 1 - _LEAST:
        limit = "" if target is None else f" within an extra variance of {target:g}"
        return _exact(
            sites, f"no sketch saves {_LEAST:.0%} of a step{limit}: the rows matter alike"
        )
    if best.rho > most:
        return _exact(
            sites,
            f"sketches would take {best.rho:.2f} of the time to a target that exact training takes (noise scale "
            f"{beta:.2g})",
        )
    return best


def _exact(sites: Sequence[Site], reason: str) -> Choice:
    return Choice((1.0,) * len(sites), 0.0, 1.0, 1.0, reason)


def _candidates(
    estimate: Estimate,
    costs: Costs,
    sites: Sequence[Site],
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
