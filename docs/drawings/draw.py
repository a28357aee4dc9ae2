"""Draw the idea and a region: ``python docs/drawings/draw.py`` writes the two pictures beside this file."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle

HERE = Path(__file__).resolve().parent
KEPT, DROPPED, EDGE, TEXT = "#3f51b5", "#e3e6f3", "#5c6380", "#2b2f42"
ROWS = 12
CHOSEN = (1, 4, 8)  # drawn by their scores
SCORES = np.array([0.3, 0.9, 0.2, 0.3, 1.0, 0.25, 0.2, 0.35, 0.8, 0.2, 0.3, 0.25])


def matrix(
    ax: Axes, x: float, y: float, width: float, rows: int, name: str, kept: object = None
) -> None:
    """Rows of height one from the top; ``kept`` are filled dark, None means all."""
    for i in range(rows):
        dark = kept is None or i in kept  # type: ignore[operator]
        colour = KEPT if dark else DROPPED
        ax.add_patch(Rectangle((x, y - i - 1), width, 0.86, fc=colour, ec="white", lw=1))
    ax.text(x + width / 2, y + 0.4, name, ha="center", va="bottom", color=TEXT, fontsize=11)


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=14, color=EDGE))


def canvas(width: float, height: float, size: tuple[float, float]) -> tuple[plt.Figure, Axes]:
    figure, ax = plt.subplots(figsize=size)
    ax.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    ax.axis("off")
    return figure, ax


def idea() -> plt.Figure:
    """The two products of a linear layer, exact, and from three rows with their weights."""
    figure, ax = canvas(44, 16.5, (9.6, 3.8))
    ax.text(1, 15.6, "exact: every row", color=TEXT, fontsize=12)
    matrix(ax, 1, 13.6, 4, ROWS, "G")
    matrix(ax, 8, 13.6, 6, ROWS, "X")
    ax.text(6.5, 7.4, "ᵀ ·", ha="center", color=TEXT, fontsize=13)
    ax.text(15, 7.4, "= grad_weight", va="center", color=TEXT, fontsize=11)
    ax.text(23, 15.6, "sketched: a few rows, each divided by its chance", color=TEXT, fontsize=12)  # fmt: skip
    matrix(ax, 23, 13.6, 4, ROWS, "G", CHOSEN)
    for i in CHOSEN:
        ax.text(27.3, 13.2 - i, "/ π", va="center", color=TEXT, fontsize=9)
    arrow(ax, (29, 7.6), (31, 7.6))
    matrix(ax, 31.6, 9.2, 4, 3, "")
    ax.text(36.6, 7.5, "ᵀ ·", ha="center", color=TEXT, fontsize=13)
    matrix(ax, 37.6, 9.2, 6, 3, "")
    ax.text(37.6, 5.2, "same mean,\na quarter of the work", ha="center", va="top", color=TEXT)
    return figure


def region() -> plt.Figure:
    """One draw at the output of a submodule; its whole backward pass runs on the drawn rows."""
    figure, ax = canvas(46, 16, (9.6, 3.5))
    stages = ("linear", "gelu", "linear", "norm")
    ax.text(1, 15.2, "forward: all rows", color=TEXT, fontsize=12)
    for i, name in enumerate(("input", *stages)):
        matrix(ax, 1 + 8 * i, 13.4, 3.4, 6, name)
        if i:
            arrow(ax, (8 * i - 3.3, 10.4), (8 * i + 0.7, 10.4))
    ax.text(1, 5.9, "backward: one draw at the output, then the drawn rows", color=TEXT, fontsize=12)  # fmt: skip
    matrix(ax, 41, 5.9, 3.4, 6, "", (0, 3))
    ax.text(42.7, 13.6, "cotangent", ha="center", color=TEXT, fontsize=11)
    arrow(ax, (42.7, 13.2), (42.7, 6.3))
    for i in range(len(stages) + 1):
        matrix(ax, 1 + 8 * i, 4.6, 3.4, 2, "")
        arrow(ax, (8 * i + 8.7, 3.6), (8 * i + 4.8, 3.6))
    return figure


if __name__ == "__main__":
    for draw in (idea, region):
        draw().savefig(
            HERE / f"{draw.__name__}.png", dpi=130, bbox_inches="tight", facecolor="white"
        )
