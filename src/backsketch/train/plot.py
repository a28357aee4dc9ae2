"""The picture of a run: training loss against steps and against seconds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from backsketch.train.result import headline

COLOURS = {"exact": "#5b6770", "sketched": "#d1495b"}
SMOOTH = 0.03  # width of the running mean, as a share of the curve


def plot_result(result: Mapping[str, Any], path: Path) -> None:
    """Write `path` (PNG) from the content of `result.json`."""
    runs = _runs(result)
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)  # no window, and no global state of pyplot
    left, right = figure.subplots(1, 2, sharey=True)
    for name, run in runs.items():
        _curve(left, run["curve"]["step"], run["curve"]["train_loss"], name)
        _curve(right, run["curve"]["seconds"], run["curve"]["train_loss"], name)
    _dress(left, "optimizer steps")
    _dress(right, "seconds of training")
    left.set_ylabel("training loss")
    _legend(right, runs)
    figure.suptitle(headline(result), x=0.01, ha="left")
    figure.savefig(path, dpi=150)


def _runs(result: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    if "exact" in result:
        return {"exact": result["exact"], "sketched": result}
    return {"exact" if result["config"]["sketch"] == "none" else "sketched": result}


def _curve(axes: Axes, x: list[float], y: list[float], name: str) -> None:
    axes.plot(x, y, color=COLOURS[name], alpha=0.2, linewidth=0.8)
    axes.plot(x, _smooth(y), color=COLOURS[name], linewidth=2, label=name)


def _smooth(values: list[float]) -> list[float]:
    """Centred running mean that shrinks at the ends."""
    half = max(int(SMOOTH * len(values) / 2), 1)
    windows = [values[max(i - half, 0) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _dress(axes: Axes, label: str) -> None:
    axes.set_yscale("log")
    axes.set_xlabel(label)
    axes.set_xlim(left=0)
    axes.grid(True, which="major", color="#e4e7ea", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(axes: Axes, runs: Mapping[str, Mapping[str, Any]]) -> None:
    handles, names = axes.get_legend_handles_labels()
    labels = [f"{name}, test accuracy {runs[name]['test_accuracy']:.2%}" for name in names]
    axes.legend(handles, labels, frameon=False, loc="upper right")
