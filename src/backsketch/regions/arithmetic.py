r"""The matrix products of a captured backward graph, in 8 bits.

A product :math:`v B` of a value v that depends on a cotangent and a saved value B is computed as
:math:`\mathrm{round}(v)\,\mathrm{round}(B)` with roundings of its own (:mod:`backsketch.products`), whose
mean given v is :math:`v B`. :mod:`.linearity` proves that this leaves every gradient unbiased, in any graph
that it lets through.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from backsketch.regions.compilers import copied
from backsketch.regions.graphs import call
from backsketch.regions.linearity import check_linear
from backsketch.regions.low_precision import (
    bmm_operator,
    convolution_operator,
    grouped_operator,
    next_seed_operator,
    vjps_operator,
)
from backsketch.regions.partition import args_of, backward_nodes, is_turned, name_of
from backsketch.regions.share import Share, hint, is_worth_it, products_of
from backsketch.regions.structure import placeholders_of

__all__ = ["Rounded", "in_8_bits"]

aten = torch.ops.aten
_turn = aten.t.default
_FIRST_STREAM = 2000  # beyond the streams of the draws, and of layers
_MOST_SLICES = 64
_EXPERTS = "grouped_mm_fallback_backward"


class Rounded(NamedTuple):
    """A backward graph with products in 8 bits, and what share of them these are."""

    module: fx.GraphModule
    share: Share


def in_8_bits(module: fx.GraphModule) -> Rounded:
    """A copy of a backward graph whose products with a cotangent are computed from 8-bit operands.

    These are matrix products, also batched ones of a few large matrices and those of experts, and convolutions.
    What would be slower stays exact (:func:`~.share.is_worth_it`), and so do fused attention, transposed
    convolutions and what does not depend on a cotangent (a recomputed forward pass). Each run of the graph draws a
    fresh seed, and each product has a stream of its own.

    Raises:
        Coupled: it is not proven that the graph is affine in its cotangents.
    """
    module = copied(module)
    check_linear(module.graph)
    before = products_of(module)
    _, cotangents = placeholders_of(module)
    replaced: set[fx.Node] = set()
    if before:
        rewriter = _Rewriter(module.graph, cotangents)
        rewriter.run()
        replaced = rewriter.replaced
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    return Rounded(module, _share(before, replaced))


def _share(before: dict[fx.Node, tuple[str, int]], replaced: set[fx.Node]) -> Share:
    exact: dict[str, int] = defaultdict(int)
    rounded = 0
    for node, (kind, work) in before.items():
        if kind and node not in replaced:
            exact[kind] += work
        else:
            rounded += work
    return Share(rounded, dict(exact))


class _Rewriter:
    """Puts 8-bit products in the place of exact ones."""

    def __init__(self, graph: fx.Graph, cotangents: Sequence[fx.Node]) -> None:
        self.graph, self.stream = graph, _FIRST_STREAM
        self.dependent = backward_nodes(graph)
        self.replaced: set[fx.Node] = set()
        with graph.inserting_after(cotangents[-1]):
            self.seed = self._call(next_seed_operator, [cotangents[0]])

    def run(self) -> None:
        for node in self._calls(aten.convolution_backward.default):
            if _is_worth_convolving(node):
                self._convolution(node)
        for node in self._calls(aten.bmm.default):
            if _is_large_batched(node):
                self._batched(node)
        for node in list(self.graph.nodes):
            if name_of(node) == _EXPERTS and _is_worth_grouping(node):
                self._experts(node)
        below: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        at_weight: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node in self._calls(aten.mm.default):
            kind, g = self._kind(node)
            depth = node.meta["val"].shape[int(args_of(node)[0] in self.dependent)]
            rows, columns = g.meta["val"].shape
            if is_worth_it(hint(rows), hint(columns), hint(depth)):
                (below if kind == "input" else at_weight)[g].append(node)
        packed: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node in self._calls(vjps_operator):
            packed[args_of(node)[0]].append(node)
        for g in dict.fromkeys([*below, *at_weight]):
            for first, second in itertools.zip_longest(below[g], [*at_weight[g], *packed[g]]):
                self._product(g, first, second)

    def _calls(self, target: Any) -> list[fx.Node]:
        """The calls of an operator with a cotangent."""
        nodes = self.graph.find_nodes(op="call_function", target=target)
        return [node for node in nodes if node in self.dependent]

    def _kind(self, node: fx.Node) -> tuple[str, fx.Node]:
        """Whether a product is ``g @ w``, or ``g.T @ x`` as it is or transposed; and its g."""
        a, b = args_of(node)
        assert isinstance(a, fx.Node)
        assert isinstance(b, fx.Node)
        if a not in self.dependent:
            return "weight", b
        turned = is_turned(a)
        return ("input", a) if turned is None else ("weight", turned)

    def _product(self, g: fx.Node, below: fx.Node | None, at_weight: fx.Node | None) -> None:
        """One call for a pair of products of one cotangent, which share its rounding, and its sum."""
        sums = [n for n in g.users if _is_sum_over_rows(n)]
        old = [n for n in (below, at_weight, *sums) if n is not None]
        place = min(old, key=list(self.graph.nodes).index)
        with self.graph.inserting_before(place):
            w = None if below is None else self._hoisted(args_of(below)[1], place)
            x, packed, turn = None, (None, None), False
            if at_weight is not None and at_weight.target is vjps_operator:
                packed = args_of(at_weight)[3:5]
                old += at_weight.users
                (at_weight,) = at_weight.users
            elif at_weight is not None:
                x, turn = self._input_of(at_weight, place)
            results = self._vjps(g, x, w, packed, bool(sums))
            if below is not None:
                below.replace_all_uses_with(self._call(operator.getitem, results, 0))
            if at_weight is not None:
                found = self._call(operator.getitem, results, 1)
                at_weight.replace_all_uses_with(self._call(_turn, found) if turn else found)
            for node in sums:
                total = self._call(operator.getitem, results, 2)
                kept = len(args_of(node)) > 2 and args_of(node)[2]
                new = self._call(aten.unsqueeze.default, total, 0) if kept else total
                node.replace_all_uses_with(new)
        for node in reversed(old):
            self._erase(node)

    def _vjps(
        self, g: fx.Node, x: fx.Node | None, w: fx.Node | None, packed: Any, with_bias: bool
    ) -> fx.Node:
        self.stream += 1
        return self._call(vjps_operator, g, x, w, *packed, self.seed, self.stream, with_bias)

    def _input_of(self, product: fx.Node, place: fx.Node) -> tuple[fx.Node, bool]:
        """The x of ``g.T @ x``; where the product is ``x.T @ g``, the result has to be turned."""
        first, second = args_of(product)
        if first in self.dependent:
            return self._hoisted(second, place), False
        return self._call(_turn, self._hoisted(first, place)), True

    def _hoisted(self, value: Any, place: fx.Node) -> fx.Node:
        """``value``, which no cotangent reaches, moved in front of ``place`` with all that it needs."""
        assert isinstance(value, fx.Node)
        order = {node: i for i, node in enumerate(self.graph.nodes)}
        if order[value] > order[place]:
            for needed in value.all_input_nodes:
                self._hoisted(needed, place)
            place.prepend(value)
        return value

    def _convolution(self, node: fx.Node) -> None:
        """Both products of a convolution, in one call."""
        g, x, weight, _, stride, padding, dilation, _, _, groups, wanted = args_of(node)
        self.stream += 1
        with self.graph.inserting_before(node):
            results = self._call(
                convolution_operator, g, x, weight, self.seed, self.stream, list(stride), list(padding),
                list(dilation), groups, list(wanted[:2]),
            )  # fmt: skip
            for user in list(node.users):
                if args_of(user)[1] == 2:
                    dims = [d for d in range(g.meta["val"].dim()) if d != 1]
                    new = self._call(aten.sum.dim_IntList, g, dims)
                else:
                    new = self._call(operator.getitem, results, args_of(user)[1])
                user.replace_all_uses_with(new)
                self.graph.erase_node(user)
        self._erase(node)

    def _batched(self, node: fx.Node) -> None:
        """A product of each slice of a batch."""
        a, b = args_of(node)
        self.stream += 1
        with self.graph.inserting_before(node):
            new = self._call(bmm_operator, a, b, a in self.dependent, self.seed, self.stream)
        node.replace_all_uses_with(new)
        self._erase(node)

    def _experts(self, node: fx.Node) -> None:
        """Both products of each expert of a mixture."""
        self.stream += 1
        with self.graph.inserting_before(node):
            new = self._call(grouped_operator, *args_of(node), self.seed, self.stream)
        node.replace_all_uses_with(new)
        self._erase(node)

    def _erase(self, node: fx.Node) -> None:
        self.replaced.add(node)
        self.graph.erase_node(node)

    def _call(self, target: Any, *args: Any) -> fx.Node:
        return call(self.graph, target, *args)


def _is_sum_over_rows(node: fx.Node) -> bool:
    """Whether a node is the gradient of a bias: the sum of a matrix over its rows, in its own type."""
    is_sum = node.target is aten.sum.dim_IntList and list(args_of(node)[1]) == [0]
    return is_sum and not node.kwargs and args_of(node)[0].meta["val"].dim() == 2


def _is_worth_convolving(node: fx.Node) -> bool:
    """Whether a convolution over at most two dimensions is large enough; transposed ones stay exact."""
    _, _, weight, _, _, _, _, is_transposed, _, groups, _ = args_of(node)
    out, inner, *kernel = map(hint, weight.meta["val"].shape)
    if is_transposed or len(kernel) > 2:
        return False
    samples, _, *positions = map(hint, args_of(node)[0].meta["val"].shape)
    columns = out // groups * math.prod(kernel)
    return is_worth_it(samples * math.prod(positions), columns, inner)


def _is_worth_grouping(node: fx.Node) -> bool:
    """Whether the matrices of experts are large, each with its share of the rows."""
    experts, inner, out = map(hint, args_of(node)[1].meta["val"].shape)
    rows = hint(args_of(node)[0].meta["val"].shape[0])
    return is_worth_it(rows // experts, out, inner)


def _is_large_batched(node: fx.Node) -> bool:
    """Whether a batched product is one of a few large matrices, such as those of experts; not attention."""
    slices, rows, columns = map(hint, node.meta["val"].shape)
    depth = hint(args_of(node)[0].meta["val"].shape[2])
    return slices <= _MOST_SLICES and is_worth_it(rows, depth, columns)
