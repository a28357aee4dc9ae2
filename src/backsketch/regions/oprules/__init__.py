"""How single operators carry rows: one small rule for each family, by operator name, one file a kind.

A rule receives the proof and a node and returns the layout of its output (a tuple for several
outputs). It raises :class:`Coupled` where rows meet. Operators without a rule are refused, except
pointwise ones, which PyTorch tags.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from backsketch.regions.oprules import (
    attention,
    leading,
    lines,
    lookups,
    losses,
    pointwise,
    products,
    reductions,
    saved,
    views,
)
from backsketch.regions.oprules.registry import RULES
from backsketch.regions.structure import Coupled, Label, Proof, describe
from backsketch.torch_private import changes_arguments

__all__ = ["KINDS", "RULES", "label_of"]

KINDS = (attention, leading, lines, lookups, losses, pointwise, products, reductions, saved, views)
"""The modules that fill :data:`RULES`."""

_NAMESPACES = ("aten", "prims")


def label_of(proof: Proof, node: fx.Node) -> Label:
    """Apply the rule of the node's operator."""
    target = node.target
    name = getattr(getattr(target, "overloadpacket", None), "__name__", "")
    if getattr(target, "namespace", "") not in _NAMESPACES and not _is_ours(target, name):
        raise Coupled(f"{describe(node)} is not known to keep rows apart")
    if changes_arguments(target):
        raise Coupled(f"{describe(node)} updates a tensor in place")
    if name in RULES:
        return RULES[name](proof, node)
    if torch.Tag.pointwise in target.tags:  # type: ignore[union-attr]
        return pointwise.pointwise(proof, node)
    if not any(proof.layout(n) for n in node.all_input_nodes) and not _has_rows(proof, node):
        return None
    raise Coupled(f"{describe(node)} is not known to keep rows apart")


def _is_ours(target: Any, name: str) -> bool:
    return getattr(target, "namespace", "") == "backsketch" and name in saved.OPERATORS


def _has_rows(proof: Proof, node: fx.Node) -> bool:
    value = node.meta["val"]
    values = value if isinstance(value, (tuple, list)) else [value]
    shapes = [v.shape for v in values if isinstance(v, Tensor)]
    return any(proof.rows.mentions(s) for shape in shapes for s in shape)
