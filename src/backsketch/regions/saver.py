"""The edits of a joint graph after which its backward part reads rounded tensors."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from backsketch.regions import low_precision as low
from backsketch.regions.again import run_attention_again
from backsketch.regions.graphs import call
from backsketch.regions.partition import args_of, backward_nodes, name_of
from backsketch.regions.row_groups import RowGroups
from backsketch.regions.share import numel
from backsketch.regions.structure import RowSymbols, is_random
from backsketch.rounding.eager import BLOCK

__all__ = ["RESHAPES", "SEED", "STREAM", "Saver", "Use", "source_of"]

RESHAPES = frozenset(["view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "detach", "alias"])
_VIEWS = RESHAPES | {"permute", "transpose", "t"}
_SIZE = torch.ops.aten.sym_size.int
_FIRST_STREAM = 3000  # beyond those of the draws, of layers and of products
SEED, STREAM = object(), object()
"""Stand for the seed of the forward pass, and for a stream of its own, among the arguments of a rounding."""


@dataclass(frozen=True)
class Use:
    """How a backward operator reads a tensor of the forward pass that need not be kept as it is.

    ``replace`` edits the operator, which is in its place still but whose arguments may have been edited.
    """

    read: fx.Node
    replace: Callable[[Saver, fx.Node], None]


def source_of(node: fx.Node, views: frozenset[str] = _VIEWS) -> fx.Node:
    """The value that a node shows, through views."""
    while node.op == "call_function" and _is_view(node, views):
        node = args_of(node)[0]
    return node


def _is_view(node: fx.Node, views: frozenset[str] = _VIEWS) -> bool:
    return name_of(node) in views or _expands_nothing(node)


def _expands_nothing(node: fx.Node) -> bool:
    """Matrix products expand the batches of their operands, most of the time to the size they have."""
    if name_of(node) != "expand":
        return False
    shapes = (n.meta["val"].shape for n in (node, args_of(node)[0]))
    before, after = (list(map(str, shape)) for shape in shapes)
    return before == after


def _tag_late(graph: fx.Graph) -> None:
    """Say of what backward operators alone read that it is computed late.

    AOTAutograd does not, for what the backward pass of an ``autograd.Function`` computes of its saved tensors.
    """
    backward = backward_nodes(graph)
    for node in reversed(graph.nodes):
        if node.op != "call_function" or node in backward or "partitioner_tag" in node.meta:
            continue
        if all(u in backward or u.meta.get("partitioner_tag") == "is_backward" for u in node.users):
            node.meta["partitioner_tag"] = "is_backward"


@dataclass
class Saver:
    """Edits one joint graph.

    ``symbols`` stand for the rows, where the backward pass is to run on some of them: then only tensors whose rows
    consist of whole groups are rounded, so that the codes of a row can be taken. ``apart`` and ``kept_exact`` name
    the tensors that each reader rounds for itself, and those that are kept as they are; ``rounded_at`` tells for
    each rounding the name of its tensor.
    """

    graph: fx.Graph
    bits: int
    products: bool
    symbols: RowSymbols | None = None
    apart: set[str] = field(default_factory=set)
    kept_exact: set[str] = field(default_factory=set)
    rounded_at: dict[fx.Node, str] = field(default_factory=dict)
    backward: set[fx.Node] = field(default_factory=set)
    _rows: RowGroups | None = None
    _again: set[fx.Node] = field(default_factory=set)
    _exact: set[fx.Node] = field(default_factory=set)
    _early: dict[fx.Node, fx.Node] = field(default_factory=dict)
    _packed: dict[Any, tuple[fx.Node, fx.Node]] = field(default_factory=dict)
    _stream: int = _FIRST_STREAM
    _seeds: dict[str, fx.Node] = field(default_factory=dict)

    def run(self, use_of: Callable[[Saver, fx.Node], Use | None]) -> None:
        """Edit the graph; ``use_of`` knows the operators."""
        _tag_late(self.graph)
        self._again = run_attention_again(self.graph)
        self.backward = backward_nodes(self.graph)
        if self.symbols is not None:
            forward = (n for n in self.graph.nodes if n not in self.backward)
            self._rows = RowGroups(self.symbols, forward)
        for node in self._again:
            if not _is_view(node):
                self._keep(node.all_input_nodes)
        uses = []
        for node in self.graph.nodes:
            if node in self.backward and node.op == "call_function":
                use = use_of(self, node)
                source = None if use is None else source_of(use.read)
                self._keep(n for n in node.all_input_nodes if source_of(n) is not source)
                if use is not None:
                    uses.append((node, use))
        for node, use in uses:
            if self._is_worth_rounding(source_of(use.read)):
                use.replace(self, node)

    def _keep(self, read: Iterable[fx.Node]) -> None:
        """What is behind nodes that somebody reads as they are has to be kept."""
        for node in read:
            if node not in self.backward:
                self._exact |= self._leaves(node)

    def _leaves(self, node: fx.Node) -> set[fx.Node]:
        """The tensors of the forward pass of which the backward pass computes a node; no parameters."""
        node = source_of(node)
        if not self._is_late(node):
            made = node.op == "call_function" and isinstance(node.meta.get("val"), Tensor)
            return {node} if made else set()
        return set().union(*(self._leaves(n) for n in node.all_input_nodes))

    def _is_late(self, node: fx.Node) -> bool:
        """Whether a value of the forward pass is computed in the backward pass only."""
        late = node.op == "call_function" and node.meta.get("partitioner_tag") == "is_backward"
        return late and node not in self.backward

    def _is_worth_rounding(self, source: fx.Node) -> bool:
        if source.name in self.kept_exact:
            return False
        return not self._leaves(source) <= self._exact

    def can_round(self, node: Any) -> bool:
        """Whether a node is an activation: a floating-point result of the forward pass, in many columns."""
        if not isinstance(node, fx.Node) or node in self.backward:
            return False
        source = source_of(node)
        value = source.meta.get("val")
        if source.op != "call_function" or not isinstance(value, Tensor):
            return False
        many = value.dim() > 0 and value.shape[-1] != 1 and numel(value) > 0
        fits = many and value.is_floating_point() and self._fits(node, low.GROUP)
        return fits and self._can_be_early(source)

    def can_mask(self, node: fx.Node) -> bool:
        """Whether one bit for each entry of a tensor can be kept."""
        return self._fits(node, BLOCK)

    def _fits(self, node: fx.Node, size: int) -> bool:
        return self._rows is None or self._rows.fit(node, size)

    def is_early(self, node: fx.Node) -> bool:
        """Whether a node belongs to the forward pass and runs there."""
        return node not in self.backward and not self._is_late(node)

    def _can_be_early(self, source: fx.Node) -> bool:
        """Whether a value can be computed in the forward pass."""
        if not self._is_late(source):
            return True
        if source in self._again or is_random(source):
            return False
        return all(self._can_be_early(source_of(n)) for n in source.all_input_nodes)

    def early(self, node: fx.Node) -> fx.Node:
        """A value at a place in the forward pass, where autograd computes it only in the backward pass."""
        if node.meta.get("partitioner_tag") != "is_backward":
            return node
        if node not in self._early:
            inputs = {n: self.early(n) for n in node.all_input_nodes}
            if name_of(node) in ("detach", "alias"):
                return inputs[node.all_input_nodes[0]]
            with self.behind(*inputs.values()):
                copy = self.graph.node_copy(node, inputs.__getitem__)
            copy.meta["partitioner_tag"] = "is_forward"
            self._early[node] = copy
        return self._early[node]

    @contextmanager
    def behind(self, *nodes: fx.Node) -> Iterator[None]:
        """New calls go, one after the other, behind nodes of the forward pass."""
        placeholders = self.graph.find_nodes(op="placeholder")
        wanted = {placeholders[-1], *nodes}
        last = [node for node in self.graph.nodes if node in wanted][-1]
        with self.graph.inserting_before(last.next):
            yield

    def rounded(
        self, x: fx.Node, twice: bool = False, of: fx.Node | None = None
    ) -> tuple[fx.Node, fx.Node]:
        """Codes and scales of ``x``, rounded in groups of consecutive entries; see :meth:`pack`."""
        args = (SEED, STREAM, self.bits, low.GROUP, twice)
        return self.pack(x, "twice" if twice else "once", low.pack_operator, *args, of=of)

    def pack(
        self, x: fx.Node, kind: str, target: Any, *args: Any, of: fx.Node | None = None
    ) -> tuple[fx.Node, fx.Node]:
        """Codes and scales of ``x`` by an operator on it and ``args``, made once for each kind.

        ``of`` is the tensor that need not be kept then, if it is not ``x`` itself.
        """
        name = source_of(of or x).name
        key: Any = source_of(x, RESHAPES), kind, str(x.meta["val"].shape[-1])
        if name in self.apart:
            key = *key, len(self._packed)
        if key not in self._packed:
            self._packed[key] = self._pack(self.early(x), name, target, args)
        return self._packed[key]

    def _pack(
        self, x: fx.Node, name: str, target: Any, args: tuple[Any, ...]
    ) -> tuple[fx.Node, fx.Node]:
        self._stream += 1
        own = {SEED: self._seed(), STREAM: self._stream}
        with self.behind(x, *(a for a in args if isinstance(a, fx.Node))):
            both = self.forward(target, x, *(own.get(a, a) for a in args))
            codes, scales = (self.forward(operator.getitem, both, i) for i in (0, 1))
        self.rounded_at[both] = name
        return codes, scales

    def sizes(self, x: fx.Node) -> list[Any]:
        """The shape of ``x``, with nodes of the forward pass for sizes that vary."""
        early = self.early(x)
        with self.behind(early):
            return [
                size if isinstance(size, int) else self.forward(_SIZE, early, dim)
                for dim, size in enumerate(x.meta["val"].shape)
            ]

    def stream(self) -> int:
        """A stream that nobody else has."""
        self._stream += 1
        return self._stream

    def _seed(self) -> fx.Node:
        """A fresh seed of the forward pass."""
        if "forward" not in self._seeds:
            placeholders = self.graph.find_nodes(op="placeholder")
            first = next(p for p in placeholders if isinstance(p.meta.get("val"), Tensor))
            with self.behind():
                self._seeds["forward"] = self.forward(low.next_seed_operator, [first])
        return self._seeds["forward"]

    def backward_seed(self, anchor: fx.Node) -> fx.Node:
        """A fresh seed of the backward pass, drawn where it is first needed, beside ``anchor``."""
        if "backward" not in self._seeds:
            self._seeds["backward"] = self.backward_call(low.next_seed_operator, [anchor])
        return self._seeds["backward"]

    def forward(self, target: Any, *args: Any) -> fx.Node:
        """A call of the forward pass."""
        return call(self.graph, target, *args, tag="is_forward")

    def backward_call(self, target: Any, *args: Any) -> fx.Node:
        """A call of the backward pass."""
        return call(self.graph, target, *args, tag="is_backward")

    def replace(self, node: fx.Node, new: fx.Node) -> None:
        """Put a new node into the place of an old one."""
        node.replace_all_uses_with(new)
        self.graph.erase_node(node)
