"""What autocast would do to the arguments of the exact layer, done before the Function sees them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["cast_for_autocast"]


def cast_for_autocast(
    x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast the arguments as autocast casts those of ``F.linear``; the casts are differentiable."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return _cast(x, dtype), _cast(weight, dtype), None if bias is None else _cast(bias, dtype)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # Autocast leaves float64 and integers alone.
    eligible = tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(dtype) if eligible else tensor
