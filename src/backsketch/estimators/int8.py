"""Both backward products from 8-bit operands, rounded stochastically: nearly no variance, a third of the time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from backsketch import products
from backsketch.estimators.base import Estimator, Gradients, register
from backsketch.estimators.bilinear import Bilinear
from backsketch.estimators.quantized import Quantized
from backsketch.products import Products
from backsketch.products.variance import Variances
from backsketch.rounding import Rounding

__all__ = ["Int8"]

_COST = 0.25  # of an 8-bit product in units of a float32 one: four bytes in the place of one number


@register("int8")
@dataclass(frozen=True)
class Int8(Estimator):
    r"""Compute both products from operands that are stochastically rounded to 8 bits; the forward pass is exact.

    .. math:: \tilde x = \Delta \lfloor x/\Delta + u \rfloor, \quad u \sim U[0,1), \quad \Delta = \max|x|/127

    with one :math:`\Delta` for each row of G and each column of W in ``grad_input``, and for each column of a
    block of 256 rows in ``grad_weight``.

    Unbiased: :math:`E\tilde x = x`; the roundings of the two operands of a product are independent, so that
    :math:`E[\tilde G \tilde W] = G W`; integer products are exact. A sketch inside draws its rows or columns with
    other random numbers, and each of its products is unbiased given the draw, so that the composition is unbiased.

    Variance: with :math:`V = \Delta^2 f(1-f)`, f the fractional part of :math:`x/\Delta`, entry by entry

    .. math:: E\|err\|^2 = \sum V_G W^2 + G^2 V_W + V_G V_W \quad \text{(through the product)}

    and the same for ``grad_weight``: some :math:`10^{-4}` to :math:`10^{-3}` of the squared gradient.

    Saves: arithmetic. An 8-bit product counts as a quarter of a float32 one in reports; what that is in time
    depends on the processor (:func:`backsketch.products.why_slow`). With ``save`` the input is kept as the codes
    that the product will read, a quarter of its bytes, and activations and norms as ``Quantized(bits=8)`` does.

    Args:
        sketch: another estimator whose products are computed in 8 bits, or None.
        save: whether the forward pass keeps the 8-bit codes instead of the input.

    Raises:
        ValueError: ``sketch`` is not an estimator, is an :class:`Int8` itself, or saves memory in its own way
            beside ``save``.

    Source: a randomized VJP in the sense of arXiv 2602.14701; the derivation is in docs/estimators/int8.md.

    Example:
        >>> import backsketch as bs
        >>> str(bs.Int8(sketch=bs.Rows(keep=0.5)))
        'int8:sketch=(rows:keep=0.5)'
    """

    sketch: Estimator | None = None
    save: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.save, bool):
            raise ValueError(f"Int8: save must be True or False; got {self.save!r}")
        if self.sketch is None:
            return
        if not isinstance(self.sketch, Estimator) or isinstance(self.sketch, Int8):
            raise ValueError(
                f"Int8: sketch must be another estimator such as bs.Rows(keep=0.5), or None; got {self.sketch!r}"
            )
        if self.save and self.sketch.saves_memory:
            raise ValueError(
                f"Int8: {self.sketch} keeps the input in a way of its own; leave out save=True"
            )

    @property
    def needs_forward_seed(self) -> bool:  # type: ignore[override]
        return self.save or (self.sketch is not None and self.sketch.needs_forward_seed)

    @property
    def saves_memory(self) -> bool:  # type: ignore[override]
        return self.save or (self.sketch is not None and self.sketch.saves_memory)

    def movable_keep(self) -> float | None:
        return None if self.sketch is None else self.sketch.movable_keep()

    def with_keep(self, keep: float) -> Int8:
        return self if self.sketch is None else Int8(self.sketch.with_keep(keep), self.save)

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
            return products.pack(op.rows(x), seed)
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
            return Products(seed).vjps(cotangent, None, flat, packed=packed, with_bias=needed[2])
        rounded = op.with_products(Products(seed))
        assert rounded is not None  # refused before
        if packed is not None:
            stored = (products.unpack(packed, cotangent.shape[0]),)
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
        if op.with_products(Products(torch.zeros((), dtype=torch.int64))) is None:
            return "its products have no 8-bit form"
        return None if self.sketch is None else self.sketch.refusal(op, weight)

    def advice(self, op: Bilinear, weight: Tensor) -> str:
        slow = products.why_slow(weight.device)
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
        variances = op.with_products(Variances(self.save))
        assert variances is not None  # refused before
        return variances


class _Joint(Estimator):
    """Nothing but both products, in one call where both are wanted: they share the rounding of G."""

    def dequantized_input(
        self, op: Bilinear, cotangent: Tensor, stored: tuple[Tensor, ...]
    ) -> Tensor | None:
        return op.rows(stored[0])
