"""One captured backward graph, runnable on all rows or on the kept ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from backsketch import sampling
from backsketch.regions import rows as row_ops
from backsketch.regions.compilers import Compiler, Rows, Runner
from backsketch.regions.oprules import label_of
from backsketch.regions.rows import Layout
from backsketch.regions.state import RegionState
from backsketch.regions.structure import Coupled, Proof, RowSymbols, expr, is_random
from backsketch.regions.verify import splits_add_up


@dataclass
class Program:
    """A captured forward and backward graph, the proof about it, and what became of the proof.

    ``refusal`` is why every backward pass runs on all rows; ``verified`` turns true once the sum over
    two parts of the first batch has reproduced the exact gradients.
    """

    row_dims: int
    symbols: RowSymbols
    refusal: str | None = None
    verified: bool = False
    layouts: dict[str, Layout | None] = field(default_factory=dict)
    gradients: list[Layout | None] = field(default_factory=list)
    built: bool = False
    exact: Runner | None = None
    kept: KeptBackward | None = None

    # --- capture ------------------------------------------------------------------------------------

    def prove(self, fw: fx.GraphModule, bw: fx.GraphModule, num_outputs: int) -> None:
        """Prove row independence from the forward graph, or note the reason it fails."""
        try:
            self._prove(fw, bw, num_outputs)
        except Coupled as reason:
            self.refusal = str(reason)

    def _prove(self, fw: fx.GraphModule, bw: fx.GraphModule, num_outputs: int) -> None:
        if not self.symbols.live:
            raise Coupled("no tensor argument has a leading dimension that may vary")
        proof = Proof(self.symbols, label_of)
        for node in fw.graph.nodes:
            if node.op != "output":
                proof.visit(node)
        self.layouts = {node.name: proof.layout(node) for node in proof.labels}
        self._prove_outputs(fw, num_outputs)
        primals = fw.graph.find_nodes(op="placeholder")
        gradients = _outputs(bw)
        if len(primals) != len(gradients):
            raise Coupled("the backward graph has outputs that are not gradients")
        self.gradients = [proof.layout(p) for p in primals]
        if any(is_random(n) for n in bw.graph.nodes):
            raise Coupled("random numbers would be drawn again in the backward pass")

    def _prove_outputs(self, fw: fx.GraphModule, num_outputs: int) -> None:
        for out in _outputs(fw)[:num_outputs]:
            value = out.meta.get("val") if isinstance(out, fx.Node) else None
            if not isinstance(value, Tensor) or not value.is_floating_point():
                continue
            at = self.layouts[out.name]
            if at is None or at.dim != 0:
                raise Coupled("an output has no rows (a loss or a statistic inside the region?)")
            if not self._has_lead(value):
                raise Coupled(
                    f"an output of shape {tuple(value.shape)} does not have the {self.row_dims} leading "
                    "dimensions of the first argument"
                )

    def _has_lead(self, value: Tensor) -> bool:
        """Whether the leading sizes of an output are those of the arguments, axis by axis."""
        if value.dim() < self.row_dims:
            return False
        sizes = [expr(size) for size in value.shape[: self.row_dims]]
        return all(
            size in axis if axis else size == 1 for size, axis in zip(sizes, self.symbols.axes)
        )

    def build(self, bw: fx.GraphModule, inputs: Sequence[Any], compiler: Compiler) -> None:
        """Prepare both ways to run the backward graph."""
        self.exact = compiler.backward(bw, inputs)
        if self.refusal is None:
            try:
                self.kept = KeptBackward.from_graph(self, bw, inputs, compiler)
            except Coupled as reason:
                self.refusal = str(reason)
        self.built = True

    # --- running ------------------------------------------------------------------------------------

    def backward(self, state: RegionState | None, args: list[Any]) -> Sequence[Any]:
        """Sizes, saved tensors and cotangents -> gradients of the inputs.

        ``state`` is the region whose forward pass this belongs to: regions of one class share a graph.
        """
        assert self.exact is not None
        if self.kept is None or state is None or state.spec is None:
            return self.exact(args)
        cotangents = args[-self.kept.num_cotangents :]
        lead = tuple(cotangents[0].shape[: self.row_dims])
        scores = row_ops.scores(cotangents, self.row_dims)
        if not self.verified:
            return self._first(state, args, lead, scores)
        state.settle("active")
        if state.trace is not None:
            state.trace.append(scores)
        sample = sampling.draw_live(scores, state.spec.keep, _num_live(state, scores))
        if sample is None:
            return self.exact(args)
        return self.kept(args, lead, sample.indices, sample.weights)

    def _first(
        self, state: RegionState, args: list[Any], lead: tuple[int, ...], scores: Tensor
    ) -> Sequence[Any]:
        """The first backward pass is exact, and checks that parts of the batch add up to it."""
        assert self.exact is not None
        assert self.kept is not None
        kept, exact = self.kept, self.exact
        gradients, verdict = splits_add_up(
            lambda index: kept(args, lead, index, None),
            lambda: exact(list(args)),
            scores,
            kept.low_precision,
        )
        if verdict is None:
            return (
                gradients  # nothing to learn from zero or non-finite cotangents: try the next one
            )
        if verdict:
            self.verified = True
            state.settle("active")
        else:
            self.refusal, self.kept = "parts of the first batch do not add up to its gradient", None
            state.settle("exact", self.refusal)
        return gradients


def _outputs(module: fx.GraphModule) -> Sequence[Any]:
    (output,) = module.graph.find_nodes(op="output")
    result = output.args[0]
    assert isinstance(result, (tuple, list))
    return result


def _num_live(state: RegionState, scores: Tensor) -> int | None:
    """How many rows have a cotangent, without waiting for an accelerator.

    On the CPU they are counted with the draw. Elsewhere the fraction is measured on a region's first backward pass
    only; a later batch with more live rows is still unbiased (the draw spreads what there is).
    """
    n = scores.shape[0]
    if scores.device.type == "cpu":
        return None
    if state.live_fraction is None:
        state.live_fraction = int(torch.count_nonzero(scores)) / n
    return math.ceil(state.live_fraction * n - 1e-6)


@dataclass
class KeptBackward:
    """The captured backward graph at ``k`` rows: sizes, saved tensors and cotangents cut down."""

    run: Runner
    sizes: list[tuple[int, tuple[int, ...]]]
    num_cotangents: int
    cotangent_layouts: list[Layout]
    axis: int
    low_precision: bool

    @classmethod
    def from_graph(
        cls, program: Program, bw: fx.GraphModule, inputs: Sequence[Any], compiler: Compiler
    ) -> KeptBackward:
        """Read off where the rows of the backward graph's inputs are.

        Raises:
            Coupled: a saved size is not a multiple of the number of rows.
        """
        placeholders = bw.graph.find_nodes(op="placeholder")
        cotangents = [p for p in placeholders if "tangents" in str(p.target)]
        saved = placeholders[: len(placeholders) - len(cotangents)]
        sizes = [
            (i, _symbol_axes(program.symbols, p.meta["val"]))
            for i, p in enumerate(saved)
            if not isinstance(p.meta["val"], Tensor)
        ]
        layouts = [program.symbols.layout_at(p.meta["val"].shape, 0) for p in cotangents]
        if None in layouts:
            raise Coupled("an output has no rows (a loss or a statistic inside the region?)")
        axis = program.symbols.live[-1]
        saved_layouts = [program.layouts.get(p.name) for p in saved]
        plain = [_is_plain(program.symbols, p, program.layouts.get(p.name)) for p in saved]
        rows = Rows(saved_layouts, program.gradients, axis, plain)
        return cls(
            compiler.kept_backward(bw, inputs, rows),
            sizes,
            len(cotangents),
            [at for at in layouts if at is not None],
            axis,
            _has_low_precision(bw),
        )

    def __call__(
        self, args: Sequence[Any], lead: tuple[int, ...], index: Tensor, weights: Tensor | None
    ) -> Sequence[Any]:
        """Gradients of the sum over rows ``index``, weighted; full shape, zero in the other rows."""
        args, k = list(args), index.shape[0]
        for i, axes in self.sizes:
            for axis in axes:
                args[i] = args[i] // lead[axis] * (k if axis == self.axis else 1)
        for i, at in enumerate(self.cotangent_layouts, start=len(args) - self.num_cotangents):
            kept = row_ops.take(args[i], at.dim, at.axes, lead, self.axis, index)
            args[i] = kept if weights is None else _weigh(kept, at, weights)
        return self.run(index, lead, args)


def _weigh(kept: Tensor, at: Layout, weights: Tensor) -> Tensor:
    """Multiply each kept row by ``1 / pi``."""
    if kept.dim() == 2 and at.axes == 1 and kept.shape[0] == weights.shape[0]:
        return kept.mul_(weights.to(kept.dtype).unsqueeze(1))
    c = math.prod(kept.shape[: at.axes]) // weights.shape[0]
    w = weights if c == 1 else weights.repeat_interleave(c)
    return kept.mul_(w.to(kept.dtype).view(*kept.shape[: at.axes], *[1] * (kept.dim() - at.axes)))


def _is_plain(symbols: RowSymbols, saved: fx.Node, at: Layout | None) -> bool:
    """Whether the rows of a saved tensor are single slices of a contiguous tensor."""
    if at is None or at.axes != 1:
        return False
    value = saved.meta["val"]
    one = symbols.multiplicity(value.shape[at.dim], symbols.live) == 1
    return one and value.is_contiguous()


def _symbol_axes(symbols: RowSymbols, size: Any) -> tuple[int, ...]:
    if not symbols.mentions(size):
        return ()
    free = expr(size).free_symbols
    axes = tuple(i for i in symbols.live if free & symbols.axes[i])
    if symbols.multiplicity(size, axes) is None:
        raise Coupled(f"a size {size} is not a multiple of the number of rows")
    return axes


def _has_low_precision(bw: fx.GraphModule) -> bool:
    values = (n.meta.get("val") for n in bw.graph.nodes)
    return any(isinstance(v, Tensor) and v.dtype in (torch.bfloat16, torch.float16) for v in values)
