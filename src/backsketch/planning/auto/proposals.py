"""What may be tried: 8-bit products, which need no profile, and the plan of a profile."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import nn

from backsketch.convert import restore_, sketch_
from backsketch.estimators import Int8, Sketch, parse
from backsketch.planning.control.ranks import of_first
from backsketch.planning.facade import Profile, profile
from backsketch.planning.measure.passes import Diverged, LossFn
from backsketch.planning.plan.candidates import auto_plan
from backsketch.planning.profiling.profiler import NothingToSketch
from backsketch.untouched import untouched

__all__ = ["PROFILE_BATCHES", "PROFILE_COST", "Proposal", "Rules", "in_8_bits", "parsed", "planned"]

PROFILE_COST = 100, 2.0
"""Exact steps, and seconds: 13.6 s for a ViT whose steps take 0.107 s."""

PROFILE_BATCHES = 2
"""The fewest: the controller measures the noise again, and goes on measuring it."""

Rules = Mapping[str, str]
"""Patterns and texts of sketches."""


@dataclass(frozen=True)
class Proposal:
    """Rules that are expected to save time, none where nothing is; why; and the profile that says so."""

    rules: Rules
    reason: str
    profile: Profile | None = None


def in_8_bits(model: nn.Module) -> Proposal:
    """8-bit products for the layers whose report expects a gain of them."""
    try:
        report = sketch_(model, Int8())
    except ValueError as error:
        return Proposal({}, str(error))
    restore_(model)
    found = {site.name: str(site.sketch) for site in report.sketched if not site.reason}
    if found:
        return Proposal(found, "8-bit products need no profile")
    reasons = [site.reason for site in report if site.reason]
    return Proposal({}, f"no 8-bit products: {reasons[0] if reasons else 'no layer'}")


def planned(model: nn.Module, batches: Iterable[Any], loss_fn: LossFn[Any]) -> Proposal:
    """The plan that follows from a profile of the model as it is now; of several ranks, that of the first.

    Raises:
        ValueError: there are fewer than two batches, or the loss function returns no loss.
    """
    restore_(model)
    with untouched(model):  # a loader draws from PyTorch's stream
        data = list(islice(batches, PROFILE_BATCHES))
    try:
        found = profile(model, data, loss_fn, progress=False)
    except (NothingToSketch, Diverged) as error:
        return of_first(Proposal({}, str(error)))
    plan = auto_plan(found)
    return of_first(Proposal(dict(plan.texts), plan.reason or str(plan.predicted), found))


def parsed(rules: Rules) -> dict[str, Sketch]:
    """What :func:`backsketch.sketch_` takes."""
    return {pattern: parse(text) for pattern, text in rules.items()}
