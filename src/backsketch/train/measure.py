"""What a sketch does to a step, measured: arithmetic, saved memory and extra variance.

All functions leave the model, its buffers and gradients and every random stream as they were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import backsketch as bs
from backsketch.memory import kept_by

B = TypeVar("B")
LossFn = Callable[[nn.Module, B], Tensor]


def backward_flops(model: nn.Module, batch: B, loss_fn: LossFn[B]) -> int:
    """Floating point operations of the matrix products in one backward pass.

    Attention is counted through its mathematical form, since PyTorch's counter has no formula for
    the fused kernel on a CPU.
    """
    counter = FlopCounterMode(display=False)
    with _untouched(model), _sketch_stream_restored(), sdpa_kernel(SDPBackend.MATH):
        loss = loss_fn(model, batch)
        with counter:
            _gradients(model, loss)
    return counter.get_total_flops()


def backward_flops_ratio(model: nn.Module, batch: B, loss_fn: LossFn[B]) -> float:
    """`backward_flops` as the model is, over the same of the exact model."""
    sketched = backward_flops(model, batch, loss_fn)
    with bs.exact(model):
        return sketched / backward_flops(model, batch, loss_fn)


def saved_bytes(model: nn.Module, batch: B, loss_fn: LossFn[B]) -> int:
    """Bytes of the distinct storages that autograd keeps for the backward of one step.

    Parameters and buffers, which exist anyway, do not count; see :func:`backsketch.saved_bytes`.
    """
    with _untouched(model), _sketch_stream_restored():
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
    error, square, total = 0.0, 0.0, None
    with _sketch_stream_restored():
        for number, batch in enumerate(batches):
            with bs.exact(model):
                exact = _gradient(model, batch, loss_fn, number)
            square += float(exact.square().sum())
            total = exact if total is None else total + exact
            for _ in range(draws):
                sketched = _gradient(model, batch, loss_fn, number)
                error += float((sketched - exact).square().sum())
    assert total is not None
    count = len(batches)
    variance = (square - float(total.square().sum()) / count) / (count - 1)
    ratio = error / (count * draws) / variance if variance > 0 else math.nan
    return ratio if math.isfinite(ratio) else None


@contextmanager
def _untouched(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """Training mode and a fixed PyTorch seed inside; afterwards everything as it was."""
    device = next(model.parameters()).device
    modes = {module: module.training for module in model.modules()}
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model.train()
        try:
            yield
        finally:
            for module, training in modes.items():
                module.training = training
            with torch.no_grad():
                for name, buffer in model.named_buffers():
                    buffer.copy_(buffers[name])


@contextmanager
def _sketch_stream_restored() -> Iterator[None]:
    state = bs.get_rng_state()
    try:
        yield
    finally:
        bs.set_rng_state(state)


def _gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    """Gradient of each trainable parameter, without touching `.grad`; zeros where unused."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads)]


def _gradient(model: nn.Module, batch: B, loss_fn: LossFn[B], seed: int) -> Tensor:
    """The whole gradient as one float64 vector; the same seed draws the same dropout."""
    with _untouched(model, seed):
        grads = _gradients(model, loss_fn(model, batch))
    return torch.cat([g.flatten().double() for g in grads])
