"""A uniform mask on the entries of the cotangent: the control that everything else must beat."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from backsketch.estimators.base import Estimator, register
from backsketch.estimators.bilinear import Bilinear
from backsketch.sampling import uniform_like
from backsketch.theory import variance

__all__ = ["Elements"]

_RESOLUTION = 2**24  # uniform numbers in float32 are multiples of its inverse


@register("elements")
@dataclass(frozen=True)
class Elements(Estimator):
    r"""Keep each entry of the cotangent with probability p, divided by p.

    .. math:: \tilde G_{ij} = \frac{b_{ij}}{p} G_{ij}, \qquad b_{ij} \sim \mathrm{Bernoulli}(p)

    Unbiased: :math:`E[b_{ij}] = p`, hence :math:`E[\tilde G] = G`, and both products are linear in G.

    Variance (linear layer, entries independent, so cross terms vanish):
    :math:`(1/p-1) \sum_{ij} G_{ij}^2 \|W_j\|^2` for ``grad_input`` and
    :math:`(1/p-1) \sum_{ij} G_{ij}^2 \|x_i\|^2` for ``grad_weight``.

    It saves nothing on dense hardware and its ``c v`` is never below 1: it is the reference point of
    the paper (uniform masks), not a tool. For convolutions the sums are those of the products applied
    to squared tensors, because one entry of G meets each entry of the target at most once.

    Args:
        keep: the probability p, in (0, 1]; p is rounded up to a multiple of 2^-24.

    Raises:
        ValueError: ``keep`` outside (0, 1].

    Source: arXiv 2602.14701, uniform masks.
    """

    keep: float

    @property
    def probability(self) -> float:
        """``keep``, rounded up to what comparing it with a uniform number of 24 bits amounts to."""
        return math.ceil(self.fraction * _RESOLUTION) / _RESOLUTION

    def _mask(self, cotangent: Tensor, seed: Tensor) -> Tensor:
        p = self.probability
        if p == 1:
            return cotangent
        wide = torch.promote_types(cotangent.dtype, torch.float32)
        mask = (uniform_like(cotangent, seed) < p).to(wide) / p
        # A product, not a selection: NaN and Inf survive the mask's zeros.
        return (cotangent * mask).to(cotangent.dtype)

    def estimate_input(
        self, op: Bilinear, cotangent: Tensor, weight: Tensor, seed: Tensor
    ) -> Tensor:
        return op.input_vjp(self._mask(cotangent, seed), weight)

    def estimate_weight(
        self, op: Bilinear, cotangent: Tensor, stored: tuple[Tensor, ...], seed: Tensor
    ) -> Tensor:
        return op.weight_vjp(self._mask(cotangent, seed), op.rows(stored[0]))

    def input_variance(self, op: Bilinear, cotangent: Tensor, weight: Tensor) -> Tensor:
        return variance.elements(
            self.probability, op.input_vjp(cotangent.square(), weight.square())
        )

    def weight_variance(self, op: Bilinear, cotangent: Tensor, x: Tensor) -> Tensor:
        return variance.elements(
            self.probability, op.weight_vjp(cotangent.square(), op.rows(x).square())
        )
