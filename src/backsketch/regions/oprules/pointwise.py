"""Operators that compute each entry from the entries at its index, with broadcasting."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, fx

from backsketch.regions.oprules.registry import arg, ndim, refuse_row_count, rule
from backsketch.regions.rows import Layout
from backsketch.regions.structure import Coupled, Label, Proof, describe, shape_of


def from_right(node: fx.Node, layout: Layout) -> int:
    return ndim(node) - layout.dim


def aligned(proof: Proof, node: fx.Node, inputs: Sequence[fx.Node], num_dims: int) -> Layout | None:
    """The common layout of broadcast inputs; every input with that dimension must have rows there."""
    found = {(from_right(n, at), at.axes) for n in inputs if (at := proof.layout(n))}
    if not found:
        return None
    if len(found) > 1:
        raise Coupled(f"{describe(node)} combines rows with other rows")
    right, axes = found.pop()
    for n in inputs:
        if proof.layout(n) is None and ndim(n) >= right:
            start = ndim(n) - right
            if any(size != 1 for size in shape_of(n)[start : start + axes]):
                raise Coupled(f"{describe(node)} combines rows with a tensor indexed by row number")
    return Layout(num_dims - right, axes)


@rule("native_dropout", "bernoulli", "rand_like", "randn_like", "where", "lerp", "clamp")
@rule("rrelu_with_noise_functional", "prelu", "_prelu_kernel", "masked_fill", "copy", "fill")
@rule("leaky_relu")  # which PyTorch 2.10 does not tag
def pointwise(proof: Proof, node: fx.Node) -> Label:
    refuse_row_count(proof, node)
    inputs = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
    value = node.meta["val"]
    if isinstance(value, (tuple, list)):
        return tuple(aligned(proof, node, inputs, v.dim()) for v in value)
    return aligned(proof, node, inputs, value.dim())


@rule("full", "zeros", "ones", "empty", "new_zeros", "new_ones", "new_full", "new_empty")
@rule("zeros_like", "ones_like", "full_like", "empty_like", "scalar_tensor", "rand", "randn")
def _factory(proof: Proof, node: fx.Node) -> Label:
    """The same value, or an independent one, in every entry: rows wherever the sizes say."""
    fill = arg(node, 1, "fill_value") if "full" in str(node.target) else None
    if isinstance(fill, fx.Node) and proof.rows.mentions(fill.meta.get("val")):
        raise Coupled(f"{describe(node)} uses the number of rows as a value")
    shape = shape_of(node)
    dims = [d for d, s in enumerate(shape) if proof.rows.mentions(s)]
    return proof.rows.layout_at(shape, dims[0]) if dims else None
