"""Operators that move entries to other dimensions and change no value."""

from __future__ import annotations

from typing import Any

from torch import fx

from backsketch.regions.oprules.pointwise import from_right
from backsketch.regions.oprules.registry import arg, ndim, refuse_along, rule, source
from backsketch.regions.partition import name_of
from backsketch.regions.rows import Layout
from backsketch.regions.structure import Coupled, Label, Proof, describe, shape_of


@rule("view", "_unsafe_view", "reshape", "flatten", "unflatten", "_reshape_copy")
@rule("unsqueeze", "squeeze")
def _reshape(proof: Proof, node: fx.Node) -> Label:
    tensor, at = source(proof, node)
    if at is None:
        return None
    found = proof.find(shape_of(node), proof.prefix(shape_of(tensor), at.dim))
    if found is None:
        raise Coupled(f"{describe(node)} mixes rows with other dimensions")
    return found


@rule("view_as_real", "view_as_complex")
def _pairs(proof: Proof, node: fx.Node) -> Label:
    """Complex numbers as pairs along a last dimension, and pairs as complex numbers."""
    tensor, at = source(proof, node)
    if name_of(node) == "view_as_complex":
        refuse_along(node, at, [ndim(tensor) - 1])
    return at


@rule("detach", "alias", "clone", "contiguous", "_to_copy", "to", "lift_fresh_copy", "positive")
@rule("convert_element_type", "_conj", "device_put", "view_of", "dropout")
def _same(proof: Proof, node: fx.Node) -> Label:
    return source(proof, node)[1]


@rule("expand")
def _expand(proof: Proof, node: fx.Node) -> Label:
    tensor, at = source(proof, node)
    if at is not None:
        return Layout(ndim(node) - from_right(tensor, at), at.axes)
    shape = shape_of(node)
    dims = [d for d, s in enumerate(shape) if proof.rows.mentions(s)]
    return proof.rows.layout_at(shape, dims[0]) if dims else None


@rule("repeat")
def _repeat(proof: Proof, node: fx.Node) -> Label:
    """Copies side by side: of rows along other dimensions, or of one row for all."""
    tensor, at = source(proof, node)
    shape, repeats = shape_of(node), arg(node, 1, "repeats")
    if at is None:
        dims = [d for d, s in enumerate(shape) if proof.rows.mentions(s)]
        return proof.rows.layout_at(shape, dims[0]) if dims else None
    out = Layout(ndim(node) - from_right(tensor, at), at.axes)
    refuse_along(node, out, [d for d, number in enumerate(repeats) if number != 1])
    return out


@rule("permute", "transpose", "t", "movedim", "swapaxes")
def _permute(proof: Proof, node: fx.Node) -> Label:
    tensor, at = source(proof, node)
    if at is None:
        return None
    new = _permutation(node, ndim(tensor))
    dims = [new.index(d) for d in range(at.dim, at.dim + at.axes)]
    if dims != list(range(dims[0], dims[0] + at.axes)):
        raise Coupled(f"{describe(node)} reorders the dimensions that count rows")
    return Layout(dims[0], at.axes)


def _permutation(node: fx.Node, num_dims: int) -> list[int]:
    name = node.target.overloadpacket.__name__  # type: ignore[union-attr]
    if name == "permute":
        dims: Any = node.args[1]
        return [int(d) % num_dims for d in dims]
    order = list(range(num_dims))
    if name == "t":
        return order[::-1]
    if name not in ("transpose", "swapaxes"):
        raise Coupled(f"{describe(node)} is not known to keep rows apart")
    a, b = (int(d) % num_dims for d in node.args[1:3])  # type: ignore[arg-type]
    order[a], order[b] = order[b], order[a]
    return order


@rule("select", "select_copy", "unbind", "unbind_copy")
def _select(proof: Proof, node: fx.Node) -> Label:
    tensor, at = source(proof, node)
    dim = arg(node, 1, "dim", 0) % ndim(tensor)
    if at is None:
        return None
    refuse_along(node, at, [dim])
    out = Layout(at.dim - (dim < at.dim), at.axes)
    value = node.meta["val"]
    return tuple(out for _ in value) if isinstance(value, (tuple, list)) else out


@rule("cat", "stack", "concat")
def _cat(proof: Proof, node: fx.Node) -> Label:
    inputs: Any = node.args[0]
    parts = [n for n in inputs if ndim(n) > 0 and not _is_nothing(n)]
    if not any(proof.layout(n) for n in parts):
        return None
    labels = {proof.layout(n) for n in parts}
    at = labels.pop()
    if labels or at is None:
        raise Coupled(f"{describe(node)} joins rows with something else")
    stack = "stack" in str(node.target)
    dim = int(arg(node, 1, "dim", 0)) % (ndim(parts[0]) + stack)
    if stack:
        if at.dim < dim < at.dim + at.axes:
            raise Coupled(f"{describe(node)} acts along the rows")
        return Layout(at.dim + (dim <= at.dim), at.axes)
    refuse_along(node, at, [dim])
    return at


def _is_nothing(node: fx.Node) -> bool:
    """Whether a tensor is the empty list with which caches of keys and values begin."""
    return list(shape_of(node)) == [0]


@rule("constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d")
@rule("replication_pad1d", "replication_pad2d", "replication_pad3d", "pad")
def _pad(proof: Proof, node: fx.Node) -> Label:
    tensor, at = source(proof, node)
    padded = len(node.args[1]) // 2  # type: ignore[arg-type]
    refuse_along(node, at, range(ndim(tensor) - padded, ndim(tensor)))
    return at
