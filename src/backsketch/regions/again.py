"""What of a forward pass runs again in the backward pass, so that it need not be kept.

Fused attention reads its queries, keys, values and outputs as they are, and that cannot be rounded: the
gradient of a softmax is not a polynomial. It runs again instead, with the linear layers and the norm in front of
it, so that what is kept of an attention block is the input of its norm.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable

from torch import fx

from backsketch.regions.partition import PIECES, VIEWS, Repeat, args_of, name_of
from backsketch.regions.structure import is_random

__all__ = ["run_attention_again"]

_ARRANGING = VIEWS | PIECES | {"clone", "cat", "_to_copy", "constant_pad_nd"}
_ENTRYWISE = frozenset({"mul", "sub", "neg", "rsqrt", "pow", "mean"})
_NORMS = frozenset({"native_layer_norm", "_fused_rms_norm"})
_LINEAR = frozenset({"addmm", "mm"})


def run_attention_again(graph: fx.Graph) -> set[fx.Node]:
    """Let the backward part of a joint graph run fused attention again, and read views of what is kept.

    Returns:
        The nodes that were copied into the backward part.
    """
    again = _of_attention(graph)
    repeat = Repeat(graph, lambda node: node in again or name_of(node) in VIEWS)
    repeat.run()
    return {copy for node, copy in repeat.copies.items() if copy is not node}


def _of_attention(graph: fx.Graph) -> set[fx.Node]:
    """Attention without dropout, what arranges its result, and what makes its arguments."""
    found: set[fx.Node] = set()
    for node in filter(_is_attention, graph.nodes):
        arguments = _reached(node.all_input_nodes, _inputs_of, _is_cheap)
        found |= {node} | arguments | _reached(node.users, lambda n: list(n.users), _arranges)
        for linear in arguments:
            if name_of(linear) in _LINEAR:
                found |= _norms_in_front(linear)
    return found


def _is_attention(node: fx.Node) -> bool:
    name = name_of(node)
    fused = "scaled_dot_product" in name and "backward" not in name
    return fused and not is_random(node) and _is_forward(node)


def _is_forward(node: fx.Node) -> bool:
    return node.op == "call_function" and node.meta.get("partitioner_tag") != "is_backward"


def _reached(
    start: Iterable[fx.Node],
    more: Callable[[fx.Node], Iterable[fx.Node]],
    accepts: Callable[[fx.Node], bool],
) -> set[fx.Node]:
    """The accepted nodes of the forward pass that can be reached from ``start`` through accepted ones."""
    found: set[fx.Node] = set()
    waiting = list(start)
    while waiting:
        node = waiting.pop()
        if node not in found and _is_forward(node) and accepts(node):
            found.add(node)
            waiting += more(node)
    return found


def _inputs_of(node: fx.Node) -> list[fx.Node]:
    """What a node in front of attention is made of; not what a linear layer is."""
    return [] if name_of(node) in _LINEAR else node.all_input_nodes


def _arranges(node: fx.Node) -> bool:
    name = name_of(node)
    return name in _ARRANGING or (not name and _is_part_of(node, PIECES))


def _is_part_of(node: fx.Node, names: frozenset[str]) -> bool:
    """Whether a node is one of the results of an operator with one of these names, or of attention."""
    source = args_of(node)[0] if node.target is operator.getitem else None
    return isinstance(source, fx.Node) and (name_of(source) in names or _is_attention(source))


def _is_cheap(node: fx.Node) -> bool:
    """Whether a node in front of attention is a linear layer, or costs next to nothing."""
    return _is_of_norm(node) or name_of(node) in _LINEAR | {"add"}


def _norms_in_front(linear: fx.Node) -> set[fx.Node]:
    """The norm whose output a linear layer reads, a fused one or one written out."""
    found: set[fx.Node] = set()
    for read in linear.all_input_nodes:
        chain = _reached([read], lambda n: n.all_input_nodes, _is_of_norm)
        if any(name_of(n) in _NORMS | {"rsqrt"} for n in chain):
            found |= chain
    return found


def _is_of_norm(node: fx.Node) -> bool:
    name = name_of(node)
    shifts = name == "add" and len(node.all_input_nodes) == 1
    norm = name in _NORMS or _is_part_of(node, _NORMS)
    return shifts or norm or _arranges(node) or name in _ENTRYWISE
