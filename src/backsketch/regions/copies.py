"""Copies that eager PyTorch does not make, or that one operator makes for two, taken out of a captured graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.multiprocessing.reductions import StorageWeakRef

from backsketch.regions.graphs import call
from backsketch.regions.partition import args_of

__all__ = ["drop_copies"]

aten = torch.ops.aten
_CLONE, _STACK, _PERMUTE = aten.clone.default, aten.stack.default, aten.permute.default


def drop_copies(graph: fx.Graph) -> None:
    """Take out of a joint graph what dropout with probability zero copies, and copies of permuted stacks."""
    (end,) = graph.find_nodes(op="output")
    given = {_storage(n) for n in (*end.all_input_nodes, *graph.find_nodes(op="placeholder"))}
    for node in graph.find_nodes(op="call_function", target=_CLONE):
        if node.kwargs:
            _stack_permuted(graph, node)
        elif _is_spare(node, given):
            node.replace_all_uses_with(args_of(node)[0])
    graph.eliminate_dead_code()


def _is_spare(clone: fx.Node, given: set[Any]) -> bool:
    """Whether readers of a copy may read its source: no argument, no output, and laid out alike."""
    (source,) = args_of(clone)
    if {_storage(clone), _storage(source)} & given:
        return False
    return str(clone.meta["val"].stride()) == str(source.meta["val"].stride())


def _stack_permuted(graph: fx.Graph, clone: fx.Node) -> None:
    """``stack(pieces).permute(dims)``, made contiguous, is a stack of permuted pieces along another dimension."""
    (permuted,) = args_of(clone)
    if clone.kwargs != {"memory_format": torch.contiguous_format} or not _is(permuted, _PERMUTE):
        return
    stack, dims = args_of(permuted)
    if not _is(stack, _STACK) or len(permuted.users) > 1 or len(stack.users) > 1:
        return
    pieces, along = (*args_of(stack), 0)[:2]
    along, dims = along % len(dims), [d % len(dims) for d in dims]
    order = [d - (d > along) for d in dims if d != along]
    tag = clone.meta.get("partitioner_tag")
    with graph.inserting_before(clone):
        turned = [call(graph, _PERMUTE, piece, order, tag=tag) for piece in pieces]
        clone.replace_all_uses_with(call(graph, _STACK, turned, dims.index(along), tag=tag))


def _is(node: Any, target: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is target


def _storage(node: Any) -> Any:
    value = node.meta.get("val")
    dense = isinstance(value, Tensor) and value.layout is torch.strided
    return StorageWeakRef(value.untyped_storage()) if dense else None
