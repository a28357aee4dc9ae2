"""Both backward products from 8-bit operands, rounded stochastically, whatever the numbers are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from backsketch import products
from backsketch.estimators.base import Estimator, Gradients
from backsketch.estimators.bilinear import Bilinear
from backsketch.products import Packed, Products
from backsketch.products.variance import Variances
from backsketch.rounding import Rounding

__all__ = ["EightBit"]

_COST = 0.25  # of an 8-bit product in units of a float32 one: four bytes in the place of one number


@dataclass(frozen=True)
class EightBit(Estimator):
    """What estimators of 8-bit operands share; a member of the family names its numbers.

    Args:
        sketch: another estimator whose products are computed in 8 bits, or None.
        save: whether the forward pass keeps the 8-bit codes instead of the input.

    Raises:
        ValueError: ``sketch`` is not an estimator, has 8-bit operands itself, or saves memory in its own way
            beside ``save``.
    """

    sketch: Estimator | None = None
    save: bool = False

    numbers: ClassVar[str]
    """What the operands are rounded to, as :mod:`backsketch.products` names it."""

    def __post_init__(self) -> None:
        if not isinstance(self.save, bool):
            raise ValueError(
                f"{type(self).__name__}: save must be True or False; got {self.save!r}"
            )
        if self.sketch is None:
            return
        if not isinstance(self.sketch, Estimator) or isinstance(self.sketch, EightBit):
            raise ValueError(
                f"{type(self).__name__}: sketch must be another estimator such as bs.Rows(keep=0.5), or None; "
                f"got {self.sketch!r}"
            )
        if self.save and self.sketch.saves_memory:
            raise ValueError(
                f"{type(self).__name__}: {self.sketch} keeps the input in a way of its own; leave out save=True"
            )

    @property
    def needs_forward_seed(self) -> bool:  # type: ignore[override]
        return self.save or (self.sketch is not None and self.sketch.needs_forward_seed)

    @property
    def saves_memory(self) -> bool:  # type: ignore[override]
        return self.save or (self.sketch is not None and self.sketch.saves_memory)

    def movable_keep(self) -> float | None:
        return None if self.sketch is None else self.sketch.movable_keep()

    def with_keep(self, keep: float) -> EightBit:
        return self if self.sketch is None else replace(self, sketch=self.sketch.with_keep(keep))

    def chooses(self) -> Literal["rows", "columns", "stored rows"] | None:
        return None if self.sketch is None else self.sketch.chooses()

    def is_exact(self) -> bool:
        return False

    def rounding(self) -> Rounding | None:
        if self.save:
            return Rounding(8, 64)
        return None if self.sketch is None else self.sketch.rounding()

    @property
    def needs_rows(self) -> bool:  # type: ignore[override]
        return self.sketch is not None and self.sketch.needs_rows

    def store(self, op: Bilinear, x: Tensor, seed: Tensor | None) -> tuple[Tensor, ...]:
        if self.save and seed is not None:
            return op.pack(x, seed, self.numbers)
        return (x,) if self.sketch is None else self.sketch.store(op, x, seed)

    def vjps(
        self,
        op: Bilinear,
        cotangent: Tensor,
        weight: Tensor,
        stored: tuple[Tensor, ...],
        seed: Tensor,
        needed: tuple[bool, bool, bool],
    ) -> Gradients:
        rounded = op.with_products(Products(seed, self.numbers, self.save))
        assert rounded is not None  # refused before
        packed = Packed(*stored) if self.save and needed[1] else None
        if self.sketch is None:
            x = packed or op.rows(stored[0]) if needed[1] else None
            return _both(rounded, cotangent, weight, x, needed)
        if packed is not None:
            stored = (op.unpack(packed, cotangent, self.numbers),)
        return self.sketch.vjps(rounded, cotangent, weight, stored, seed, needed)

    def estimate_input(
        self, op: Bilinear, cotangent: Tensor, weight: Tensor, seed: Tensor
    ) -> Tensor:
        below = self.vjps(op, cotangent, weight, (), seed, (True, False, False))[0]
        assert below is not None
        return below

    def estimate_weight(
        self, op: Bilinear, cotangent: Tensor, stored: tuple[Tensor, ...], seed: Tensor
    ) -> Tensor:
        nothing = cotangent.new_empty(0, 0)
        at_weight = self.vjps(op, cotangent, nothing, stored, seed, (False, True, False))[1]
        assert at_weight is not None
        return at_weight

    def work(self) -> tuple[float, float]:
        inner = (1.0, 1.0) if self.sketch is None else self.sketch.work()
        return _COST * inner[0], _COST * inner[1]

    def saved(self) -> float:
        if self.save:
            return 0.25 + 2 / 256
        return 1.0 if self.sketch is None else self.sketch.saved()

    def refusal(self, op: Bilinear, weight: Tensor) -> str | None:
        if op.with_products(Products(torch.zeros((), dtype=torch.int64), self.numbers)) is None:
            return "its products have no 8-bit form"
        return None if self.sketch is None else self.sketch.refusal(op, weight)

    def advice(self, op: Bilinear, weight: Tensor) -> str:
        slow = products.why_slow(weight.device, self.numbers)
        if slow:
            return f"expect no gain in time: {slow}"
        draws_rows = self.chooses() == "rows" and not self.saves_memory
        if draws_rows and op.gathers_rows and weight.device.type == "cpu":
            return f"{self.name} alone is faster: gathers of rows cost more than the products they save"
        return op.slow_products(weight.device)

    def input_variance(self, op: Bilinear, cotangent: Tensor, weight: Tensor) -> Tensor:
        return self._variances(op).input_vjp(cotangent, weight).sum()

    def weight_variance(self, op: Bilinear, cotangent: Tensor, x: Tensor) -> Tensor:
        return self._variances(op).weight_vjp(cotangent, op.rows(x)).sum()

    def _variances(self, op: Bilinear) -> Bilinear:
        if self.sketch is not None:
            raise ValueError(f"the variance of {self} has no closed form here: measure it")
        variances = op.with_products(Variances(self.save, self.numbers))
        assert variances is not None  # refused before
        return variances


def _both(
    op: Bilinear,
    cotangent: Tensor,
    weight: Tensor,
    x: Any,
    needed: tuple[bool, bool, bool],
) -> Gradients:
    """What is needed of the two products, in one call where both are: they share a rounding of G."""
    if needed[0] and needed[1]:
        return op.vjps(cotangent, x, weight, needed[2])
    return (
        op.input_vjp(cotangent, weight) if needed[0] else None,
        op.weight_vjp(cotangent, x) if needed[1] else None,
        op.bias_vjp(cotangent) if needed[2] else None,
    )
