"""Modules watched while a model runs: what they were called with, and what came back to their outputs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from backsketch.torch_private import pytree

__all__ = ["Call", "Calls", "backward", "fresh", "replay", "tensors_of", "watching"]


@dataclass
class Call:
    """A module's call: its arguments, where its outputs stand in the autograd graph, their cotangents.

    ``edges`` were taken before anything could change the outputs in place; ``turn`` counts the calls of a pass.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    edges: list[GradientEdge] = field(default_factory=list)
    cotangents: list[Tensor] = field(default_factory=list)
    turn: int = 0

    @property
    def tensors(self) -> list[Tensor]:
        """All arguments that are tensors."""
        return tensors_of((self.args, self.kwargs))


Calls = dict[str, list[Call]]
"""Calls of a pass by the module's qualified name."""


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors in a nest of containers."""
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)]


@contextmanager
def watching(model: nn.Module, names: Iterable[str]) -> Iterator[Calls]:
    """Calls of these modules while the block runs."""
    calls: Calls = {name: [] for name in names}
    handles = []
    turns = itertools.count()
    for name, found in calls.items():
        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(_before(found, turns), with_kwargs=True))
        handles.append(module.register_forward_hook(_after(found)))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _before(found: list[Call], turns: Iterator[int]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        args, kwargs = pytree.tree_map_only(Tensor, fresh, (args, kwargs))
        found.append(Call(args, kwargs, turn=next(turns)))

    return hook


def _after(found: list[Call]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if found and not found[-1].edges:
            outputs = [t for t in tensors_of(output) if t.grad_fn is not None]
            found[-1].edges = [get_gradient_edge(t) for t in outputs]

    return hook


def fresh(t: Tensor) -> Tensor:
    """A leaf of the same values, to be called with again."""
    return t.detach().requires_grad_(t.requires_grad)


def backward(
    loss: Tensor, parameters: Sequence[Tensor], calls: Calls, retain_graph: bool
) -> list[Tensor]:
    """Gradients of the parameters; the calls learn their cotangents."""
    every = [call for found in calls.values() for call in found]
    edges = [edge for call in every for edge in call.edges]
    inputs: list[Any] = [*parameters, *edges]
    grads = torch.autograd.grad(loss, inputs, allow_unused=True, retain_graph=retain_graph)
    rest = iter(grads[len(parameters) :])
    for call in every:
        found = [(edge, g) for edge, g in zip(call.edges, rest) if g is not None]
        call.edges, call.cotangents = [e for e, _ in found], [g for _, g in found]
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads)]


def replay(module: nn.Module, call: Call) -> None:
    """One forward and backward pass of a module alone."""
    outputs = [t for t in tensors_of(module(*call.args, **call.kwargs)) if t.requires_grad]
    cotangents = call.cotangents or [torch.randn_like(t) for t in outputs]
    wanted = [t for t in (*call.tensors, *module.parameters()) if t.requires_grad]
    torch.autograd.grad(outputs[: len(cotangents)], wanted, cotangents, allow_unused=True)
