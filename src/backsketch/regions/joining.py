"""Gradients of the pieces of a tensor, put together in one pass.

A captured graph takes ``q, k, v = qkv.unbind()`` apart, so that the gradient of ``qkv`` is a sum of tensors of
its size that are zero but for one piece each. Eager PyTorch stacks the pieces; so do we.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from backsketch.regions.graphs import call
from backsketch.regions.partition import args_of

__all__ = ["join_pieces"]

aten = torch.ops.aten
_END = 2**63 - 1
_ADD = aten.add.Tensor
_SELECTED, _SLICED = aten.select_backward.default, aten.slice_backward.default


def join_pieces(graph: fx.Graph) -> None:
    """Replace sums of padded pieces that fill a tensor by a stack, or a concatenation, of the pieces."""
    for node in graph.find_nodes(op="call_function", target=_SLICED):
        if list(args_of(node)[3:]) == [0, _END, 1]:  # x[:, :8] is two slices
            node.replace_all_uses_with(args_of(node)[0])
    for root in graph.find_nodes(op="call_function", target=_ADD):
        if not _is_inner(root):
            _join(graph, root)
    graph.eliminate_dead_code()


def _is_inner(node: fx.Node) -> bool:
    """Whether a sum is a term of another sum, and nothing else reads it."""
    users = list(node.users)
    return _is_sum(node) and len(users) == 1 and _is_sum(users[0])


def _is_sum(node: Any) -> bool:
    if not isinstance(node, fx.Node) or node.target is not _ADD or node.kwargs:
        return False
    shapes = {str(n.meta["val"].shape) for n in (node, *node.all_input_nodes)}
    return len(node.all_input_nodes) == 2 and len(shapes) == 1


def _terms(node: fx.Node, root: fx.Node) -> list[fx.Node]:
    if node is root or _is_inner(node):
        return [t for n in node.all_input_nodes for t in _terms(n, root)]
    return [node]


def _join(graph: fx.Graph, root: fx.Node) -> None:
    if not _is_sum(root):
        return
    terms = _terms(root, root)
    groups: dict[Any, list[fx.Node]] = defaultdict(list)
    for term in terms:
        if term.target in (_SELECTED, _SLICED):
            groups[term.target, str(term.meta["val"].shape), args_of(term)[2]].append(term)
    filling = [(pieces, ordered) for pieces in groups.values() if (ordered := _filling(pieces))]
    if not filling:
        return
    with graph.inserting_before(root):
        for pieces, ordered in filling:
            terms = [t for t in terms if t not in pieces] + [_joined(graph, ordered)]
        total = terms[0]
        for term in terms[1:]:
            total = call(graph, _ADD, total, term, tag="is_backward")
    root.replace_all_uses_with(total)
    graph.erase_node(root)


def _filling(pieces: Sequence[fx.Node]) -> list[fx.Node] | None:
    """The pieces in order, if together they are the whole tensor."""
    size = pieces[0].meta["val"].shape[args_of(pieces[0])[2]]
    spans = [(*_span(piece, size), piece) for piece in pieces]
    if not isinstance(size, int) or any(
        not isinstance(s, int) for a, b, _ in spans for s in (a, b)
    ):
        return None
    spans.sort(key=lambda span: span[0])
    edges = [0, *(end for _, end, _ in spans)]
    fits = edges[-1] == size and all(start == edge for (start, _, _), edge in zip(spans, edges))
    return [piece for _, _, piece in spans] if fits and len(pieces) > 1 else None


def _span(piece: fx.Node, size: Any) -> tuple[Any, Any]:
    """The first entry of a piece and the one after its last, None where that is not known."""
    where = args_of(piece)[3:]
    if not all(isinstance(i, int) for i in (*where, size)):
        return None, None
    if piece.target is _SELECTED:
        start = where[0] % size
        return start, start + 1
    start, end, step = where
    if step != 1:
        return None, None
    start, end = (min(i + size if i < 0 else i, size) for i in (start, end))
    return start, end


def _joined(graph: fx.Graph, pieces: list[fx.Node]) -> fx.Node:
    first = pieces[0]
    target = aten.stack.default if first.target is _SELECTED else aten.cat.default
    inner = [args_of(p)[0] for p in pieces]
    return call(graph, target, inner, args_of(first)[2], tag="is_backward")
