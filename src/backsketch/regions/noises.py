r"""The proof that a backward graph with rounded saved tensors is unbiased: no noise meets itself.

Let :math:`\xi_1, \xi_2, \dots` be the roundings that the forward pass kept. They are independent of each other
given the forward pass, because each has a stream of random numbers of its own, which is checked. Every value v of
the backward graph is a polynomial in them. :func:`check_independent` walks the graph and notes for each value the
set N(v) of roundings that it may depend on. Where a value is multiplied by a rounded tensor,

.. math:: w = v \cdot \tilde x , \qquad \xi_x \notin N(v) ,

which the walk demands, v and :math:`\tilde x` are independent, so that :math:`E[w] = E[v]\, x`. Everything
else is affine in the values that depend on a cotangent (:mod:`.linearity`), through which expectations pass. By
induction each value is multilinear in the roundings, and its mean is the exact one.

A norm is quadratic in its input and reads two roundings of it, independent of each other: its mean given v is
exact (:mod:`backsketch.ops.norm`), and both count as met afterwards.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable

from torch import fx

from backsketch.regions import low_precision as low
from backsketch.regions.partition import args_of, backward_nodes, name_of
from backsketch.regions.structure import Coupled, describe

__all__ = ["MetTwice", "check_independent"]

_NOTHING: frozenset[fx.Node] = frozenset()
_MULTIPLIES = {
    low.times_operator: 1,
    low.saved_mm_operator: 1,
    low.saved_layer_norm_operator: 4,
    low.saved_group_norm_operator: 4,
    low.saved_batch_norm_operator: 4,
    low.vjps_operator: 3,
}
"""Operators that multiply their first argument by a rounded tensor, and where its codes are."""
_STREAM = {
    low.pack_operator: (1, 2),
    low.pack_slope_operator: (3, 4),
    low.product_pack_operator: (1, 2),
}
"""Operators that round, and where their seed and stream are."""
_BILINEAR = frozenset({"mul", "mm", "bmm", "convolution_backward", "grouped_mm_fallback_backward"})
_ARRANGES = frozenset(
    {"view", "t", "permute", "transpose", "reshape", "_unsafe_view", "convert_element_type"}
)


class MetTwice(Coupled):
    """A value would be multiplied by a rounding that it depends on already."""

    def __init__(self, message: str, rounding: fx.Node) -> None:
        super().__init__(message)
        self.rounding = rounding


def check_independent(graph: fx.Graph) -> None:
    """Prove that no value is multiplied by a rounded tensor that it depends on already.

    Raises:
        MetTwice: a value may be.
        Coupled: a rounded tensor is read by an operator that is not linear in it, or two share random numbers.
    """
    _check_streams(graph)
    backward = backward_nodes(graph)
    met: dict[fx.Node, frozenset[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_function":
            met[node] = _met(node, met, backward)


def _check_streams(graph: fx.Graph) -> None:
    taken: set[tuple[fx.Node, int]] = set()
    for node in graph.nodes:
        if node.target in _STREAM:
            seed, stream = (args_of(node)[i] for i in _STREAM[node.target])
            if (seed, stream) in taken:
                raise Coupled(f"{describe(node)} has the random numbers of another rounding")
            taken.add((seed, stream))


def _rounding_of(codes: fx.Node) -> fx.Node:
    """The call that rounded the tensor with these codes."""
    return args_of(codes)[0] if codes.target is operator.getitem else codes


def _is_code(node: fx.Node) -> bool:
    return _rounding_of(node).target in _STREAM


def _met(
    node: fx.Node, met: dict[fx.Node, frozenset[fx.Node]], backward: set[fx.Node]
) -> frozenset[fx.Node]:
    """The roundings that a node may depend on: codes themselves count as none."""
    read = [met.get(n, _NOTHING) for n in node.all_input_nodes]
    at = _MULTIPLIES.get(node.target)
    if at is not None and args_of(node)[at] is not None:
        return _product([*read, frozenset({_rounding_of(args_of(node)[at])})], node)
    if node.target is low.restore_operator:
        return frozenset({_rounding_of(args_of(node)[0])})
    if any(map(_is_code, node.all_input_nodes)) and node.target is not operator.getitem:
        return _codes_as_anchor(node)
    if name_of(node) in _BILINEAR:
        return _product(read, node)
    reads_rounded = any(met.get(n) and n not in backward for n in node.all_input_nodes)
    if reads_rounded and (node in backward or name_of(node) not in _ARRANGES):
        raise Coupled(f"{describe(node)} is not known to be linear in a rounded tensor")
    return _NOTHING.union(*read)


def _codes_as_anchor(node: fx.Node) -> frozenset[fx.Node]:
    """Codes may tell a seed where to be drawn, which depends on nothing."""
    if node.target is not low.next_seed_operator:
        raise Coupled(f"{describe(node)} is not known to read rounded tensors")
    return _NOTHING


def _product(parts: Iterable[frozenset[fx.Node]], node: fx.Node) -> frozenset[fx.Node]:
    found: frozenset[fx.Node] = _NOTHING
    for part in parts:
        twice = sorted(found & part, key=lambda n: n.name)
        if twice:
            raise MetTwice(f"{describe(node)} would multiply a rounding by itself", twice[0])
        found |= part
    return found
