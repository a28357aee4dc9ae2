"""A package that is missing is named, with the extra that brings it."""

from __future__ import annotations

import sys

import pytest

from backsketch.planning.plan import knapsack


def test_a_plan_under_a_limit_names_scipy(monkeypatch):
    costs = [[(0.0, 0.0, 0.0), (-1.0, 1.0, 1.0)]]
    limits = (9.0, 9.0, 9.0)
    assert knapsack.choose(costs, 0, limits) == [1]
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs SciPy: pip install 'backsketch\[plan\]'"):
        knapsack.choose(costs, 0, limits)
