r"""The choice of one option at each of several sites: the frontier of two costs, and a knapsack under limits.

On the lower convex hull of a site's options, moving from one to the next saves some cost for some more
variance; taking such moves in the order of what they save per variance solves the relaxed problem
:math:`\min \sum_s c_s + \mu \sum_s v_s` for every :math:`\mu` at once. Every choice on the way is the cheapest
for the variance that it has, up to the granularity of the options. A product of two positive sums, such as
:func:`backsketch.theory.time_to_target_ratio`, is quasi-concave, so the least one of all choices is among them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["choose", "frontier"]

_MOST = 2048  # partial choices that are kept; beyond it the best one of each cell of a grid

Option = Sequence[float]
Cost = tuple[float, float, float]


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


# --- within limits ----------------------------------------------------------------------------------


def choose(
    costs: Sequence[Sequence[Cost]],
    score: Callable[[Tensor], Tensor],
    parts: Sequence[int],
    limits: Sequence[float],
) -> list[int] | None:
    """The choice with the least score whose sums of all costs stay within limits.

    Site by site, partial choices that another one beats in every cost that counts are dropped. That is exact
    until more than two thousand are left; from there on similar ones are merged, the limits still being kept.

    Args:
        costs: per site, per option, three numbers.
        score: takes ``(choices, 3)`` sums and returns ``(choices,)``, not decreasing in any of the sums.
        parts: the costs that the score depends on.
        limits: an upper bound for each sum; infinity is none.

    Returns:
        The index of the chosen option per site, None where no choice stays within the limits.

    Example:
        >>> choose([[(0, 0, 0), (-2, 1, 0)], [(0, 0, 0), (-3, 2, 0)]], lambda sums: sums[:, 0], [0], (9, 2, 9))
        [0, 1]
    """
    tables = [torch.tensor(options, dtype=torch.float64) for options in costs]
    counted = [i for i in range(3) if i in parts or math.isfinite(limits[i])]
    bound = torch.tensor(limits, dtype=torch.float64)
    bound += 1e-9 * bound.abs().nan_to_num(posinf=0) + 1e-12
    least = torch.stack([table.amin(0) for table in tables])
    rest = least.flip(0).cumsum(0).flip(0) - least  # of the sites that follow
    sums = torch.zeros(1, 3, dtype=torch.float64)
    picked = torch.zeros(1, 0, dtype=torch.int64)
    for table, more in zip(tables, rest):
        n, m = len(sums), len(table)
        sums = (sums[:, None] + table).view(-1, 3)
        picked = torch.cat([picked.repeat_interleave(m, 0), torch.arange(m).repeat(n)[:, None]], 1)
        kept = ((sums + more) <= bound).all(1).nonzero().flatten()
        kept = kept[_best(sums[kept][:, counted])]
        sums, picked = sums[kept], picked[kept]
        if not len(sums):
            return None
    size = sums.abs().amax(0).clamp(min=1e-300)
    scores = score(sums)
    tie = (sums / size).clamp(min=0).sum(1)  # among equals the one with the least of everything
    best = int((scores + 1e-7 * scores.abs().amax() * tie).argmin())
    return [int(i) for i in picked[best]]


def _best(points: Tensor) -> Tensor:
    """Indices of the points that no other one beats in all coordinates; fewer where there are too many."""
    n, dims = points.shape
    order = torch.arange(n)
    for column in reversed(range(dims)):
        order = order[torch.argsort(points[order, column], stable=True)]
    if dims == 1:
        return order[:1]
    if dims == 2:
        second = points[order, 1]
        before = torch.cat([second.new_full((1,), math.inf), second.cummin(0).values[:-1]])
        order = order[second < before]
    elif n <= _MOST:
        p = points[order]
        beaten = (p[None] <= p[:, None]).all(2) & torch.ones(n, n, dtype=torch.bool).tril(-1)
        order = order[~beaten.any(1)]
    return order if len(order) <= _MOST else order[_thinned(points[order])]


def _thinned(points: Tensor) -> Tensor:
    """Of each cell of a grid over all coordinates but the first, the point with the least first one."""
    rest = points[:, 1:]
    cells = int(_MOST ** (1 / rest.shape[1]))
    low, high = rest.amin(0), rest.amax(0)
    cell = ((rest - low) / (high - low).clamp(min=1e-300) * cells).long().clamp(max=cells - 1)
    key = torch.zeros(len(points), dtype=torch.int64)
    for column in cell.T:
        key = key * cells + column
    first = torch.full((cells ** rest.shape[1],), len(points))
    first.scatter_reduce_(0, key, torch.arange(len(points)), "amin")  # points are in order
    return first[first < len(points)].sort().values
