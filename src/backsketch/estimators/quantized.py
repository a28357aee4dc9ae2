"""Save the input in a few bits per entry, rounded stochastically: the memory saver of least variance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from backsketch.estimators.base import Estimator, check_choice, register
from backsketch.estimators.bilinear import Bilinear
from backsketch.sampling import uniform_like
from backsketch.theory import variance

__all__ = ["Quantized"]


@register("quantized")
@dataclass(frozen=True)
class Quantized(Estimator):
    r"""Save the input at ``bits`` per entry, with stochastic rounding per group.

    In each group of consecutive entries, with minimum a and step :math:`\Delta = (\max - \min)/(2^b-1)`,

    .. math:: \tilde x = a + \Delta \lfloor (x-a)/\Delta + u \rfloor, \qquad u \sim U[0,1)

    Unbiased: :math:`E\lfloor t+u \rfloor = t`, and ``grad_weight`` is linear in X. ``grad_input`` is exact.

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

    stores_randomly: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_choice(self, "bits", self.bits, (1, 2, 4, 8))
        if not isinstance(self.bits, int) or isinstance(self.bits, bool):
            raise ValueError(f"Quantized: bits must be 1, 2, 4 or 8; got {self.bits!r}")
        size = self.group_size
        if isinstance(size, bool) or not isinstance(size, int) or size < 8 or size % 8:
            raise ValueError(
                f"Quantized: group_size must be a positive multiple of 8; got {size!r}"
            )

    def store(self, op: Bilinear, x: Tensor, seed: Tensor | None) -> tuple[Tensor, ...]:
        if seed is None or x.numel() == 0:
            return (x,)
        lowest, step, scaled = self._levels(x)
        top = 2**self.bits - 1
        codes = (scaled + uniform_like(scaled, seed)).floor().clamp(0, top).to(torch.uint8)
        # The empty tensor carries shape and dtype: everything that is saved is a tensor.
        return (
            self._pack(codes),
            lowest,
            step,
            x.new_empty((0, *x.shape[1:])),
            x.new_empty(x.shape[0], 0),
        )

    def estimate_weight(
        self, op: Bilinear, cotangent: Tensor, stored: tuple[Tensor, ...], seed: Tensor
    ) -> Tensor:
        if len(stored) == 1:
            return op.weight_vjp(cotangent, op.rows(stored[0]))
        packed, lowest, step, tail, head = stored
        flat = (lowest + step * self._unpack(packed)).flatten()
        shape = (head.shape[0], *tail.shape[1:])
        x = flat[: math.prod(shape)].view(shape).to(tail.dtype)
        return op.weight_vjp(cotangent, op.rows(x))

    def _levels(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Minimum and step of each group, ``(groups, 1)``, and the entries in units of the step."""
        flat = x.detach().flatten().to(torch.promote_types(x.dtype, torch.float32))
        short = -flat.shape[0] % self.group_size
        if short:
            flat = torch.cat([flat, flat[-1:].expand(short)])
        groups = flat.view(-1, self.group_size)
        lowest, highest = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
        step = (highest - lowest) / (2**self.bits - 1)
        return lowest, step, (groups - lowest) / torch.where(step > 0, step, 1.0)

    def _pack(self, codes: Tensor) -> Tensor:
        per_byte = 8 // self.bits
        parts = codes.view(codes.shape[0], per_byte, -1)
        packed = parts[:, 0]
        for i in range(1, per_byte):
            packed = packed | (parts[:, i] << (i * self.bits))
        return packed.contiguous()

    def _unpack(self, packed: Tensor) -> Tensor:
        mask = 2**self.bits - 1
        parts = [(packed >> (i * self.bits)) & mask for i in range(8 // self.bits)]
        return torch.cat(parts, 1)

    def saved(self) -> float:
        return self.bits / 32 + 2 / self.group_size

    def weight_variance(self, op: Bilinear, cotangent: Tensor, x: Tensor) -> Tensor:
        _, step, scaled = self._levels(x)
        spread = variance.quantized(step, scaled - scaled.floor()).flatten()
        per_entry = op.rows(spread[: x.numel()].view(x.shape))
        return op.weight_vjp(cotangent.double().square(), per_entry).sum()
