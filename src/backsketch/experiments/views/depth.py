"""Growth of the second moment with depth: the exponential and its cures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes

from backsketch.experiments.store import Sweep
from backsketch.experiments.views.page import COLOURS, Page, TextTable, dress, new_figure

__all__ = ["page"]


def page(sweep: Sweep) -> Page:
    """Two panels, plain and residual: measured growth with two standard errors, predicted dashed."""
    jobs = list(sweep.done("depth"))
    figure, panels = new_figure(2, 10.5, 4.4)
    for axes, residual in zip(panels, (False, True)):
        own = [(o, r) for o, r in jobs if o["residual"] == residual]
        _panel(axes, own)
        title = "residual, x + tanh(W x)" if residual else "plain, tanh(W x)"
        dress(axes, "layers", "second moment of the cotangent / exact", title)
    top = max(axes.get_ylim()[1] for axes in panels)
    for axes in panels:
        axes.set_ylim(0.8, top)
    panels[0].legend(frameon=False, loc="upper left", fontsize="small")
    return Page(sweep.name, sweep.about, [_table(jobs)], {sweep.name: figure})


def _panel(axes: Axes, jobs: list[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> None:
    for number, arm in enumerate(dict.fromkeys(options["arm"] for options, _ in jobs)):
        own = sorted(
            ((o["depth"], r) for o, r in jobs if o["arm"] == arm), key=lambda pair: pair[0]
        )
        depths, colour = [depth for depth, _ in own], COLOURS[number]
        measured = [r["measured"] for _, r in own]
        errors = [2 * r["error"] for _, r in own]
        axes.errorbar(depths, measured, yerr=errors, fmt="o", color=colour, markersize=4, label=arm)
        axes.plot(depths, [r["predicted"] for _, r in own], "--", color=colour, linewidth=1.2)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({options["depth"] for options, _ in jobs})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])


def _table(jobs: list[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> TextTable:
    depths = sorted({options["depth"] for options, _ in jobs})
    rows: dict[tuple[str, bool], dict[int, str]] = {}
    for options, result in jobs:
        cell = f"{result['measured']:.2f} ({result['predicted']:.2f})"
        rows.setdefault((options["arm"], options["residual"]), {})[options["depth"]] = cell
    body = [
        (arm, "residual" if residual else "plain", *(cells.get(d, "") for d in depths))
        for (arm, residual), cells in sorted(rows.items(), key=lambda item: item[0][1])
    ]
    header = ("sketches", "network", *(f"{d} layers" for d in depths))
    return TextTable("growth, measured (predicted)", header, body)
