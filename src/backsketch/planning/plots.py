"""The figures of a profile and of a ledger; matplotlib is imported here, when one is drawn."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from backsketch.planning.ledger.records import Ledger
    from backsketch.planning.plan.plan import Plan
    from backsketch.planning.profiling.records import Option, ProfileData

__all__ = ["plot_ledger", "plot_profile"]

_TITLES = {
    "save": "regions, activations saved",
    "recompute": "regions, recomputed",
    "weights": "rows of the weight gradients",
    "int8": "8-bit products",
}
_MARKERS = "osD^vP"
_LEFT_EDGE = 1e-4  # of extra variance: smaller ones are drawn there
_CHOSEN = "#d1495b"
_COLOURS = {"isolated": "#9fb3c0", "joint": "#d1495b", "predicted": "#2b2d34"}


# --- of a profile -----------------------------------------------------------------------------------


def plot_profile(profile: ProfileData, plan: Plan | None) -> Figure:
    """A panel per family of sketches; see :meth:`backsketch.planning.Profile.plot`."""
    kinds = [site.name.rpartition(".")[2] or "(model)" for site in profile.sites]
    counts = Counter(kinds)
    markers = dict(zip(counts, itertools.cycle(_MARKERS)))
    depths = [kinds[:i].count(kind) / max(counts[kind] - 1, 1) for i, kind in enumerate(kinds)]
    styles = [(markers[kind], 0.15 + 0.7 * depth) for kind, depth in zip(kinds, depths)]
    families = [f for f in _TITLES if any(o.family == f for s in profile.sites for o in s.options)]
    figure = _new_figure(4.2 * max(len(families), 1) + 1.6, 4.4)
    panels = figure.subplots(1, max(len(families), 1), sharey=True, sharex=True, squeeze=False)[0]
    for axes, family in zip(panels, families):
        _panel(axes, profile, plan, family, styles)
    limits = panels[0].get_xlim(), panels[0].get_ylim()
    for axes in panels:
        _break_even(axes, profile, *limits)
    panels[0].set_ylabel("change of a step's time, %")
    for kind, marker in markers.items():
        label = f"{kind} (lighter: later)" if counts[kind] > 1 else kind
        panels[0].plot(
            [], [], color="#5b6770", marker=marker, markersize=4, linewidth=1, label=label
        )
    handles = {t: h for a in panels for h, t in zip(*a.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False)
    chosen = (
        "" if plan is None else f"\nplan: {plan.predicted}" if plan.texts else f"\n{plan.reason}"
    )
    figure.suptitle(
        f"exact step {1e3 * profile.step_seconds:.1f} ms, noise scale {profile.noise_scale:.3g}{chosen}",
        x=0.01,
        ha="left",
        fontsize=10,
    )
    return figure


def _panel(
    axes: Axes,
    profile: ProfileData,
    plan: Plan | None,
    family: str,
    styles: Sequence[tuple[str, float]],
) -> None:
    """The sites in their markers and shades, with what is in the plan."""
    for site, style in zip(profile.sites, styles):
        options = [o for o in site.options if o.family == family]
        if options:
            _line(axes, profile, options, *style)
        for option in options:
            if plan is not None and option.rules.items() <= dict(plan.texts).items():
                _point(axes, profile, option)
    axes.axhline(0, color="#5b6770", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_title(_TITLES[family], fontsize=10)
    axes.set_xlabel("extra variance, of SGD's")
    axes.grid(alpha=0.25, which="major")


def _line(
    axes: Axes, profile: ProfileData, options: Sequence[Option], marker: str, shade: float
) -> None:
    from matplotlib import colormaps

    axes.plot(
        [max(o.variance, _LEFT_EDGE) for o in options],
        [100 * o.seconds() / profile.step_seconds for o in options],
        color=colormaps["viridis"](shade),
        marker=marker,
        markersize=3.5,
        linewidth=1,
    )


def _point(axes: Axes, profile: ProfileData, option: Option) -> None:
    axes.plot(
        [max(option.variance, _LEFT_EDGE)],
        [100 * option.seconds() / profile.step_seconds],
        "o",
        markersize=10,
        markerfacecolor="none",
        markeredgecolor=_CHOSEN,
        markeredgewidth=1.6,
        label="in the plan",
    )


def _break_even(
    axes: Axes, profile: ProfileData, across: tuple[float, float], along: tuple[float, float]
) -> None:
    """Below this line a sketch by itself shortens the time to a target."""
    beta = profile.noise_scale
    weight = 1.0 if math.isinf(beta) else beta / (1 + beta)
    low, high = across
    variances = [low * (high / low) ** (i / 60) for i in range(61)]
    saved = [100 * (1 / (1 + weight * v) - 1) for v in variances]
    axes.plot(variances, saved, color=_CHOSEN, linewidth=1, linestyle="--", label="break-even")
    axes.set_xlim(across)
    axes.set_ylim(along)


# --- of a ledger ------------------------------------------------------------------------------------


def plot_ledger(ledger: Ledger) -> Figure:
    """Left: variance per site, isolated, joint and predicted. Right: growth in backward order."""
    height = 1.6 + 0.32 * len(ledger.sites)
    figure = _new_figure(10, max(height, 3.2))
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
        color=_COLOURS["isolated"],
        label="isolated",
    )
    axes.barh(
        [y + 0.2 for y in at],
        joint,
        xerr=errors,
        height=0.38,
        color=_COLOURS["joint"],
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
        color=_COLOURS["predicted"],
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
        color=_COLOURS["joint"],
        markersize=4,
    )
    axes.set_xlabel("second moment of the cotangent / exact")
    axes.axvline(1, color="#c8ced3", linewidth=1)
    _dress(axes)


def _dress(axes: Axes) -> None:
    axes.grid(True, axis="x", color="#e4e7ea", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "a figure needs matplotlib: pip install 'backsketch[train]'"
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # no window, and no global state of pyplot
    return figure
