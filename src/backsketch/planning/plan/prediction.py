"""What a choice of options costs together: time, extra variance and bytes from the numbers of a profile."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress

from backsketch.estimators import parse
from backsketch.planning.plan.plan import CostEstimate, Plan
from backsketch.planning.profiling.records import Option, ProfileData
from backsketch.regions import Mask
from backsketch.theory.cost import smaller_batch_ratio, time_to_target_ratio

__all__ = [
    "Picked",
    "assembled",
    "chosen",
    "everywhere_in_8_bits",
    "exact_plan",
    "measured_plans",
    "option_variance",
    "predict",
]

Picked = Sequence[Option | None]
"""An option for each site, None where it stays exact."""

_SMALLER = (1.0, 0.75, 0.5, 0.25)


def predict(profile: ProfileData, rules: Mapping[str, object]) -> Plan:
    """See :meth:`backsketch.planning.Profile.predict`."""
    left = {pattern: str(parse(str(sketch))) for pattern, sketch in rules.items()}
    masks = [str(Mask(keep=m.keep)) for m in profile.masks]
    mask = masks.index(left.pop("")) if left.get("") in masks else None
    options = chosen(profile, left)
    used = {pattern for o in options if o is not None for pattern in o.rules}
    for pattern in left.keys() - used:
        raise ValueError(
            f"predict: {pattern!r}: {left[pattern]} is none of the options of the profile"
        )
    return assembled(profile, mask, options)[0]


def chosen(profile: ProfileData, texts: Mapping[str, str]) -> list[Option | None]:
    """The option of a plan at each site, None where it leaves the site exact."""
    rules = texts.items()
    return [next((o for o in s.options if o.rules.items() <= rules), None) for s in profile.sites]


def assembled(profile: ProfileData, mask: int | None, options: Picked) -> tuple[Plan, list[float]]:
    """The plan of these options, and by how much the noise above each site adds to its extra variance."""
    texts = {pattern: text for o in options if o is not None for pattern, text in o.rules.items()}
    if mask is not None:
        texts[""] = str(Mask(keep=profile.masks[mask].keep))
    ratio, error = _time(profile, 1.0 if mask is None else profile.masks[mask].keep, options)
    omega, factors = _joint_variance(profile, mask, options)
    for trial in profile.trials:
        if trial.rules == texts:
            ratio = max(trial.time_ratio, profile.least_ratio)
            error, omega = trial.time_error, trial.extra_variance
    size = profile.saved_bytes + sum(o.saved_bytes for o in options if o is not None)
    rho = time_to_target_ratio(ratio, 1 + omega, profile.noise_scale)
    cost = CostEstimate(ratio, omega, size, rho, _smaller_batch(profile), time_error=error)
    return Plan(texts, cost, exact_names=tuple(s.name for s in profile.sites)), factors


def exact_plan(profile: ProfileData, reason: str) -> Plan:
    """The plan that sketches nothing."""
    cost = CostEstimate(1.0, 0.0, profile.saved_bytes, 1.0, _smaller_batch(profile))
    return Plan({}, cost, reason, tuple(s.name for s in profile.sites))


def everywhere_in_8_bits(profile: ProfileData) -> Plan:
    """The plan of 8-bit products on all rows, wherever there are such options."""
    found = [[o for o in s.options if o.in_8_bits and o.keep == 1] for s in profile.sites]
    options = [min(o, key=s.seconds, default=None) for s, o in zip(profile.sites, found)]
    return assembled(profile, None, options)[0]


def measured_plans(profile: ProfileData) -> Iterator[Plan]:
    """Those that were measured as a whole, as far as they are made of options of this profile."""
    for trial in profile.trials:
        with suppress(ValueError):
            yield predict(profile, trial.rules)


def _time(profile: ProfileData, live: float, options: Picked) -> tuple[float, float]:
    """A step relative to exact, never less than what no sketch saves, and its standard error.

    Sites of one kind share one timing, so that their errors are the same error.
    """
    chosen = [(s, o) for s, o in zip(profile.sites, options) if o is not None]
    change = math.fsum(site.seconds(o, live) for site, o in chosen)
    shared: Counter[tuple[str, float]] = Counter()
    for _, o in chosen:
        shared[o.family, o.error_seconds] += 1
    error = math.hypot(*(count * seconds for (_, seconds), count in shared.items()))
    ratio = max(1 + change / profile.step_seconds, profile.least_ratio)
    return ratio, error / profile.step_seconds


def option_variance(profile: ProfileData, option: Option, mask: int | None) -> float:
    """The extra variance of an option by itself, below a mask."""
    if mask is None:
        return option.variance
    return option.masked[mask] if option.masked else option.variance * profile.masks[mask].growth


def _joint_variance(
    profile: ProfileData, mask: int | None, options: Picked
) -> tuple[float, list[float]]:
    """Extra variance of all sites together, and the factor of each by the noise of the regions above it.

    That noise adds to the cotangent that a sketch meets, whether a mask is above or not: to its error it adds in
    proportion to the error without a mask.
    """
    sketched = {s.name: (s, o) for s, o in zip(profile.sites, options) if o}
    isolated = {name: option_variance(profile, o, mask) for name, (_, o) in sketched.items()}
    total = dict(isolated)
    for _ in profile.sites:  # the noise of one site may pass through all others
        before = dict(total)
        for name, (site, option) in sketched.items():
            above = math.fsum(
                a * before[n]
                for n, a in site.arriving.items()
                if n in sketched and sketched[n][1].is_region
            )
            total[name] = isolated[name] + option.variance * above
        if total == before:
            break
    factors = [
        total[s.name] / isolated[s.name] if isolated.get(s.name) else 1.0 for s in profile.sites
    ]
    above_all = 0.0 if mask is None else profile.masks[mask].variance
    return above_all + math.fsum(total.values()), factors


def _smaller_batch(profile: ProfileData) -> tuple[float, float]:
    rho, b = min((smaller_batch_ratio(b, profile.noise_scale), b) for b in _SMALLER)
    return b, rho
