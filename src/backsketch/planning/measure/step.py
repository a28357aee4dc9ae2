"""What a sketch does to a step, measured: arithmetic, saved memory and extra variance.

All functions leave the model, its buffers and gradients and every random stream as they were.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor, nn

from backsketch.arithmetic import product_counter
from backsketch.memory import kept_by
from backsketch.nn.swap import exact as exactly
from backsketch.planning.measure.errors import extra_variance as measured
from backsketch.planning.measure.passes import Diverged, LossFn
from backsketch.planning.measure.recorder import unseen, vjp
from backsketch.untouched import untouched

__all__ = [
    "backward_flops",
    "backward_flops_ratio",
    "extra_variance",
    "saved_bytes",
    "warm",
]

B = TypeVar("B")


def backward_flops(model: nn.Module, batch: B, loss_fn: LossFn[B]) -> int:
    """Floating point operations of the matrix products in one backward pass; those of bytes count a quarter.

    Attention counts as its mathematical form, whichever kernel computes it.
    """
    counter = product_counter()
    with untouched(model, training=True, seed=0):
        # The first pass of a region captures and checks it, which later ones do not repeat.
        _gradients(model, loss_fn(model, batch))
        loss = loss_fn(model, batch)
        with counter:
            _gradients(model, loss)
    return counter.get_total_flops()


def backward_flops_ratio(model: nn.Module, batch: B, loss_fn: LossFn[B]) -> float:
    """`backward_flops` as the model is, over the same of the exact model."""
    sketched = backward_flops(model, batch, loss_fn)
    with exactly(model):
        return sketched / backward_flops(model, batch, loss_fn)


def saved_bytes(model: nn.Module, batch: B, loss_fn: LossFn[B]) -> int:
    """Bytes of the distinct storages that autograd keeps for the backward of one step.

    Parameters and buffers, which exist anyway, do not count; see :func:`backsketch.saved_bytes`.
    """
    with untouched(model, training=True, seed=0):
        return kept_by(model, lambda: loss_fn(model, batch)).total


def extra_variance(
    model: nn.Module, batches: Sequence[B], loss_fn: LossFn[B], draws: int = 2
) -> float | None:
    """Extra variance `ω = E‖ĝ − g‖² / E‖g − E g‖²`, both at the size of these batches.

    The numerator averages over batches and `draws` sketched backward passes each, against the
    exact gradient of the same batch with the same dropout. The denominator is the unbiased sample
    variance of the exact gradient over the batches.

    Returns:
        `ω`, or None where the gradient does not vary or is not finite.

    Raises:
        ValueError: fewer than two batches.
    """
    if len(batches) < 2:
        raise ValueError(f"the variance over batches needs two batches, got {len(batches)}")
    try:
        with unseen(model), untouched(model):  # a controller may wait for the next training call
            found = measured(model, batches, loss_fn, draws)
    except Diverged:
        return None
    varies = found.sums.sgd_variance > 0
    return found.omega if varies and math.isfinite(found.omega) else None


def _gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return vjp(loss, [p for p in model.parameters() if p.requires_grad])


def warm(model: nn.Module, batch: B, loss_fn: LossFn[B]) -> None:
    """One training pass that leaves nothing behind, in which regions are captured and verified."""
    with untouched(model, training=True, seed=0):
        _gradients(model, loss_fn(model, batch))
