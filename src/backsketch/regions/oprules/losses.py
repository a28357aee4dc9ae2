"""Losses, which keep rows apart only where they are not reduced."""

from __future__ import annotations

from torch import Tensor, fx

from backsketch.regions.oprules.pointwise import pointwise
from backsketch.regions.oprules.registry import arg, rule
from backsketch.regions.structure import Coupled, Label, Proof, describe


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
    if arg(node, position, "reduction", default) != 0:
        raise Coupled(f"{describe(node)} is a loss that is reduced over the rows")
    if "nll" in name:
        at = proof.layout(inputs[0])
        return (at, None)
    return pointwise(proof, node)
