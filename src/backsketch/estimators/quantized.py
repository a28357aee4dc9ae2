"""Save the input in a few bits per entry, rounded stochastically: the memory saver of least variance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from backsketch.estimators.base import Estimator, check_choice, register
from backsketch.estimators.bilinear import Bilinear
from backsketch.rounding import Rounding, units
from backsketch.theory import variance

__all__ = ["Quantized"]


@register("quantized")
@dataclass(frozen=True)
class Quantized(Estimator):
    r"""Save the input at ``bits`` per entry, with stochastic rounding per group.

    In each group of consecutive entries, with minimum a and step :math:`\Delta = (\max - \min)/(2^b-1)`,

    .. math:: \tilde x = a + \Delta \lfloor (x-a)/\Delta + u \rfloor, \qquad u \sim U[0,1)

    Unbiased: :math:`E\lfloor t+u \rfloor = t`, and ``grad_weight`` is linear in X. ``grad_input`` is exact.
    (The random numbers have 16 bits: the bias of an entry is at most :math:`2^{-17}\Delta`.)

    Beyond the inputs of linear layers it saves the same way, still without bias, what element-wise
    activations, norms and dot-product attention keep: see :mod:`backsketch.ops`.

    Variance: :math:`\sum_{ij} \|g_i\|^2 \Delta_{ij}^2 f_{ij}(1-f_{ij}) \le \sum_{ij} \|g_i\|^2 \Delta_{ij}^2/4`
    with f the fractional part of :math:`(x-a)/\Delta`; for convolutions the same with the product
    applied to squared tensors.

    Saves: ``bits`` per entry packed into bytes, and 8 bytes per group (float32 minimum and step).

    Args:
        bits: 1, 2, 4 or 8.
        group_size: entries per group, a multiple of 8; groups run along the last dimension.

    Raises:
        ValueError: a field outside its range.

    Source: ActNN (Chen et al. 2021).
    """

    bits: int
    group_size: int = 64

    needs_forward_seed: ClassVar[bool] = True
    saves_memory: ClassVar[bool] = True
    needs_rows: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_choice(self, "bits", self.bits, (1, 2, 4, 8))
        if not isinstance(self.bits, int) or isinstance(self.bits, bool):
            raise ValueError(f"Quantized: bits must be 1, 2, 4 or 8; got {self.bits!r}")
        size = self.group_size
        if isinstance(size, bool) or not isinstance(size, int) or size < 8 or size % 8:
            raise ValueError(
                f"Quantized: group_size must be a positive multiple of 8; got {size!r}"
            )

    def rounding(self) -> Rounding:
        return Rounding(self.bits, self.group_size)

    def store(self, op: Bilinear, x: Tensor, seed: Tensor | None) -> tuple[Tensor, ...]:
        if seed is None or x.numel() == 0:
            return (x,)
        # The empty tensors carry shape and dtype: everything that is saved is a tensor.
        shape = x.new_empty((0, *x.shape[1:])), x.new_empty(x.shape[0], 0)
        return *self.rounding().pack(x, seed), *shape

    def dequantized_input(
        self, op: Bilinear, cotangent: Tensor, stored: tuple[Tensor, ...]
    ) -> Tensor:
        if len(stored) == 1:
            return op.rows(stored[0])
        codes, scales, tail, head = stored
        shape = (head.shape[0], *tail.shape[1:])
        x = self.rounding().restore((codes, scales), shape, cotangent)
        return op.rows(x.to(tail.dtype))

    def estimate_weight(
        self, op: Bilinear, cotangent: Tensor, stored: tuple[Tensor, ...], seed: Tensor
    ) -> Tensor:
        return op.weight_vjp(cotangent, self.dequantized_input(op, cotangent, stored))

    def saved(self) -> float:
        return self.rounding().share()

    def weight_variance(self, op: Bilinear, cotangent: Tensor, x: Tensor) -> Tensor:
        step, levels = units(x, self.rounding())
        rounding = variance.quantized(step, levels - levels.floor())
        per_entry = op.rows(rounding.view(x.shape))
        return op.weight_vjp(cotangent.double().square(), per_entry).sum()
