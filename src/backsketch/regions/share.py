"""What share of the products of a backward graph runs in 8 bits, and which of them are worth it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from backsketch.regions.partition import args_of, backward_nodes, name_of

__all__ = ["Share", "hint", "is_worth_it", "numel", "products_of"]

_LEAST_WORK = 1 << 22
_LEAST_WIDTH = 28.0


def is_worth_it(rows: int, columns: int, depth: int) -> bool:
    """Whether 8 bits make products of a ``(rows, columns)`` cotangent and a ``(columns, depth)`` weight faster.

    Measured on a processor with AVX-512 VNNI, one thread, both products and the sum for the bias, over exact:
    2.2 at 1024 -> 10, 1.2 at 32 -> 64, 0.9 at 64 -> 64 (4096 rows), 0.7 at 96 -> 384, 0.4 at 192 -> 768; and
    1.5 below some million multiply-adds, for the call itself.
    """
    wide = columns * depth >= _LEAST_WIDTH * (columns + depth)
    return wide and rows * columns * depth >= _LEAST_WORK


@dataclass(frozen=True)
class Share:
    """Multiply-adds of the products with a cotangent: those in 8 bits, and those left exact, by kind."""

    rounded: int = 0
    exact: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        total = max(self.rounded + sum(self.exact.values()), 1)
        large = {kind: work for kind, work in self.exact.items() if work > 0.005 * total}
        rest = sorted(large.items(), key=lambda item: -item[1])
        text = f"{self.rounded / total:.0%} of its backward products in 8 bits"
        kinds = ", ".join(f"{work / total:.0%} {kind}" for kind, work in rest)
        return f"{text} (exact: {kinds})" if kinds else text


def _matrix_work(node: fx.Node) -> int:
    """Multiply-adds of ``a @ b``, the last two positional arguments."""
    a = args_of(node)[-2]
    return _numel(node) * _sizes(a)[-1]


def _convolution_work(node: fx.Node) -> int:
    g, x, weight = args_of(node)[:3]
    positions = (
        x if args_of(node)[7] else g
    )  # of a transposed convolution the smaller side is the input
    each = _numel(positions) * math.prod(_sizes(weight)[1:])
    return each * sum(map(bool, args_of(node)[10][:2]))


def _attention_work(node: fx.Node) -> int:
    """Five products: the scores again, and the gradients of values, probabilities, queries and keys."""
    q, k = args_of(node)[1:3]
    return 5 * _numel(q) * _sizes(k)[-2]


def _packed_work(node: fx.Node) -> int:
    g, _, _, _, stats = args_of(node)[:5]
    return _numel(g) * _sizes(stats)[-1]


def _experts_work(node: fx.Node) -> int:
    """Both products of each row with the matrix of its expert, ``(experts, in, out)``."""
    _, weight, _, g = args_of(node)
    return 2 * _numel(g) * _sizes(weight)[1]


_WORK: dict[str, tuple[str, Callable[[fx.Node], int]]] = {
    "int8_vjps": ("", _packed_work),
    "mm": ("too small or narrow", _matrix_work),
    "addmm": ("sums of products", _matrix_work),
    "bmm": ("batched products", _matrix_work),
    "baddbmm": ("batched products", _matrix_work),
    "grouped_mm_fallback_backward": ("experts", _experts_work),
    "convolution_backward": ("convolutions that are narrow or transposed", _convolution_work),
}


def products_of(module: fx.GraphModule) -> dict[fx.Node, tuple[str, int]]:
    """The products of a backward graph with a cotangent: why each stays exact if it does, and its multiply-adds.

    Those that are in 8 bits already have no reason.
    """
    found = {}
    dependent = backward_nodes(module.graph)
    for node in module.graph.nodes:
        name = name_of(node)
        if node.op != "call_function" or node not in dependent:
            continue
        if "attention" in name and name.endswith("_backward"):
            found[node] = "fused attention", _attention_work(node)
        elif name in _WORK:
            kind, work = _WORK[name]
            found[node] = kind, work(node)
    return found


def _sizes(node: Any) -> list[int]:
    """Sizes as they were while the graph was captured, without a guard on them."""
    return [hint(size) for size in node.meta["val"].shape]


def _numel(node: Any) -> int:
    return math.prod(_sizes(node))


def numel(value: Tensor) -> int:
    """The number of entries that a tensor had when it was captured."""
    return math.prod(map(hint, value.shape))


def hint(size: Any) -> int:
    """The number that a symbolic size was when it was captured."""
    node = getattr(size, "node", None)
    return int(size if node is None else node.hint)
