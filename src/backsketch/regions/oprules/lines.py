"""Operators on the lines along one dimension, or on the matrices of the last two."""

from __future__ import annotations

from typing import Any

from torch import fx

from backsketch.regions.oprules.registry import arg, ndim, overlaps, refuse_along, rule, source
from backsketch.regions.structure import Coupled, Label, Proof, describe, shape_of


@rule(
    "slice", "flip", "roll", "cumsum", "cumprod", "logcumsumexp", "sort", "topk", "split", "chunk"
)
@rule("split_with_sizes", "narrow", "_softmax", "_log_softmax", "softmax", "log_softmax", "glu")
@rule("cummax", "cummin", "kthvalue", "unfold", "_safe_softmax", "slice_scatter")
@rule("select_scatter")
def _along_dim(proof: Proof, node: fx.Node) -> Label:
    """Operators on lines along one dimension that leave the others where they are."""
    name = node.target.overloadpacket.__name__  # type: ignore[union-attr]
    position = {"slice": 1, "topk": 2, "split": 2, "chunk": 2, "split_with_sizes": 2, "kthvalue": 2}
    position |= {"roll": 2, "slice_scatter": 2, "select_scatter": 2}
    default = {"slice": 0, "split": 0, "chunk": 0, "split_with_sizes": 0, "slice_scatter": 0}
    tensor, at = source(proof, node)
    num_dims = ndim(tensor)
    dims = arg(node, position.get(name, 1), "dim", default.get(name, -1))
    if name in ("flip", "roll"):
        dims = arg(node, position.get(name, 1), "dims")
    dims = [int(d) % num_dims for d in ([dims] if isinstance(dims, int) else dims)] or list(
        range(num_dims)
    )
    if name == "slice_scatter" and at is None and proof.layout(node.args[1]):
        raise Coupled(f"{describe(node)} is not known to keep rows apart")
    if name == "slice_scatter" and at is not None and overlaps(at, dims):
        new: Any = node.args[1]
        if _whole(new, node) and proof.layout(new) == at:
            return at
    if name == "slice" and at is not None and overlaps(at, dims) and _whole(tensor, node):
        return at
    refuse_along(node, at, dims)
    value = node.meta["val"]
    return tuple(at for _ in value) if isinstance(value, (tuple, list)) else at


@rule("_fft_r2c", "_fft_c2r", "_fft_c2c")
def _transform(proof: Proof, node: fx.Node) -> Label:
    """Fourier transforms along some dimensions."""
    tensor, at = source(proof, node)
    refuse_along(node, at, [int(d) % ndim(tensor) for d in arg(node, 1, "dim", ())])
    return at


def _whole(source: fx.Node, node: fx.Node) -> bool:
    return all(a == b for a, b in zip(shape_of(source), shape_of(node)))


@rule("renorm")
def _renorm(proof: Proof, node: fx.Node) -> Label:
    """Each slice along one dimension by its own norm, over all other dimensions."""
    tensor, at = source(proof, node)
    num_dims = ndim(tensor)
    kept = int(arg(node, 2, "dim")) % num_dims
    refuse_along(node, at, [d for d in range(num_dims) if d != kept])
    return at


@rule("tril", "triu")
def _triangle(proof: Proof, node: fx.Node) -> Label:
    tensor, at = source(proof, node)
    refuse_along(node, at, range(ndim(tensor) - 2, ndim(tensor)))
    return at
