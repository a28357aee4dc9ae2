"""The one recorder of calls: what a module was called with, and the cotangents that came back to its outputs."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from backsketch.regions import RegionModule, scores_of
from backsketch.torch_private import pytree

__all__ = [
    "Call",
    "Calls",
    "Hook",
    "backward",
    "fresh",
    "listen",
    "repeatable_arguments",
    "rerun",
    "tensors_of",
    "unseen",
    "vjp",
    "watching",
]


class Hook:
    """A function as a hook: a copy of the module gets one that does nothing, and so does compiled code."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> None:
        if not torch.compiler.is_compiling():
            self.function(*args)

    def __reduce__(self) -> Any:
        return _inert, ()


def _inert() -> Callable[..., None]:
    return _nothing


def _nothing(*args: Any) -> None:
    return None


def listen(
    module: nn.Module,
    called: Callable[[tuple[Any, ...], dict[str, Any]], Any],
    returned: Callable[[Any, list[Tensor]], None] = _nothing,
    arrived: Callable[[Any, int, Tensor], None] | None = None,
) -> list[Any]:
    """Put hooks on a module; the recorders of this room differ only in what they note.

    Args:
        module: any.
        called: takes the arguments of a call that can be differentiated and returns a record of it, which
            the other two receive; None if the call is not to be followed.
        returned: takes the record and the outputs that have a gradient.
        arrived: takes the record, the index of such an output and its cotangent, just before the module's own
            backward nodes run.

    Returns:
        Handles, to be removed.
    """
    records: list[Any] = []
    since = _UNSEEN.block

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        follows = torch.is_grad_enabled() and since is _UNSEEN.block
        records.append(called(args, kwargs) if follows else None)

    def after(_: nn.Module, args: Any, output: Any) -> None:
        record = records.pop() if records else None
        if record is None:
            return
        outputs = [t for t in tensors_of(output) if t.requires_grad]
        returned(record, outputs)
        if arrived is not None:
            for i, t in enumerate(outputs):
                t.register_hook(partial(arrived, record, i))

    return [
        module.register_forward_pre_hook(Hook(before), with_kwargs=True),
        module.register_forward_hook(Hook(after)),
    ]


class _Unseen(threading.local):
    """The innermost block that is open in a thread, as a mark of its own."""

    block: object = None


_UNSEEN = _Unseen()


@contextmanager
def unseen(model: nn.Module) -> Iterator[None]:
    """Passes inside the block are no training: hooks that :func:`listen` put before do not follow them.

    The row scores that regions of ``model`` collect are afterwards those from before.
    """
    found = [scores_of(m) for m in model.modules() if isinstance(m, RegionModule)]
    collected = [(trace, list(trace)) for trace in found if trace is not None]
    outer, _UNSEEN.block = _UNSEEN.block, object()
    try:
        yield
    finally:
        _UNSEEN.block = outer
        for trace, before in collected:
            trace.clear()
            trace.extend(before)


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors in a nest of containers."""
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)]


def repeatable_arguments(tree: Any) -> Any:
    """Arguments to be called with again: tensors as leaves, no caches of keys and values.

    A decoder's cache grows with each call, and holds the graph of the call before.
    """

    def again(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return fresh(leaf)
        return None if _is_cache(leaf) else leaf

    return pytree.tree_map(again, tree, is_leaf=_is_cache)


def _is_cache(value: Any) -> bool:
    return hasattr(value, "get_seq_length") and hasattr(value, "update")


def fresh(t: Tensor) -> Tensor:
    """A leaf of the same values, to be called with again."""
    return t.detach().requires_grad_(t.requires_grad)


def vjp(
    outputs: Tensor | Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor] | None = None,
    retain: bool = False,
) -> list[Tensor]:
    """Gradients of the inputs, without touching ``.grad``; zeros where unused."""
    grads = torch.autograd.grad(outputs, inputs, cotangents, retain, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, grads)]


# --- the calls of a pass ----------------------------------------------------------------------------


@dataclass(eq=False)
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


@contextmanager
def watching(model: nn.Module, names: Iterable[str]) -> Iterator[Calls]:
    """Calls of these modules while the block runs."""
    calls: Calls = {name: [] for name in names}
    turns = itertools.count()

    def called(found: list[Call], args: Any, kwargs: Any) -> Call:
        args, kwargs = repeatable_arguments((args, kwargs))
        found.append(Call(args, kwargs, turn=next(turns)))
        return found[-1]

    def returned(call: Call, outputs: list[Tensor]) -> None:
        call.edges = [get_gradient_edge(t) for t in outputs if t.grad_fn is not None]

    handles = []
    for name, found in calls.items():
        handles += listen(model.get_submodule(name), partial(called, found), returned)
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


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


def rerun(module: nn.Module, call: Call) -> list[Tensor]:
    """One forward and backward pass of a module by itself: gradients of its inputs, then of its parameters."""
    outputs = [t for t in tensors_of(module(*call.args, **call.kwargs)) if t.requires_grad]
    cotangents = call.cotangents or [torch.randn_like(t) for t in outputs]
    wanted = [t for t in (*call.tensors, *module.parameters()) if t.requires_grad]
    return vjp(outputs[: len(cotangents)], wanted, cotangents)
