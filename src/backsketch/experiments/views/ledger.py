"""Variance ledgers: v predicted against measured, and the martingale statement on real models."""

from __future__ import annotations

import re

from backsketch.experiments.store import Sweep
from backsketch.experiments.views.page import Page, TextTable
from backsketch.planning import Ledger

__all__ = ["page"]


def page(sweep: Sweep) -> Page:
    """One row a ledger, and the figure of each."""
    rows, figures = [], {}
    for options, result in sweep.done("ledger"):
        ledger = Ledger.from_dict(result["ledger"])
        name = options["name"]
        rows.append(_row(name, ledger))
        figures[re.sub(r"[^\w.]+", "-", name).lower()] = ledger.plot()
    header = (
        "model and sketch", "v, predicted", "v, measured", "β", "sum joint", "total", "sum isolated",
    )  # fmt: skip
    title = "variances in units of the SGD variance, ± two standard errors"
    return Page(sweep.name, sweep.about, [TextTable(title, header, rows)], figures)


def _row(name: str, ledger: Ledger) -> tuple[str, ...]:
    sgd = ledger.sgd_variance or 1.0
    predicted, v = ledger.predicted_multiplier, ledger.multiplier
    return (
        name,
        "" if predicted is None else f"{predicted:.3f}",
        "" if v is None else f"{v:.3f}",
        "" if ledger.noise_scale is None else f"{ledger.noise_scale:.2g}",
        f"{ledger.sum_joint / sgd:.3f}",
        f"{ledger.total / sgd:.3f} ± {2 * ledger.total_error / sgd:.3f}",
        f"{ledger.sum_isolated / sgd:.3f}",
    )
