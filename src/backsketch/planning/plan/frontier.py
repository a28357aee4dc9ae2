r"""The frontier of cost and variance over the choices of one option at each of several sites.

On the lower convex hull of a site's options, moving from one to the next saves some cost for some more
variance; taking such moves in the order of what they save per variance solves the relaxed problem
:math:`\min \sum_s c_s + \mu \sum_s v_s` for every :math:`\mu` at once. Every choice on the way is the cheapest
for the variance that it has, up to the granularity of the options. A product of two positive sums, such as
:func:`backsketch.theory.time_to_target_ratio`, is quasi-concave, so the least one of all choices is among them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

__all__ = ["frontier"]

Option = Sequence[float]


def frontier(
    sites: Sequence[Sequence[Option]], limit: float = math.inf
) -> Iterator[tuple[list[int], float, float]]:
    """Choices of increasing variance and decreasing cost, as (option per site, cost, variance).

    Args:
        sites: per site, options that begin with cost and variance.
        limit: a move that takes the sum of variances beyond it is skipped, and later ones of its site with it.

    Example:
        >>> [(picked, cost) for picked, cost, _ in frontier([[(0, 0), (-2, 1)], [(0, 0), (-3, 1), (-4, 3)]], 3)]
        [([0, 0], 0), ([0, 1], -3), ([1, 1], -5)]
    """
    hulls = [_hull(options) for options in sites]
    moves = [
        (_slope(sites[site], a, b), site, b)
        for site, hull in enumerate(hulls)
        for a, b in itertools.pairwise(hull)
    ]
    picked, closed = [hull[0] for hull in hulls], set()
    cost, variance = (sum(sites[s][i][part] for s, i in enumerate(picked)) for part in range(2))
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
    """Indices of the lower convex hull, from the least variance on, by falling cost."""
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
