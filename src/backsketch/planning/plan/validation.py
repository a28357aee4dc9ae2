"""The cost of a plan, measured on the model that it was applied to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from backsketch.memory import kept_by
from backsketch.nn.swap import exact
from backsketch.planning.measure.errors import extra_variance
from backsketch.planning.measure.passes import LossFn
from backsketch.planning.measure.timing import compared
from backsketch.planning.plan.estimate import CostEstimate
from backsketch.theory.cost import time_to_target_ratio
from backsketch.untouched import untouched

__all__ = ["measured_cost"]

_ROUNDS, _KNOWN = (7, 15), 0.015


def measured_cost(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn[Any],
    predicted: CostEstimate,
    draws: int,
) -> CostEstimate:
    """Step time in interleaved rounds, extra variance over the batches, saved bytes."""
    data = list(batches)
    if len(data) < 2:
        raise ValueError(f"measure: needs at least two batches, got {len(data)}")
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        torch.autograd.grad(loss_fn(model, data[0]), parameters, allow_unused=True)

    def exactly() -> None:
        with exact(model):
            step()

    with untouched(model, training=True, seed=0):
        noise = extra_variance(model, data, loss_fn, draws)
        (difference,), base = compared(exactly, [step], rounds=_ROUNDS, known=_KNOWN, seconds=2)
        size = kept_by(model, lambda: loss_fn(model, data[0])).total
    ratio = max(1 + difference.seconds / base.seconds, 0.0)
    return replace(
        predicted,
        time_ratio=ratio,
        extra_variance=noise.omega,
        saved_bytes=size,
        rho=time_to_target_ratio(ratio, 1 + noise.omega, noise.sums.noise_scale),
        standard_error=noise.standard_error,
        time_error=difference.error / base.seconds,
    )
