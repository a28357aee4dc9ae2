"""Both backward products from 8-bit integers, rounded stochastically: nearly no variance, a third of the time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from backsketch.estimators.base import register
from backsketch.estimators.eight_bit import EightBit

__all__ = ["Int8"]


@register("int8")
@dataclass(frozen=True)
class Int8(EightBit):
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
        ValueError: ``sketch`` is not an estimator, has 8-bit operands itself, or saves memory in its own way
            beside ``save``.

    Source: a randomized VJP in the sense of arXiv 2602.14701; the derivation is in docs/estimators/int8.md.

    Example:
        >>> import backsketch as bs
        >>> str(bs.Int8(sketch=bs.Rows(keep=0.5)))
        'int8:sketch=(rows:keep=0.5)'
    """

    numbers: ClassVar[str] = "int8"
