"""What sketches are called in tables and figures, and in which colour they are drawn."""

from __future__ import annotations

import backsketch as bs
from backsketch.experiments.views.page import COLOURS

__all__ = ["colour", "family", "keep"]

FAMILIES = (
    "rows",
    "columns",
    "low rank",
    "elements",
    "rows, uniform",
    "smaller batch",
    "stored rows",
    "columns, uniform",
)

_OTHERS = "#3d9970"


def family(sketch: str) -> str:
    """The estimator and its scores, where these are not its usual ones."""
    parsed = bs.parse(sketch)
    scores = getattr(parsed, "scores", "")
    plain = {"optimal", "l2"} if parsed.name != "rows" else {"optimal"}
    return parsed.name.replace("_", " ") + (f", {scores}" if scores and scores not in plain else "")


def keep(sketch: str) -> float:
    """Its keep; 1 where it has none."""
    return float(getattr(bs.parse(sketch), "keep", 1.0))


def colour(name: str) -> str:
    """Of a family, the same in every figure."""
    return COLOURS[FAMILIES.index(name)] if name in FAMILIES else _OTHERS
