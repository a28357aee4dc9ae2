"""The picture of a variance ledger."""

from __future__ import annotations

from typing import TYPE_CHECKING

from backsketch.planning.plots.figure import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from backsketch.planning.ledger.records import Ledger

COLOURS = {"isolated": "#9fb3c0", "joint": "#d1495b", "predicted": "#2b2d34"}


def plot_ledger(ledger: Ledger) -> Figure:
    """Left: variance per site, isolated, joint and predicted. Right: growth in backward order."""
    height = 1.6 + 0.32 * len(ledger.sites)
    figure = new_figure(10, max(height, 3.2))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    _bars(left, ledger)
    _growth(right, ledger)
    if ledger.multiplier is not None and ledger.noise_scale is not None:
        title = f"v = {ledger.multiplier:.3f}, noise scale β = {ledger.noise_scale:.3g}"
        figure.suptitle(title, x=0.01, ha="left")
    return figure


def _bars(axes: Axes, ledger: Ledger) -> None:
    scale = ledger.sgd_variance or 1.0
    at = range(len(ledger.sites))
    joint = [site.joint / scale for site in ledger.sites]
    errors = [2 * site.joint_error / scale for site in ledger.sites]
    axes.barh(
        [y - 0.2 for y in at],
        [site.isolated / scale for site in ledger.sites],
        height=0.38,
        color=COLOURS["isolated"],
        label="isolated",
    )
    axes.barh(
        [y + 0.2 for y in at],
        joint,
        xerr=errors,
        height=0.38,
        color=COLOURS["joint"],
        label="joint",
    )
    predicted = [(y + 0.2, site.predicted_joint) for y, site in zip(at, ledger.sites)]
    known = [(y, value / scale) for y, value in predicted if value is not None]
    axes.plot(
        [value for _, value in known],
        [y for y, _ in known],
        "|",
        markersize=11,
        markeredgewidth=2,
        color=COLOURS["predicted"],
        label="predicted, joint",
    )
    axes.set_yticks(list(at), [site.name or "(model)" for site in ledger.sites])
    axes.invert_yaxis()
    unit = "SGD variance" if ledger.sgd_variance else "squared gradient"
    axes.set_xlabel(f"extra variance that arrives at the parameters, in units of {unit}")
    axes.legend(frameon=False, loc="best")
    _dress(axes)


def _growth(axes: Axes, ledger: Ledger) -> None:
    axes.plot(
        [site.growth for site in ledger.sites],
        range(len(ledger.sites)),
        "o-",
        color=COLOURS["joint"],
        markersize=4,
    )
    axes.set_xlabel("second moment of the cotangent / exact")
    axes.axvline(1, color="#c8ced3", linewidth=1)
    _dress(axes)


def _dress(axes: Axes) -> None:
    axes.grid(True, axis="x", color="#e4e7ea", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
