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
from backsketch.regions.rows import Layout
from backsketch.regions.structure import Coupled, Label, Proof, describe


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


@rule("index")
def _index(proof: Proof, node: fx.Node) -> Label:
    at = source(proof, node)[1]
    indices: Sequence[Any] = node.args[1]  # type: ignore[assignment]
    used = [d for d, i in enumerate(indices) if i is not None]
    labels = [proof.layout(indices[d]) for d in used]
    if at is None and not any(labels):
        return None
    if at is not None and not any(labels) and used and min(used) >= at.dim + at.axes:
        return at
    if at is None and len(used) == 1:
        label = labels[0]
        assert label is not None
        return Layout(used[0] + label.dim, label.axes)
    raise Coupled(f"{describe(node)} is not known to keep rows apart")
