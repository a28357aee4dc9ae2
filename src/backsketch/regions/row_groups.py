"""Which tensors can be rounded so that the codes of single rows can be taken out afterwards."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, fx

from backsketch.regions.oprules import label_of
from backsketch.regions.oprules.saved import in_whole_groups
from backsketch.regions.structure import Proof, RowSymbols

__all__ = ["RowGroups"]


class RowGroups:
    """Where rows are in the tensors of a forward pass.

    Args:
        symbols: of the leading sizes.
        forward: the nodes of the forward pass, in order.

    Raises:
        Coupled: rows may interact.
    """

    def __init__(self, symbols: RowSymbols, forward: Iterable[fx.Node]) -> None:
        self._proof = Proof(symbols, label_of)
        for node in forward:
            if node.op != "output":
                self._proof.visit(node)

    def fit(self, node: fx.Node, size: int) -> bool:
        """Whether groups of so many consecutive entries of a tensor belong to one row each, or it has no rows."""
        if node not in self._proof.labels or not isinstance(node.meta.get("val"), Tensor):
            return False
        at = self._proof.layout(node)
        if at is None:
            return True
        return at.dim == 0 and in_whole_groups(self._proof.rows, node.meta["val"], size)
