"""From what passes and timings showed to the options of each site, in units of SGD's variance."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean

import torch

from backsketch.planning.profiling.families import FAMILIES, LADDER, REFERENCE, ROUNDING
from backsketch.planning.profiling.noise import MASK_REFERENCE, ratio
from backsketch.planning.profiling.observe import Observed
from backsketch.planning.profiling.records import MaskOption, Option, ProfileData, SiteProfile
from backsketch.planning.profiling.sites import Site
from backsketch.planning.profiling.times import SiteCosts

__all__ = ["assembled"]

Omegas = dict[tuple[str, str], float]
"""Extra variance by site and family of noise, of what draws rows at the reference keep."""


def assembled(sites: Sequence[Site], seen: Observed, costs: Mapping[str, SiteCosts]) -> ProfileData:
    """The profile."""
    sgd = seen.sums.sgd_variance
    omegas = _omegas(sites, seen, costs, sgd) if sgd > 0 else {}
    # Together the sites take no longer than the backward pass that they are a part of.
    backward = max(seen.step_seconds - seen.forward_seconds, 0.0)
    share = min(1.0, backward / max(math.fsum(c.backward for c in costs.values()), 1e-12))
    profiles = tuple(
        SiteProfile(
            site.name,
            site.kind,
            site.row_dims,
            site.layers,
            tuple(_options(site, seen, costs[site.name], omegas)) if site.name in costs else (),
            _arriving(site, seen, omegas),
            share * costs[site.name].backward if site.name in costs else 0.0,
        )
        for site in sites
    )
    return ProfileData(
        profiles,
        tuple(_masks(seen, sgd)) if sgd > 0 else (),
        seen.step_seconds,
        seen.saved_bytes,
        seen.sums.noise_scale,
        sgd,
        seen.device,
        torch.__version__,
        seen.forward_seconds,
    )


def _omegas(
    sites: Sequence[Site], seen: Observed, costs: Mapping[str, SiteCosts], sgd: float
) -> Omegas:
    """That of drawn rows is in closed form, up to a factor which one draw shows.

    The draw is one of each region on the first batch, and one of the rows of a weight gradient at a site of each
    kind. Rounding errs by the same fraction of the gradient at all sites of a kind. It passes on the same fraction
    of each row, independent of the other rows, so that at a layer below they add up as ``Σ ‖g_i‖²‖x_i‖²``.
    """
    found: Omegas = {}
    below = 0.0
    turn = {name: call.turn for name, call in seen.calls.items()}
    for site in sorted(sites, key=lambda s: turn.get(s.name, 0)):
        drawn = {f: _series(seen, site.name, f) for f in ("save", "weights")}
        growth = {f: fmean(e) / e[0] if e and e[0] else 1.0 for f, e in drawn.items()}
        if site.name in seen.noise:
            found[site.name, "save"] = seen.noise[site.name].error * growth["save"] / sgd
        energy = seen.energy(site.name)
        for name, cost in costs[site.name].families.items() if site.name in costs else ():
            if name == "weights":
                of_kind = _series(seen, site.like, name)[0]
                factor = cost.own * seen.energy(site.like)[0] / of_kind if of_kind else 0.0
                found[site.name, name] = factor * fmean(drawn[name]) / sgd
            elif name in ROUNDING:
                found[site.name, name] = (cost.own * fmean(energy) + cost.below * below) / sgd
        rows = [c[site.name, "weights", 1.0] for c in seen.curves if drawn["weights"]]
        below += fmean([curve.energy for curve in rows] or [0.0])
    return found


def _series(seen: Observed, site: str, family: str) -> list[float]:
    """The error in closed form at the reference keep, of each batch that was watched."""
    key, at = (site, family, 1.0), LADDER.index(REFERENCE)
    return [c[key].errors[at] for c in seen.curves if key in c]


def _options(site: Site, seen: Observed, costs: SiteCosts, omegas: Omegas) -> Iterator[Option]:
    masks = () if seen.mask is None else LADDER
    for family in FAMILIES:
        cost = costs.families.get(family.name)
        noise = {n: omegas[site.name, n] for n in family.noise if (site.name, n) in omegas}
        if cost is None or len(noise) < len(family.noise):
            continue
        for keep in family.keeps:
            yield Option(
                family.name,
                keep,
                {n: str(s) for n, s in family.rules(site, keep).items()},
                cost.fixed,
                cost.slope * keep,
                _omega(site, noise, seen, 1.0, keep),
                cost.saved_bytes,
                family.nested,
                tuple(_omega(site, noise, seen, mask, keep) for mask in masks),
                cost.error,
            )


def _omega(
    site: Site, noise: Mapping[str, float], seen: Observed, mask: float, keep: float
) -> float:
    """Extra variance at a keep below a mask."""
    total = 0.0
    for name, omega in noise.items():
        if name in ROUNDING:  # in proportion to the energy of the cotangents
            total += omega * (1 + _relative(seen, mask) if mask < 1 else 1.0)
        else:
            total += omega * ratio(seen.curves, (site.name, name), mask, keep, REFERENCE)
    return total


def _relative(seen: Observed, mask: float) -> float:
    """``E‖error‖²`` of a mask on the output, over the energy of its cotangent."""
    assert seen.output is not None
    return seen.output.errors[LADDER.index(mask)] / max(seen.output.energy, 1e-300)


def _masks(seen: Observed, sgd: float) -> Iterator[MaskOption]:
    if seen.mask is None:
        return
    base = _relative(seen, MASK_REFERENCE)
    for keep in LADDER:
        relative = _relative(seen, keep)
        yield MaskOption(keep, seen.mask / sgd * relative / base if base else 0.0, 1 + relative)


def _arriving(site: Site, seen: Observed, omegas: Omegas) -> dict[str, float]:
    """By how much a unit of extra variance at other sites adds to the errors made here, relative.

    The growth with all others at the reference keep, shared among them by the energy of their noise.
    """
    if site.name not in seen.noise:
        return {}
    energy = {o: noise.arriving.get(site.name, 0.0) for o, noise in seen.noise.items()}
    unit = seen.noise[site.name].growth / max(math.fsum(energy.values()), 1e-300)
    return {
        o: unit * e / omegas[o, "save"] for o, e in energy.items() if e and omegas.get((o, "save"))
    }
