"""One exact pass, watched: what each slot receives, and how uneven its rows are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from backsketch.planning.families import LADDER
from backsketch.planning.slots import Slot
from backsketch.regions.rows import scores
from backsketch.sampling import num_kept
from backsketch.theory.variance import minimal_sampling

__all__ = ["Call", "Curve", "watch"]


@dataclass
class Call:
    """A module's call in a pass: its arguments, and the cotangent of its first output."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    cotangent: Tensor | None = None


@dataclass(frozen=True)
class Curve:
    """``E‖error‖²`` at the boundary over the energy of the cotangent, on the ladder of keeps."""

    relative: dict[float, float]

    def over(self, reference: float) -> dict[float, float]:
        """The curve relative to its value at one keep."""
        base = self.relative[reference]
        return {k: (v / base if base > 0 else 0.0) for k, v in self.relative.items()}


def curve(row_scores: Tensor) -> Curve:
    """From row norms: the water-filling variance at every keep of the ladder."""
    energy = float(row_scores.double().square().sum())
    n = row_scores.shape[0]
    relative = {}
    for keep in LADDER:
        k = num_kept(n, keep)
        error = float(minimal_sampling(row_scores, k)) if k < n else 0.0
        relative[keep] = error / energy if energy > 0 else 0.0
    return Curve(relative)


def row_curve(cotangent: Tensor, row_dims: int) -> Curve:
    """The curve of a region or a mask that receives this cotangent."""
    return curve(scores([cotangent], row_dims))


def weight_curve(x: Tensor, cotangent: Tensor) -> Curve:
    """The curve of sampled rows for ``grad_weight``: contributions bounded by ``‖g_i‖ ‖x_i‖``."""
    x = x.detach()
    if cotangent.ndim == 4:  # a convolution: channels first, rows are samples
        norms = [t.flatten(1).norm(dim=1) for t in (x, cotangent)]
    else:
        norms = [t.reshape(-1, t.shape[-1]).norm(dim=1) for t in (x, cotangent)]
    return curve(norms[0] * norms[1])


def watch(
    model: nn.Module, slots: Sequence[Slot], run: Callable[[], Any]
) -> tuple[dict[str, Call], dict[str, Call]]:
    """Calls of the slots and of their layers during ``run``, which makes one backward pass."""
    layers = {name for slot in slots for name in slot.layers}
    calls = {name: Call() for name in {slot.name for slot in slots} | layers}

    def before(call: Call) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            call.args, call.kwargs = pytree.tree_map_only(Tensor, _fresh, (args, kwargs))

        return hook

    def after(call: Call) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensors = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]
            if tensors and tensors[0].requires_grad:
                tensors[0].register_hook(lambda g: setattr(call, "cotangent", g.detach()))

        return hook

    handles = []
    for name, call in calls.items():
        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(before(call), with_kwargs=True))
        handles.append(module.register_forward_hook(after(call)))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    seen = {name: call for name, call in calls.items() if call.cotangent is not None}
    return (
        {slot.name: seen[slot.name] for slot in slots if slot.name in seen},
        {name: seen[name] for name in layers if name in seen},
    )


def _fresh(t: Tensor) -> Tensor:
    return t.detach().requires_grad_(t.requires_grad)


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """The average over batches."""
    return Curve({k: math.fsum(c.relative[k] for c in curves) / len(curves) for k in LADDER})


def replay(module: nn.Module, call: Call) -> None:
    """One forward and backward pass of a slot alone."""
    output = module(*call.args, **call.kwargs)
    first = next(t for t in pytree.tree_leaves(output) if isinstance(t, Tensor))
    wanted = [t for t in pytree.tree_leaves((call.args, call.kwargs)) if isinstance(t, Tensor)]
    wanted = [t for t in (*wanted, *module.parameters()) if t.requires_grad]
    torch.autograd.grad(first, wanted, call.cotangent, allow_unused=True)
