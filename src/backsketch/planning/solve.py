"""One option for each place at the least total, under limits: a multiple-choice knapsack, solved exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["choose"]

Cost = tuple[float, float, float]


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
        ImportError: SciPy is not installed.

    Example:
        >>> choose([[(0, 0, 0), (-2, 1, 0)], [(0, 0, 0), (-3, 2, 0)]], 0, (9, 2, 9))
        [0, 1]
    """
    try:
        import numpy as np
        from scipy.optimize import Bounds, LinearConstraint, milp
    except ImportError as error:
        raise ImportError("planning needs SciPy: pip install 'backsketch[train]'") from error

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
