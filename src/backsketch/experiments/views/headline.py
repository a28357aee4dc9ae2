"""Several equal-cost comparisons in one figure: the best arm of every kind, against the best exact one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from backsketch.experiments.store import Sweep
from backsketch.experiments.views.arms import Arm, arms, best_exact, ends_level, relative_time
from backsketch.experiments.views.page import COLOURS, dress, new_figure

__all__ = ["best_of_kinds", "figure", "kind"]

AUTOCAST = "bf16 autocast"

KINDS: Mapping[str, str] = MappingProxyType(
    {
        "best exact": "#2b2d34",
        AUTOCAST: "#9a9ca6",
        "rows": COLOURS[1],
        "regions": COLOURS[2],
        "8 bits": COLOURS[0],
        "8 bits in regions": COLOURS[4],
        "auto": COLOURS[3],
    }
)

WORSE = "///"  # training ends worse than with the best exact arm
HIGHEST = 1.6  # of the picture; what is worse has its number


def kind(arm: Arm) -> str:
    """What a reader would call the sketch of an arm."""
    if not arm.is_sketched:
        return AUTOCAST
    text = arm.first.step_key[0]
    if text == "auto":
        return "auto"
    is_region = "region" in text
    if "int8" in text:
        return "8 bits in regions" if is_region else "8 bits"
    return "regions" if is_region else "rows"


def best_of_kinds(found: Sequence[Arm], model: str) -> dict[str, tuple[Arm, float, float]]:
    """By kind the arm that is first at the target, its time over that of the best exact arm, and the error.

    Of those that end level with the best exact arm, if any does.
    """
    exact = best_exact(found, model)
    if exact is None:
        return {}
    best: dict[str, tuple[Arm, float, float]] = {"best exact": (exact, 1.0, math.nan)}

    def rank(arm: Arm, ratio: float) -> tuple[bool, int, float]:
        # Of these as many seeds as the others have, so that no arm wins by one lucky run.
        return not ends_level(arm, exact), -len(arm.runs), ratio

    for arm in found:
        ratio = None if arm.is_exact or arm.model != model else relative_time(arm, exact)
        if ratio is None:
            continue
        other = best.get(kind(arm))
        if other is None or rank(arm, ratio[0]) < rank(*other[:2]):
            best[kind(arm)] = (arm, *ratio)
    return best


def figure(sweeps: Sequence[Sweep]) -> Figure:
    """Bars in groups, one group a comparison; an arm that misses the target in a run has no bar.

    Hatched: training ends worse than with the best exact arm. The label of a group is ``label`` in the
    settings of its sweep.
    """
    made, (axes,) = new_figure(1, 1.6 + 2.4 * len(sweeps), 3.6)
    groups = []
    for sweep in sweeps:
        found = arms(sweep)
        groups.append((sweep, found[0].goal, best_of_kinds(found, found[0].model)))
    kinds = [name for name in KINDS if any(name in best for _, _, best in groups)]
    width = 0.8 / len(kinds)
    for number, name in enumerate(kinds):
        bars = [(i, best[name]) for i, (_, _, best) in enumerate(groups) if name in best]
        level = [ends_level(arm, groups[i][2]["best exact"][0]) for i, (arm, *_) in bars]
        x = [i + (number - (len(kinds) - 1) / 2) * width for i, _ in bars]
        axes.bar(
            x,
            [ratio for _, (_, ratio, _) in bars],
            0.9 * width,
            color=KINDS[name],
            hatch=[None if is_level else WORSE for is_level in level],
            edgecolor="white",
            linewidth=0,
            yerr=[0.0 if math.isnan(error) else error for _, (_, _, error) in bars],
            error_kw={"elinewidth": 1, "ecolor": "#5b6770"},
        )
        for place, (_, (_, ratio, error)) in zip(x, bars):
            top = min(ratio + (0.0 if math.isnan(error) else error), HIGHEST - 0.1)
            axes.text(
                place, top + 0.015, f"{ratio:.2f}", ha="center", va="bottom", fontsize=8,
                color="white" if ratio > HIGHEST else "black",
            )  # fmt: skip
    axes.set_ylim(0, HIGHEST)
    axes.axhline(1.0, color=KINDS["best exact"], linewidth=0.8)
    labels = [
        f"{sweep.settings.get('label', sweep.name.removeprefix('equal_cost_'))}\nto {goal}"
        for sweep, goal, _ in groups
    ]
    axes.set_xticks(range(len(groups)), labels)
    dress(axes, "", "time to target, best exact arm = 1")
    axes.grid(visible=False, axis="x")
    handles = [Patch(facecolor=KINDS[name], label=name) for name in kinds]
    if any(bar.get_hatch() for bar in axes.patches):
        handles.append(
            Patch(facecolor="#9a9ca6", edgecolor="white", hatch=WORSE, label="ends worse")
        )
    made.legend(handles=handles, loc="outside right upper", frameon=False, fontsize="small")
    return made
