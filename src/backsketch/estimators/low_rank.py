"""Rank-constrained sketches: the least variance per rank, exactly and practically."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from backsketch.estimators.base import Estimator, check_choice, nonfinite, register
from backsketch.estimators.bilinear import Bilinear, unit
from backsketch.estimators.columns import Columns
from backsketch.sampling import draw, num_kept, signs
from backsketch.theory import variance

__all__ = ["LowRank"]

METHODS = ("svd", "subspace")


@register("low_rank")
@dataclass(frozen=True)
class LowRank(Estimator):
    r"""An unbiased estimate of rank at most r.

    ``method="svd"``. With the target :math:`M = \sum_k \sigma_k u_k v_k^\top` (``grad_input`` or
    ``grad_weight`` as a matrix), draw r singular triples with the water-filling probabilities of
    :math:`\sigma`: the m largest surely, the tail with :math:`\pi_k \propto \sigma_k`,

    .. math:: \tilde M = \sum_{k \in S} \frac{\sigma_k}{\pi_k} u_k v_k^\top .

    Unbiased: :math:`E[z_k] = \pi_k`. Its variance
    :math:`(\sum_{k>m}\sigma_k)^2/(r-m) - \sum_{k>m}\sigma_k^2` is the minimum over *all* unbiased
    estimates of rank r. It needs the product and its SVD, so it saves nothing: it is the reference, the
    floor that says how good a rank-r sketch can be.

    ``method="subspace"``. A basis Q of q directions of d_out splits the cotangent, and with it the
    product, into q + d_out rank-one terms:

    .. math:: G W = [\,GQ,\; G - GQQ^\top\,]\,[\,Q^\top W;\; W\,]

    of which r are drawn as :class:`~backsketch.Columns` draws them. Directions that carry much are kept
    surely by water-filling, and what Q misses is sampled; where the cotangent has no low rank nothing
    is lost. Unbiased for any Q chosen before the draw. Q comes from one power iteration on random
    signs, :math:`Q = \mathrm{orth}(G^\top G \Omega)`; it is found anew at each step, so that there is no state to
    save, to compile or to go stale. The variance has no closed form, Q being random; given Q it is that
    of Columns. A grouped convolution keeps its channels apart: there it is Columns.

    Args:
        keep: the rank as a fraction of the full one (``"svd"``: of the target matrix,
            ``"subspace"``: of d_out).
        method: ``"svd"`` or ``"subspace"``.

    Raises:
        ValueError: a field outside its range.

    Source: arXiv 2602.14701, rank-constrained sketches; range finder: Halko, Martinsson, Tropp 2011.
    """

    keep: float
    method: str = "svd"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "method", self.method, METHODS)

    def estimate_input(
        self, op: Bilinear, cotangent: Tensor, weight: Tensor, seed: Tensor
    ) -> Tensor:
        if self.method == "svd":
            return self._sample_svd(op.input_vjp(cotangent, weight), seed, 0)
        basis = self._basis(op, cotangent, seed)
        if basis is None:
            return Columns(self.fraction).estimate_input(op, cotangent, weight, seed)
        columns = self._columns(basis)
        turned = torch.cat([torch.einsum("dq,d...->q...", basis, weight), weight])
        return columns.estimate_input(op, _turn(cotangent, basis), turned, seed)

    def estimate_weight(
        self, op: Bilinear, cotangent: Tensor, stored: tuple[Tensor, ...], seed: Tensor
    ) -> Tensor:
        if self.method == "svd":
            return self._sample_svd(op.weight_vjp(cotangent, op.rows(stored[0])), seed, 1)
        basis = self._basis(op, cotangent, seed)
        if basis is None:
            return Columns(self.fraction).estimate_weight(op, cotangent, stored, seed)
        part = self._columns(basis).estimate_weight(op, _turn(cotangent, basis), stored, seed)
        q = basis.shape[1]
        return part[q:] + torch.einsum("dq,q...->d...", basis, part[:q])

    def _sample_svd(self, target: Tensor, seed: Tensor, stream: int) -> Tensor:
        matrix = target.flatten(1).to(torch.promote_types(target.dtype, torch.float32))
        full = min(matrix.shape)
        rank = num_kept(full, self.fraction)
        if rank >= full:
            return target
        # LAPACK raises on NaN; the poison puts it back where the user looks for it.
        u, sigma, vh = torch.linalg.svd(matrix.nan_to_num(0.0, 0.0, 0.0), full_matrices=False)
        kept = draw(sigma, rank, seed, stream)
        left = u.index_select(1, kept.indices) * (sigma[kept.indices] * kept.weights)
        estimate = left @ vh.index_select(0, kept.indices) + nonfinite(target)
        return estimate.to(target.dtype).view(target.shape)

    def _basis(self, op: Bilinear, cotangent: Tensor, seed: Tensor) -> Tensor | None:
        """``(d_out, q)`` orthonormal directions, or None where there is nothing to gain from them."""
        d = cotangent.shape[1]
        rank = num_kept(d, self.fraction)
        q = (rank + 1) // 2
        if op.groups > 1 or rank >= d or cotangent.numel() == 0:
            return None
        g = cotangent.movedim(1, -1).reshape(-1, d)
        g = unit(
            g
        )  # the basis does not depend on the scale, and the square of a large entry overflows
        omega = signs(g, d, q, seed, 2)
        return torch.linalg.qr(g.T @ (g @ omega)).Q.to(cotangent.dtype)

    def _columns(self, basis: Tensor) -> Columns:
        d, q = basis.shape
        return Columns(num_kept(d, self.fraction) / (d + q))

    def work(self) -> tuple[float, float]:
        return (1.0, 1.0) if self.method == "svd" else (self.keep, self.keep)

    def input_variance(self, op: Bilinear, cotangent: Tensor, weight: Tensor) -> Tensor:
        return self._svd_variance(op.input_vjp(cotangent, weight))

    def weight_variance(self, op: Bilinear, cotangent: Tensor, x: Tensor) -> Tensor:
        x = op.rows(x)
        return self._svd_variance(op.weight_vjp(cotangent, x))

    def _svd_variance(self, target: Tensor) -> Tensor:
        if self.method == "subspace":
            raise ValueError(
                "LowRank(method='subspace') has no closed-form variance; 'svd' has one"
            )
        sigma = torch.linalg.svdvals(target.flatten(1).to(torch.float64))
        return variance.low_rank(sigma, num_kept(sigma.shape[0], self.keep))


def _turn(cotangent: Tensor, basis: Tensor) -> Tensor:
    """``[GQ, G - GQQᵀ]``, side by side along the columns."""
    coefficients = torch.einsum("nd...,dq->nq...", cotangent, basis)
    residual = cotangent - torch.einsum("nq...,dq->nd...", coefficients, basis)
    return torch.cat([coefficients, residual], 1)
