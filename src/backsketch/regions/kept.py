"""What a captured forward graph keeps for its backward graph, in bytes, by how it is kept."""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch import Tensor, fx

from backsketch.regions import low_precision as low
from backsketch.regions.partition import PIECES, VIEWS, args_of, name_of
from backsketch.regions.share import numel

__all__ = ["Kept", "kept_bytes"]


@dataclass(frozen=True)
class Kept:
    """Bytes that a forward graph keeps for its backward graph, parameters and arguments left out.

    ``exact`` are those of tensors that are kept as they are, by the first operator that reads them.
    """

    rounded: int
    exact: dict[str, int]

    def __str__(self) -> str:
        total = max(self.rounded + sum(self.exact.values()), 1)
        large = sorted(self.exact.items(), key=lambda item: -item[1])[:4]
        kinds = ", ".join(
            f"{size / total:.0%} {name}" for name, size in large if size > 0.005 * total
        )
        return f"{self.rounded / total:.0%} of the bytes it keeps rounded" + (
            f" (as they are: {kinds})" if kinds else ""
        )


def kept_bytes(fw: fx.GraphModule, bw: fx.GraphModule, num_outputs: int) -> Kept:
    """What is saved between two graphs, whose forward one has so many outputs of the module's."""
    (output,) = fw.graph.find_nodes(op="output")
    readers = {p.name: p for p in bw.graph.find_nodes(op="placeholder")}
    rounded = 0
    exact: dict[str, int] = {}
    for node in {n for n in args_of(output)[0][num_outputs:] if isinstance(n, fx.Node)}:
        value = node.meta.get("val")
        if node.op == "placeholder" or not isinstance(value, Tensor):
            continue
        size = numel(value) * value.element_size()
        made = args_of(node)[0] if node.target is operator.getitem else node
        if made.target in low.PACKERS:
            rounded += size
        else:
            name = _reader(readers[node.name]) if node.name in readers else "nothing"
            exact[name] = exact.get(name, 0) + size
    return Kept(rounded, exact)


def _reader(node: fx.Node) -> str:
    """The first operator that reads a saved tensor, through views."""
    for user in node.users:
        name = name_of(user) or "getitem"
        return _reader(user) if name in VIEWS | PIECES | {"getitem"} and user.users else name
    return "nothing"
