"""Sums over the processes of a distributed training."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["summed"]


def summed(numbers: Sequence[float], device: torch.device) -> tuple[int, list[float]]:
    """How many ranks there are, and each number summed over them; the same bits on all."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 1, list(numbers)
    total = torch.tensor(numbers, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(total)
    return torch.distributed.get_world_size(), total.tolist()
