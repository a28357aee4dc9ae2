"""Both backward products from 8-bit operands, rounded stochastically, whatever the numbers are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from backsketch import products
from backsketch.estimators.base import Estimator, Gradients
from backsketch.estimators.bilinear import Bilinear
from backsketch.estimators.quantized import Quantized
from backsketch.products import Products
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

    def store(self, op: Bilinear, x: Tensor, seed: Tensor | None) -> tuple[Tensor, ...]:
        if self.save and op.is_matrix and seed is not None and x.numel():
            return products.pack(op.rows(x), seed, numbers=self.numbers)
        inner = self._inner()
        return (x,) if inner is None else inner.store(op, x, seed)

    def _inner(self) -> Estimator | None:
        """The sketch inside; where codes of the input cannot be those of the product, its saver."""
        return Quantized(bits=8) if self.save and self.sketch is None else self.sketch

    def vjps(
        self,
        op: Bilinear,
        cotangent: Tensor,
        weight: Tensor,
        stored: tuple[Tensor, ...],
        seed: Tensor,
        needed: tuple[bool, bool, bool],
    ) -> Gradients:
        packed = (stored[0], stored[1]) if self.save and len(stored) == 2 else None
        if packed is not None and self.sketch is None:
            flat = weight.flatten(1) if needed[0] else None
            return Products(seed, self.numbers).vjps(
                cotangent, None, flat, packed=packed, with_bias=needed[2]
            )
        rounded = op.with_products(Products(seed, self.numbers))
        assert rounded is not None  # refused before
        if packed is not None:
            stored = (products.unpack(packed, cotangent.shape[0], self.numbers),)
        inner = self._inner() or _Joint()
        return inner.vjps(rounded, cotangent, weight, stored, seed, needed)

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
        # Measured: a BagNet's step takes 2.5 of exact with its 3x3 kernels sketched, 1.1 without.
        return "" if op.is_matrix else "slower than exact: larger kernels are unfolded; use None"

    def input_variance(self, op: Bilinear, cotangent: Tensor, weight: Tensor) -> Tensor:
        return self._variances(op).input_vjp(cotangent, weight).sum()

    def weight_variance(self, op: Bilinear, cotangent: Tensor, x: Tensor) -> Tensor:
        return self._variances(op).weight_vjp(cotangent, op.rows(x)).sum()

    def _variances(self, op: Bilinear) -> Bilinear:
        if self.sketch is not None or (self.save and not op.is_matrix):
            raise ValueError(f"the variance of {self} has no closed form here: measure it")
        variances = op.with_products(Variances(self.save, self.numbers))
        assert variances is not None  # refused before
        return variances


class _Joint(Estimator):
    """Nothing but both products, in one call where both are wanted: they share the rounding of G."""

    def dequantized_input(
        self, op: Bilinear, cotangent: Tensor, stored: tuple[Tensor, ...]
    ) -> Tensor | None:
        return op.rows(stored[0])
