"""The table of rules, and the questions that several of them ask about a node."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

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


def arg(node: fx.Node, i: int, name: str, default: Any = None) -> Any:
    return node.args[i] if len(node.args) > i else node.kwargs.get(name, default)


def ndim(node: Any) -> int:
    return len(shape_of(node))


def source(proof: Proof, node: fx.Node) -> tuple[fx.Node, Layout | None]:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source, proof.layout(source)


def refuse_row_count(proof: Proof, node: fx.Node) -> None:
    """Refuse numbers computed from the batch size: they change when fewer rows are run."""
    for n in node.all_input_nodes:
        value = n.meta.get("val")
        if not isinstance(value, (Tensor, tuple, list)) and proof.rows.mentions(value):
            raise Coupled(f"{describe(node)} uses the number of rows as a value")


def dims_of(node: fx.Node, i: int, ndim: int, name: str = "dim") -> list[int]:
    dims = arg(node, i, name)
    if dims is None or dims == []:
        return list(range(ndim))
    return [int(d) % ndim for d in ([dims] if isinstance(dims, int) else dims)]


def overlaps(at: Layout, dims: Sequence[int]) -> bool:
    return any(at.dim <= d < at.dim + at.axes for d in dims)


def refuse_along(node: fx.Node, at: Layout | None, dims: Sequence[int]) -> None:
    if at is not None and overlaps(at, dims):
        raise Coupled(f"{describe(node)} acts along the rows")


def refuse_as_parameters(proof: Proof, node: fx.Node, inputs: Sequence[Any]) -> None:
    if any(proof.layout(n) for n in inputs):
        raise Coupled(f"{describe(node)} uses rows as parameters")


def first_rows(proof: Proof, value: Any) -> Layout | None:
    rowed = isinstance(value, Tensor) and value.dim() > 0 and proof.rows.mentions(value.shape[0])
    return Layout(0) if rowed else None
