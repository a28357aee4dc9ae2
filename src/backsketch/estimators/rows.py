"""Sample the rows (samples, tokens, positions) of the cotangent: the workhorse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from backsketch.estimators.base import Estimator, check_choice, register
from backsketch.estimators.bilinear import (
    Bilinear,
    energy,
    gather_scaled,
    norms,
    scale_free,
    scatter,
)
from backsketch.sampling import (
    DESIGNS,
    Sample,
    draw,
    inclusion_probabilities,
    num_kept,
    num_live_kept,
    row_norms,
)
from backsketch.theory import variance

__all__ = ["SCORES", "Rows", "sampled_variance", "simple_scores"]

SCORES = ("uniform", "l1", "l2", "optimal")


@register("rows")
@dataclass(frozen=True)
class Rows(Estimator):
    r"""Keep k of N rows of the cotangent, each divided by its inclusion probability.

    .. math:: \tilde G = R\,G, \qquad R = \mathrm{diag}(z_i/\pi_i),\quad
              z_i \in \{0,1\},\ E[z_i]=\pi_i,\ \sum_i z_i = k

    Unbiased: :math:`E[R] = I`, both products are linear in G, and R is drawn after G, X and W are known.
    Each product draws its own rows, with the scores that are best for it.

    Variance: ``grad_input`` has :math:`\sum_i (1/\pi_i-1)\|g_i W\|^2` for any design, because the rows
    of the product are orthogonal contributions; ``grad_weight`` has
    :math:`\sum_i (1/\pi_i-1)\|g_i\|^2\|x_i\|^2` under independent draws, and
    :func:`backsketch.theory.systematic` of the same contributions under the default design.

    The scores ``"optimal"`` are :math:`\|g_i\|\|x_i\|` for ``grad_weight``: the minimum over all
    inclusion probabilities. For ``grad_input`` the minimum needs :math:`\|g_i W\|`, that is the product
    itself; :math:`(\sum_j G_{ij}^2\|W_j\|^2)^{1/2}` stands in for it at the price of a
    matrix-vector product (equal where the rows of W are orthogonal, zero only where the target is).

    Args:
        keep: the fraction k/N, in (0, 1]; k is rounded up. Rows whose cotangent is zero are not drawn, where
            they can be counted without waiting for a device: eager code on the CPU.
        scores: ``"uniform"``, ``"l1"`` or ``"l2"`` (norm of the cotangent row), ``"optimal"``.
        design: how the rows are drawn, see :data:`backsketch.sampling.DESIGNS`. The default takes the
            natural order, in which neighbouring tokens stratify the sample for free.

    Raises:
        ValueError: a field outside its range.

    Source: arXiv 2602.14701, data-dependent diagonal sketches; systematic sampling: Madow 1949.
    """

    keep: float
    scores: str = "optimal"
    design: str = "systematic"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "scores", self.scores, SCORES)
        check_choice(self, "design", self.design, DESIGNS)

    def estimate_input(
        self, op: Bilinear, cotangent: Tensor, weight: Tensor, seed: Tensor
    ) -> Tensor:
        n = cotangent.shape[0]
        if num_kept(n, self.fraction) >= n:
            return op.input_vjp(cotangent, weight)
        kept = self._draw(self.input_scores(cotangent, weight), seed, 0)
        part = op.input_vjp(gather_scaled(cotangent, 0, *kept), weight)
        return scatter(part, 0, kept.indices, n)

    def estimate_weight(
        self, op: Bilinear, cotangent: Tensor, stored: tuple[Tensor, ...], seed: Tensor
    ) -> Tensor:
        x = op.rows(stored[0])
        if num_kept(x.shape[0], self.fraction) >= x.shape[0]:
            return op.weight_vjp(cotangent, x)
        kept = self._draw(self.weight_scores(cotangent, x), seed, 1)
        return op.weight_vjp(gather_scaled(cotangent, 0, *kept), x.index_select(0, kept.indices))

    def _draw(self, scores: Tensor, seed: Tensor, stream: int) -> Sample:
        return draw(scores, self._num(scores), seed, stream, self.design)

    def _num(self, scores: Tensor) -> int:
        """How many rows are drawn: below a mask no more than it left."""
        n = scores.shape[0]
        k = num_kept(n, self.fraction)
        return n if k >= n else num_live_kept(scores, self.fraction)

    def input_scores(self, cotangent: Tensor, weight: Tensor) -> Tensor:
        """``(rows,)`` scores of the draw for ``grad_input``."""
        if self.scores == "optimal":
            if (fast := _input_scores_in_one_pass(cotangent, weight)) is not None:
                return fast
            return scale_free(
                lambda g, w: (energy(g) @ norms(w).square()).sqrt(), cotangent, weight
            )
        return simple_scores(cotangent, 0, self.scores)

    def weight_scores(self, cotangent: Tensor, x: Tensor) -> Tensor:
        """``(rows,)`` scores of the draw for ``grad_weight``."""
        if self.scores == "optimal":
            of_g, of_x = (row_norms(t.flatten(1)) for t in (cotangent, x))
            if of_g is not None and of_x is not None:
                return of_g * of_x
            return scale_free(lambda g, x: norms(g) * norms(x), cotangent, x)
        return simple_scores(cotangent, 0, self.scores)

    def chooses(self) -> Literal["rows"] | None:
        return None if self.scores == "uniform" else "rows"

    def work(self) -> tuple[float, float]:
        return self.keep, self.keep

    def input_variance(self, op: Bilinear, cotangent: Tensor, weight: Tensor) -> Tensor:
        scores = self.input_scores(cotangent, weight)
        exact = op.input_vjp(cotangent, weight)
        return sampled_variance(scores, self._num(scores), norms(exact).square())

    def weight_variance(self, op: Bilinear, cotangent: Tensor, x: Tensor) -> Tensor:
        x = op.rows(x)
        scores = self.weight_scores(cotangent, x)
        gram = op.row_gram(cotangent, x)
        return sampled_variance(scores, self._num(scores), gram, self.design)


def _input_scores_in_one_pass(cotangent: Tensor, weight: Tensor) -> Tensor | None:
    """The optimal scores up to a common factor; None where there is no kernel for that."""
    of_columns = row_norms(weight.flatten(1))
    if of_columns is None:
        return None
    positions = cotangent[0, 0].numel()
    if positions > 1:
        of_columns = of_columns.repeat_interleave(positions)
    return row_norms(cotangent.flatten(1), of_columns)


def simple_scores(cotangent: Tensor, dim: int, kind: str) -> Tensor:
    """Norms of the slices of the cotangent, or ones; NaN or Inf where a slice is not finite."""
    if kind == "uniform":
        return norms(cotangent, dim, 1) * 0 + 1
    if kind == "l2" and dim == 0 and (fast := row_norms(cotangent.flatten(1))) is not None:
        return fast
    order = {"l1": 1, "l2": 2}[kind]
    return scale_free(lambda g: norms(g, dim, order), cotangent)


def sampled_variance(
    scores: Tensor, k: int, contributions: Tensor, design: str = "systematic"
) -> Tensor:
    """Variance of a sum over k of n rows: ``(n,)`` squared norms (orthogonal terms) or an ``(n, n)`` Gram matrix.

    Raises:
        ValueError: a Gram matrix under the permuted design, which has no closed form.
    """
    if k >= scores.shape[0]:
        return torch.zeros((), dtype=torch.float64)
    pi = inclusion_probabilities(scores, k)
    if contributions.ndim == 1:
        return variance.horvitz_thompson(pi, contributions)
    if design == "independent":
        return variance.horvitz_thompson(pi, contributions.diagonal())
    if design == "systematic":
        return variance.systematic(pi, contributions)
    raise ValueError(
        f"no closed form for the variance of the {design!r} design; 'systematic' and 'independent' have one"
    )
