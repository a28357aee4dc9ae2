"""The exact vector-Jacobian products: keep = 1, the baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from backsketch.estimators.base import Estimator, register

__all__ = ["Exact"]


@register("exact")
@dataclass(frozen=True)
class Exact(Estimator):
    """Both products exactly as PyTorch computes them: no randomness, no saving.

    Useful inside :class:`~backsketch.Split` and as the control arm of an experiment.

    Example:
        >>> import backsketch as bs
        >>> str(bs.Exact())
        'exact'
    """

    needs_rows: ClassVar[bool] = False

    def is_exact(self) -> bool:
        return True
