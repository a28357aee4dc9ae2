"""The experiments of the paper: accuracy against keep, arithmetic and seconds, for every family of estimators."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from backsketch.experiments.config import SweepError
from backsketch.experiments.store import Sweep
from backsketch.experiments.views import families
from backsketch.experiments.views.arms import mean_error
from backsketch.experiments.views.page import Page, TextTable, dress, new_figure

__all__ = ["Point", "page", "points"]

INK = "#2b2d34"


@dataclass(frozen=True)
class Point:
    """All runs of a sketch at the learning rate that was best on its first seed.

    Attributes:
        accuracies: final ones on the test split, in 0..1.
        omegas: extra variances, where they were finite.
        lr: the learning rate; ``tuned`` says whether there were others.
        arithmetic: of the products of a backward pass, over exact.
        backward: quiet seconds of one over those of exact training, None where nothing was timed.
    """

    sketch: str
    accuracies: Sequence[float]
    omegas: Sequence[float]
    lr: float
    tuned: bool
    arithmetic: float
    backward: float | None

    @property
    def family(self) -> str:
        return families.family(self.sketch)

    @property
    def keep(self) -> float:
        return families.keep(self.sketch)


def page(sweep: Sweep) -> Page:
    """The table of accuracies and extra variances, and the figure with the exact run as the line to hold.

    Raises:
        SweepError: there is no exact run.
    """
    found = points(sweep)
    exact = next((point for point in found if point.sketch == "none"), None)
    if exact is None:
        raise SweepError(f"{sweep.name}: there is no exact run to compare with")
    sketched: dict[str, dict[float, Point]] = {}
    for point in found:
        if point is not exact:
            sketched.setdefault(point.family, {})[point.keep] = point
    tables = [_table(sketched, exact)]
    if any(point.backward is not None for point in found):
        tables.append(_costs(sketched))
    return Page(sweep.name, sweep.about, tables, {sweep.name: _figure(sketched, exact)})


def points(sweep: Sweep) -> list[Point]:
    """What became of every sketch of a sweep, in its order."""
    runs: dict[str, list[tuple[Mapping[str, Any], Mapping[str, Any]]]] = {}
    for options, result in sweep.done("training"):
        runs.setdefault(options["sketch"], []).append((options, result))
    seconds = _backward_seconds(sweep)
    found = []
    for sketch, own in runs.items():
        first = min(options.get("seed", 0) for options, _ in own)
        on_first = [result for options, result in own if options.get("seed", 0) == first]
        lr = max(on_first, key=lambda result: result["accuracy"])["lr"]
        results = [result for _, result in own if result["lr"] == lr]
        omegas = [w for r in results for w in r["extra_variance"].values() if w is not None]
        backward = None
        if sketch in seconds and "none" in seconds:
            backward = seconds[sketch] / seconds["none"]
        accuracies = [r["accuracy"] for r in results]
        arithmetic = results[0]["backward_flops_ratio"]
        tuned = len(on_first) > 1
        found.append(Point(sketch, accuracies, omegas, lr, tuned, arithmetic, backward))
    return found


def _backward_seconds(sweep: Sweep) -> dict[str, float]:
    """Quiet seconds of a backward pass, by sketch."""
    return {
        options["arms"][name].get("sketch", "none"): entry["backward"]
        for options, result in sweep.done("step_time")
        for name, entry in result["arms"].items()
    }


def _table(found: Mapping[str, Mapping[float, Point]], exact: Point) -> TextTable:
    keeps = sorted({keep for points in found.values() for keep in points}, reverse=True)
    header = ("final accuracy, % (ω)", *(f"keep {keep:g}" for keep in keeps))
    rows = [("exact", *(_percent(exact) for _ in keeps))]
    for family, own in found.items():
        rows.append((family, *(_cell(own.get(keep)) for keep in keeps)))
    tuned = "; each at its best learning rate" if exact.tuned else ""
    return TextTable(f"± standard error over {len(exact.accuracies)} seeds{tuned}", header, rows)


def _cell(point: Point | None) -> str:
    if point is None:
        return ""
    omega = f" ({_short(statistics.fmean(point.omegas))})" if point.omegas else " (not finite)"
    return _percent(point) + omega


def _costs(found: Mapping[str, Mapping[float, Point]]) -> TextTable:
    """Seconds of a backward pass, and its arithmetic."""
    keeps = sorted({keep for points in found.values() for keep in points}, reverse=True)
    rows = []
    for family, own in found.items():
        cells = (
            "" if (p := own.get(keep)) is None or p.backward is None
            else f"{p.backward:.2f} ({p.arithmetic:.2f})"
            for keep in keeps
        )  # fmt: skip
        rows.append((family, *cells))
    header = ("backward seconds (arithmetic)", *(f"keep {keep:g}" for keep in keeps))
    return TextTable("of a backward pass over exact, medians on a quiet machine", header, rows)


def _short(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def _percent(point: Point) -> str:
    mean, error = mean_error(point.accuracies)
    return f"{100 * mean:.2f} ± {100 * error:.2f}"


def _figure(found: Mapping[str, Mapping[float, Point]], exact: Point) -> Figure:
    everything = [point for points in found.values() for point in points.values()]
    timed = all(point.backward is not None for point in everything)
    figure, panels = new_figure(2 + timed, 5.2 + 4.4 * (1 + timed), 4.6)
    against: list[tuple[str, Callable[[Point], float]]] = [
        ("keep", lambda point: point.keep),
        ("arithmetic of the backward pass, exact = 1", lambda point: point.arithmetic),
        ("seconds of the backward pass, exact = 1", lambda point: point.backward or 0.0),
    ]
    for axes, (name, x) in zip(panels, against):
        _panel(axes, found, exact, x)
        # By keep what has none would stand at 1, where exact training is.
        dress(axes, name, "final test accuracy, %" if axes is panels[0] else "")
    panels[0].set_xscale("log")
    keeps = sorted({point.keep for point in everything})
    panels[0].set_xticks(keeps, [f"{keep:g}" for keep in keeps])
    panels[0].minorticks_off()
    for axes in panels[1:]:
        axes.set_xlim(left=0)
    panels[0].set_title("solid: data-dependent, dashed: uniform", fontsize="medium")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    return figure


def _panel(
    axes: Axes,
    found: Mapping[str, Mapping[float, Point]],
    exact: Point,
    x: Callable[[Point], float],
) -> None:
    mean, error = mean_error(exact.accuracies)
    axes.axhline(100 * mean, color=INK, linewidth=1.6, label="exact", zorder=1)
    axes.axhspan(100 * (mean - error), 100 * (mean + error), color=INK, alpha=0.12, linewidth=0)
    for family, own in found.items():
        keeps = sorted(own)
        pairs = [mean_error(own[keep].accuracies) for keep in keeps]
        axes.errorbar(
            [x(own[keep]) for keep in keeps], [100 * m for m, _ in pairs],
            yerr=[100 * e for _, e in pairs], color=families.colour(family), marker="o",
            markersize=4.5, linewidth=1.7, capsize=2.5, label=family,
            linestyle="--" if "uniform" in family or family == "elements" else "-",
        )  # fmt: skip
