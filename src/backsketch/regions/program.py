"""One captured backward graph, runnable on all rows or on the kept ones."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, fx

from backsketch import sampling
from backsketch.regions import rows as row_ops
from backsketch.regions.compilers import Compiler, Rows, Runner
from backsketch.regions.oprules import label_of
from backsketch.regions.rows import Layout
from backsketch.regions.share import Share
from backsketch.regions.state import Runtime
from backsketch.regions.structure import (
    Coupled,
    Proof,
    RowSymbols,
    expr,
    is_random,
    outputs_of,
    placeholders_of,
)
from backsketch.regions.verify import splits_add_up

__all__ = ["KeptBackward", "Program", "Rounded", "RowsApart"]

_NO_ROWS = (
    "no output has rows (a loss or a statistic inside the region?): put the region on what comes before, "
    "or call the model without labels and compute the loss outside"
)


@dataclass(frozen=True)
class RowsApart:
    """The proof that rows do not interact: where they are in the values of a graph, and in its gradients.

    ``layouts`` holds the rows of every value of the forward graph by name, ``gradients`` those of the
    gradients that the backward graph returns.
    """

    row_dims: int
    symbols: RowSymbols
    layouts: dict[str, Layout | None]
    gradients: list[Layout | None]

    @classmethod
    def prove(
        cls,
        symbols: RowSymbols,
        row_dims: int,
        fw: fx.GraphModule,
        bw: fx.GraphModule,
        outputs: int,
    ) -> RowsApart:
        """Follow the rows through the forward graph, whose first ``outputs`` results are the module's.

        Raises:
            Coupled: rows may interact, or the backward graph is not a function of saved values.
        """
        if not symbols.live:
            raise Coupled("no tensor argument has a leading dimension that may vary")
        proof = Proof(symbols, label_of)
        for node in fw.graph.nodes:
            if node.op != "output":
                proof.visit(node)
        found = [_check_output(proof, out, row_dims) for out in outputs_of(fw)[:outputs]]
        if not any(found):
            raise Coupled(_NO_ROWS)
        primals = fw.graph.find_nodes(op="placeholder")
        if len(primals) != len(outputs_of(bw)):
            raise Coupled("the backward graph has outputs that are not gradients")
        if any(is_random(n) for n in bw.graph.nodes):
            raise Coupled("random numbers would be drawn again in the backward pass")
        layouts = {node.name: proof.layout(node) for node in proof.labels}
        return cls(row_dims, symbols, layouts, [proof.layout(p) for p in primals])


def _check_output(proof: Proof, out: Any, row_dims: int) -> bool:
    """Whether an output has rows, in its leading dimensions.

    One that has none does not depend on any row, or the proof would have ended: its cotangent is used as it is.

    Raises:
        Coupled: its rows are elsewhere.
    """
    value = out.meta.get("val") if isinstance(out, fx.Node) else None
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    at = proof.layout(out)
    if at is None:
        return False
    if at.dim != 0 or not _has_lead(proof.rows, value, row_dims):
        raise Coupled(
            f"an output of shape {tuple(value.shape)} does not have the {row_dims} leading "
            "dimensions of the first argument"
        )
    return True


def _has_lead(symbols: RowSymbols, value: Tensor, row_dims: int) -> bool:
    """Whether the leading sizes of an output are those of the arguments, axis by axis."""
    if value.dim() < row_dims:
        return False
    sizes = [expr(size) for size in value.shape[:row_dims]]
    return all(size in axis if axis else size == 1 for size, axis in zip(sizes, symbols.axes))


class Rounded(NamedTuple):
    """A backward graph with products in 8 bits, on all rows and on kept ones, and their share."""

    every: Runner
    kept: KeptBackward
    share: Share


@dataclass
class Program:
    """A captured backward graph on all rows, and on the kept ones.

    ``verified`` are the regions for which the sum over two parts of their first batch has reproduced the exact
    gradients; if it does not, ``refusal`` says so and every backward pass runs on all rows (from what was kept in
    a few bits, if that was asked for: that is unbiased still). Each checks for itself though they share the graph,
    or what a region draws would depend on what the process did before. ``make_rounded`` makes the same with
    products in 8 bits; it is called when a region first asks for that.
    """

    exact: Runner
    kept: KeptBackward
    make_rounded: Callable[[], Rounded]
    note: str = "rows proven independent"
    verified: WeakSet[Runtime] = field(default_factory=WeakSet)
    refusal: str | None = None
    _rounded: Rounded | Coupled | None = None

    def rounded(self) -> Rounded | Coupled:
        """The graph with products in 8 bits, or why there is none."""
        if self._rounded is None:
            try:
                self._rounded = self.make_rounded()
            except Coupled as reason:
                self._rounded = reason
        return self._rounded

    def backward(self, region: Runtime | None, args: list[Any]) -> Sequence[Any]:
        """Sizes, saved tensors and cotangents -> gradients of the inputs.

        ``region`` is the one whose forward pass this belongs to: regions of one class share a graph.
        """
        if self.refusal or region is None or region.spec is None:
            return self.exact(args)
        every, kept, note = self.exact, self.kept, self.note
        if region.spec.arithmetic == "int8":
            rounded = self.rounded()
            if isinstance(rounded, Coupled):
                region.settle("exact", str(rounded))
                return self.exact(args)
            every, kept, note = rounded.every, rounded.kept, f"{note}; {rounded.share}"
        cotangents, row_dims = self.kept.cotangents_with_rows(args), region.spec.row_dims
        lead = tuple(cotangents[0].shape[:row_dims])
        scores = row_ops.scores(cotangents, row_dims)
        if region not in self.verified:
            return self._first(region, args, lead, scores, note)
        region.settle("active", note=note)
        if region.scores is not None:
            region.scores.append(scores)
        sample = sampling.draw_live(
            scores,
            region.spec.keep,
            _num_live(region, scores),
            region.spec.design,
            row_ops.tokens(lead),
        )
        if sample is None:
            return every(args)
        return kept(args, lead, sample.indices, sample.weights)

    def _first(
        self, region: Runtime, args: list[Any], lead: tuple[int, ...], scores: Tensor, note: str
    ) -> Sequence[Any]:
        """The first backward pass is exact, and checks that parts of the batch add up to it."""
        shared = itertools.cycle((True, False))  # what has no rows belongs to one of the parts
        gradients, verdict = splits_add_up(
            lambda index: self.kept(args, lead, index, None, next(shared)),
            lambda: self.exact(list(args)),
            scores,
            self.kept.low_precision,
        )
        if verdict:
            self.verified.add(region)
            region.settle("active", note=note)
        elif verdict is False:
            self.refusal = "parts of the first batch do not add up to its gradient"
            region.settle("exact", self.refusal)
        return gradients  # without a verdict (zero or non-finite cotangents): try the next batch


def _num_live(region: Runtime, scores: Tensor) -> int | None:
    """How many rows have a cotangent, without waiting for an accelerator.

    On the CPU they are counted with the draw. Elsewhere the fraction is measured on a region's first backward pass
    only; a later batch with more live rows is still unbiased (the draw spreads what there is).
    """
    n = scores.shape[0]
    if scores.device.type == "cpu":
        return None
    if region.live_fraction is None:
        region.live_fraction = int(torch.count_nonzero(scores)) / n
    return math.ceil(region.live_fraction * n - 1e-6)


@dataclass(frozen=True)
class KeptBackward:
    """The captured backward graph at ``k`` rows: sizes, saved tensors and cotangents cut down."""

    run: Runner
    sizes: list[tuple[int, tuple[int, ...]]]
    num_cotangents: int
    cotangent_layouts: list[Layout | None]
    axis: int
    low_precision: bool

    @classmethod
    def from_graph(
        cls, apart: RowsApart, bw: fx.GraphModule, inputs: Sequence[Any], compiler: Compiler
    ) -> KeptBackward:
        """Read off where the rows of the backward graph's inputs are.

        Raises:
            Coupled: a saved size is not a multiple of the number of rows.
        """
        saved, cotangents = placeholders_of(bw)
        sizes = [
            (i, _symbol_axes(apart.symbols, p.meta["val"]))
            for i, p in enumerate(saved)
            if not isinstance(p.meta["val"], Tensor)
        ]
        layouts = [_rows_of(apart.symbols, p.meta["val"]) for p in cotangents]
        if not any(layouts):
            raise Coupled(_NO_ROWS)
        axis = apart.symbols.live[-1]
        saved_layouts = [apart.layouts.get(p.name) for p in saved]
        plain = [_is_plain(apart.symbols, p, apart.layouts.get(p.name)) for p in saved]
        rows = Rows(saved_layouts, apart.gradients, axis, plain)
        return cls(
            compiler.kept_backward(bw, inputs, rows),
            sizes,
            len(cotangents),
            layouts,
            axis,
            _has_low_precision(bw),
        )

    def cotangents_with_rows(self, args: Sequence[Any]) -> list[Tensor]:
        """The cotangents among the arguments that have rows."""
        cotangents = args[len(args) - self.num_cotangents :]
        return [g for g, at in zip(cotangents, self.cotangent_layouts) if at is not None]

    def __call__(
        self,
        args: Sequence[Any],
        lead: tuple[int, ...],
        index: Tensor,
        weights: Tensor | None,
        shared: bool = True,
    ) -> Sequence[Any]:
        """Gradients of the sum over rows ``index``, weighted; full shape, zero in the other rows.

        ``shared`` adds those of the outputs without rows.
        """
        args, k = list(args), index.shape[0]
        for i, axes in self.sizes:
            for axis in axes:
                args[i] = args[i] // lead[axis] * (k if axis == self.axis else 1)
        for i, at in enumerate(self.cotangent_layouts, start=len(args) - self.num_cotangents):
            if at is None:
                args[i] = args[i] if shared else torch.zeros_like(args[i])
                continue
            kept = row_ops.take(args[i], at.dim, at.axes, lead, self.axis, index)
            args[i] = kept if weights is None else _weigh(kept, at, weights)
        return self.run(index, lead, args)


def _rows_of(symbols: RowSymbols, cotangent: Tensor) -> Layout | None:
    return symbols.layout_at(cotangent.shape, 0) if cotangent.dim() else None


def _weigh(kept: Tensor, at: Layout, weights: Tensor) -> Tensor:
    """Multiply each kept row by ``1 / pi``.

    In 16 bits the rounding of a weight would be an error common to all draws.
    """
    weights = weights.to(torch.promote_types(kept.dtype, torch.float32))
    if kept.dim() == 2 and at.axes == 1 and kept.shape[0] == weights.shape[0]:
        return kept.mul_(weights.unsqueeze(1))
    c = math.prod(kept.shape[: at.axes]) // weights.shape[0]
    w = weights if c == 1 else weights.repeat_interleave(c)
    return kept.mul_(w.view(*kept.shape[: at.axes], *[1] * (kept.dim() - at.axes)))


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
