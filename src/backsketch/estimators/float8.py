"""Both backward products from 8-bit floats, rounded stochastically, for GPUs that multiply them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from backsketch.estimators.base import register
from backsketch.estimators.eight_bit import EightBit

__all__ = ["Float8"]


@register("float8")
@dataclass(frozen=True)
class Float8(EightBit):
    r"""Compute both products from operands rounded stochastically to 8-bit floats; the forward pass is exact.

    .. math:: \tilde x = \Delta \lfloor x/\Delta + u \rfloor, \quad u \sim U[0,1), \quad
              \Delta = s\, 2^{\max(\lfloor \log_2 |x/s| \rfloor,\, -6) - 3}

    in the format e4m3, with a scale s for each row of G and each column of W and X: the power of two that brings
    the largest entry of the group into (224, 448], the upper end of the format.

    Unbiased: :math:`E\tilde x = x` between any two neighbours of the format, subnormal ones included; nothing is
    beyond its end. The roundings of the two operands of a product are independent. A sketch inside draws its rows
    with other random numbers, as in :class:`Int8`.

    Variance: that of :class:`Int8`, with a :math:`\Delta` that differs from entry to entry:
    :math:`V = \Delta^2 f(1-f) \le x^2/256` above the subnormal numbers, whatever else is in the group. That is
    less than the variance of :class:`Int8` where the largest entry of a group is beyond some 12 times its rms, and
    more elsewhere.

    Saves: arithmetic, where the device multiplies 8-bit floats (NVIDIA GPUs of compute capability 8.9 and later,
    by ``torch._scaled_mm``). Elsewhere the rounded operands are multiplied as float32: right, and slower than
    exact (:func:`backsketch.products.why_slow`). With ``save`` the input is kept as its codes, a quarter of its
    bytes, and activations and norms as ``Quantized(bits=8)`` does.

    Args:
        sketch: another estimator whose products are computed in 8 bits, or None.
        save: whether the forward pass keeps the 8-bit codes instead of the input.

    Raises:
        ValueError: ``sketch`` is not an estimator, has 8-bit operands itself, or saves memory in its own way
            beside ``save``.

    Source: the format is that of Micikevicius et al. 2022 (arXiv 2209.05433); the derivation is in
    docs/estimators/float8.md.

    Example:
        >>> import backsketch as bs
        >>> str(bs.Float8(save=True))
        'float8:save=true'
    """

    numbers: ClassVar[str] = "float8"
