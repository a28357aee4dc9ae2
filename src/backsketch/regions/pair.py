"""A captured forward and backward graph as one ``autograd.Function``, thin enough for small modules.

AOTAutograd's own runtime handles mutation, aliasing and subclasses, at more than 100 µs a call. A region
has none of these (they are refused, or copied away while it is captured), so that what is left is
passing saved values from one graph to the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd import Function

from backsketch.ops.double_backward import without_double_backward
from backsketch.regions.program import Program
from backsketch.regions.state import CURRENT, RegionState

__all__ = ["Pair"]


@dataclass
class Pair:
    """How values pass between the graphs of one :class:`Program`, and the call that runs them.

    ``saved`` and ``sizes`` are the ranges of saved tensors and saved integers among the outputs of the
    forward graph; ``tangents`` the outputs that the backward graph wants cotangents of, ``formats`` how these were
    laid out when they were traced; ``order`` says where each argument of the backward graph comes
    from.
    """

    program: Program
    forward: Callable[..., Any] | None = None
    num_outputs: int = 0
    num_inputs: int = 0
    saved: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()
    tangents: tuple[int, ...] = ()
    formats: tuple[torch.memory_format | None, ...] = ()
    order: list[int] = field(default_factory=list)
    backward: fx.GraphModule | None = None
    backward_inputs: Sequence[Any] = ()
    aliases: bool = False

    def connect(self, fw: fx.GraphModule, bw: fx.GraphModule, num_outputs: int) -> None:
        """Read off the graphs which value goes where."""
        outputs = _outputs(fw)
        self.num_outputs = num_outputs
        self.num_inputs = len(fw.graph.find_nodes(op="placeholder"))
        kept = range(num_outputs, len(outputs))
        self.saved = tuple(i for i in kept if isinstance(outputs[i].meta["val"], Tensor))
        self.sizes = tuple(i for i in kept if i not in self.saved)
        names = [outputs[i].name for i in (*self.saved, *self.sizes)]
        placeholders = bw.graph.find_nodes(op="placeholder")
        cotangents = [p for p in placeholders if "tangents" in str(p.target)]
        if [p for p in placeholders if p.name not in names] != cotangents:
            return self._refuse(
                "its backward graph needs values that its forward graph does not save"
            )
        self.backward, self.backward_inputs = bw, [p.meta["val"] for p in placeholders]
        self.order = [names.index(p.name) for p in placeholders if p.name in names]
        self.formats = tuple(_memory_format(p.meta["val"]) for p in cotangents)
        if None in self.formats:
            self.aliases = True

    def check(self, metadata: Any) -> None:
        """Find out whether outputs are plain new tensors, or what stands against it."""
        if metadata is None:
            return self._refuse("PyTorch tells nothing about its outputs")
        if metadata.num_mutated_inp_runtime_indices or metadata.mutated_graph_handled_indices:
            self._refuse("it changes a buffer or an argument in place")
        self.aliases = self.aliases or bool(metadata.num_outputs_aliased)
        self.tangents = tuple(
            i
            for i, out in enumerate(metadata.output_info)
            if out.requires_grad and issubclass(out.raw_type, Tensor)
        )
        if not self.aliases and len(self.tangents) != len(metadata.traced_tangents):
            self._refuse("its outputs are not plain tensors")

    def is_plain(self, num_inputs: int) -> bool:
        """Whether this class can run the graphs; if not, the program's refusal says why."""
        if self.aliases:
            self._refuse("its outputs share memory")
        if num_inputs != self.num_inputs:
            self._refuse("its arguments share memory")
        return self.program.refusal is None

    def _refuse(self, reason: str) -> None:
        self.program.refusal = self.program.refusal or reason

    def __call__(self, *args: Any) -> Any:
        """The module's forward pass on the flat inputs of its graph."""
        return _Region.apply(self, *args)


class _Region(Function):
    @staticmethod
    def forward(ctx: Any, pair: Pair, *args: Any) -> Any:
        assert pair.forward is not None
        with _casts_in_the_graph():
            values = pair.forward(list(args))
        ctx.pair, ctx.state = pair, CURRENT.state
        ctx.sizes = [values[i] for i in pair.sizes]
        saved = [values[i] for i in pair.saved]
        # A view keeps its base's history alive; what is saved needs none.
        ctx.save_for_backward(*[t.detach() if t._is_view() else t for t in saved])
        outputs = tuple(values[: pair.num_outputs])
        plain = [y for i, y in enumerate(outputs) if i not in pair.tangents]
        if plain:
            ctx.mark_non_differentiable(*[y for y in plain if isinstance(y, Tensor)])
        return outputs

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        return None, *without_double_backward(
            _vjp, ctx.pair, ctx.state, ctx.sizes, *ctx.saved_tensors, *cotangents
        )


def _vjp(pair: Pair, state: RegionState | None, sizes: list[int], *tensors: Tensor) -> Any:
    """Gradients of the inputs, from the saved tensors and the cotangents of all outputs."""
    saved, cotangents = tensors[: len(pair.saved)], tensors[len(pair.saved) :]
    values = [*saved, *sizes]
    args = [values[i] for i in pair.order]
    for i, layout in zip(pair.tangents, pair.formats):
        assert layout is not None, "a cotangent without a layout"  # it would have been copied
        args.append(cotangents[i].contiguous(memory_format=layout))
    with _casts_in_the_graph():
        return tuple(pair.program.backward(state, args))


def _casts_in_the_graph() -> Any:
    """Autocast off, where it is on: the captured graph holds the casts."""
    on = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
    return torch._C._DisableAutocast() if on else nullcontext()


def _memory_format(value: Tensor) -> torch.memory_format | None:
    """How a cotangent was laid out when it was traced; None where that has no name."""
    named = {4: torch.channels_last, 5: torch.channels_last_3d}
    if value.is_contiguous():
        return torch.contiguous_format
    other = named.get(value.dim())
    return other if other is not None and value.is_contiguous(memory_format=other) else None


def _outputs(module: fx.GraphModule) -> Sequence[Any]:
    (output,) = module.graph.find_nodes(op="output")
    return output.args[0]
