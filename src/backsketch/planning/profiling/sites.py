"""Where sketches can be put: found by looking at one pass, not at class names.

A *residual branch* is a module whose output goes straight into an addition; sketching it leaves the identity
path exact. Rows of a branch are tokens if a region over tokens passes its check, else samples, else the
branch is no region. Layers outside of branches are sites of their own. Sites of one class and size are *alike*:
the first stands for the others wherever that is enough.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from backsketch.convert import restore_, sketch_
from backsketch.estimators import Int8, Rows, Split
from backsketch.nn.registry import adapter_of, advice, is_small, refusal
from backsketch.planning.measure.passes import LossFn, checked
from backsketch.planning.measure.recorder import Call, Calls, rerun, tensors_of, watching
from backsketch.regions import Region, state_of
from backsketch.torch_private import pytree
from backsketch.untouched import repeatable

__all__ = ["Site", "find_sites", "is_inside"]

_INT8 = Int8()
_WEIGHTS = Split(grad_weight=Rows(keep=0.5))


@dataclass(frozen=True)
class Site:
    """A module for which one sketch is chosen.

    ``row_dims`` is None where it cannot be a region; ``like`` is the first site of its class and sizes;
    ``layers_in_8_bits`` are those of its layers where 8-bit products may be faster.
    """

    name: str
    kind: str  # "branch", "layer" or "model"
    row_dims: int | None
    layers: tuple[str, ...]
    like: str
    layers_in_8_bits: tuple[str, ...] = ()


def find_sites(model: nn.Module, batch: Any, loss_fn: LossFn[Any]) -> list[Site]:
    """The sites of a model, in the order of ``named_modules``.

    Args:
        model: without sketches, in training mode. Its buffers are left as they were.
        batch: one batch.
        loss_fn: ``loss_fn(model, batch)`` returns the scalar loss.
    """
    with repeatable(model, 0), torch.enable_grad():
        with watching(model, [name for name, _ in model.named_modules()]) as calls:
            loss = checked(loss_fn(model, batch), 0)
        branches = _branches(model, calls, loss)
        if not branches and calls[""] and _row_dims(model, "", calls[""][0]):
            layers = _layers(model, "")  # a plain chain is best sketched as one
            return [Site("", "model", 1, layers, "", _in_8_bits(model, layers))]
        inside = {n for b in branches for n, _ in model.named_modules() if is_inside(n, b)}
        single = [
            name
            for name, module in model.named_modules()
            if name not in inside and adapter_of(module) and _is_worth_it(module)
        ]
        chosen = {name for name in (*branches, *single) if calls[name]}
        return _described(
            model, [n for n, _ in model.named_modules() if n in chosen], single, calls
        )


def _described(model: nn.Module, names: list[str], single: list[str], calls: Calls) -> list[Site]:
    first: dict[Any, str] = {}
    dims: dict[str, int | None] = {}
    sites = []
    for name in names:
        layer = name in single
        like = first.setdefault(_sizes(model.get_submodule(name), calls[name][0]), name)
        if like == name:
            dims[name] = None if layer else _row_dims(model, name, calls[name][0])
        layers = (name,) if layer else _layers(model, name)
        kind = "layer" if layer else "branch"
        sites.append(Site(name, kind, dims[like], layers, like, _in_8_bits(model, layers)))
    return [s for s in sites if s.layers or s.row_dims]


def _sizes(module: nn.Module, call: Call) -> Any:
    """What decides a module's time and bytes."""
    inputs = tuple((tuple(t.shape), t.dtype, t.requires_grad) for t in call.tensors)
    parts = tuple((type(m), m.extra_repr()) for m in module.modules())
    sizes = tuple((n, tuple(p.shape), p.requires_grad) for n, p in module.named_parameters())
    return parts, inputs, sizes


def is_inside(name: str, top: str) -> bool:
    """Whether a module is another one or inside it, by their qualified names."""
    return not top or name == top or name.startswith(f"{top}.")


def _layers(model: nn.Module, top: str) -> tuple[str, ...]:
    return tuple(n for n, m in model.named_modules() if is_inside(n, top) and _is_worth_it(m))


def _in_8_bits(model: nn.Module, layers: tuple[str, ...]) -> tuple[str, ...]:
    found = {name: model.get_submodule(name) for name in layers}
    return tuple(n for n, m in found.items() if not (refusal(m, _INT8) or advice(m, _INT8)))


def _is_worth_it(module: nn.Module) -> bool:
    adapter = adapter_of(module)
    if adapter is None or refusal(module, _WEIGHTS) is not None:
        return False
    return not is_small(module)


# --- residual branches ------------------------------------------------------------------------------


def _branches(model: nn.Module, calls: Calls, loss: Tensor) -> list[str]:
    with_weights = {n for n, m in model.named_modules() if any(True for _ in m.parameters())}
    makers: dict[Any, str] = {}  # autograd node -> the outermost module whose output it made
    for name, _ in reversed(list(model.named_modules())):
        if name and name in with_weights:
            makers |= {call.edges[0].node: name for call in calls[name] if call.edges}
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


def _row_dims(model: nn.Module, name: str, call: Call) -> int | None:
    """The most leading dimensions whose rows a region over a module keeps apart, by its own check."""
    module = model.get_submodule(name)
    for dims in (2, 1) if name else (1,):
        if not _seem_apart(module, call, dims - 1):
            continue  # a capture costs as much as several steps
        try:
            sketch_(model, {name: Region(keep=0.5, row_dims=dims)})
        except ValueError:  # batch statistics, say: refused before anything runs
            continue
        try:
            rerun(module, call)
            if state_of(module).status == "active":
                return dims
        finally:
            restore_(model)
    return None


@torch.no_grad()
def _seem_apart(module: nn.Module, call: Call, axis: int) -> bool:
    """Whether a change of the first row along an axis leaves the other rows of the output as they were."""
    if not call.tensors or call.tensors[0].ndim <= axis + 1 or not call.edges:
        return False
    size = call.tensors[0].shape[axis]

    def changed(t: Tensor) -> Tensor:
        if not t.is_floating_point() or t.ndim <= axis or t.shape[axis] != size:
            return t
        first = t.narrow(axis, 0, 1)
        # Of entries of different signs: a norm takes out what all entries of a row have in common.
        wave = torch.arange(first.numel(), device=t.device).remainder(7).sub(3).to(t.dtype)
        first = first + (1 + first.abs().amax()) * wave.view(first.shape)
        return torch.cat([first, t.narrow(axis, 1, size - 1)], axis)

    def rest(args: Any, kwargs: Any) -> Tensor:
        with repeatable(module, 0):
            output = tensors_of(module(*args, **kwargs))[0]
        return output.narrow(axis, 1, size - 1)

    try:
        after = rest(*pytree.tree_map_only(Tensor, changed, (call.args, call.kwargs)))
        before = rest(call.args, call.kwargs)
    except (RuntimeError, IndexError):  # an output without such an axis
        return False
    return before.shape == after.shape and torch.allclose(before, after, rtol=1e-3, atol=1e-5)
