r"""How backward operators read what the forward pass kept: one rule for each kind of operator.

Each rule names the tensor that its operator need not read as it is, and edits the operator:

* matrix products, convolutions and entry-wise products are linear in it: it is rounded,
* an activation's derivative is computed in the forward pass and rounded; one bit an entry for a ReLU,
* the mask of a dropout is kept as bits,
* the gradient of a log softmax is linear in the probabilities, which are rounded,
* the gradient of a norm is quadratic in its input, of which two roundings are kept.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from backsketch.regions import low_precision as low
from backsketch.regions.partition import args_of, dropout_scale, is_turned, name_of
from backsketch.regions.saver import RESHAPES, SEED, STREAM, Saver, Use, source_of
from backsketch.regions.share import hint, is_worth_it

__all__ = ["use_of"]

aten = torch.ops.aten
_CONVERT = torch.ops.prims.convert_element_type.default


def use_of(saver: Saver, node: fx.Node) -> Use | None:
    """What a backward operator reads that can be rounded; None if nothing is known."""
    rule = _RULES.get(name_of(node))
    return None if rule is None else rule(saver, node)


def _is_cotangent(saver: Saver, node: Any) -> bool:
    return isinstance(node, fx.Node) and node in saver.backward


def _same_kind(a: fx.Node, b: fx.Node) -> bool:
    """Whether two tensors have one shape and type."""
    x, y = a.meta["val"], b.meta["val"]
    return x.dtype == y.dtype and list(map(str, x.shape)) == list(map(str, y.shape))


# --- linear in what is read -------------------------------------------------------------------------


def _matrix_product(saver: Saver, node: fx.Node) -> Use | None:
    """``g.T @ x``, or ``x.T @ g``, which is its transpose."""
    x = _operands(saver, node)[1]
    return Use(x, _replace_matrix_product) if saver.can_round(x) else None


def _operands(saver: Saver, node: fx.Node) -> tuple[Any, Any]:
    """g and x of ``g.T @ x`` or ``x.T @ g``; None for x if a product is neither."""
    a, b = args_of(node)
    if a not in saver.backward:
        return b, is_turned(a)
    g = is_turned(a)
    return g, None if g is None else b


def _replace_matrix_product(saver: Saver, node: fx.Node) -> None:
    g, x = _operands(saver, node)
    first = x is args_of(node)[1]
    rows, columns = g.meta["val"].shape
    large = is_worth_it(hint(rows), hint(columns), hint(x.meta["val"].shape[1]))
    if saver.products and large:
        codes, scales = saver.pack(x, "product", low.product_pack_operator, SEED, STREAM)
    else:
        codes, scales = saver.rounded(x)
        width = saver.sizes(x)[1]
    with saver.graph.inserting_before(node):
        if saver.products and large:
            seed = saver.backward_seed(codes)
            args = (g, None, None, codes, scales, seed, saver.stream(), False)
            new = saver.backward_call(
                operator.getitem, saver.backward_call(low.vjps_operator, *args), 1
            )
        else:
            new = saver.backward_call(low.saved_mm_operator, g, codes, scales, width, saver.bits)
        new = new if first else saver.backward_call(aten.t.default, new)
    saver.replace(node, new)


def _batched_product(saver: Saver, node: fx.Node) -> Use | None:
    """``g @ x`` or ``x @ g`` of batches of matrices."""
    a, b = args_of(node)
    x = b if a in saver.backward else a
    return Use(x, _restoring(x)) if saver.can_round(x) else None


def _experts(saver: Saver, node: fx.Node) -> Use | None:
    """Products of each row with the matrix of its expert: ``(x, weights, ends of groups, g)``."""
    x, weight, _, g = args_of(node)
    fits = saver.can_round(x) and _is_cotangent(saver, g) and not _is_cotangent(saver, weight)
    return Use(x, _restoring(x)) if fits else None


def _convolution(saver: Saver, node: fx.Node) -> Use | None:
    g, x = args_of(node)[:2]
    return Use(x, _restoring(x)) if saver.can_round(x) and _is_cotangent(saver, g) else None


def _restoring(x: fx.Node) -> Callable[[Saver, fx.Node], None]:
    """The operator reads the rounded tensor, unpacked."""

    def replace(saver: Saver, node: fx.Node) -> None:
        codes, scales = saver.rounded(x)
        value, sizes = x.meta["val"], saver.sizes(x)
        with saver.graph.inserting_before(node):
            args = (codes, scales, sizes, saver.bits)
            new = saver.backward_call(low.restore_operator, *args)
            if new.meta["val"].dtype != value.dtype:
                new = saver.backward_call(_CONVERT, new, value.dtype)
        node.replace_input_with(x, new)

    return replace


def _entrywise(saver: Saver, node: fx.Node) -> Use | None:
    """``g * x`` of equal shapes."""
    a, b = args_of(node)[:2]
    g, x = (a, b) if _is_cotangent(saver, a) else (b, a)
    fits = _is_cotangent(saver, g) and saver.can_round(x) and _same_kind(g, x)

    def replace(saver: Saver, node: fx.Node) -> None:
        cotangent = next(n for n in args_of(node)[:2] if n is not x)
        _times(saver, node, cotangent, *saver.rounded(x))

    return Use(x, replace) if fits else None


def _times(saver: Saver, node: fx.Node, g: fx.Node, codes: fx.Node, scales: fx.Node) -> None:
    with saver.graph.inserting_before(node):
        new = saver.backward_call(low.times_operator, g, codes, scales, saver.bits, low.GROUP)
    saver.replace(node, new)


# --- activations ------------------------------------------------------------------------------------


def _activation(saver: Saver, node: fx.Node) -> Use | None:
    """``g`` times a derivative at x, or at y = f(x)."""
    g, x = args_of(node)[:2]
    fits = _is_cotangent(saver, g) and saver.can_round(x) and _same_kind(g, x)
    return Use(x, _replace_activation) if fits else None


def _replace_activation(saver: Saver, node: fx.Node) -> None:
    g, x = args_of(node)[:2]
    name = name_of(node).removesuffix("_backward")
    value = _value_of(saver, x, name)
    if value is not None and node.kwargs.get("approximate", "none") == "none":
        args = (value, name, SEED, STREAM, saver.bits, low.GROUP)
        packed = saver.pack(x, "slope", low.pack_slope_operator, *args)
    else:
        packed = saver.rounded(_slope(saver, node, saver.early(x)), of=x)
    _times(saver, node, g, *packed)


def _value_of(saver: Saver, x: fx.Node, name: str) -> fx.Node | None:
    """The result of the activation at x, where the rounding knows its derivative."""
    if name not in ("gelu", "silu"):
        return None
    values = saver.graph.find_nodes(op="call_function", target=getattr(aten, name).default)
    source = source_of(x, RESHAPES)
    shown = (
        v for v in values if saver.is_early(v) and v.kwargs.get("approximate") in (None, "none")
    )
    return next((v for v in shown if source_of(args_of(v)[0], RESHAPES) is source), None)


def _slope(saver: Saver, node: fx.Node, x: fx.Node) -> fx.Node:
    """The derivative at x: what the backward operator makes of ones."""
    with saver.behind(x):
        ones = saver.forward(aten.ones_like.default, x)
        args = (ones, x, *args_of(node)[2:])
        slope = saver.graph.call_function(node.target, args, dict(node.kwargs))  # type: ignore[arg-type]
    slope.meta = {"val": x.meta["val"], "partitioner_tag": "is_forward"}
    return slope


def _threshold(saver: Saver, node: fx.Node) -> Use | None:
    """A ReLU: one bit an entry."""
    g, y = args_of(node)[:2]
    fits = _is_cotangent(saver, g) and saver.can_round(y) and _same_kind(g, y)
    return Use(y, _replace_threshold) if fits and saver.can_mask(y) else None


def _replace_threshold(saver: Saver, node: fx.Node) -> None:
    g, y, limit = args_of(node)
    y = saver.early(y)
    with saver.behind(y):
        bits = saver.forward(low.mask_operator, y, float(limit), math.inf)
    with saver.graph.inserting_before(node):
        new = saver.backward_call(low.masked_operator, g, bits, 0.0)
    saver.replace(node, new)


# --- losses -----------------------------------------------------------------------------------------


def _log_softmax(saver: Saver, node: fx.Node) -> Use | None:
    """``g - p sum(g)`` is linear in the probabilities p."""
    g, y = args_of(node)[:2]
    fits = _is_cotangent(saver, g) and saver.can_round(y) and _same_kind(g, y)
    return Use(y, _replace_log_softmax) if fits else None


def _replace_log_softmax(saver: Saver, node: fx.Node) -> None:
    g, y, dim = args_of(node)[:3]
    early = saver.early(y)
    with saver.behind(early):
        p = saver.forward(aten.exp.default, early)
    codes, scales = saver.rounded(p, of=y)
    sizes = saver.sizes(y)
    with saver.graph.inserting_before(node):
        restored = saver.backward_call(low.restore_operator, codes, scales, sizes, saver.bits)
        if restored.meta["val"].dtype != g.meta["val"].dtype:
            restored = saver.backward_call(_CONVERT, restored, g.meta["val"].dtype)
        total = saver.backward_call(aten.sum.dim_IntList, g, [dim], True)
        removed = saver.backward_call(aten.mul.Tensor, restored, total)
        new = saver.backward_call(aten.sub.Tensor, g, removed)
    saver.replace(node, new)


def _picked(saver: Saver, node: fx.Node) -> Use | None:
    """The gradient of picked entries reads no more than the sizes of what they are picked from."""
    y = args_of(node)[1]
    return Use(y, _replace_by_nothing) if saver.can_round(y) else None


def _replace_by_nothing(saver: Saver, node: fx.Node) -> None:
    _, y, picks = args_of(node)[:3]
    sizes = saver.sizes(y)
    with saver.graph.inserting_before(node):
        nothing = saver.backward_call(aten.new_zeros.default, picks, [])
        nothing = saver.backward_call(_CONVERT, nothing, y.meta["val"].dtype)
        nothing = saver.backward_call(aten.expand.default, nothing, sizes)
    node.replace_input_with(y, nothing)


# --- dropout ----------------------------------------------------------------------------------------


def _dropout(saver: Saver, node: fx.Node) -> Use | None:
    """``g`` times the mask of a dropout, and a number."""
    g, mask, _ = args_of(node)
    drawn = args_of(mask)[0] if mask.target is operator.getitem else None
    is_mask = isinstance(drawn, fx.Node) and name_of(drawn) == "native_dropout"
    fits = is_mask and saver.is_early(mask) and _is_cotangent(saver, g) and saver.can_mask(mask)
    return Use(mask, _replace_dropout) if fits else None


def _replace_dropout(saver: Saver, node: fx.Node) -> None:
    g, mask, _ = args_of(node)
    with saver.behind(mask):
        bits = saver.forward(low.mask_operator, mask, 0.5, math.inf)
    with saver.graph.inserting_before(node):
        kept = saver.backward_call(low.masked_operator, g, bits, 0.0)
        scale = dropout_scale(args_of(args_of(mask)[0])[1], g.meta["val"])
        new = saver.backward_call(aten.mul.Tensor, kept, scale)
    saver.replace(node, new)


# --- norms ------------------------------------------------------------------------------------------


def _layer_norm(saver: Saver, node: fx.Node) -> Use | None:
    x = args_of(node)[1]
    return Use(x, _replace_layer_norm) if saver.can_round(x) else None


def _replace_layer_norm(saver: Saver, node: fx.Node) -> None:
    g, x, _, *stats, weight = args_of(node)[: 6 if "layer" in name_of(node) else 5]
    mean, rstd = stats if len(stats) == 2 else (None, *stats)
    codes, scales = saver.rounded(x, twice=True)
    with saver.graph.inserting_before(node):
        args = (g, weight, mean, rstd, codes, scales, saver.bits)
        new = saver.backward_call(low.saved_layer_norm_operator, *args)
    saver.replace(node, new)


def _group_norm(saver: Saver, node: fx.Node) -> Use | None:
    return Use(args_of(node)[1], _replace_group_norm) if _is_norm(saver, node) else None


def _is_norm(saver: Saver, node: fx.Node) -> bool:
    g, x = args_of(node)[:2]
    return _is_cotangent(saver, g) and saver.can_round(x) and _same_kind(g, x)


def _replace_group_norm(saver: Saver, node: fx.Node) -> None:
    g, x, mean, rstd, weight = args_of(node)[:5]
    groups = args_of(node)[8]
    codes, scales = saver.rounded(x, twice=True)
    with saver.graph.inserting_before(node):
        args = (g, weight, mean, rstd, codes, scales, groups, saver.bits)
        new = saver.backward_call(low.saved_group_norm_operator, *args)
    saver.replace(node, new)


def _batch_norm(saver: Saver, node: fx.Node) -> Use | None:
    """By the statistics of the batch."""
    is_training = args_of(node)[7]
    fits = is_training and _is_norm(saver, node)
    return Use(args_of(node)[1], _replace_batch_norm) if fits else None


def _replace_batch_norm(saver: Saver, node: fx.Node) -> None:
    g, x, weight, _, _, mean, rstd = args_of(node)[:7]
    codes, scales = saver.rounded(x, twice=True)
    with saver.graph.inserting_before(node):
        args = (g, weight, mean, rstd, codes, scales, saver.bits)
        new = saver.backward_call(low.saved_batch_norm_operator, *args)
    saver.replace(node, new)


_POINTWISE = "gelu silu tanh sigmoid softplus hardswish mish leaky_relu hardtanh"
_RULES: dict[str, Callable[[Saver, fx.Node], Use | None]] = {
    "mm": _matrix_product,
    "bmm": _batched_product,
    "mul": _entrywise,
    "convolution_backward": _convolution,
    "threshold_backward": _threshold,
    "native_layer_norm_backward": _layer_norm,
    "_fused_rms_norm_backward": _layer_norm,
    "native_group_norm_backward": _group_norm,
    "native_batch_norm_backward": _batch_norm,
    "native_dropout_backward": _dropout,
    "_log_softmax_backward_data": _log_softmax,
    "nll_loss_backward": _picked,
    "grouped_mm_fallback_backward": _experts,
    **{f"{name}_backward": _activation for name in _POINTWISE.split()},
}
