"""What a step costs at any keeps: measured seconds where there are some, else counted arithmetic."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from backsketch.estimators import Estimator, parse
from backsketch.planning.control.calibration import Work
from backsketch.planning.control.sites import MovableSite
from backsketch.planning.profiling.records import Option, ProfileData
from backsketch.planning.profiling.sites import is_inside
from backsketch.regions import Region

__all__ = ["StepCosts"]

_TINY = 2**20  # multiply-adds of a backward pass below which the draws cost what they save


@dataclass(frozen=True)
class StepCosts:
    """What a site saves of an exact step: ``fixed + live * share`` for every site, negative where it saves.

    The share of the work is the keep, or less below a mask (:meth:`MovableSite.share`); ``tiny`` says why nothing
    can be gained anywhere.
    """

    fixed: tuple[float, ...]
    live: tuple[float, ...]
    tiny: str = ""

    def of(self, sites: Sequence[MovableSite], index: int, keep: float, left: float) -> float:
        """Change of a step's cost by one site, a fraction ``left`` of the rows being left by a mask."""
        if keep >= 1:
            return 0.0
        return self.fixed[index] + self.live[index] * sites[index].share(keep, left)

    def step(self, sites: Sequence[MovableSite], keeps: Sequence[float]) -> float:
        """A step's cost, exact = 1."""
        left = math.prod(k for s, k in zip(sites, keeps) if s.is_mask)
        return max(1 + math.fsum(self.of(sites, i, k, left) for i, k in enumerate(keeps)), 0.0)

    @classmethod
    def from_profile(cls, profile: ProfileData, sites: Sequence[MovableSite]) -> StepCosts:
        """From measured seconds; those of a layer's sketch that was not timed from the layer's own and arithmetic.

        Raises:
            ValueError: the profile does not have one of the sites.
        """
        pairs = [_measured(profile, site) for site in sites]
        return cls(tuple(a for a, _ in pairs), tuple(b for _, b in pairs))

    @classmethod
    def from_work(cls, work: Mapping[str, Work], sites: Sequence[MovableSite]) -> StepCosts:
        """From counted arithmetic: each site's share of the products of a step."""
        total = math.fsum(w.size * (1 + w.products) for w in work.values())
        if not total:  # modules of unknown kinds: the model as one, shared out evenly
            n = max(sum(not s.is_mask for s in sites), 1)
            share = [0.0 if s.is_mask else 2 / 3 / n for s in sites]
            return cls(tuple(-s for s in share), tuple(share))
        pairs, backward = [], 0.0
        for site in sites:
            inside = [w for name, w in work.items() if is_inside(name, site.name)]
            at_zero, slope = _counted(site, inside)
            pairs.append((at_zero / total, slope / total))
            backward += 0.0 if site.is_mask else math.fsum(w.size * w.products for w in inside)
        tiny = f"the sketched layers have {backward:.2g} multiply-adds in a backward pass"
        fixed, live = (tuple(column) for column in zip(*pairs))
        return cls(fixed, live, tiny if backward < _TINY else "")


def _counted(site: MovableSite, inside: Sequence[Work]) -> tuple[float, float]:
    """Multiply-adds at keep 0 more than those of exact, and their slope in keep."""
    if site.is_mask:
        return 0.0, 0.0
    if isinstance(site.base, Region):
        products = math.fsum(w.size * w.products for w in inside)
        again = math.fsum(w.size for w in inside) if site.base.mode == "recompute" else 0.0
        return -products, products + again
    of_input, of_weight = _slopes(site)
    size = math.fsum(w.size * (of_weight + of_input * (w.products > 1)) for w in inside)
    return -size, size


def _slopes(site: MovableSite) -> tuple[float, float]:
    """How the arithmetic of grad_input and of grad_weight, exact = 1, grows with keep."""
    low, high = (site.base.with_keep(k).work() for k in (0.5, 1.0))
    return 2 * (high[0] - low[0]), 2 * (high[1] - low[1])


def _measured(profile: ProfileData, site: MovableSite) -> tuple[float, float]:
    if site.is_mask:
        return 0.0, 0.0
    for owner in profile.sites:
        if owner.name != site.name and site.name not in owner.layers:
            continue
        layers = 1 if owner.name == site.name else len(owner.layers)
        scale = 1 / (layers * profile.step_seconds)
        option = next((o for o in owner.options if _is_timing_of(o, site)), None)
        if option is not None:
            # An option is timed as the seconds at its keep; the live part is in proportion to it.
            return option.fixed_seconds * scale, option.live_seconds / option.keep * scale
        if isinstance(site.base, Estimator) and owner.backward_seconds is not None:
            saved = sum(_slopes(site)) / 2 * owner.backward_seconds * scale
            return -saved, saved
    raise ValueError(_unknown(profile, site))


def _is_timing_of(option: Option, site: MovableSite) -> bool:
    """Whether it was timed with the sketch of a site, at whatever keep; of regions mode and arithmetic decide."""
    text, base = option.rules.get(site.name), site.base
    timed = None if text is None else parse(text)
    if isinstance(base, Region) and isinstance(timed, Region):
        return (timed.mode, timed.arithmetic) == (base.mode, base.arithmetic)
    return text == str(base.with_keep(option.keep))


def _unknown(profile: ProfileData, site: MovableSite) -> str:
    known = ", ".join(sorted({s.name or "(model)" for s in profile.sites}))
    return (
        f"Controller: the profile has no time of {site.base} at {site.name or '(model)'!r}; it has {known}. "
        "Sketch those, or leave the profile out: the arithmetic is counted then"
    )
