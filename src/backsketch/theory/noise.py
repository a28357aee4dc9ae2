r"""The noise scale of SGD, without bias.

:math:`\beta = \sigma^2 / \|\bar g\|^2` with :math:`\sigma^2 = E\|g_B - \bar g\|^2` at the batch size in use.
Both parts are estimated without bias from B independent minibatch gradients:

.. math:: \hat\sigma^2 = \frac{\sum_b \|g_b\|^2 - \|\sum_b g_b\|^2/B}{B-1}, \qquad
          \widehat{\|\bar g\|^2} = \Bigl\|\tfrac1B \textstyle\sum_b g_b\Bigr\|^2 - \frac{\hat\sigma^2}{B} .

The naive :math:`\|\tfrac1B\sum_b g_b\|^2` is too large by :math:`\sigma^2/B`, which late in training is most of
it. Source: McCandlish et al. 2018, appendix A.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["GradientSums", "mean_square", "noise_scale", "noise_scale_at", "sgd_variance"]


def sgd_variance(count: int, sum_of_squares: float, square_of_sum: float) -> float:
    r""":math:`\hat\sigma^2` from running sums over the minibatch gradients.

    Args:
        count: B, at least 2.
        sum_of_squares: :math:`\sum_b \|g_b\|^2`.
        square_of_sum: :math:`\|\sum_b g_b\|^2`.

    Raises:
        ValueError: fewer than two gradients.

    Example:
        >>> sgd_variance(2, 1.0 + 9.0, 16.0)
        2.0
    """
    if count < 2:
        raise ValueError(f"a variance over minibatches needs two of them, got {count}")
    return max((sum_of_squares - square_of_sum / count) / (count - 1), 0.0)


def mean_square(count: int, sum_of_squares: float, square_of_sum: float) -> float:
    r"""The squared norm of the mean gradient, without bias (so that it may come out negative)."""
    return square_of_sum / count**2 - sgd_variance(count, sum_of_squares, square_of_sum) / count


@dataclass
class GradientSums:
    """Running sums over minibatch gradients, for the two estimates above without keeping the gradients.

    Example:
        >>> sums = GradientSums()
        >>> for g in (3.0, 1.0):
        ...     sums.add([torch.tensor([g])])
        >>> sums.sgd_variance, sums.noise_scale
        (2.0, 0.6666666666666666)
    """

    count: int = 0
    sum_of_squares: float = 0.0
    total: list[Tensor] = field(default_factory=list)

    def add(self, gradient: Sequence[Tensor]) -> None:
        """Take the gradient of one more minibatch into account, a tensor per parameter."""
        flat = [g.detach().to(torch.float64) for g in gradient]
        self.sum_of_squares += sum(float(g.square().sum()) for g in flat)
        self.total = [a + b for a, b in zip(self.total, flat)] if self.count else flat
        self.count += 1

    @property
    def sgd_variance(self) -> float:
        """See :func:`sgd_variance`."""
        return sgd_variance(*self._sums)

    @property
    def noise_scale(self) -> float:
        """See :func:`noise_scale`."""
        mean = mean_square(*self._sums)
        return self.sgd_variance / mean if mean > 0 else math.inf

    @property
    def _sums(self) -> tuple[int, float, float]:
        return self.count, self.sum_of_squares, sum(float(t.square().sum()) for t in self.total)


def noise_scale(gradients: Tensor) -> float:
    r""":math:`\beta` from minibatch gradients ``(B, d)``; infinite where the mean is lost in the noise.

    Example:
        >>> noise_scale(torch.tensor([[3.0], [1.0]]))  # variance 2, squared mean 4 - 2/2
        0.6666666666666666
    """
    sums = GradientSums()
    for gradient in gradients:
        sums.add([gradient])
    return sums.noise_scale


def noise_scale_at(beta: float, batch_ratio: float) -> float:
    """The noise scale of a batch ``batch_ratio`` times as large: the variance falls in proportion.

    Example:
        >>> noise_scale_at(3.0, 2.0)
        1.5
    """
    if not batch_ratio > 0:
        raise ValueError(f"batch_ratio must be positive; got {batch_ratio!r}")
    return beta / batch_ratio
