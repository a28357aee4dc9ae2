"""A captured forward and backward graph as one ``autograd.Function``, thin enough for small modules.

AOTAutograd's own runtime handles mutation, aliasing and subclasses, at more than 100 µs a call. A region
has none of these (they are refused, or copied away while it is captured), so that what is left is
passing saved values from one graph to the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd import Function

from backsketch.ops.double_backward import without_double_backward
from backsketch.regions.context import current
from backsketch.regions.program import Program
from backsketch.regions.state import Runtime
from backsketch.regions.structure import Coupled, outputs_of
from backsketch.torch_private import ForwardFacts, without_autocast, without_history

__all__ = ["Pair", "Wiring"]


@dataclass(frozen=True)
class Wiring:
    """How values pass from a forward graph to its backward graph.

    ``saved`` and ``sizes`` are the positions of saved tensors and saved integers among the outputs of the
    forward graph; ``tangents`` the outputs that the backward graph wants cotangents of, ``formats`` how
    these were laid out when they were traced (None: in a way that has no name); ``order`` says where
    each argument of the backward graph comes from.
    """

    num_outputs: int
    num_inputs: int
    saved: tuple[int, ...]
    sizes: tuple[int, ...]
    order: tuple[int, ...]
    tangents: tuple[int, ...]
    formats: tuple[torch.memory_format | None, ...]
    facts: ForwardFacts

    @classmethod
    def read(
        cls, fw: fx.GraphModule, bw: fx.GraphModule, num_outputs: int, facts: ForwardFacts | None
    ) -> Wiring:
        """Read off the graphs which value goes where.

        Raises:
            Coupled: the values cannot be passed by hand.
        """
        if facts is None:
            raise Coupled("PyTorch tells nothing about its outputs")
        outputs = outputs_of(fw)
        kept = range(num_outputs, len(outputs))
        saved = tuple(i for i in kept if isinstance(outputs[i].meta["val"], Tensor))
        sizes = tuple(i for i in kept if i not in saved)
        names = [outputs[i].name for i in (*saved, *sizes)]
        placeholders = bw.graph.find_nodes(op="placeholder")
        cotangents = [p for p in placeholders if "tangents" in str(p.target)]
        if [p for p in placeholders if p.name not in names] != cotangents:
            raise Coupled("its backward graph needs values that its forward graph does not save")
        return cls(
            num_outputs=num_outputs,
            num_inputs=len(fw.graph.find_nodes(op="placeholder")),
            saved=saved,
            sizes=sizes,
            order=tuple(names.index(p.name) for p in placeholders if p.name in names),
            tangents=facts.trained,
            formats=tuple(_memory_format(p.meta["val"]) for p in cotangents),
            facts=facts,
        )

    @property
    def shares_memory(self) -> bool:
        """Whether outputs share memory with each other or with an input, so that they must be copied."""
        return self.facts.aliases or None in self.formats

    def check(self, num_inputs: int) -> None:
        """See to it that outputs are plain new tensors and arguments plain tensors.

        Raises:
            Coupled: they are not.
        """
        if self.facts.mutates:
            raise Coupled("it changes a buffer or an argument in place")
        if self.shares_memory:
            raise Coupled(
                "its outputs share memory; if it fills a cache, train it with use_cache=False"
            )
        if len(self.tangents) != self.facts.num_cotangents:
            raise Coupled("its outputs are not plain tensors")
        if num_inputs != self.num_inputs:
            raise Coupled("its arguments share memory")


@dataclass(frozen=True)
class Pair:
    """The call that runs a forward graph now and a :class:`Program` in the backward pass."""

    wiring: Wiring
    forward: Callable[..., Any]
    program: Program

    def __call__(self, *args: Any) -> Any:
        """The module's forward pass on the flat inputs of its graph."""
        return _Region.apply(self, *args)


class _Region(Function):
    @staticmethod
    def forward(ctx: Any, pair: Pair, *args: Any) -> Any:
        call, wiring = current(), pair.wiring
        with without_autocast():  # the captured graph holds the casts
            values = pair.forward(list(args))
        ctx.pair, ctx.region = pair, call and call.region
        ctx.sizes = [values[i] for i in wiring.sizes]
        saved = [values[i] for i in wiring.saved]
        # A view keeps its base's history alive; what is saved needs none.
        ctx.save_for_backward(*[without_history(t) for t in saved])
        outputs = tuple(values[: wiring.num_outputs])
        plain = [y for i, y in enumerate(outputs) if i not in wiring.tangents]
        if plain:
            ctx.mark_non_differentiable(*[y for y in plain if isinstance(y, Tensor)])
        return outputs

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        return None, *without_double_backward(
            _vjp, ctx.pair, ctx.region, ctx.sizes, *ctx.saved_tensors, *cotangents
        )


def _vjp(pair: Pair, region: Runtime | None, sizes: list[int], *tensors: Tensor) -> Any:
    """Gradients of the inputs, from the saved tensors and the cotangents of all outputs."""
    wiring = pair.wiring
    saved, cotangents = tensors[: len(wiring.saved)], tensors[len(wiring.saved) :]
    values = [*saved, *sizes]
    args = [values[i] for i in wiring.order]
    for i, layout in zip(wiring.tangents, wiring.formats):
        assert layout is not None, "a cotangent without a layout"  # it would have been copied
        args.append(cotangents[i].contiguous(memory_format=layout))
    with without_autocast():
        return tuple(pair.program.backward(region, args))


def _memory_format(value: Tensor) -> torch.memory_format | None:
    """How a cotangent was laid out when it was traced; None where that has no name."""
    named = {4: torch.channels_last, 5: torch.channels_last_3d}
    if value.is_contiguous():
        return torch.contiguous_format
    other = named.get(value.dim())
    return other if other is not None and value.is_contiguous(memory_format=other) else None
