"""A numerical check on the first batch: parts of the batch must add up to its gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from backsketch import sampling

_TOLERANCE = {False: 1e-3, True: 5e-2}


def splits_add_up(
    part: Callable[[Tensor], Sequence[Any]],
    exact: Callable[[], Sequence[Any]],
    scores: Tensor,
    low_precision: bool,
) -> tuple[Sequence[Any], bool | None]:
    r"""Whether :math:`J^\top g = J_A^\top g_A + J_B^\top g_B` for a random split of the rows.

    This holds for every split if and only if rows do not interact. It also exercises the gathers and
    scatters that every later step relies on.

    Args:
        part: gradients from the rows in an index.
        exact: gradients from all rows.
        scores: cotangent row norms ``(n,)``.
        low_precision: half-precision numbers take part, so compare loosely.

    Returns:
        The exact gradients, and the verdict: None where this batch cannot tell (a single row; zero
        or non-finite cotangents).
    """
    n = scores.shape[0]
    total = scores.sum()
    if n < 2 or not bool(torch.isfinite(total)) or not bool((scores > 0).sum() > 1):
        return exact(), None
    order = sampling.uniform_like(scores, torch.tensor(n)).argsort()
    first, second = (part(i.sort().values) for i in (order[: n // 2], order[n // 2 :]))
    gradients = exact()  # last: a compiled backward may reuse the saved tensors' memory
    return gradients, _close(gradients, first, second, _TOLERANCE[low_precision])


def _close(exact: Sequence[Any], a: Sequence[Any], b: Sequence[Any], tolerance: float) -> bool:
    triples = [(e, x, y) for e, x, y in zip(exact, a, b) if isinstance(e, Tensor) and e.numel()]
    rms = max((float(e.double().square().mean().sqrt()) for e, _, _ in triples), default=0.0)
    for e, x, y in triples:
        error = float((e.double() - x.double() - y.double()).norm())
        size = float(e.double().norm() + x.double().norm() + y.double().norm())
        # A gradient that is zero by cancellation (a key bias) is compared with the others' noise.
        if error > tolerance * (size + 1e-2 * rms * e.numel() ** 0.5):
            return False
    return True
