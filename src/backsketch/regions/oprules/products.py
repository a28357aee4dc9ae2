"""Matrix products."""

from __future__ import annotations

from torch import fx

from backsketch.regions.oprules.pointwise import from_right
from backsketch.regions.oprules.registry import (
    ndim,
    refuse_along,
    refuse_as_parameters,
    rule,
    source,
)
from backsketch.regions.rows import Layout
from backsketch.regions.structure import Coupled, Label, Proof, describe, shape_of


def _product(proof: Proof, node: fx.Node, a: fx.Node, b: fx.Node, batch: int) -> Label:
    """``a @ b`` with ``batch`` leading batch dimensions."""
    at, bt = proof.layout(a), proof.layout(b)
    if at is not None and at == bt and at.dim < batch and at.dim + at.axes <= batch:
        return at
    if at is not None and bt is not None:
        raise Coupled(f"{describe(node)} multiplies rows with other rows")
    if at is not None and at.dim < ndim(a) - 1 and at.axes == 1 and at.dim >= batch:
        return at
    if bt is not None and bt.dim == ndim(b) - 1 and bt.dim >= batch + 1:
        return Layout(ndim(node) - 1)
    if at is not None or bt is not None:
        raise Coupled(f"{describe(node)} sums over the rows")
    return None


@rule("mm", "mv", "_scaled_mm")
def _mm(proof: Proof, node: fx.Node) -> Label:
    a, b = node.args[:2]
    return _product(proof, node, a, b, 0)  # type: ignore[arg-type]


@rule("bmm")
def _bmm(proof: Proof, node: fx.Node) -> Label:
    a, b = node.args[:2]
    return _product(proof, node, a, b, 1)  # type: ignore[arg-type]


@rule("addmm", "baddbmm", "addmv")
def _addmm(proof: Proof, node: fx.Node) -> Label:
    bias, a, b = node.args[:3]
    batch = 1 if "baddbmm" in str(node.target) else 0
    out = _product(proof, node, a, b, batch)  # type: ignore[arg-type]
    at = proof.layout(bias)
    if out is None and at is None:
        return None
    assert isinstance(bias, fx.Node)
    if at is not None:
        if out is None or Layout(ndim(node) - from_right(bias, at), at.axes) != out:
            raise Coupled(f"{describe(node)} combines rows with other rows")
    elif isinstance(out, Layout):
        right = ndim(node) - out.dim
        if ndim(bias) >= right and shape_of(bias)[ndim(bias) - right] != 1:
            raise Coupled(f"{describe(node)} combines rows with a tensor indexed by row number")
    return out


@rule("linear")
def _linear(proof: Proof, node: fx.Node) -> Label:
    tensor, at = source(proof, node)
    refuse_as_parameters(proof, node, node.args[1:])
    refuse_along(node, at, [ndim(tensor) - 1])
    return at
