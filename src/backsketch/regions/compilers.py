"""How captured graphs are run: node by node, or compiled by inductor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from backsketch.regions import rows as row_ops
from backsketch.regions.rows import Layout
from backsketch.torch_private import (
    batch_norm_with_statistics,
    boxed,
    compile_inner,
    decompositions,
    layout_of,
    min_cut_partition,
)

__all__ = ["COMPILERS", "Compiler", "Inductor", "Rows", "Runner", "copied"]

Runner = Callable[..., Sequence[Any]]

aten = torch.ops.aten
_RANDOM = (aten.native_dropout, aten.bernoulli, aten.rand_like, aten.randn_like)


class Rows(NamedTuple):
    """Where rows are among the saved tensors and the gradients; ``axis`` carries the kept ones.

    ``plain`` says which saved tensors are contiguous with one slice to a row: a single ``index_select``.
    """

    saved: Sequence[Layout | None]
    gradients: Sequence[Layout | None]
    axis: int
    plain: Sequence[bool]


class Compiler:
    """Plain execution: every operator of the graph is called in turn, as eager PyTorch would."""

    def decompositions(self) -> dict[Any, Any]:
        return {}

    def inner_partition(self, mode: str) -> Any:
        """The partitioner of a mode, None for PyTorch's default one."""
        return None

    def forward(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return boxed(_with_eager_norms(copied(graph)).forward)

    def backward(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> Runner:
        """The graph on all rows: a function of the list of arguments."""
        return boxed(_as_eager(copied(graph)).forward)

    def kept_backward(self, graph: fx.GraphModule, inputs: Sequence[Any], rows: Rows) -> Runner:
        """The graph on kept rows: a function of (index, lead, full-size saved tensors, cotangents).

        Every saved tensor is gathered just before it is read, so that it is still in cache then.
        """
        run = _as_eager(fx.GraphModule(graph, _gathering(graph, rows))).forward
        return lambda index, lead, args: run(index, lead, *args)


def _gathering(module: fx.GraphModule, rows: Rows) -> fx.Graph:
    """A copy of a backward graph with gathers at its inputs and scatters at its outputs."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    # The names of the graph's own placeholders are those of operators: "index" is one.
    index, lead = graph.placeholder("backsketch_index"), graph.placeholder("backsketch_lead")
    placeholders = module.graph.find_nodes(op="placeholder")
    pending = {
        p: (at, plain)
        for p, at, plain in zip(placeholders, rows.saved, rows.plain)
        if at is not None
    }

    def read(node: fx.Node) -> fx.Node:
        at, plain = pending.pop(node, (None, False))
        if at is not None and plain:
            args: Any = (env[node], at.dim, index)
            env[node] = graph.call_function(torch.index_select, args)
        elif at is not None:
            args = (env[node], at.dim, at.axes, lead, rows.axis, index)
            env[node] = graph.call_function(row_ops.take, args)
        return env[node]

    def scattered(gradient: Any, at: Layout | None) -> Any:
        if not isinstance(gradient, fx.Node) or at is None:
            return read(gradient) if isinstance(gradient, fx.Node) else gradient
        return graph.call_function(row_ops.put, (read(gradient), at.dim, at.axes, lead, index))

    for node in module.graph.nodes:
        if node.op == "output":
            graph.output(tuple(map(scattered, node.args[0], rows.gradients)))
        elif node.op == "placeholder":
            env[node] = graph.placeholder(node.name)
        else:
            env[node] = graph.node_copy(node, read)
    graph.lint()
    return graph


def _as_eager(module: fx.GraphModule) -> fx.GraphModule:
    """Without transposes of transposes, which AOTAutograd leaves around every matrix product; norms are safe.

    Views copy where they must: an operator that was put in may lay out its result otherwise than the traced one.
    """
    for node in module.graph.find_nodes(op="call_function", target=aten.view.default):
        node.target = aten.reshape.default
    for node in module.graph.find_nodes(op="call_function", target=aten.t.default):
        inner = node.args[0]
        if isinstance(inner, fx.Node) and inner.target is aten.t.default:
            node.replace_all_uses_with(inner.args[0])
    module.graph.eliminate_dead_code()
    return _with_eager_norms(module)


def _with_eager_norms(module: fx.GraphModule) -> fx.GraphModule:
    """A graph whose norms are computed as eager code does it."""
    for target, function in _EAGER_NORMS.items():
        for node in module.graph.find_nodes(op="call_function", target=target):
            node.target = function
    module.recompile()
    return module


def _batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, training: bool, *rest: float
) -> tuple[Tensor, ...]:  # fmt: skip
    """Output, statistics of the batch, and running statistics, which are not changed in place.

    Bit for bit those of eager code: on a GPU a kernel of cuDNN, for which a captured graph has PyTorch's own.
    """
    if not training:
        target = aten._native_batch_norm_legit_functional
        return tuple(target(x, weight, bias, mean, var, training, *rest))
    state = mean.clone(), var.clone()
    return *batch_norm_with_statistics(x, weight, bias, state, *rest), *state


def _group_norm_backward(g: Tensor, x: Tensor, *args: Any) -> Any:
    """PyTorch's kernel for a CPU is silently wrong where the two tensors differ in their memory format.

    Autograd makes them equal. In a captured graph ``g`` may come from another operator than it was traced with.
    """
    return aten.native_group_norm_backward(g.contiguous(memory_format=layout_of(x)), x, *args)


_EAGER_NORMS = {
    aten._native_batch_norm_legit_functional.default: _batch_norm,
    aten.native_group_norm_backward.default: _group_norm_backward,
}


class Inductor(Compiler):
    """Graphs compiled by inductor with symbolic sizes: one kernel set serves ``n`` and ``k`` rows.

    Gathers happen before the compiled graph. Random operators are not decomposed, so their results
    are saved like any activation and never drawn again.
    """

    def decompositions(self) -> dict[Any, Any]:
        table = decompositions()
        random = {getattr(op, name) for op in _RANDOM for name in op.overloads()}
        return {op: f for op, f in table.items() if op not in random}

    def inner_partition(self, mode: str) -> Any:
        return min_cut_partition if mode == "save" else None

    def forward(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return compile_inner(graph, inputs)

    def backward(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> Runner:
        return compile_inner(copied(graph), inputs, is_backward=True)

    def kept_backward(self, graph: fx.GraphModule, inputs: Sequence[Any], rows: Rows) -> Runner:
        dense = [
            x if at is None or not isinstance(x, Tensor) else row_ops.dense_like(x, at)
            for x, at in zip(inputs, [*rows.saved, *[None] * (len(inputs) - len(rows.saved))])
        ]
        compiled: Any = compile_inner(copied(graph), dense, is_backward=True)

        def run(index: Tensor, lead: Any, args: list[Any]) -> Sequence[Any]:
            for i, at in enumerate(rows.saved):
                if at is not None:
                    args[i] = row_ops.take(args[i], at.dim, at.axes, lead, rows.axis, index)
            gradients = compiled(args)
            return [
                g if at is None or g is None else row_ops.put(g, at.dim, at.axes, lead, index)
                for g, at in zip(gradients, rows.gradients)
            ]

        return run


def copied(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph, for the passes of AOTAutograd and inductor edit the one they are given."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    return fx.GraphModule(module, graph)


COMPILERS: dict[str, Compiler] = {"plain": Compiler(), "inductor": Inductor()}
