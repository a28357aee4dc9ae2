r"""A row mask on a cotangent: full shape, few non-zero rows.

.. math:: \hat g_i = g_i \, 1[i \in S] / \pi_i

The forward pass returns its input unchanged. Regions and row sketches upstream see the zero rows in
their scores and never draw them: ``k`` shrinks with the mask, without a second draw's noise.
"""

from __future__ import annotations

import math
import warnings
import weakref
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn

from backsketch import sampling
from backsketch.ops.double_backward import without_double_backward
from backsketch.regions import rows as row_ops
from backsketch.regions.spec import Mask
from backsketch.torch_private import pytree, traced_as_constant

__all__ = ["mask_outputs", "mask_rows", "masked_rows"]

_WAY_OUT = "put the mask on the module before the loss, or compute the loss outside"
_CHECKED: weakref.WeakKeyDictionary[nn.Module, set[tuple[int, ...]]] = weakref.WeakKeyDictionary()


def masked_rows(cotangent: Tensor, keep: float, row_dims: int, design: str = "shuffled") -> Tensor:
    """An unbiased estimate of ``cotangent`` with at most ``ceil(keep * n)`` non-zero rows."""
    n = math.prod(cotangent.shape[:row_dims])
    if n == 0:
        return cotangent
    rows = cotangent.reshape(n, -1)
    scores = row_ops.row_norms(rows)
    sample = sampling.draw(
        scores,
        sampling.num_kept(n, keep),
        sampling.next_seed(cotangent),
        design=design,
        block=row_ops.tokens(cotangent.shape[:row_dims]),
    )
    weights = torch.zeros_like(scores).index_put((sample.indices,), sample.weights)
    # Not a product: a dropped row must be zero even where the cotangent is not finite.
    kept = torch.where(weights[:, None] > 0, rows * weights[:, None].to(rows.dtype), 0.0)
    return kept.to(cotangent.dtype).view(cotangent.shape)


class _Mask(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, keep: float, row_dims: int, design: str) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.keep, ctx.row_dims, ctx.design = inputs

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None, None]:
        kept = without_double_backward(masked_rows, cotangent, ctx.keep, ctx.row_dims, ctx.design)
        return kept, None, None, None


def mask_rows(x: Tensor, keep: float, row_dims: int = 1, design: str = "shuffled") -> Tensor:
    """The identity, with a backward pass that keeps a fraction ``keep`` of the rows.

    Args:
        x: at least ``row_dims`` dimensions, the leading ones counting rows.
        keep: fraction in (0, 1].
        row_dims: 1 for samples, 2 for tokens.
        design: as of :class:`~backsketch.Mask`.

    Raises:
        ValueError: ``x`` has too few dimensions.
    """
    if x.dim() < row_dims:
        raise ValueError(
            f"a mask over {row_dims} leading dimensions cannot act on an output of shape {tuple(x.shape)}"
        )
    return _Mask.apply(x, keep, row_dims, design) if keep < 1 else x


def mask_outputs(module: nn.Module, outputs: Any, sketch: Mask) -> Any:
    """Mask every differentiable tensor among a module's outputs, each with a draw of its own.

    A tensor without rows (an auxiliary loss beside the hidden states) is left alone: its gradient is
    exact, the sum stays unbiased. If it is computed from the outputs that are masked, as a loss is from
    the logits, its gradient never passes the mask: an error. That is looked up in the autograd graph once
    for each pattern of outputs; where compiled code hides the graph, a warning says what may be.

    Args:
        module: the masked module, for messages.
        outputs: what its forward pass returned.
        sketch: how much of them is kept, and how it is drawn.

    Returns:
        ``outputs`` with the same values.

    Raises:
        ValueError: no output has rows, or one without rows is computed from those with rows.
        TypeError: there is no tensor among the outputs, as far as PyTorch can look into them.
    """
    if sketch.keep >= 1:
        return outputs
    row_dims = sketch.row_dims
    leaves, spec = pytree.tree_flatten(outputs)
    trained = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad]
    rows = [i for i in trained if leaves[i].dim() >= row_dims]
    if not any(isinstance(x, Tensor) for x in leaves):
        _check_opaque(module, leaves)
    elif trained and not rows:
        shapes = ", ".join(str(tuple(leaves[i].shape)) for i in trained)
        raise ValueError(
            f"{_mask_on(module, row_dims)} finds no rows in its output of shape {shapes}; {_WAY_OUT}"
        )
    elif len(rows) < len(trained):
        _check_losses(module, [leaves[i] for i in trained], row_dims)
    for i in rows:
        leaves[i] = mask_rows(leaves[i], sketch.keep, row_dims, sketch.design)
    return pytree.tree_unflatten(leaves, spec)


def _kind(module: nn.Module) -> str:
    return getattr(type(module), "_original_class", type(module)).__name__


def _mask_on(module: nn.Module, row_dims: int) -> str:
    return f"the mask over the {row_dims} leading dimension(s) on {_kind(module)}"


def _check_opaque(module: nn.Module, leaves: list[Any]) -> None:
    opaque = [x for x in leaves if not isinstance(x, bool | int | float | str | NoneType)]
    if opaque:
        kinds = ", ".join(sorted({type(x).__name__ for x in opaque}))
        raise TypeError(
            f"the mask on {_kind(module)} finds no tensor in its output of type {kinds}: return tensors, "
            "tuples or dicts, or register the type with torch.export.register_dataclass"
        )


def _check_losses(module: nn.Module, trained: list[Tensor], row_dims: int) -> None:
    """Whether the mask acts: no output without rows may be computed from the last ones with rows."""
    unclear = (
        f"{_mask_on(module, row_dims)}: an output without rows is left exact; if it is a loss computed "
        f"from the other outputs, the mask does nothing: {_WAY_OUT}"
    )
    if torch.compiler.is_compiling():
        _warn(unclear)
        return
    pattern = tuple(x.dim() for x in trained)
    if pattern in _CHECKED.setdefault(module, set()):
        return
    rows = [x for x in trained if x.dim() >= row_dims]
    losses = [x for x in trained if x.dim() < row_dims]
    above_losses, above_rows = _ancestors(losses), _ancestors(rows)
    if any(x.grad_fn in above_losses and x.grad_fn not in above_rows for x in rows):
        raise ValueError(
            f"{_mask_on(module, row_dims)} does nothing: an output without rows (a loss?) is computed inside "
            f"from the outputs that are masked, so its gradient never passes the mask; {_WAY_OUT}"
        )
    if {x.grad_fn for x in losses} & {x.grad_fn for x in rows}:
        _warn(unclear)
    _CHECKED[module].add(pattern)


def _ancestors(tensors: list[Tensor]) -> set[Any]:
    """The autograd nodes that the tensors' own ones are computed from."""
    seen: set[Any] = set()
    waiting = [x.grad_fn for x in tensors if x.grad_fn is not None]
    while waiting:
        found = [node for node, _ in waiting.pop().next_functions if node not in seen and node]
        seen.update(found)
        waiting += found
    return seen


@traced_as_constant
def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)
