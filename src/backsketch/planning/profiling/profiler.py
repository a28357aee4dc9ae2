"""What each sketch at each site would cost and save, measured on this device."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from backsketch.convert import restore_, sketch_
from backsketch.memory import kept_by
from backsketch.nn.registry import SMALL_WEIGHT
from backsketch.nn.swap import is_swapped
from backsketch.planning.measure.errors import squared_errors
from backsketch.planning.measure.passes import LossFn, Passes, passes
from backsketch.planning.measure.recorder import Call, backward, watching
from backsketch.planning.measure.rows import RowCurve, row_curve
from backsketch.planning.measure.timing import timed
from backsketch.planning.profiling.curves import Curves, curves, mask_weights, ratio
from backsketch.planning.profiling.families import FAMILIES, LADDER, REFERENCE, Family
from backsketch.planning.profiling.noise import MASK_REFERENCE, Noise, mask_noise, region_noise
from backsketch.planning.profiling.progress import stages
from backsketch.planning.profiling.records import MaskOption, Option, ProfileData, SiteProfile
from backsketch.planning.profiling.sites import Site, find_sites
from backsketch.planning.profiling.times import Costs, site_costs
from backsketch.regions import RunsExactly
from backsketch.regions.rows import scores
from backsketch.rules import unwrap
from backsketch.theory.noise import GradientSums
from backsketch.untouched import repeatable, untouched

__all__ = ["measured"]

_BATCHES = 8  # for SGD's own noise
_CLOSELY = 2  # of them for the noise of sketches
_STEPS = 5  # timed
_STAGES = 1 + len(FAMILIES) + sum(f.own_weights_only for f in FAMILIES)  # and one per batch


def measured(
    model: nn.Module, batches: Iterable[Any], loss_fn: LossFn[Any], progress: bool
) -> ProfileData:
    """See :func:`backsketch.profile`."""
    model = unwrap(model)
    data = _batches(batches)
    if any(is_swapped(m) for m in model.modules()):
        raise ValueError("profile: the model is sketched already; call bs.restore_(model) first")
    with (
        stages("profile", _STAGES + len(data), progress) as tick,
        untouched(model, training=True, seed=0),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", RunsExactly)  # regions are tried here
        try:
            return _measured(model, data, loss_fn, tick)
        finally:
            restore_(model)


def _batches(batches: Iterable[Any]) -> list[Any]:
    data = []
    for batch in batches:
        data.append(batch)
        if len(data) == _BATCHES:
            break
    if len(data) < 2:
        raise ValueError(
            f"profile: needs at least two batches to see SGD's own noise, got {len(data)}"
        )
    return data


def _measured(
    model: nn.Module, data: Sequence[Any], loss_fn: LossFn[Any], tick: Callable[[str], None]
) -> ProfileData:
    tick("looking for sites")
    sites = find_sites(model, data[0], loss_fn)
    if not sites:
        raise ValueError(
            "profile: nothing to sketch: no residual branch, no linear layer or convolution of more than "
            f"{SMALL_WEIGHT} weights"
        )
    observed = _observe(model, loss_fn, data, sites, tick)
    costs = site_costs(model, sites, observed.first, tick)
    errors: dict[tuple[str, str], float] = {}
    for family in (f for f in FAMILIES if f.own_weights_only):
        tick(f"extra variance of {family.name}")
        for name, error in _weight_errors(model, loss_fn, data, family, sites, observed).items():
            errors[name, family.name] = error
    for site in sites:
        if site.row_dims is not None and site.name in observed.noise[0]:
            errors[site.name, "save"] = fmean(n[site.name].isolated for n in observed.noise)
    return _assembled(sites, observed, costs, errors)


# --- exact passes -----------------------------------------------------------------------------------


@dataclass
class _Observed:
    """What exact passes showed; the lists have an entry per batch that was watched."""

    device: str
    saved_bytes: int = 0
    step_seconds: float = 0.0
    forward_seconds: float = 0.0
    sums: GradientSums = field(default_factory=GradientSums)
    exact: list[list[Tensor]] = field(default_factory=list)
    curves: list[Curves] = field(default_factory=list)
    noise: list[dict[str, Noise]] = field(default_factory=list)
    masks: list[float] = field(default_factory=list)
    output: list[RowCurve] = field(default_factory=list)
    first: dict[str, Call] = field(default_factory=dict)


def _observe(
    model: nn.Module,
    loss_fn: LossFn[Any],
    data: Sequence[Any],
    sites: Sequence[Site],
    tick: Callable[[str], None],
) -> _Observed:
    seen = _Observed(str(next(model.parameters()).device))
    times = []
    with passes(model, loss_fn, among=()) as run:
        for number, batch in enumerate(data):
            tick("exact passes")
            if number < _CLOSELY:
                gradient = _watched(run, sites, batch, number, seen)
            else:
                seconds, gradient = timed(lambda: run.gradient(batch, number))  # noqa: B023
                times.append(seconds)
            seen.sums.add(gradient)
        while len(times) < _STEPS:
            times.append(timed(lambda: run.gradient(data[0], 0))[0])
        forward = [timed(lambda: _forward(run, data[0]))[0] for _ in range(_STEPS)]
    seen.step_seconds, seen.forward_seconds = statistics.median(times), statistics.median(forward)
    with repeatable(model, 0):
        seen.saved_bytes = kept_by(model, lambda: loss_fn(model, data[0])).total
    return seen


def _forward(run: Passes, batch: Any) -> None:
    with run.loss(batch, 0):
        pass


def _watched(
    run: Passes, sites: Sequence[Site], batch: Any, number: int, seen: _Observed
) -> list[Tensor]:
    """An exact pass, and on its graph the noise of single sites."""
    names = {"", *(s.name for s in sites), *(name for s in sites for name in s.layers)}
    with watching(run.model, names) as calls, run.loss(batch, number) as loss:
        gradient = backward(loss, list(run.parameters.values()), calls, retain_graph=True)
        seen.noise.append(region_noise(run, calls, sites, number))
        output = _maskable(calls[""], sites)
        if output:
            seen.masks.append(mask_noise(run, output, number))
            seen.output.append(row_curve(scores(output.cotangents, 1), LADDER, live_only=False))
    weights = mask_weights(output.cotangents[0]) if output else {}
    seen.curves.append(curves(run.model, sites, calls, weights))
    seen.exact.append(gradient)
    if not seen.first:
        seen.first = {name: found[0] for name, found in calls.items() if found[0].cotangents}
    return gradient


def _maskable(calls: list[Call], sites: Sequence[Site]) -> Call | None:
    """The model's call, if its output is one tensor with a row per sample.

    Not where the whole model is one site: a region over it is that mask, and saves time as well.
    """
    if len(calls) != 1 or len(calls[0].cotangents) != 1 or any(not site.name for site in sites):
        return None
    g = calls[0].cotangents[0]
    return calls[0] if g.ndim > 1 and g.shape[0] > 1 else None


# --- sketched passes --------------------------------------------------------------------------------


def _weight_errors(
    model: nn.Module,
    loss_fn: LossFn[Any],
    data: Sequence[Any],
    family: Family,
    sites: Sequence[Site],
    seen: _Observed,
) -> dict[str, float]:
    """``‖ĝ − g‖²`` by site, all of them sketched at once: errors of ``grad_weight`` stay where they are made."""
    fitting = [s for s in sites if family.fits(s)]
    if not fitting:
        return {}
    sketch_(model, {k: v for s in fitting for k, v in family.rules(s, REFERENCE).items()})
    errors = dict.fromkeys((s.name for s in fitting), 0.0)
    with passes(model, loss_fn) as run:
        everything = [site.index for site in run.sites]
        for number, exact in enumerate(seen.exact):
            noisy = run.gradient(data[number], number, everything)
            for name, error in zip(run.parameters, squared_errors(noisy, exact).tolist()):
                owners = [s.name for s in fitting if _owns(s, name)] or list(errors)
                for owner in owners:
                    errors[owner] += error / len(owners)
    restore_(model)
    return {name: total / len(seen.exact) for name, total in errors.items()}


def _owns(site: Site, parameter: str) -> bool:
    return any(parameter.startswith(f"{layer}.") for layer in site.layers)


# --- everything together ----------------------------------------------------------------------------


def _assembled(
    sites: Sequence[Site],
    seen: _Observed,
    costs: Costs,
    errors: Mapping[tuple[str, str], float],
) -> ProfileData:
    """Relative to the exact step and to SGD's variance."""
    sgd = seen.sums.sgd_variance
    # Together the sites take no longer than the backward pass that they are a part of.
    backward = max(seen.step_seconds - seen.forward_seconds, 0.0)
    share = min(1.0, backward / max(math.fsum(costs.backward.values()), 1e-12))
    profiles = tuple(
        SiteProfile(
            site.name,
            site.kind,
            site.row_dims,
            site.layers,
            tuple(_options(site, seen, costs, errors)) if sgd > 0 else (),
            _arriving(site, seen.noise, sgd),
            share * costs.backward[site.name],
        )
        for site in sites
    )
    return ProfileData(
        profiles,
        tuple(_masks(seen)) if sgd > 0 else (),
        seen.step_seconds,
        seen.saved_bytes,
        seen.sums.noise_scale,
        sgd,
        seen.device,
        torch.__version__,
        seen.forward_seconds,
    )


def _options(
    site: Site,
    seen: _Observed,
    costs: Costs,
    errors: Mapping[tuple[str, str], float],
) -> Iterator[Option]:
    masks = LADDER if seen.masks else ()
    for family in FAMILIES:
        error, cost = (
            errors.get((site.name, family.noise)),
            costs.sketched.get((site.name, family.name)),
        )
        if error is None or cost is None or not family.fits(site):
            continue
        omega = error / seen.sums.sgd_variance
        for keep in family.keeps:
            yield Option(
                family.name,
                keep,
                {n: str(s) for n, s in family.rules(site, keep).items()},
                cost.fixed,
                cost.slope * keep,
                omega * _scale(site, family, seen, 1.0, keep),
                cost.saved_bytes,
                family.nested,
                tuple(omega * _scale(site, family, seen, mask, keep) for mask in masks),
                cost.error,
            )


def _scale(site: Site, family: Family, seen: _Observed, mask: float, keep: float) -> float:
    """Extra variance at a keep below a mask, over what was measured."""
    if len(family.keeps) == 1:  # rounding: in proportion to the energy of the cotangents
        return 1 + _relative(seen, mask) if mask < 1 else 1.0
    return ratio(seen.curves, (site.name, family.noise), mask, keep, REFERENCE)


def _relative(seen: _Observed, mask: float) -> float:
    """``E‖error‖²`` of a mask on the output, over the energy of its cotangent."""
    at = LADDER.index(mask)
    return fmean(curve.errors[at] / max(curve.energy, 1e-300) for curve in seen.output)


def _masks(seen: _Observed) -> Iterator[MaskOption]:
    if not seen.masks:
        return
    measured, base = fmean(seen.masks) / seen.sums.sgd_variance, _relative(seen, MASK_REFERENCE)
    for keep in LADDER:
        relative = _relative(seen, keep)
        yield MaskOption(keep, measured * relative / base if base > 0 else 0.0, 1 + relative)


def _arriving(site: Site, noise: Sequence[Mapping[str, Noise]], sgd: float) -> dict[str, float]:
    """By how much a unit of extra variance at other sites adds to the errors made here, relative.

    The growth measured with all others at the reference keep, shared among them by the energy of their noise.
    """
    if site.name not in noise[0]:
        return {}
    isolated, joint = (
        math.fsum(getattr(n[site.name], kind) for n in noise) for kind in ("isolated", "joint")
    )
    energy = {o: math.fsum(n[o].arriving.get(site.name, 0.0) for n in noise) for o in noise[0]}
    total = math.fsum(energy.values())
    if not (joint > isolated > 0 and total > 0):
        return {}
    return {
        other: (joint / isolated - 1) * part / total * sgd / fmean(n[other].joint for n in noise)
        for other, part in energy.items()
        if part > 0
    }
