r"""Proof, from a captured graph, that the rows of a region do not interact.

The batch dimension is captured as a symbol ``s``, so every tensor of the forward graph shows where its
rows are. We follow them from the inputs: each operator must carry rows to rows (:mod:`.oprules`),

.. math:: \mathrm{out}_i = \phi(\mathrm{in}_i, \text{tensors without rows}) ,

which makes the Jacobian block diagonal over rows, hence the captured backward graph, run on the saved
rows ``S``, returns exactly :math:`\sum_{i \in S} J_i^\top g_i`. An operator that is not known to keep rows
apart ends the proof: unknown means refused.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from backsketch.regions.rows import Layout
from backsketch.torch_private import position_of

__all__ = [
    "Coupled",
    "Proof",
    "RowSymbols",
    "is_random",
    "outputs_of",
    "placeholders_of",
    "shape_of",
]


class Coupled(Exception):
    """Rows may interact; the message says where."""


@dataclass(frozen=True)
class RowSymbols:
    """The symbols that stand for the leading sizes; several where inputs were never related.

    ``axes[i]`` holds the symbols of leading axis ``i``, empty where that axis has size one.
    """

    axes: tuple[frozenset[sympy.Symbol], ...]

    @property
    def symbols(self) -> frozenset[sympy.Symbol]:
        return frozenset().union(*self.axes)

    @property
    def live(self) -> tuple[int, ...]:
        """Axes with a symbol; the last one carries the kept rows."""
        return tuple(i for i, axis in enumerate(self.axes) if axis)

    def multiplicity(self, size: Any, axes: Iterable[int]) -> sympy.Expr | None:
        """``c`` where ``size = c * product of one symbol per axis`` and c has no row symbol."""
        c = expr(size)
        for axis in axes:
            hits = c.free_symbols & self.axes[axis]
            if len(hits) != 1:
                return None
            c = sympy.cancel(c / hits.pop())
        return None if c.free_symbols & self.symbols or not c.is_polynomial() else c

    def mentions(self, size: Any) -> bool:
        return bool(expr(size).free_symbols & self.symbols)

    def layout_at(self, shape: Sequence[Any], dim: int) -> Layout | None:
        """The layout of rows that begin at dimension ``dim``, if that is what the sizes say."""
        live = self.live
        if self.multiplicity(shape[dim], live) is not None:
            return Layout(dim)
        end = dim + len(live)
        if len(live) > 1 and end <= len(shape):
            *outer, last = shape[dim:end]
            exact = all(self.multiplicity(s, [a]) == 1 for s, a in zip(outer, live))
            if exact and self.multiplicity(last, live[-1:]) is not None:
                return Layout(dim, len(live))
        return None


def expr(size: Any) -> sympy.Expr:
    """The simplified symbolic value of a size."""
    node = getattr(size, "node", None)
    return node.expr if node is not None else sympy.sympify(size)


def is_random(node: fx.Node) -> bool:
    """Whether running the node again gives other values; attention without dropout does not."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    i = position_of(node.target, "dropout_p")
    if i is None:
        return True
    p: Any = node.args[i] if len(node.args) > i else node.kwargs.get("dropout_p", 0.0)
    return bool(p != 0)


def outputs_of(module: fx.GraphModule) -> Sequence[Any]:
    """What a graph returns, in order."""
    (output,) = module.graph.find_nodes(op="output")
    results = output.args[0]
    assert isinstance(results, (tuple, list))
    return results


def placeholders_of(backward: fx.GraphModule) -> tuple[list[fx.Node], list[fx.Node]]:
    """The arguments of a backward graph: saved values and sizes, then cotangents."""
    placeholders = list(backward.graph.find_nodes(op="placeholder"))
    cotangents = [p for p in placeholders if "tangents" in str(p.target)]
    return placeholders[: len(placeholders) - len(cotangents)], cotangents


def shape_of(node: fx.Node) -> Sequence[Any]:
    return node.meta["val"].shape


Label = Layout | None | tuple[Layout | None, ...]


@dataclass
class Proof:
    """Row layouts of the nodes of a forward graph, derived one node at a time."""

    rows: RowSymbols
    rule: Callable[[Proof, fx.Node], Label]
    labels: dict[fx.Node, Label] = field(default_factory=dict)

    def visit(self, node: fx.Node) -> None:
        """Derive the layout of ``node`` from its inputs, or raise :class:`Coupled`."""
        label = self._derive(node)
        values = node.meta.get("val")
        if isinstance(values, (tuple, list)):
            parts = label if isinstance(label, tuple) else [label] * len(values)
            for value, part in zip(values, parts):
                self._consistent(node, value, part)
        else:
            self._consistent(node, values, label)
        self.labels[node] = label

    def _derive(self, node: fx.Node) -> Label:
        if node.op == "placeholder":
            return self._input(node)
        if node.op == "get_attr":
            return None
        if node.target is operator.getitem:
            source, position = node.args
            parent = self.labels.get(source)  # type: ignore[arg-type]
            return parent[position] if isinstance(parent, tuple) else parent  # type: ignore[index]
        if not isinstance(node.meta.get("val"), (Tensor, tuple, list)):
            return None  # arithmetic on sizes
        return self.rule(self, node)

    def _input(self, node: fx.Node) -> Label:
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or not any(map(self.rows.mentions, value.shape)):
            return None
        label = next(
            filter(None, (self._at_input(value, d) for d in range(min(2, value.dim())))), None
        )
        if label is None:
            raise Coupled(f"an input of shape {tuple(value.shape)} has rows in a later dimension")
        return label

    def _at_input(self, value: Tensor, dim: int) -> Layout | None:
        leading_ones = all(s == 1 for s in value.shape[:dim])
        return self.rows.layout_at(value.shape, dim) if leading_ones else None

    def _consistent(self, node: fx.Node, value: Any, label: Label) -> None:
        """Row symbols occur in the dimensions of the layout and nowhere else."""
        if not isinstance(value, Tensor):
            return
        where = {d for d, size in enumerate(value.shape) if self.rows.mentions(size)}
        if label is None:
            if where:
                raise Coupled(f"{describe(node)} makes values that depend on the row's number")
            return
        assert isinstance(label, Layout)
        if where != set(range(label.dim, label.dim + label.axes)):
            raise Coupled(f"{describe(node)} relates rows to other rows")
        if self.rows.layout_at(value.shape, label.dim) != label:
            raise Coupled(f"{describe(node)} mixes rows with other dimensions")

    def layout(self, node: Any) -> Layout | None:
        label = self.labels.get(node) if isinstance(node, fx.Node) else None
        return label if isinstance(label, Layout) else None

    def prefix(self, shape: Sequence[Any], dim: int) -> sympy.Expr:
        return sympy.expand(math.prod((expr(s) for s in shape[:dim]), start=sympy.Integer(1)))

    def find(self, shape: Sequence[Any], prefix: sympy.Expr) -> Layout | None:
        """The layout in ``shape`` of rows that follow ``prefix`` outer elements."""
        for dim in range(len(shape)):
            if self.prefix(shape, dim) == prefix and self.rows.mentions(shape[dim]):
                return self.rows.layout_at(shape, dim)
        return None


def describe(node: fx.Node) -> str:
    """The operator and, where known, the user's line of code."""
    trace = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines()]
    code = next((s for s in reversed(trace) if s.strip("^~") and not s.startswith("File")), "")
    name = getattr(node.target, "__name__", str(node.target))
    name = name.split(".")[0]
    return f"'{name}' (in `{code}`)" if code else f"'{name}'"
