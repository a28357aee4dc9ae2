"""Sample the columns (output channels) of the cotangent: the diagonal sketch on d_out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from backsketch.estimators.base import Estimator, check_choice, register
from backsketch.estimators.bilinear import Bilinear, energy, norms, scale_free
from backsketch.estimators.rows import SCORES, sampled_variance, simple_scores
from backsketch.sampling import DESIGNS, Sample, draw, num_kept

__all__ = ["Columns"]


@register("columns")
@dataclass(frozen=True)
class Columns(Estimator):
    r"""Keep k of the d_out columns of the cotangent, each divided by its inclusion probability.

    .. math:: \tilde G = G\,R, \qquad R = \mathrm{diag}(z_j/\pi_j),\quad E[z_j] = \pi_j,\ \sum_j z_j = k

    Unbiased: :math:`E[R] = I` and both products are linear in G. Each product draws its own columns.

    Variance: ``grad_weight`` has :math:`\sum_j (1/\pi_j-1)\|G_{:j}^\top X\|^2` for any design (the columns
    fill different rows of the weight); ``grad_input`` has
    :math:`\sum_j (1/\pi_j-1)\|G_{:j}\|^2\|W_j\|^2` under independent draws, and
    :func:`backsketch.theory.systematic` of the same contributions under the default design.

    The scores ``"optimal"`` are :math:`\|G_{:j}\|\|W_j\|` for ``grad_input``: the minimum. For
    ``grad_weight`` the minimum needs the product itself; :math:`(\sum_i G_{ij}^2\|x_i\|^2)^{1/2}`
    stands in for it. In a grouped convolution a column is a whole group of channels.

    Args:
        keep: the fraction k/d_out, in (0, 1]; k is rounded up.
        scores: ``"uniform"``, ``"l1"`` or ``"l2"`` (norm of the cotangent column), ``"optimal"``.
        design: see :data:`backsketch.sampling.DESIGNS`.

    Raises:
        ValueError: a field outside its range.

    Source: arXiv 2602.14701, data-dependent diagonal sketches.
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
        n = op.num_columns(cotangent)
        k = num_kept(n, self.fraction)
        if k >= n or cotangent.shape[0] == 0:
            return op.input_vjp(cotangent, weight)
        kept = self._draw(self.input_scores(op, cotangent, weight), k, seed, 0)
        return op.input_vjp_columns(cotangent, weight, *kept)

    def estimate_weight(
        self, op: Bilinear, cotangent: Tensor, stored: tuple[Tensor, ...], seed: Tensor
    ) -> Tensor:
        x = op.rows(stored[0])
        n = op.num_columns(cotangent)
        k = num_kept(n, self.fraction)
        if k >= n or cotangent.shape[0] == 0:
            return op.weight_vjp(cotangent, x)
        kept = self._draw(self.weight_scores(op, cotangent, x), k, seed, 1)
        return op.weight_vjp_columns(cotangent, x, *kept)

    def _draw(self, scores: Tensor, k: int, seed: Tensor, stream: int) -> Sample:
        return draw(scores, k, seed, stream, self.design)

    def input_scores(self, op: Bilinear, cotangent: Tensor, weight: Tensor) -> Tensor:
        """``(columns,)`` scores of the draw for ``grad_input``."""
        if self.scores != "optimal":
            return self._simple_scores(op, cotangent)

        def scores(g: Tensor, w: Tensor) -> Tensor:
            return op.by_column(energy(g).sum(0) * norms(w).square(), 0).sqrt()

        return scale_free(scores, cotangent, weight)

    def weight_scores(self, op: Bilinear, cotangent: Tensor, x: Tensor) -> Tensor:
        """``(columns,)`` scores of the draw for ``grad_weight``."""
        if self.scores != "optimal":
            return self._simple_scores(op, cotangent)

        def scores(g: Tensor, x: Tensor) -> Tensor:
            size = energy(x)
            size = op.by_column(size, 1) if op.groups > 1 else size.sum(1, keepdim=True)
            return (op.by_column(energy(g), 1) * size).sum(0).sqrt()

        return scale_free(scores, cotangent, x)

    def _simple_scores(self, op: Bilinear, cotangent: Tensor) -> Tensor:
        if op.groups > 1:
            cotangent = cotangent.unflatten(1, (op.groups, -1))
        return simple_scores(cotangent, 1, self.scores)

    def chooses(self) -> Literal["columns"] | None:
        return None if self.scores == "uniform" else "columns"

    def work(self) -> tuple[float, float]:
        return self.keep, self.keep

    def refusal(self, op: Bilinear, weight: Tensor) -> str | None:
        if weight.shape[0] == 1 and op.groups == 1:
            return "it has a single output column, so there is nothing to choose from"
        return None

    def input_variance(self, op: Bilinear, cotangent: Tensor, weight: Tensor) -> Tensor:
        scores = self.input_scores(op, cotangent, weight)
        return sampled_variance(
            scores, num_kept(len(scores), self.keep), op.column_gram(cotangent, weight), self.design
        )

    def weight_variance(self, op: Bilinear, cotangent: Tensor, x: Tensor) -> Tensor:
        x = op.rows(x)
        scores = self.weight_scores(op, cotangent, x)
        squares = norms(op.weight_vjp(cotangent, x)).square()
        k = num_kept(len(scores), self.keep)
        return sampled_variance(scores, k, op.by_column(squares, 0))
