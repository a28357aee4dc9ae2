"""Several equal-cost comparisons in one figure: the best arm of every kind, against the best exact one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from matplotlib.figure import Figure

from backsketch.experiments.store import Sweep
from backsketch.experiments.views.arms import Arm, arms, best_exact, relative_time
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
    """By kind the arm that is first at the target, its time over that of the best exact arm, and the error."""
    exact = best_exact(found, model)
    if exact is None:
        return {}
    best: dict[str, tuple[Arm, float, float]] = {"best exact": (exact, 1.0, math.nan)}
    for arm in found:
        ratio = None if arm.is_exact or arm.model != model else relative_time(arm, exact)
        if ratio is None:
            continue
        # As many seeds as the others have, so that no arm wins by one lucky run.
        key = (kind(arm), -len(arm.runs), ratio[0])
        other = best.get(key[0])
        if other is None or key[1:] < (-len(other[0].runs), other[1]):
            best[key[0]] = (arm, *ratio)
    return best


def figure(sweeps: Sequence[Sweep]) -> Figure:
    """Bars in groups, one group a comparison; an arm that misses the target in a run has no bar.

    The label of a group is ``label`` in the settings of the sweep.
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
        x = [i + (number - (len(kinds) - 1) / 2) * width for i, _ in bars]
        axes.bar(
            x,
            [ratio for _, (_, ratio, _) in bars],
            0.9 * width,
            color=KINDS[name],
            label=name,
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
    made.legend(loc="outside right upper", frameon=False, fontsize="small")
    return made
