"""Where sketches can be put: found by looking at one pass, not at class names.

A *residual branch* is a module whose output goes straight into an addition; sketching it leaves the identity
path exact. Rows of a branch are tokens if a region over tokens proves itself, else samples, else the
branch is no region. Layers outside of branches are slots of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from backsketch.convert import restore_, sketch_
from backsketch.estimators import Rows, Split
from backsketch.nn.registry import adapter_of, refusal
from backsketch.regions import Region, state_of

__all__ = ["Slot", "find_slots"]

_SMALL_WEIGHT = 4096
_WEIGHTS = Split(grad_weight=Rows(keep=0.5))

LossFn = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Slot:
    """A module for which one sketch is chosen; ``row_dims`` is None where it cannot be a region."""

    name: str
    kind: str  # "branch", "layer" or "model"
    row_dims: int | None
    layers: tuple[str, ...]


def find_slots(model: nn.Module, batch: Any, loss_fn: LossFn) -> list[Slot]:
    """The slots of a model, in the order of ``named_modules``.

    Args:
        model: without sketches, in training mode.
        batch: one batch.
        loss_fn: ``loss_fn(model, batch)`` returns the scalar loss.
    """
    branches = _branches(model, batch, loss_fn)
    if not branches and _row_dims(model, [""], batch, loss_fn):
        return [Slot("", "model", 1, _layers(model, ""))]  # a plain chain is best sketched as one
    dims = _row_dims(model, branches, batch, loss_fn)
    inside = {n for b in branches for n, _ in model.named_modules() if _below(n, b)}
    found = [Slot(b, "branch", dims.get(b), _layers(model, b)) for b in branches]
    for name, module in model.named_modules():
        if name not in inside and adapter_of(module) and _is_worth_it(module):
            found.append(Slot(name, "layer", None, (name,)))
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    return sorted((s for s in found if s.layers or s.row_dims), key=lambda s: order[s.name])


def _below(name: str, top: str) -> bool:
    return not top or name == top or name.startswith(f"{top}.")


def _layers(model: nn.Module, top: str) -> tuple[str, ...]:
    return tuple(n for n, m in model.named_modules() if _below(n, top) and _is_worth_it(m))


def _is_worth_it(module: nn.Module) -> bool:
    adapter = adapter_of(module)
    if adapter is None or refusal(module, _WEIGHTS) is not None:
        return False
    return sum(weight.numel() for _, weight in adapter.weights(module)) >= _SMALL_WEIGHT


# --- residual branches ------------------------------------------------------------------------------


def _branches(model: nn.Module, batch: Any, loss_fn: LossFn) -> list[str]:
    made: dict[
        Any, list[str]
    ] = {}  # autograd node -> modules whose output it made, inner ones first
    names = {module: name for name, module in model.named_modules()}
    keep: list[Tensor] = []  # a node's identity holds only while its tensor lives

    def after(module: nn.Module, args: Any, output: Any) -> None:
        tensors = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]
        if tensors and tensors[0].grad_fn is not None and names[module]:
            made.setdefault(tensors[0].grad_fn, []).append(names[module])
            keep.append(tensors[0])

    handles = [m.register_forward_hook(after) for m in names]
    try:
        loss = loss_fn(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    with_weights = {n for n, m in model.named_modules() if any(True for _ in m.parameters())}
    makers = {
        node: n[-1] for node, ns in made.items() if (n := [n for n in ns if n in with_weights])
    }
    return list(dict.fromkeys(makers[node] for node in _branch_terms(loss.grad_fn, makers)))


def _branch_terms(root: Any, makers: dict[Any, str]) -> list[Any]:
    """Outputs of modules that are added to something they were computed from, or have an origin with.

    Of ``x + f(x)`` that of f, because x is reached from it; of ``s(x) + f(x)`` both.
    """
    found = []
    for node in _reached(root):
        terms = [n for n, _ in node.next_functions if n is not None]
        if not node.name().startswith("AddBackward") or len(terms) != 2:
            continue
        if any("AccumulateGrad" in n.name() for n in terms):
            continue  # a parameter: a bias, a position table
        first, second = (_made(t, makers) for t in terms)
        if first is not None and first not in _reached(terms[1]):
            found.append(first)
        if second is not None and second not in _reached(terms[0]):
            found.append(second)
    return found


def _made(node: Any, makers: dict[Any, str]) -> Any:
    """The module output that a term is, seen through dropout, slices and the like; None without one."""
    while node is not None and node not in makers:
        following = [n for n, _ in node.next_functions if n is not None]
        node = following[0] if len(following) == 1 else None
    return node


def _reached(root: Any) -> list[Any]:
    """All nodes at or below one, in order of discovery."""
    seen, stack = {root: None}, [root]
    while stack:
        for n, _ in stack.pop().next_functions:
            if n is not None and n not in seen:
                seen[n] = None
                stack.append(n)
    return list(seen)


# --- rows -------------------------------------------------------------------------------------------


def _row_dims(model: nn.Module, branches: list[str], batch: Any, loss_fn: LossFn) -> dict[str, int]:
    """The most leading dimensions whose rows a region over each branch keeps apart."""
    found: dict[str, int] = {}
    for dims in (2, 1):
        rest = [b for b in branches if b not in found]
        accepted = []
        for branch in rest:
            try:
                sketch_(model, {branch: Region(keep=0.5, row_dims=dims)})
                accepted.append(branch)
            except ValueError:  # batch statistics, say: refused before anything runs
                continue
        if not accepted:
            continue
        sketch_(model, {b: Region(keep=0.5, row_dims=dims) for b in accepted})
        try:
            parameters = [p for p in model.parameters() if p.requires_grad]
            torch.autograd.grad(loss_fn(model, batch), parameters, allow_unused=True)
            for branch in accepted:
                if state_of(model.get_submodule(branch)).status == "active":
                    found[branch] = dims
        finally:
            restore_(model)
    return found
