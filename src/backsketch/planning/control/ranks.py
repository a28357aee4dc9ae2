"""Sums over the processes of a distributed training, and what each of them has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["gathered", "own", "summed"]


def summed(numbers: Sequence[float], device: torch.device) -> tuple[int, list[float]]:
    """How many ranks there are, and each number summed over them; the same bits on all."""
    if not _are_several():
        return 1, list(numbers)
    total = torch.tensor(numbers, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(total)
    return torch.distributed.get_world_size(), total.tolist()


def gathered(value: Any) -> list[Any]:
    """The values of all ranks, plain data, in their order."""
    if not _are_several():
        return [value]
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def own(values: Sequence[Any]) -> Any:
    """Of what :func:`gathered` returned, the value of this rank; None where the ranks were more or fewer."""
    if not _are_several():
        return values[0] if len(values) == 1 else None
    is_same = len(values) == torch.distributed.get_world_size()
    return values[torch.distributed.get_rank()] if is_same else None


def _are_several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
