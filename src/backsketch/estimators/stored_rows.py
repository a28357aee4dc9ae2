"""Save only some rows of the input: memory, chosen in the forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from backsketch.estimators.base import Estimator, check_choice, nonfinite, register
from backsketch.estimators.bilinear import Bilinear, gather_scaled
from backsketch.estimators.rows import sampled_variance, simple_scores
from backsketch.sampling import DESIGNS, draw, num_kept

__all__ = ["StoredRows"]


@register("stored_rows")
@dataclass(frozen=True)
class StoredRows(Estimator):
    r"""Keep k of N rows of the input from the forward pass on, each divided by its inclusion probability.

    .. math:: \widetilde{\nabla W} = \sum_{i \in S} \frac{1}{\pi_i}\, g_i^\top x_i,
              \qquad S \text{ drawn in the forward pass}

    Unbiased: S depends on X alone, and G, given X, does not depend on S. ``grad_input`` is exact.

    Variance: :math:`\sum_i (1/\pi_i-1)\|g_i\|^2\|x_i\|^2` under independent draws, and
    :func:`backsketch.theory.systematic` of the same contributions under the default design. The
    cotangent is unknown when the rows are chosen; for exchangeable cotangents
    :math:`\pi_i \propto \|x_i\|` is optimal, which is why ``"l2"`` is the default.

    Saves: the input shrinks to k rows (and their int64 indices), ``grad_weight`` to k rows of work.

    Args:
        keep: the fraction k/N, in (0, 1]; k is rounded up.
        scores: ``"uniform"``, ``"l1"`` or ``"l2"`` (norm of the input row).
        design: see :data:`backsketch.sampling.DESIGNS`.

    Raises:
        ValueError: a field outside its range.

    Source: after WTA-CRS (Liu et al. 2023) and RAD (Oktay et al. 2021), with water-filling probabilities.
    """

    keep: float
    scores: str = "l2"
    design: str = "systematic"

    needs_forward_seed: ClassVar[bool] = True
    saves_memory: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scores == "optimal":
            raise ValueError(
                "StoredRows: the optimal scores need the cotangent, which the forward pass does not "
                "have; scores='l2' is optimal for what it knows"
            )
        check_choice(self, "scores", self.scores, ("uniform", "l1", "l2"))
        check_choice(self, "design", self.design, DESIGNS)

    def store(self, op: Bilinear, x: Tensor, seed: Tensor | None) -> tuple[Tensor, ...]:
        rows = op.rows(x)
        k = num_kept(rows.shape[0], self.fraction)
        if k >= rows.shape[0] or seed is None:
            return (x,)
        kept = draw(simple_scores(rows, 0, self.scores), k, seed, 0, self.design)
        return gather_scaled(rows, 0, *kept), kept.indices

    def estimate_weight(
        self, op: Bilinear, cotangent: Tensor, stored: tuple[Tensor, ...], seed: Tensor
    ) -> Tensor:
        if len(stored) == 1:
            return op.weight_vjp(cotangent, op.rows(stored[0]))
        rows, indices = stored
        estimate = op.weight_vjp(cotangent.index_select(0, indices), rows)
        return estimate + nonfinite(cotangent).to(estimate.dtype)

    def chooses(self) -> Literal["stored rows"] | None:
        return None if self.scores == "uniform" else "stored rows"

    def work(self) -> tuple[float, float]:
        return 1.0, self.keep

    def saved(self) -> float:
        return self.keep

    def weight_variance(self, op: Bilinear, cotangent: Tensor, x: Tensor) -> Tensor:
        x = op.rows(x)
        scores = simple_scores(x, 0, self.scores)
        return sampled_variance(
            scores, num_kept(len(scores), self.keep), op.row_gram(cotangent, x), self.design
        )
