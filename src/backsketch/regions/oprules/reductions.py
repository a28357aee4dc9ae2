"""Operators that reduce dimensions, and norms of the last ones."""

from __future__ import annotations

from torch import fx

from backsketch.regions.oprules.pointwise import pointwise
from backsketch.regions.oprules.registry import (
    arg,
    dims_of,
    ndim,
    overlaps,
    refuse_along,
    refuse_as_parameters,
    rule,
    source,
)
from backsketch.regions.rows import Layout
from backsketch.regions.structure import Coupled, Label, Proof, describe


@rule("sum", "mean", "amax", "amin", "var", "std", "var_mean", "std_mean", "logsumexp", "prod")
@rule("any", "all", "argmax", "argmin", "linalg_vector_norm", "norm", "max", "min", "nansum")
@rule("count_nonzero", "median", "mode")
def _reduce(proof: Proof, node: fx.Node) -> Label:
    tensor, at = source(proof, node)
    if at is None:
        return None
    if isinstance(arg(node, 1, "other"), fx.Node):
        return pointwise(proof, node)  # max(x, y)
    name = node.target.overloadpacket.__name__  # type: ignore[union-attr]
    position = 2 if name in ("linalg_vector_norm", "norm") else 1
    dims = dims_of(node, position, ndim(tensor))
    if overlaps(at, dims):
        raise Coupled(f"{describe(node)} reduces over the rows")
    value = node.meta["val"]
    first = value[0] if isinstance(value, (tuple, list)) else value
    removed = 0 if first.dim() == ndim(tensor) else sum(d < at.dim for d in dims)
    out = Layout(at.dim - removed, at.axes)
    return tuple(out for _ in value) if isinstance(value, (tuple, list)) else out


@rule("native_layer_norm", "_fused_rms_norm", "rms_norm")
def _layer_norm(proof: Proof, node: fx.Node) -> Label:
    tensor, at = source(proof, node)
    normalized = len(node.args[1])  # type: ignore[arg-type]
    refuse_along(node, at, range(ndim(tensor) - normalized, ndim(tensor)))
    refuse_as_parameters(proof, node, node.args[2:4])
    value = node.meta["val"]
    return tuple(at for _ in value) if isinstance(value, (tuple, list)) else at
