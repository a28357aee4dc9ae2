"""One option for each place: the frontier of two costs, and a multiple-choice knapsack under limits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

__all__ = ["choose", "frontier"]

Cost = tuple[float, float, float]


def frontier(costs: Sequence[Sequence[Cost]]) -> list[list[int]]:
    """Choices at the corners of the convex hull of total time (cost 0) and total variance (cost 1).

    Each place's own hull is walked from its least variance on, always taking the step that saves most time per
    variance. A product of two positive sums, such as :func:`backsketch.theory.time_to_target_ratio`, is
    quasi-concave, so the least one of all choices is at a corner.

    Returns:
        Lists of one index per place, from the least variance to the least time.

    Example:
        >>> frontier([[(0, 0, 0), (-2, 1, 0)], [(0, 0, 0), (-3, 2, 0)]])
        [[0, 0], [1, 0], [1, 1]]
    """
    hulls = [_hull(options) for options in costs]
    steps = []
    for place, hull in enumerate(hulls):
        for i, j in itertools.pairwise(hull):
            (ta, va, _), (tb, vb, _) = costs[place][i], costs[place][j]
            steps.append(((vb - va) / (ta - tb), place, j))
    picked = [hull[0] for hull in hulls]
    found = [list(picked)]
    for _, place, option in sorted(steps):
        picked[place] = option
        found.append(list(picked))
    return found


def _hull(options: Sequence[Cost]) -> list[int]:
    """The lower left hull of (time, variance), from the least variance to the least time."""
    order = sorted(range(len(options)), key=lambda i: (options[i][1], options[i][0]))
    hull: list[int] = []
    for i in order:
        t, v, _ = options[i]
        if hull and t >= options[hull[-1]][0]:
            continue
        while len(hull) > 1:
            (ta, va, _), (tb, vb, _) = options[hull[-2]], options[hull[-1]]
            if (vb - va) * (ta - t) < (v - va) * (ta - tb):
                break
            hull.pop()
        hull.append(i)
    return hull


def choose(
    costs: Sequence[Sequence[Cost]], minimise: int, limits: tuple[float, float, float]
) -> list[int] | None:
    """The choice with the least sum of one cost whose sums of all costs stay within limits.

    A mixed-integer linear program with one binary per place and option, solved by SciPy (HiGHS).

    Args:
        costs: per place, per option, three numbers.
        minimise: which of the three.
        limits: an upper bound for each sum; infinity is none.

    Returns:
        The index of the chosen option per place, None where no choice stays within the limits.

    Raises:
        ModuleNotFoundError: SciPy is not installed.

    Example:
        >>> choose([[(0, 0, 0), (-2, 1, 0)], [(0, 0, 0), (-3, 2, 0)]], 0, (9, 2, 9))
        [0, 1]
    """
    try:
        import numpy as np
        from scipy.optimize import Bounds, LinearConstraint, milp
    except ImportError as error:
        raise ModuleNotFoundError(
            "a plan under a limit needs SciPy: pip install 'backsketch[plan]'", name="scipy"
        ) from error

    owner = np.repeat(np.arange(len(costs)), [len(options) for options in costs])
    table = np.array([cost for options in costs for cost in options], dtype=float)
    one_each = (owner == np.arange(len(costs))[:, None]).astype(float)
    # Numbers of like size: bytes and seconds differ by ten orders of magnitude.
    scale = np.abs(table).max(0)
    scale[scale == 0] = 1.0
    scaled = table / scale
    constraints = [LinearConstraint(one_each, 1, 1)]
    for part, limit in enumerate(limits):
        if math.isfinite(limit):
            constraints.append(LinearConstraint(scaled[:, part], -np.inf, limit / scale[part]))
    # Among equals the one with the least of everything.
    target = scaled[:, minimise] + 1e-7 * scaled.clip(min=0).sum(1)
    solution = milp(
        target, integrality=np.ones(len(table)), bounds=Bounds(0, 1), constraints=constraints
    )
    if solution.x is None:
        return None
    starts = np.searchsorted(owner, np.arange(len(costs)))
    return [int(np.argmax(solution.x[owner == i])) for i in range(len(starts))]
