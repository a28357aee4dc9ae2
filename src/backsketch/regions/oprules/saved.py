"""Our own operators that round what is kept: in groups of consecutive entries, none of which is in two rows."""

from __future__ import annotations

import sympy
from torch import Tensor, fx

from backsketch.regions.oprules.registry import rule, source
from backsketch.regions.rows import Layout
from backsketch.regions.structure import Coupled, Label, Proof, RowSymbols, describe
from backsketch.rounding.eager import BLOCK

__all__ = ["OPERATORS", "in_whole_groups"]

_GROUP_AT = {"pack": 4, "pack_slope": 6}  # where the number of entries of a group is
OPERATORS = frozenset({*_GROUP_AT, "mask", "next_seed"})
"""Those of this library that have a rule."""


def in_whole_groups(rows: RowSymbols, value: Tensor, size: int) -> bool:
    """Whether each row has a multiple of ``size`` of the entries of a tensor, whatever the other sizes."""
    entries = rows.multiplicity(value.numel(), rows.live)
    return entries is not None and sympy.Mod(entries, size) == 0


@rule(*_GROUP_AT, "mask")
def _in_groups(proof: Proof, node: fx.Node) -> Label:
    name = node.target.overloadpacket.__name__  # type: ignore[union-attr]
    tensor, at = source(proof, node)
    read = [n for n in node.all_input_nodes if n.meta["val"].shape == tensor.meta["val"].shape]
    if len({proof.layout(n) for n in read}) > 1:
        raise Coupled(f"{describe(node)} combines rows with other rows")
    if at is None:
        return None
    size = node.args[_GROUP_AT[name]] if name in _GROUP_AT else BLOCK
    assert isinstance(size, int)
    if at.dim != 0 or not in_whole_groups(proof.rows, tensor.meta["val"], size):
        raise Coupled(f"{describe(node)} rounds entries of several rows together")
    return Layout(0) if name == "mask" else (Layout(0), Layout(0))


@rule("next_seed")
def _seed(proof: Proof, node: fx.Node) -> Label:
    """A number that no row has part in, whatever tells where it is drawn."""
    return None
