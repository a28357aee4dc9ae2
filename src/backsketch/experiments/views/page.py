"""The parts of a report, and how they look."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

__all__ = ["COLOURS", "Page", "TextTable", "dress", "new_figure"]

COLOURS = ("#d1495b", "#2e6f95", "#e09f3e", "#5b8e7d", "#6d597a", "#5b6770", "#9c6644", "#b56576")


@dataclass(frozen=True)
class TextTable:
    """A table of text cells; the first column is on the left, numbers on the right."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Page:
    """A sweep as people read it: figures by file name without suffix."""

    title: str
    about: str
    tables: Sequence[TextTable] = ()
    figures: Mapping[str, Figure] = field(default_factory=dict)


def new_figure(columns: int, width: float = 10, height: float = 4.2) -> tuple[Figure, list[Axes]]:
    """A figure with some axes side by side, no window and no global state of pyplot."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False)
    return figure, list(axes[0])


def dress(axes: Axes, x: str, y: str, title: str = "") -> None:
    """Labels and a quiet grid."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, loc="left", fontsize="medium")
    axes.grid(True, which="major", color="#e4e7ea", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
