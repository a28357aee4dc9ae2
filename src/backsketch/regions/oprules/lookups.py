"""Operators that look entries up by an index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from backsketch.regions.oprules.registry import (
    arg,
    ndim,
    refuse_along,
    refuse_as_parameters,
    rule,
    source,
)
from backsketch.regions.partition import RANGES, name_of
from backsketch.regions.rows import Layout
from backsketch.regions.structure import Coupled, Label, Proof, describe, expr, shape_of

_VIEWS = frozenset(["unsqueeze", "view", "slice"])


@rule("embedding")
def _embedding(proof: Proof, node: fx.Node) -> Label:
    weight, indices = node.args[:2]
    refuse_as_parameters(proof, node, [weight])
    if arg(node, 3, "scale_grad_by_freq", False) and proof.layout(indices):
        raise Coupled(f"{describe(node)} scales gradients by frequency over all rows")
    return proof.layout(indices)


@rule("gather", "take_along_dim", "scatter", "scatter_add", "scatter_reduce")
def _gather(proof: Proof, node: fx.Node) -> Label:
    tensor, at = source(proof, node)
    tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
    labels = {proof.layout(n) for n in tensors if ndim(n) > 0}
    if labels == {None}:
        return None
    if len(labels) != 1 or at is None:
        raise Coupled(f"{describe(node)} is not known to keep rows apart")
    refuse_along(node, at, [int(arg(node, 1, "dim")) % ndim(tensor)])
    return at


@rule("index_select")
def _index_select(proof: Proof, node: fx.Node) -> Label:
    tensor, at = source(proof, node)
    refuse_as_parameters(proof, node, [node.args[2]])
    refuse_along(node, at, [int(node.args[1]) % ndim(tensor)])  # type: ignore[arg-type]
    return at


@rule("arange", "iota")
def _numbers(proof: Proof, node: fx.Node) -> Label:
    """Row numbers, where they pick an entry of each row alone: rows that are kept have numbers of their own."""
    if not proof.rows.mentions(shape_of(node)[0]):
        return None
    if not _counts(proof, node) or not all(_picks(u) for u in node.users):
        raise Coupled(f"{describe(node)} makes values that depend on the row's number")
    return Layout(0)


def _counts(proof: Proof, node: fx.Node) -> bool:
    """Whether a range is 0, 1, ... up to the number of rows."""
    numbers = [a for a in node.args if a is not None]
    start = node.kwargs.get("start", numbers[0] if len(numbers) > 1 else 0)
    step = node.kwargs.get("step", numbers[2] if len(numbers) > 2 else 1)
    counts = len(proof.rows.axes) == 1 and (start, step) == (0, 1)
    return counts and expr(shape_of(node)[0]) in proof.rows.axes[0]


def _picks(user: fx.Node) -> bool:
    """Whether a reader of row numbers uses them as an index, through views; gradients are put back by them."""
    if name_of(user) in _VIEWS:
        return all(_picks(u) for u in user.users)
    return name_of(user) in ("index", "index_put")


def _row_numbers(index: Any) -> bool:
    """Whether an index is a range of row numbers, through views."""
    while isinstance(index, fx.Node) and name_of(index) in _VIEWS:
        index = index.args[0]
    return isinstance(index, fx.Node) and name_of(index) in RANGES


def _of_each_row(proof: Proof, node: fx.Node, indices: Sequence[Any]) -> bool:
    """``x[range(n), picks]``: entries of row i of x by row i of the picks, or by picks for all rows."""
    x, first, picks = source(proof, node)[0], indices[0], [i for i in indices[1:] if i is not None]
    if not _row_numbers(first) or any(_row_numbers(i) and proof.layout(i) for i in picks):
        return False
    whole = expr(shape_of(x)[0]) in proof.rows.axes[0]
    dims = {ndim(i) for i in (first, *picks) if proof.layout(i)}
    rows = all(proof.layout(i) in (None, Layout(0)) for i in picks)
    shared = all(proof.layout(i) or _is_shared(i, first) for i in picks)
    return whole and proof.layout(x) == Layout(0) and len(dims) == 1 and rows and shared


def _is_shared(pick: fx.Node, first: fx.Node) -> bool:
    """Whether picks without rows are the same for every row."""
    return ndim(pick) < ndim(first) or (ndim(pick) == ndim(first) and shape_of(pick)[0] == 1)


@rule("index")
def _index(proof: Proof, node: fx.Node) -> Label:
    at = source(proof, node)[1]
    indices: Sequence[Any] = node.args[1]  # type: ignore[assignment]
    used = [d for d, i in enumerate(indices) if i is not None]
    labels = [proof.layout(indices[d]) for d in used]
    if any(_row_numbers(indices[d]) and proof.layout(indices[d]) for d in used):
        if _of_each_row(proof, node, indices):
            return Layout(0)
        raise Coupled(f"{describe(node)} uses the rows' numbers as values")
    if at is None and not any(labels):
        return None
    if at is not None and not any(labels) and used and min(used) >= at.dim + at.axes:
        return at
    if at is None and len(used) == 1:
        label = labels[0]
        assert label is not None
        return Layout(used[0] + label.dim, label.axes)
    raise Coupled(f"{describe(node)} is not known to keep rows apart")
