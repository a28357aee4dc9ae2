"""One estimator for each of the two products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from backsketch.estimators.base import Estimator, register
from backsketch.estimators.bilinear import Bilinear
from backsketch.estimators.exact import Exact
from backsketch.rounding import Rounding

__all__ = ["Split"]


@register("split")
@dataclass(frozen=True)
class Split(Estimator):
    r"""``grad_input`` by one estimator and ``grad_weight`` by another; None means exact.

    Unbiased because each part is. Sketching ``grad_weight`` alone leaves the cotangents of all layers
    below exact, so that errors do not compound along a chain: the mildest of all sketches.

    Args:
        grad_input: estimator of the gradient of the input, or None.
        grad_weight: estimator of the gradient of the weight, or None.

    Raises:
        ValueError: neither an estimator nor None; or a memory saver as ``grad_input``, whose input
            gradient is exact anyway.

    Example:
        >>> import backsketch as bs
        >>> str(bs.Split(grad_weight=bs.Rows(keep=0.5)))
        'split:grad_weight=(rows:keep=0.5)'
    """

    grad_input: Estimator | None = None
    grad_weight: Estimator | None = None

    def __post_init__(self) -> None:
        for field in ("grad_input", "grad_weight"):
            part = getattr(self, field)
            if part is not None and not isinstance(part, Estimator):
                raise ValueError(f"Split: {field} must be an estimator or None; got {part!r}")
        if self.grad_input is not None and self.grad_input.saves_memory:
            raise ValueError(
                f"Split: {type(self.grad_input).__name__} leaves grad_input exact, so it belongs "
                "under grad_weight"
            )

    @property
    def _input(self) -> Estimator:
        return Exact() if self.grad_input is None else self.grad_input

    @property
    def _weight(self) -> Estimator:
        return Exact() if self.grad_weight is None else self.grad_weight

    def movable_keep(self) -> float | None:
        keeps = [part.movable_keep() for part in (self._input, self._weight)]
        return next((keep for keep in keeps if keep is not None), None)

    def with_keep(self, keep: float) -> Split:
        parts = (self.grad_input, self.grad_weight)
        return Split(*(part and part.with_keep(keep) for part in parts))

    def chooses(self) -> Literal["rows", "columns", "stored rows"] | None:
        return self._weight.chooses() or self._input.chooses()

    def is_exact(self) -> bool:
        return self._input.is_exact() and self._weight.is_exact()

    @property
    def needs_forward_seed(self) -> bool:  # type: ignore[override]
        return self._weight.needs_forward_seed

    @property
    def saves_memory(self) -> bool:  # type: ignore[override]
        return self._weight.saves_memory

    @property
    def needs_pairs(self) -> bool:  # type: ignore[override]
        return self._input.needs_pairs or self._weight.needs_pairs

    @property
    def needs_rows(self) -> bool:  # type: ignore[override]
        return self._input.needs_rows or self._weight.needs_rows

    def store(self, op: Bilinear, x: Tensor, seed: Tensor | None) -> tuple[Tensor, ...]:
        return self._weight.store(op, x, seed)

    def rounding(self) -> Rounding | None:
        return self._weight.rounding()

    def estimate_input(
        self, op: Bilinear, cotangent: Tensor, weight: Tensor, seed: Tensor
    ) -> Tensor:
        return self._input.estimate_input(op, cotangent, weight, seed)

    def estimate_weight(
        self, op: Bilinear, cotangent: Tensor, stored: tuple[Tensor, ...], seed: Tensor
    ) -> Tensor:
        return self._weight.estimate_weight(op, cotangent, stored, seed)

    def dequantized_input(
        self, op: Bilinear, cotangent: Tensor, stored: tuple[Tensor, ...]
    ) -> Tensor | None:
        return (
            self._weight.dequantized_input(op, cotangent, stored)
            if self._input.is_exact()
            else None
        )

    def work(self) -> tuple[float, float]:
        return self._input.work()[0], self._weight.work()[1]

    def saved(self) -> float:
        return self._weight.saved()

    def refusal(self, op: Bilinear, weight: Tensor) -> str | None:
        return self._input.refusal(op, weight) or self._weight.refusal(op, weight)

    def advice(self, op: Bilinear, weight: Tensor) -> str:
        return self._input.advice(op, weight) or self._weight.advice(op, weight)

    def input_variance(self, op: Bilinear, cotangent: Tensor, weight: Tensor) -> Tensor:
        return self._input.input_variance(op, cotangent, weight)

    def weight_variance(self, op: Bilinear, cotangent: Tensor, x: Tensor) -> Tensor:
        return self._weight.weight_variance(op, cotangent, x)
