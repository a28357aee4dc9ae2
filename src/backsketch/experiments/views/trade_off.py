"""Epochs against cost: steps and cost to a target, predicted from noise measurements and measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from backsketch import theory
from backsketch.experiments.config import SweepError
from backsketch.experiments.store import Sweep
from backsketch.experiments.views import families
from backsketch.experiments.views.page import Page, TextTable, dress, new_figure

__all__ = ["Arm", "arms", "page", "ratios"]


@dataclass(frozen=True)
class Arm:
    """One sketch or smaller batch, each at its best step size of the same grid.

    ``steps`` is None where the target was not reached, ``predicted_steps`` infinite where theory says that it
    cannot be. ``cost`` is that of a step, exact at the full batch being 1. ``multiplier`` is v and ``beta`` the
    noise scale where the target is.
    """

    family: str
    keep: float
    cost: float
    lr: float | None
    steps: float | None
    predicted_lr: float
    predicted_steps: float
    multiplier: float
    beta: float


def arms(sweep: Sweep) -> list[Arm]:
    """Every arm of a trade-off sweep, the exact one first.

    Raises:
        SweepError: the exact run or the noise measurement is missing, or the former did not arrive.
    """
    noise = next((result for _, result in sweep.done("noise")), None)
    runs: dict[tuple[str, int], list[tuple[Mapping[str, Any], Mapping[str, Any]]]] = {}
    for options, result in sweep.done("descent"):
        runs.setdefault((options["sketch"], options["batch_size"]), []).append((options, result))
    full = max((size for sketch, size in runs if sketch == "none"), default=0)
    if noise is None or not full:
        raise SweepError(f"{sweep.name}: needs a noise job and exact runs")
    found = [_arm(key, own, full, noise) for key, own in runs.items()]
    found.sort(key=lambda arm: (arm.family != "exact", arm.family, -arm.keep))
    if found[0].steps is None:
        raise SweepError(f"{sweep.name}: no exact run reaches the target")
    return found


def _arm(
    key: tuple[str, int],
    runs: list[tuple[Mapping[str, Any], Mapping[str, Any]]],
    full: int,
    noise: Mapping[str, Any],
) -> Arm:
    sketch, size = key
    share = size / full
    sgd = noise["sgd_variance"]
    extra = noise["extra"][sketch] if sketch != "none" else 0.0
    variance = (sgd + extra) / share
    spectrum = _mixed(noise["sgd_spectrum"], sgd / (sgd + extra))
    if sketch != "none":
        spectrum += _mixed(noise["extra_spectrum"][sketch], extra / (sgd + extra))
    reached = [(r["reached"], o["lr"]) for o, r in runs if r["reached"] is not None]
    steps, lr = min(reached, default=(None, None))
    foreseen = [(_foreseen(o, noise, variance, spectrum), o["lr"]) for o, _ in runs]
    predicted, predicted_lr = min(foreseen)
    return Arm(
        family=families.family(sketch)
        if sketch != "none"
        else "exact"
        if share == 1
        else "smaller batch",
        keep=share if sketch == "none" else families.keep(sketch),
        cost=runs[0][1]["cost"] * share,
        lr=lr,
        steps=steps,
        predicted_lr=predicted_lr,
        predicted_steps=predicted,
        multiplier=variance / sgd,
        beta=sgd / noise["slope"],
    )


def _mixed(spectrum: list[list[float]], weight: float) -> list[tuple[float, float]]:
    return [(curvature, weight * share) for curvature, share in spectrum]


def _foreseen(
    options: Mapping[str, Any],
    noise: Mapping[str, Any],
    variance: float,
    spectrum: list[tuple[float, float]],
) -> float:
    lr = options["lr"]
    if lr * noise["sharpness"] >= 2:  # the exact run itself would not be stable
        return math.inf
    flow = noise["time"], noise["gap"]
    return theory.steps_to_target(lr, options["target"], *flow, variance, spectrum)


def page(sweep: Sweep) -> Page:
    """The table of all arms and a figure: steps and cost to target against keep."""
    found = arms(sweep)
    return Page(sweep.name, sweep.about, [_table(found)], {sweep.name: _figure(found)})


def ratios(arm: Arm, exact: Arm) -> tuple[float, float | None]:
    """Cost to the target over that of exact training: predicted, and measured or None."""
    assert exact.steps is not None
    predicted = arm.cost * arm.predicted_steps / exact.predicted_steps
    return predicted, None if arm.steps is None else arm.cost * arm.steps / exact.steps


def _table(found: list[Arm]) -> TextTable:
    header = (
        "arm", "keep", "step cost c", "v", "steps, predicted", "steps, measured",
        "cost, predicted", "cost, measured",
    )  # fmt: skip
    rows = []
    for arm in found:
        predicted, measured = ratios(arm, found[0])
        rows.append(
            (
                arm.family,
                f"{arm.keep:g}",
                f"{arm.cost:.2f}",
                f"{arm.multiplier:.2f}",
                _count(arm.predicted_steps),
                _count(arm.steps),
                _ratio(predicted),
                _ratio(measured),
            )
        )
    title = f"to the target; cost relative to exact; noise scale at the target {found[0].beta:.3g}"
    return TextTable(title, header, rows)


def _count(value: float | None) -> str:
    return "not reached" if value is None or math.isinf(value) else f"{value:.0f}"


def _ratio(value: float | None) -> str:
    return "" if value is None or math.isinf(value) else f"{value:.2f}"


def _figure(found: list[Arm]) -> Figure:
    figure, (left, right) = new_figure(2, 11, 4.6)
    exact = found[0]
    costs = {id(arm): ratios(arm, exact) for arm in found}
    for family in dict.fromkeys(arm.family for arm in found[1:]):
        own = [arm for arm in found if arm.family == family]
        colour = families.colour(family)
        _curve(left, own, [a.steps for a in own], [a.predicted_steps for a in own], colour, family)
        both = [costs[id(arm)] for arm in own]
        _curve(right, own, [b for _, b in both], [a for a, _ in both], colour, family)
    assert exact.steps is not None
    left.axhline(exact.steps, color="#2b2d34", linewidth=1)
    left.axhline(exact.predicted_steps, color="#2b2d34", linewidth=1, linestyle="--")
    right.axhline(1, color="#2b2d34", linewidth=1)
    _scale(left, found, [v for a in found for v in (a.steps, a.predicted_steps)])
    _scale(right, found, [v for pair in costs.values() for v in pair])
    dress(left, "keep (share of the batch)", "steps", "steps to target; line: exact")
    dress(right, "keep (share of the batch)", "relative to exact", "steps × arithmetic of a step")
    left.plot([], [], "o-", color="#2b2d34", label="measured")
    left.plot([], [], "x--", color="#2b2d34", label="predicted")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    return figure


def _curve(
    axes: Axes,
    own: list[Arm],
    measured: list[float | None],
    predicted: list[float],
    colour: str,
    label: str,
) -> None:
    keeps = [arm.keep for arm in own]
    foreseen = [math.nan if math.isinf(value) else value for value in predicted]
    axes.plot(keeps, foreseen, "x--", color=colour, linewidth=1.2, markersize=4.5)
    values = [math.nan if value is None else value for value in measured]
    axes.plot(keeps, values, "o-", color=colour, linewidth=1.8, markersize=4.5, label=label)


def _scale(axes: Axes, found: list[Arm], values: list[float | None]) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    keeps = sorted({arm.keep for arm in found[1:]})
    axes.set_xlim(keeps[0] / 1.15, keeps[-1] * 1.15)
    axes.set_xticks(keeps, [f"{keep:g}" for keep in keeps])
    known = [value for value in values if value is not None and math.isfinite(value)]
    low, high = min(known) / 1.1, max(known) * 1.1
    steps = [m * 10**e for e in range(-2, 6) for m in (1, 1.5, 2, 3, 5, 7)]
    ticks = [tick for tick in steps if low <= tick <= high]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(low, high)
