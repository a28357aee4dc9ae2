"""The picture of a profile: time saved against extra variance, site by site, and what a plan chose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from backsketch.planning.plots.figure import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from backsketch.planning.plan.plan import Plan
    from backsketch.planning.profiling.records import Option, ProfileData, SiteProfile

__all__ = ["plot_profile"]

_TITLES = {
    "save": "regions, activations saved",
    "recompute": "regions, recomputed",
    "weights": "rows of the weight gradients",
    "int8": "8-bit products",
}
_MARKERS = "osD^vP"
_LEFT_EDGE = 1e-4  # of extra variance: smaller ones are drawn there
_CHOSEN = "#d1495b"


def plot_profile(profile: ProfileData, plan: Plan | None) -> Figure:
    """A panel per family of sketches; see :meth:`backsketch.planning.Profile.plot`."""
    families = [f for f in _TITLES if any(o.family == f for s in profile.sites for o in s.options)]
    figure = new_figure(4.2 * max(len(families), 1) + 1.6, 4.4)
    panels = figure.subplots(1, max(len(families), 1), sharey=True, sharex=True, squeeze=False)[0]
    for axes, family in zip(panels, families):
        _panel(axes, profile, plan, family)
    limits = panels[0].get_xlim(), panels[0].get_ylim()
    for axes in panels:
        _break_even(axes, profile, *limits)
    panels[0].set_ylabel("change of a step's time, %")
    for i, kind in enumerate(_kinds(profile)):
        label = f"{kind} (lighter: later)" if _count(profile, kind) > 1 else kind
        panels[0].plot(
            [], [], color="#5b6770", marker=_marker(i), markersize=4, linewidth=1, label=label
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


def _panel(axes: Axes, profile: ProfileData, plan: Plan | None, family: str) -> None:
    seen: dict[str, int] = {}
    for site in profile.sites:
        kind = _kind(site)
        depth = seen[kind] = seen.get(kind, -1) + 1
        options = [o for o in site.options if o.family == family]
        if options:
            shade = 0.15 + 0.7 * depth / max(_count(profile, kind) - 1, 1)
            _line(axes, profile, options, _marker(_kinds(profile).index(kind)), shade)
        for option in options:
            if plan is not None and option.rules.items() <= dict(plan.texts).items():
                _point(axes, profile, option)
    axes.axhline(0, color="#5b6770", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_title(_TITLES[family], fontsize=10)
    axes.set_xlabel("extra variance, of SGD's")
    axes.grid(alpha=0.25, which="major")


def _kind(site: SiteProfile) -> str:
    return site.name.rpartition(".")[2] or "(model)"


def _kinds(profile: ProfileData) -> list[str]:
    return list(dict.fromkeys(_kind(s) for s in profile.sites))


def _count(profile: ProfileData, kind: str) -> int:
    return sum(_kind(s) == kind for s in profile.sites)


def _marker(kind: int) -> str:
    return _MARKERS[kind % len(_MARKERS)]


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
