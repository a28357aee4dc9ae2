"""Capture a region's forward and backward graphs.

``torch.compile`` with a backend built on AOTAutograd does the capture: Dynamo guards on everything
Python that the graph depends on, AOTAutograd supplies the gradients, of which parameters are inputs
like any other (so hooks, DDP and FSDP see theirs). The leading dimensions are marked dynamic; their
symbols tell which tensors have rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from backsketch.regions.arithmetic import in_8_bits
from backsketch.regions.compilers import Compiler, copied
from backsketch.regions.compilers import Runner as GraphRunner
from backsketch.regions.context import Call, current
from backsketch.regions.copies import drop_copies
from backsketch.regions.joining import join_pieces
from backsketch.regions.kept import kept_bytes
from backsketch.regions.pair import Pair, Wiring
from backsketch.regions.partition import partition
from backsketch.regions.program import KeptBackward, Program, Rounded, RowsApart
from backsketch.regions.saving import round_saved
from backsketch.regions.spec import Region
from backsketch.regions.structure import Coupled, RowSymbols, outputs_of
from backsketch.torch_private import (
    ForwardFacts,
    aot_autograd,
    changed_inputs,
    forward_facts,
    pytree,
)

__all__ = ["Capture", "has_rows"]


_INSTEAD = (
    "Put regions on modules that leave this out, or one with keep=1.0 and arithmetic='int8' or save='int8', for "
    "which rows need not be independent"
)


class Capture:
    """A ``torch.compile`` backend that makes one :class:`Pair` per captured graph.

    ``compiler`` turns a graph into something that runs: plain execution, or inductor where the
    surrounding model is compiled. ``copies`` turns true where outputs share memory with each other or with
    an input, so that they have to be copied, which ``copying`` says is done; ``programs`` counts the graphs.
    """

    def __init__(self, spec: Region, compiler: Compiler, copying: bool = False) -> None:
        self.copying = copying
        self.mode, self.row_dims, self.compiler = spec.mode, spec.row_dims, compiler
        self.all_rows, self.int8 = spec.keep == 1, spec.arithmetic == "int8"
        self.bits = {"exact": None, "int8": 8, "int4": 4}[spec.save]
        self.programs = 0
        self.copies = False

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.programs += 1
        call = current()
        assert call is not None, "a region's graph is captured in the region's own call"
        rows = None if self.all_rows else partial(row_symbols, gm, call, self.row_dims)
        graphs = _Graphs(self.mode, self.compiler, self.int8 and self.all_rows, self.bits, rows)
        compiled = graphs.capture(gm, inputs)
        if self.all_rows:
            return _reporting(compiled, graphs)
        if graphs.run_forward is None:  # nothing requires a gradient
            return compiled
        try:
            symbols = row_symbols(gm, call, self.row_dims)
            return self._pair(graphs, symbols, len(inputs))
        except Coupled as reason:
            if self.bits is not None:  # nothing is rounded where all rows are computed after all
                compiled = _Graphs(self.mode, self.compiler).capture(gm, inputs)
            if self.copies and not self.copying:  # the next call captures it with copies
                return compiled
            return _exactly(compiled, str(reason))

    def _pair(self, graphs: _Graphs, symbols: RowSymbols, num_inputs: int) -> Pair:
        """Both graphs, run by ourselves.

        Raises:
            Coupled: rows may interact, or the graphs need AOTAutograd's runtime.
        """
        assert graphs.fw is not None
        assert graphs.bw is not None
        assert graphs.run_forward is not None
        apart = RowsApart.prove(symbols, self.row_dims, graphs.fw, graphs.bw, graphs.num_outputs)
        wiring = Wiring.read(graphs.fw, graphs.bw, graphs.num_outputs, graphs.facts)
        self.copies = self.copies or wiring.shares_memory
        wiring.check(num_inputs)
        backward, inputs = graphs.backward_graph()
        kept = KeptBackward.from_graph(apart, backward, inputs, self.compiler)

        def rounded() -> Rounded:
            graph, share = in_8_bits(backward)
            kept = KeptBackward.from_graph(apart, graph, inputs, self.compiler)
            return Rounded(self.compiler.backward(graph, inputs), kept, share)

        program = Program(graphs.run_backward, kept, rounded)
        program.note = "; ".join([program.note, *graphs.notes, *graphs.problems])
        if self.int8:  # inductor compiles only while a graph is captured
            program.rounded()
        return Pair(wiring, graphs.run_forward, program)


class _Graphs:
    """What AOTAutograd hands over while it captures one graph: it calls the methods in their order."""

    def __init__(
        self,
        mode: str,
        compiler: Compiler,
        rounded: bool = False,
        bits: int | None = None,
        rows: Callable[[], RowSymbols] | None = None,
    ) -> None:
        self.compiler, self.rounded, self.bits, self.rows = compiler, rounded, bits, rows
        self.notes: list[str] = []
        self.problems: list[str] = []
        self._partition = partition(mode, compiler.inner_partition(mode), self._edited)
        self.fw: fx.GraphModule | None = None
        self.bw: fx.GraphModule | None = None
        self.num_outputs = 0
        self.facts: ForwardFacts | None = None
        self.run_forward: Callable[..., Any] | None = None
        self._exact: GraphRunner | None = None
        self._backward: tuple[fx.GraphModule, Sequence[Any]] | None = None

    def capture(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Trace and split a graph; returns it under AOTAutograd's own runtime."""
        backend = aot_autograd(
            fw_compiler=self.forward,
            bw_compiler=self.backward,
            inference_compiler=self.compiler.forward,
            partition_fn=self.split,
            decompositions=self.compiler.decompositions(),
        )
        return backend(gm, inputs)

    def split(self, joint: fx.GraphModule, joint_inputs: Any, **options: Any) -> Any:
        self.num_outputs = options["num_fwd_outputs"]
        fw, bw = self._partition(joint, joint_inputs, **options)
        if self.bits is not None and not self.problems:
            self.notes.append(str(kept_bytes(fw, bw, self.num_outputs)))
        self.fw, self.bw = copied(fw), copied(bw)
        return fw, bw

    def forward(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.facts = forward_facts()
        _save_copies(graph, self.num_outputs, changed_inputs())
        self.run_forward = self.compiler.forward(graph, inputs)
        return self.run_forward

    def backward(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> GraphRunner:
        self._backward = graph, inputs
        if self.rounded:
            graph = self._in_8_bits(graph)
        self._exact = self.compiler.backward(graph, inputs)
        return self._exact

    def _in_8_bits(self, graph: fx.GraphModule) -> fx.GraphModule:
        """The graph with products in 8 bits, or as it is, with the reason kept."""
        try:
            rounded, share = in_8_bits(graph)
        except Coupled as reason:
            self.problems.append(str(reason))
            return graph
        (self.notes if share.rounded else self.problems).append(str(share))
        return rounded

    def _edited(self, joint: fx.GraphModule) -> fx.GraphModule:
        """The joint graph with saved tensors in a few bits, or in full, with the reason kept."""
        join_pieces(joint.graph)
        drop_copies(joint.graph)
        if self.bits is None:
            return joint
        try:
            products, rows = self.rounded and self.bits == 8, self.rows and self.rows()
            return round_saved(joint, self.bits, products, rows)
        except Coupled as reason:
            self.problems.append(str(reason))
            return joint

    def backward_graph(self) -> tuple[fx.GraphModule, Sequence[Any]]:
        """The backward graph and its example inputs, also where AOTAutograd puts off compiling it."""
        if self._backward is None:
            assert self.bw is not None
            values = [p.meta["val"] for p in self.bw.graph.find_nodes(op="placeholder")]
            self._backward = self.bw, values
        return self._backward

    @property
    def run_backward(self) -> GraphRunner:
        """The backward graph on all rows."""
        return self._exact or self.backward(*self.backward_graph())


def _save_copies(fw: fx.GraphModule, num_outputs: int, changed: frozenset[int]) -> None:
    """Save copies of the inputs that change after they were read, such as the statistics of a batch norm.

    A checkpoint inside a region reads them again in the backward pass, where autograd refuses changed ones.
    """
    inputs = fw.graph.find_nodes(op="placeholder")
    (end,) = fw.graph.find_nodes(op="output")
    values = list(outputs_of(fw))
    saved = [inputs[i] for i in sorted(changed) if inputs[i] in values[num_outputs:]]
    for node in saved:
        with fw.graph.inserting_after(inputs[-1]):
            copy = fw.graph.call_function(torch.ops.aten.clone.default, (node,))
        copy.meta["val"] = node.meta["val"]
        values[num_outputs:] = [copy if v is node else v for v in values[num_outputs:]]
    if saved:
        end.args = (tuple(values),)
        fw.recompile()


def _exactly(run: Callable[..., Any], reason: str) -> Callable[..., Any]:
    """AOTAutograd's own runtime, exact: tell the running region why."""

    def call(*args: Any) -> Any:
        running = current()
        if running is not None:
            running.region.settle("exact", reason, instead=_INSTEAD)
        return run(*args)

    return call


def _reporting(run: Callable[..., Any], graphs: _Graphs) -> Callable[..., Any]:
    """AOTAutograd's own runtime around a backward graph on all rows, in 8 bits unless that was refused."""

    def call(*args: Any) -> Any:
        running = current()
        if running is not None:
            notes, problems = "; ".join(graphs.notes), "; ".join(graphs.problems)
            if notes:
                running.region.settle("active", None, "; ".join(filter(None, [notes, problems])))
            else:
                running.region.settle("exact", problems or "nothing requires a gradient")
        return run(*args)

    return call


# --- which symbols count rows -----------------------------------------------------------------------


def row_symbols(gm: fx.GraphModule, call: Call, row_dims: int) -> RowSymbols:
    """The symbols that Dynamo made for the leading sizes of the arguments of ``call``."""
    env = _shape_env(gm)
    if env is None:
        return RowSymbols(())
    names = [_size_names(call, axis) for axis in range(row_dims)]
    axes: list[set[Any]] = [set() for _ in range(row_dims)]
    for symbol, sources in env.var_to_sources.items():
        for source in sources:
            name = source.name() if callable(source.name) else source.name
            for axis in range(row_dims):
                if name in names[axis]:
                    axes[axis] |= env.simplify(symbol).free_symbols
    # An axis that Dynamo made constant must have size one: its rows could not be told apart.
    for axis, size in enumerate(call.lead):
        if size != 1 and not axes[axis]:
            return RowSymbols(())
    return RowSymbols(tuple(frozenset(a) for a in axes))


def _shape_env(gm: fx.GraphModule) -> Any:
    fakes = [p.meta.get("example_value") for p in gm.graph.find_nodes(op="placeholder")]
    modes = [getattr(f, "fake_mode", None) for f in fakes]
    return next((mode.shape_env for mode in modes if mode is not None), None)


def _size_names(call: Call, axis: int) -> set[str]:
    names = set()
    args, kwargs = call.inputs
    for root, tree in (("L['args']", args), ("L['kwargs']", kwargs)):
        for path, leaf in pytree.tree_flatten_with_path(tree)[0]:
            if isinstance(leaf, Tensor) and has_rows(leaf, call.lead):
                names.add(f"{root}{pytree.keystr(path)}.size()[{axis}]")
    return names


def has_rows(x: Tensor, lead: tuple[int, ...]) -> bool:
    """Whether a tensor's leading sizes are those that count rows."""
    return x.dim() >= len(lead) and tuple(x.shape[: len(lead)]) == lead
