r"""Keeps for several sites from a common budget of variance, along the frontier of cost and variance.

Each site has options (cost, variance) with exact = (0, 0). On its lower convex hull, moving from one option
to the next saves some cost for some more variance; taking such moves in the order of what they save per
variance solves the relaxed problem :math:`\min \sum_s c_s + \mu \sum_s v_s` for every :math:`\mu` at once.
Every choice on the way is the cheapest for the variance that it has, up to the granularity of the ladder. No
solver is needed, which keeps the control of a training free of SciPy and of its milliseconds (a plan, made
once, uses :mod:`backsketch.planning.plan.knapsack`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

__all__ = ["frontier"]

Option = tuple[float, float]


def frontier(
    sites: Sequence[Sequence[Option]], limit: float = math.inf
) -> Iterator[tuple[list[int], float, float]]:
    """Choices of increasing variance and decreasing cost, as (option per site, cost, variance).

    Args:
        sites: per site, options (cost, variance); the first is the exact one, (0, 0).
        limit: a move that takes the sum of variances beyond it is skipped, and later ones of its site with it.

    Example:
        >>> [(picked, cost) for picked, cost, _ in frontier([[(0, 0), (-2, 1)], [(0, 0), (-3, 1), (-4, 3)]], 3)]
        [([0, 0], 0.0), ([0, 1], -3.0), ([1, 1], -5.0)]
    """
    moves = []
    for site, options in enumerate(sites):
        hull = _hull(options)
        for a, b in itertools.pairwise(hull):
            saved = options[a][0] - options[b][0]
            more = options[b][1] - options[a][1]
            moves.append((-saved / more if more > 0 else -math.inf, site, b))
    picked, closed = [0] * len(sites), set()
    cost = variance = 0.0
    yield list(picked), cost, variance
    for _, site, option in sorted(moves):
        before, after = sites[site][picked[site]], sites[site][option]
        if site in closed or variance + after[1] - before[1] > limit:
            closed.add(site)
            continue
        picked[site] = option
        cost += after[0] - before[0]
        variance += after[1] - before[1]
        yield list(picked), cost, variance


def _hull(options: Sequence[Option]) -> list[int]:
    """Indices of the lower convex hull from the exact option on, variance ascending and cost descending."""
    hull: list[int] = []
    for i in sorted(range(len(options)), key=lambda i: (options[i][1], options[i][0])):
        if hull and options[i][0] >= options[hull[-1]][0]:
            continue
        while len(hull) > 1 and _slope(options, hull[-2], hull[-1]) >= _slope(options, hull[-1], i):
            hull.pop()
        hull.append(i)
    return hull


def _slope(options: Sequence[Option], a: int, b: int) -> float:
    more = options[b][1] - options[a][1]
    return (options[b][0] - options[a][0]) / more if more > 0 else -math.inf
