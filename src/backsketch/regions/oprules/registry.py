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
    """Decorator: the rule of the operators with these names."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def arg(node: fx.Node, i: int, name: str, default: Any = None) -> Any:
    """An argument by position or by name."""
    return node.args[i] if len(node.args) > i else node.kwargs.get(name, default)


def ndim(node: Any) -> int:
    """The number of dimensions of a node's value."""
    return len(shape_of(node))


def source(proof: Proof, node: fx.Node) -> tuple[fx.Node, Layout | None]:
    """The first argument, and where its rows are."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source, proof.layout(source)


def refuse_row_count(proof: Proof, node: fx.Node) -> None:
    """Refuse numbers computed from the batch size: they change when fewer rows are run."""
    for n in node.all_input_nodes:
        value = n.meta.get("val")
        if not isinstance(value, (Tensor, tuple, list)) and proof.rows.mentions(value):
            raise Coupled(f"{describe(node)} uses the number of rows as a value")


def dims_of(node: fx.Node, i: int, num_dims: int, name: str = "dim") -> list[int]:
    """The dimensions that an operator acts on; all of them where it names none."""
    dims = arg(node, i, name)
    if dims is None or dims == []:
        return list(range(num_dims))
    return [int(d) % num_dims for d in ([dims] if isinstance(dims, int) else dims)]


def overlaps(at: Layout, dims: Sequence[int]) -> bool:
    """Whether rows run along one of the dimensions."""
    return any(at.dim <= d < at.dim + at.axes for d in dims)


def refuse_along(node: fx.Node, at: Layout | None, dims: Sequence[int]) -> None:
    """Refuse an operator that acts along the dimensions of the rows."""
    if at is not None and overlaps(at, dims):
        raise Coupled(f"{describe(node)} acts along the rows")


def refuse_as_parameters(proof: Proof, node: fx.Node, inputs: Sequence[Any]) -> None:
    """Refuse rows where an operator expects what all rows share."""
    if any(proof.layout(n) for n in inputs):
        raise Coupled(f"{describe(node)} uses rows as parameters")


def first_rows(proof: Proof, value: Any) -> Layout | None:
    """Rows along the first dimension, if its size says so."""
    rowed = isinstance(value, Tensor) and value.dim() > 0 and proof.rows.mentions(value.shape[0])
    return Layout(0) if rowed else None
