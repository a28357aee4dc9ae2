"""How single operators carry rows: one small rule per family, by operator name.

A rule receives the proof and a node and returns the layout of its output (a tuple for several
outputs). It raises :class:`Coupled` where rows meet. Operators without a rule are refused, except
pointwise ones, which PyTorch tags.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from backsketch.regions.rows import Layout
from backsketch.regions.structure import Coupled, Label, Proof, describe, shape_of

Rule = Callable[[Proof, fx.Node], Label]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def label_of(proof: Proof, node: fx.Node) -> Label:
    """Apply the rule of the node's operator."""
    target = node.target
    name = getattr(getattr(target, "overloadpacket", None), "__name__", "")
    if getattr(target, "namespace", "") not in ("aten", "prims", "backsketch_regions"):
        raise Coupled(f"{describe(node)} is not known to keep rows apart")
    schema = getattr(target, "_schema", None)
    if schema is not None and schema.is_mutable:
        raise Coupled(f"{describe(node)} updates a tensor in place")
    if name in RULES:
        return RULES[name](proof, node)
    if torch.Tag.pointwise in target.tags:  # type: ignore[union-attr]
        return _pointwise(proof, node)
    if not any(proof.layout(n) for n in node.all_input_nodes) and not _has_rows(proof, node):
        return None
    raise Coupled(f"{describe(node)} is not known to keep rows apart")


def _has_rows(proof: Proof, node: fx.Node) -> bool:
    value = node.meta["val"]
    values = value if isinstance(value, (tuple, list)) else [value]
    shapes = [v.shape for v in values if isinstance(v, Tensor)]
    return any(proof.rows.mentions(s) for shape in shapes for s in shape)


def _arg(node: fx.Node, i: int, name: str, default: Any = None) -> Any:
    return node.args[i] if len(node.args) > i else node.kwargs.get(name, default)


def _ndim(node: Any) -> int:
    return len(shape_of(node))


def _source(proof: Proof, node: fx.Node) -> tuple[fx.Node, Layout | None]:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source, proof.layout(source)


def _no_row_count(proof: Proof, node: fx.Node) -> None:
    """Refuse numbers computed from the batch size: they change when fewer rows are run."""
    for n in node.all_input_nodes:
        value = n.meta.get("val")
        if not isinstance(value, (Tensor, tuple, list)) and proof.rows.mentions(value):
            raise Coupled(f"{describe(node)} uses the number of rows as a value")


# --- pointwise, with broadcasting -------------------------------------------------------------------


def _from_right(node: fx.Node, layout: Layout) -> int:
    return _ndim(node) - layout.dim


def _aligned(proof: Proof, node: fx.Node, inputs: Sequence[fx.Node], ndim: int) -> Layout | None:
    """The common layout of broadcast inputs; every input with that dimension must have rows there."""
    found = {(_from_right(n, at), at.axes) for n in inputs if (at := proof.layout(n))}
    if not found:
        return None
    if len(found) > 1:
        raise Coupled(f"{describe(node)} combines rows with other rows")
    right, axes = found.pop()
    for n in inputs:
        if proof.layout(n) is None and _ndim(n) >= right:
            start = _ndim(n) - right
            if any(size != 1 for size in shape_of(n)[start : start + axes]):
                raise Coupled(f"{describe(node)} combines rows with a tensor indexed by row number")
    return Layout(ndim - right, axes)


@rule("native_dropout", "bernoulli", "rand_like", "randn_like", "where", "lerp", "clamp")
@rule("rrelu_with_noise_functional", "prelu", "_prelu_kernel", "masked_fill", "copy")
def _pointwise(proof: Proof, node: fx.Node) -> Label:
    _no_row_count(proof, node)
    inputs = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
    value = node.meta["val"]
    if isinstance(value, (tuple, list)):
        return tuple(_aligned(proof, node, inputs, v.dim()) for v in value)
    return _aligned(proof, node, inputs, value.dim())


@rule("full", "zeros", "ones", "empty", "new_zeros", "new_ones", "new_full", "new_empty")
@rule("zeros_like", "ones_like", "full_like", "empty_like", "scalar_tensor", "rand", "randn")
def _factory(proof: Proof, node: fx.Node) -> Label:
    """The same value, or an independent one, in every entry: rows wherever the sizes say."""
    fill = _arg(node, 1, "fill_value") if "full" in str(node.target) else None
    if isinstance(fill, fx.Node) and proof.rows.mentions(fill.meta.get("val")):
        raise Coupled(f"{describe(node)} uses the number of rows as a value")
    shape = shape_of(node)
    dims = [d for d, s in enumerate(shape) if proof.rows.mentions(s)]
    return proof.rows.layout_at(shape, dims[0]) if dims else None


# --- views ------------------------------------------------------------------------------------------


@rule("view", "_unsafe_view", "reshape", "flatten", "unflatten", "_reshape_copy")
@rule("unsqueeze", "squeeze")
def _reshape(proof: Proof, node: fx.Node) -> Label:
    source, at = _source(proof, node)
    if at is None:
        return None
    found = proof.find(shape_of(node), proof.prefix(shape_of(source), at.dim))
    if found is None:
        raise Coupled(f"{describe(node)} mixes rows with other dimensions")
    return found


@rule("detach", "alias", "clone", "contiguous", "_to_copy", "to", "lift_fresh_copy", "positive")
@rule("convert_element_type", "_conj", "device_put", "view_of", "dropout")
def _same(proof: Proof, node: fx.Node) -> Label:
    return _source(proof, node)[1]


@rule("expand")
def _expand(proof: Proof, node: fx.Node) -> Label:
    source, at = _source(proof, node)
    if at is not None:
        return Layout(_ndim(node) - _from_right(source, at), at.axes)
    shape = shape_of(node)
    dims = [d for d, s in enumerate(shape) if proof.rows.mentions(s)]
    return proof.rows.layout_at(shape, dims[0]) if dims else None


@rule("permute", "transpose", "t", "movedim", "swapaxes")
def _permute(proof: Proof, node: fx.Node) -> Label:
    source, at = _source(proof, node)
    if at is None:
        return None
    new = _permutation(node, _ndim(source))
    dims = [new.index(d) for d in range(at.dim, at.dim + at.axes)]
    if dims != list(range(dims[0], dims[0] + at.axes)):
        raise Coupled(f"{describe(node)} reorders the dimensions that count rows")
    return Layout(dims[0], at.axes)


def _permutation(node: fx.Node, ndim: int) -> list[int]:
    name = node.target.overloadpacket.__name__  # type: ignore[union-attr]
    if name == "permute":
        dims: Any = node.args[1]
        return [int(d) % ndim for d in dims]
    order = list(range(ndim))
    if name == "t":
        return order[::-1]
    if name not in ("transpose", "swapaxes"):
        raise Coupled(f"{describe(node)} is not known to keep rows apart")
    a, b = (int(d) % ndim for d in node.args[1:3])  # type: ignore[arg-type]
    order[a], order[b] = order[b], order[a]
    return order


def _dims(node: fx.Node, i: int, ndim: int, name: str = "dim") -> list[int]:
    dims = _arg(node, i, name)
    if dims is None or dims == []:
        return list(range(ndim))
    return [int(d) % ndim for d in ([dims] if isinstance(dims, int) else dims)]


def _inside(at: Layout, dims: Sequence[int]) -> bool:
    return any(at.dim <= d < at.dim + at.axes for d in dims)


def _along(node: fx.Node, at: Layout | None, dims: Sequence[int]) -> None:
    if at is not None and _inside(at, dims):
        raise Coupled(f"{describe(node)} acts along the rows")


@rule("select", "select_copy", "unbind", "unbind_copy")
def _select(proof: Proof, node: fx.Node) -> Label:
    source, at = _source(proof, node)
    dim = _arg(node, 1, "dim", 0) % _ndim(source)
    if at is None:
        return None
    _along(node, at, [dim])
    out = Layout(at.dim - (dim < at.dim), at.axes)
    value = node.meta["val"]
    return tuple(out for _ in value) if isinstance(value, (tuple, list)) else out


@rule(
    "slice", "flip", "roll", "cumsum", "cumprod", "logcumsumexp", "sort", "topk", "split", "chunk"
)
@rule("split_with_sizes", "narrow", "_softmax", "_log_softmax", "softmax", "log_softmax", "glu")
@rule("cummax", "cummin", "kthvalue", "unfold", "_safe_softmax", "prims_svd", "slice_scatter")
@rule("select_scatter", "renorm")
def _along_dim(proof: Proof, node: fx.Node) -> Label:
    """Operators on lines along one dimension that leave the others where they are."""
    name = node.target.overloadpacket.__name__  # type: ignore[union-attr]
    position = {"slice": 1, "topk": 2, "split": 2, "chunk": 2, "split_with_sizes": 2, "kthvalue": 2}
    position |= {"roll": 2, "slice_scatter": 2, "select_scatter": 2, "renorm": 2}
    default = {"slice": 0, "split": 0, "chunk": 0, "split_with_sizes": 0, "slice_scatter": 0}
    source, at = _source(proof, node)
    ndim = _ndim(source)
    dims = _arg(node, position.get(name, 1), "dim", default.get(name, -1))
    if name in ("flip", "roll"):
        dims = _arg(node, position.get(name, 1), "dims")
    dims = [int(d) % ndim for d in ([dims] if isinstance(dims, int) else dims)] or list(range(ndim))
    if name == "slice_scatter" and at is None and proof.layout(node.args[1]):
        raise Coupled(f"{describe(node)} is not known to keep rows apart")
    if name == "slice" and at is not None and _inside(at, dims) and _whole(source, node):
        return at
    _along(node, at, dims)
    value = node.meta["val"]
    return tuple(at for _ in value) if isinstance(value, (tuple, list)) else at


def _whole(source: fx.Node, node: fx.Node) -> bool:
    return all(a == b for a, b in zip(shape_of(source), shape_of(node)))


@rule("cat", "stack", "concat")
def _cat(proof: Proof, node: fx.Node) -> Label:
    inputs: Any = node.args[0]
    parts = [n for n in inputs if _ndim(n) > 0]
    if not any(proof.layout(n) for n in parts):
        return None
    labels = {proof.layout(n) for n in parts}
    at = labels.pop()
    if labels or at is None:
        raise Coupled(f"{describe(node)} joins rows with something else")
    stack = "stack" in str(node.target)
    dim = int(_arg(node, 1, "dim", 0)) % (_ndim(parts[0]) + stack)
    if stack:
        if at.dim < dim < at.dim + at.axes:
            raise Coupled(f"{describe(node)} acts along the rows")
        return Layout(at.dim + (dim <= at.dim), at.axes)
    _along(node, at, [dim])
    return at


@rule("constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d")
@rule("replication_pad1d", "replication_pad2d", "replication_pad3d", "pad")
def _pad(proof: Proof, node: fx.Node) -> Label:
    source, at = _source(proof, node)
    padded = len(node.args[1]) // 2  # type: ignore[arg-type]
    _along(node, at, range(_ndim(source) - padded, _ndim(source)))
    return at


# --- reductions -------------------------------------------------------------------------------------


@rule("sum", "mean", "amax", "amin", "var", "std", "var_mean", "std_mean", "logsumexp", "prod")
@rule("any", "all", "argmax", "argmin", "linalg_vector_norm", "norm", "max", "min", "nansum")
@rule("count_nonzero", "median", "mode")
def _reduce(proof: Proof, node: fx.Node) -> Label:
    source, at = _source(proof, node)
    if at is None:
        return None
    if isinstance(_arg(node, 1, "other"), fx.Node):
        return _pointwise(proof, node)  # max(x, y)
    name = node.target.overloadpacket.__name__  # type: ignore[union-attr]
    position = 2 if name in ("linalg_vector_norm", "norm") else 1
    dims = _dims(node, position, _ndim(source))
    if _inside(at, dims):
        raise Coupled(f"{describe(node)} reduces over the rows")
    value = node.meta["val"]
    first = value[0] if isinstance(value, (tuple, list)) else value
    removed = 0 if first.dim() == _ndim(source) else sum(d < at.dim for d in dims)
    out = Layout(at.dim - removed, at.axes)
    return tuple(out for _ in value) if isinstance(value, (tuple, list)) else out


@rule("native_layer_norm", "_fused_rms_norm", "rms_norm")
def _layer_norm(proof: Proof, node: fx.Node) -> Label:
    source, at = _source(proof, node)
    normalized = len(node.args[1])  # type: ignore[arg-type]
    _along(node, at, range(_ndim(source) - normalized, _ndim(source)))
    _shared(proof, node, node.args[2:4])
    value = node.meta["val"]
    return tuple(at for _ in value) if isinstance(value, (tuple, list)) else at


def _shared(proof: Proof, node: fx.Node, inputs: Sequence[Any]) -> None:
    if any(proof.layout(n) for n in inputs):
        raise Coupled(f"{describe(node)} uses rows as parameters")


def _leading(proof: Proof, node: fx.Node) -> Label:
    """Operators over ``(N, ...)`` that treat the entries of the first dimension alike."""
    at = _source(proof, node)[1]
    if at is None:
        return None
    if at != Layout(0):
        raise Coupled(f"{describe(node)} is not known to keep rows apart along this dimension")
    value = node.meta["val"]
    if not isinstance(value, (tuple, list)):
        return at
    return tuple(_first_rows(proof, v) for v in value)


def _first_rows(proof: Proof, value: Any) -> Layout | None:
    rowed = isinstance(value, Tensor) and value.dim() > 0 and proof.rows.mentions(value.shape[0])
    return Layout(0) if rowed else None


@rule("native_group_norm", "_native_batch_norm_legit_no_training", "convolution")
@rule("cudnn_batch_norm", "miopen_batch_norm", "native_batch_norm", "_native_batch_norm_legit")
@rule("_native_batch_norm_legit_functional", "_batch_norm_with_update", "batch_norm_with_update")
@rule("_batch_norm_with_update_functional", "_convolution")
def _leading_with_parameters(proof: Proof, node: fx.Node) -> Label:
    name = node.target.overloadpacket.__name__  # type: ignore[union-attr]
    _shared(proof, node, node.args[1:])
    if "batch_norm" in name and "no_training" not in name and _source(proof, node)[1]:
        training = True if "update" in name or "legit" in name else node.args[5]
        if training:
            raise Coupled(f"{describe(node)} normalises over the rows (batch statistics)")
    return _leading(proof, node)


_POOLING = (
    "avg_pool1d avg_pool2d avg_pool3d max_pool2d_with_indices max_pool3d_with_indices "
    "adaptive_avg_pool1d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d "
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d "
    "upsample_bicubic2d upsample_linear1d upsample_trilinear3d _upsample_bilinear2d_aa "
    "im2col col2im pixel_shuffle pixel_unshuffle channel_shuffle max_pool2d"
)
rule(*_POOLING.split())(_leading)


# --- products ---------------------------------------------------------------------------------------


def _product(proof: Proof, node: fx.Node, a: fx.Node, b: fx.Node, batch: int) -> Label:
    """``a @ b`` with ``batch`` leading batch dimensions."""
    at, bt = proof.layout(a), proof.layout(b)
    if at is not None and at == bt and at.dim < batch and at.dim + at.axes <= batch:
        return at
    if at is not None and bt is not None:
        raise Coupled(f"{describe(node)} multiplies rows with other rows")
    if at is not None and at.dim < _ndim(a) - 1 and at.axes == 1 and at.dim >= batch:
        return at
    if bt is not None and bt.dim == _ndim(b) - 1 and bt.dim >= batch + 1:
        return Layout(_ndim(node) - 1)
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
        if out is None or Layout(_ndim(node) - _from_right(bias, at), at.axes) != out:
            raise Coupled(f"{describe(node)} combines rows with other rows")
    elif isinstance(out, Layout):
        right = _ndim(node) - out.dim
        if _ndim(bias) >= right and shape_of(bias)[_ndim(bias) - right] != 1:
            raise Coupled(f"{describe(node)} combines rows with a tensor indexed by row number")
    return out


@rule("linear")
def _linear(proof: Proof, node: fx.Node) -> Label:
    source, at = _source(proof, node)
    _shared(proof, node, node.args[1:])
    _along(node, at, [_ndim(source) - 1])
    return at


_ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
    "_scaled_dot_product_fused_attention_overrideable"
)


@rule(*_ATTENTION.split())
def _attention(proof: Proof, node: fx.Node) -> Label:
    q, k, v = node.args[:3]
    if not any(proof.layout(n) for n in (q, k, v)):
        return None
    if any(proof.layout(n) != Layout(0) for n in (q, k, v)):
        raise Coupled(f"{describe(node)} attends across rows")
    _no_attention_dropout(node)
    bias = [n for n in node.all_input_nodes if n not in (q, k, v)]
    for n in bias:
        shape = shape_of(n) if isinstance(n.meta.get("val"), Tensor) else ()
        if proof.layout(n) not in (None, Layout(0)):
            raise Coupled(f"{describe(node)} has a mask that relates rows")
        if len(shape) == 4 and proof.layout(n) is None and shape[0] != 1:
            raise Coupled(f"{describe(node)} has a mask indexed by row number")
    return tuple(_first_rows(proof, v) for v in node.meta["val"])


def _no_attention_dropout(node: fx.Node) -> None:
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    p = _arg(node, names.index("dropout_p"), "dropout_p", 0.0)
    if p:
        raise Coupled(
            f"{describe(node)} has dropout inside the fused kernel, which cannot replay it row by row"
        )


# --- look-ups ---------------------------------------------------------------------------------------


@rule("embedding")
def _embedding(proof: Proof, node: fx.Node) -> Label:
    weight, indices = node.args[:2]
    _shared(proof, node, [weight])
    if _arg(node, 3, "scale_grad_by_freq", False) and proof.layout(indices):
        raise Coupled(f"{describe(node)} scales gradients by frequency over all rows")
    return proof.layout(indices)


@rule("gather", "take_along_dim", "scatter", "scatter_add", "scatter_reduce")
def _gather(proof: Proof, node: fx.Node) -> Label:
    source, at = _source(proof, node)
    tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
    labels = {proof.layout(n) for n in tensors if _ndim(n) > 0}
    if labels == {None}:
        return None
    if len(labels) != 1 or at is None:
        raise Coupled(f"{describe(node)} is not known to keep rows apart")
    _along(node, at, [int(_arg(node, 1, "dim")) % _ndim(source)])
    return at


@rule("index_select")
def _index_select(proof: Proof, node: fx.Node) -> Label:
    source, at = _source(proof, node)
    _shared(proof, node, [node.args[2]])
    _along(node, at, [int(node.args[1]) % _ndim(source)])  # type: ignore[arg-type]
    return at


@rule("index")
def _index(proof: Proof, node: fx.Node) -> Label:
    at = _source(proof, node)[1]
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


@rule("tril", "triu")
def _triangle(proof: Proof, node: fx.Node) -> Label:
    source, at = _source(proof, node)
    _along(node, at, range(_ndim(source) - 2, _ndim(source)))
    return at


@rule("nll_loss_forward", "nll_loss2d_forward", "mse_loss", "smooth_l1_loss", "huber_loss")
@rule("binary_cross_entropy", "soft_margin_loss")
def _loss(proof: Proof, node: fx.Node) -> Label:
    inputs = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
    if not any(proof.layout(n) for n in inputs):
        return None
    name = node.target.overloadpacket.__name__  # type: ignore[union-attr]
    position, default = (
        (3, 1) if "nll" in name else (3, 1) if name == "binary_cross_entropy" else (2, 1)
    )
    if _arg(node, position, "reduction", default) != 0:
        raise Coupled(f"{describe(node)} is a loss that is reduced over the rows")
    if "nll" in name:
        at = proof.layout(inputs[0])
        return (at, None)
    return _pointwise(proof, node)
