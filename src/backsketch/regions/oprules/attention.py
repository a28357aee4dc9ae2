"""The fused attention operators."""

from __future__ import annotations

from torch import Tensor, fx

from backsketch.regions.oprules.registry import arg, first_rows, rule
from backsketch.regions.rows import Layout
from backsketch.regions.structure import Coupled, Label, Proof, describe, shape_of
from backsketch.torch_private import position_of

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
    return tuple(first_rows(proof, v) for v in node.meta["val"])


def _no_attention_dropout(node: fx.Node) -> None:
    i = position_of(node.target, "dropout_p")
    if i is None or arg(node, i, "dropout_p", 0.0):
        raise Coupled(
            f"{describe(node)} has dropout inside the fused kernel, which cannot replay it row by row"
        )
