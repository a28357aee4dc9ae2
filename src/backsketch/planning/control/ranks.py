"""What each process of a distributed training has, for all of them, and sums of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch

__all__ = ["added", "gathered", "of_first", "own"]

T = TypeVar("T")


def gathered(value: T) -> list[T]:
    """The values of all ranks, plain data, in their order; the same on all."""
    if not _are_several():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def of_first(value: T) -> T:
    """The value of the first rank, on all of them; every rank calls this."""
    return gathered(value)[0]


def own(values: Sequence[Any]) -> Any:
    """Of what :func:`gathered` returned, the value of this rank; None where the ranks were more or fewer."""
    if not _are_several():
        return values[0] if len(values) == 1 else None
    is_same = len(values) == torch.distributed.get_world_size()
    return values[torch.distributed.get_rank()] if is_same else None


def added(parts: Iterable[Mapping[int, Any]]) -> dict[int, Any]:
    """The values of several mappings, those of one key summed."""
    total: dict[int, Any] = {}
    for part in parts:
        total |= {key: total[key] + x if key in total else x for key, x in part.items()}
    return total


def _are_several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
