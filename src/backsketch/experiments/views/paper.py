"""The experiments of the paper: accuracy against keep, for every family of estimators."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from backsketch.experiments.config import SweepError
from backsketch.experiments.store import Sweep
from backsketch.experiments.views import families
from backsketch.experiments.views.arms import mean_error
from backsketch.experiments.views.page import Page, TextTable, dress, new_figure

__all__ = ["page"]

INK = "#2b2d34"
Points = dict[float, list[Mapping[str, Any]]]


def page(sweep: Sweep) -> Page:
    """The table of accuracies and extra variances, and the figure with the exact run as the line to hold.

    Raises:
        SweepError: there is no exact run.
    """
    found: dict[str, Points] = {}
    exact: list[float] = []
    for options, result in sweep.done("training"):
        sketch = options["sketch"]
        if sketch == "none":
            exact.append(result["accuracy"])
        else:
            points = found.setdefault(families.family(sketch), {})
            points.setdefault(families.keep(sketch), []).append(result)
    if not exact:
        raise SweepError(f"{sweep.name}: there is no exact run to compare with")
    table = _table(found, exact)
    return Page(sweep.name, sweep.about, [table], {sweep.name: _figure(found, exact)})


def _table(found: Mapping[str, Points], exact: list[float]) -> TextTable:
    keeps = sorted({keep for points in found.values() for keep in points}, reverse=True)
    header = ("final accuracy, % (ω)", *(f"keep {keep:g}" for keep in keeps))
    first = _percent(exact)
    rows = [("exact", *(first for _ in keeps))]
    for family, points in found.items():
        rows.append((family, *(_cell(points.get(keep, [])) for keep in keeps)))
    return TextTable(f"± standard error over {len(exact)} seeds", header, rows)


def _cell(results: list[Mapping[str, Any]]) -> str:
    if not results:
        return ""
    omegas = [w for r in results for w in r["extra_variance"].values() if w is not None]
    omega = f" ({_short(statistics.fmean(omegas))})" if omegas else " (not finite)"
    return _percent([r["accuracy"] for r in results]) + omega


def _short(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def _percent(accuracies: list[float]) -> str:
    mean, error = mean_error(accuracies)
    return f"{100 * mean:.2f} ± {100 * error:.2f}"


def _figure(found: Mapping[str, Points], exact: list[float]) -> Any:
    figure, (axes,) = new_figure(1, 8.2, 4.6)
    mean, error = mean_error(exact)
    axes.axhline(100 * mean, color=INK, linewidth=1.6, label="exact", zorder=1)
    axes.axhspan(100 * (mean - error), 100 * (mean + error), color=INK, alpha=0.12, linewidth=0)
    for family, points in found.items():
        keeps = sorted(points)
        pairs = [mean_error([r["accuracy"] for r in points[keep]]) for keep in keeps]
        axes.errorbar(
            keeps, [100 * m for m, _ in pairs], yerr=[100 * e for _, e in pairs],
            color=families.colour(family), marker="o", markersize=4.5, linewidth=1.7, capsize=2.5,
            linestyle="--" if "uniform" in family or family == "elements" else "-", label=family,
        )  # fmt: skip
    axes.set_xscale("log")
    keeps = sorted({keep for points in found.values() for keep in points})
    axes.set_xticks(keeps, [f"{keep:g}" for keep in keeps])
    axes.minorticks_off()
    dress(axes, "keep", "final test accuracy, %", "solid: data-dependent, dashed: uniform")
    figure.legend(loc="outside right center", frameon=False)
    return figure
