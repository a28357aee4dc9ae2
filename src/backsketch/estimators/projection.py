"""Save a random projection of the input's rows: memory without looking at the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from backsketch.estimators.base import Estimator, check_choice, register
from backsketch.estimators.bilinear import Bilinear
from backsketch.sampling import draw, num_kept, signs
from backsketch.theory import variance

__all__ = ["Projection"]

KINDS = ("rademacher", "srht")


@register("projection")
@dataclass(frozen=True)
class Projection(Estimator):
    r"""Save :math:`S X` with S of r rows and :math:`E[S^\top S] = I`; use :math:`(S G)^\top (S X)`.

    Unbiased: :math:`E[G^\top S^\top S X] = G^\top X`, S being independent of X and G. ``grad_input`` is exact.

    - ``"rademacher"``: independent entries :math:`\pm 1/\sqrt r`. Variance
      :math:`\frac1r(\|G\|^2\|X\|^2 + \|G^\top X\|^2 - 2\sum_i\|g_i\|^2\|x_i\|^2)`.
    - ``"srht"``: random signs, Walsh-Hadamard transform (rows padded to a power of two m), r of m rows
      without replacement. The same variance times :math:`(m-r)/(m-1)`.

    Saves: the input shrinks to r rows and one seed; S is drawn again from the seed in the backward pass.
    The projection itself costs ``2 r N (d_in + d_out)`` operations (Rademacher), so it saves no time.

    Args:
        keep: the fraction r/N, in (0, 1]; r is rounded up; 1 means exact.
        kind: ``"rademacher"`` or ``"srht"``.

    Raises:
        ValueError: a field outside its range.

    Source: fewbit (Bershatsky et al. 2022); SRHT: Ailon and Chazelle 2009.
    """

    keep: float
    kind: str = "rademacher"

    needs_forward_seed: ClassVar[bool] = True
    saves_memory: ClassVar[bool] = True
    needs_pairs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "kind", self.kind, KINDS)

    def store(self, op: Bilinear, x: Tensor, seed: Tensor | None) -> tuple[Tensor, ...]:
        rows = op.rows(x)
        if seed is None or num_kept(rows.shape[0], self.fraction) >= rows.shape[0]:
            return (x,)
        return self._project(rows, seed), seed

    def estimate_weight(
        self, op: Bilinear, cotangent: Tensor, stored: tuple[Tensor, ...], seed: Tensor
    ) -> Tensor:
        if len(stored) == 1:
            return op.weight_vjp(cotangent, op.rows(stored[0]))
        projected, seed = stored
        return op.weight_vjp(self._project(cotangent, seed), projected)

    def _project(self, rows: Tensor, seed: Tensor) -> Tensor:
        flat = rows.flatten(1)
        r = num_kept(rows.shape[0], self.fraction)
        projected = (
            self._rademacher(flat, r, seed) if self.kind == "rademacher" else _srht(flat, r, seed)
        )
        return projected.unflatten(1, rows.shape[1:])

    def _rademacher(self, flat: Tensor, r: int, seed: Tensor) -> Tensor:
        return signs(flat, r, flat.shape[0], seed) @ flat * r**-0.5

    def work(self) -> tuple[float, float]:
        return 1.0, self.keep

    def saved(self) -> float:
        return self.keep

    def weight_variance(self, op: Bilinear, cotangent: Tensor, x: Tensor) -> Tensor:
        x = op.rows(x)
        n = x.shape[0]
        r = num_kept(n, self.keep)
        if r >= n:
            return torch.zeros((), dtype=torch.float64)
        pairs = op.pair_energy(cotangent, x)
        if self.kind == "srht":
            return variance.srht(r, _padded(n), pairs)
        return variance.rademacher(r, pairs)


def _padded(n: int) -> int:
    """The next power of two; by comparisons, so that a compiler gets a number from a symbol."""
    m = 1
    while m < n:
        m *= 2
    return m


def _srht(flat: Tensor, r: int, seed: Tensor) -> Tensor:
    n, m = flat.shape[0], _padded(flat.shape[0])
    wide = flat.to(torch.promote_types(flat.dtype, torch.float32))
    signed = torch.nn.functional.pad(wide * signs(wide, n, 1, seed), (0, 0, 0, m - n))
    kept = draw(wide.new_ones(m), r, seed, 1, "permuted").indices
    return (_hadamard(signed).index_select(0, kept) * r**-0.5).to(flat.dtype)


def _hadamard(x: Tensor) -> Tensor:
    """Walsh-Hadamard transform along dimension 0 (a power of two), entries of the matrix being ±1."""
    m, half = x.shape[0], 1
    while half < m:
        pairs = x.view(m // (2 * half), 2, half, -1)
        a, b = pairs[:, 0], pairs[:, 1]
        x = torch.stack([a + b, a - b], 1).view(m, -1)
        half *= 2
    return x
