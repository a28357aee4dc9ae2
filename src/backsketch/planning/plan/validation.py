"""The bill of a plan, measured on the model that it was applied to."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from backsketch.memory import kept_by
from backsketch.nn.swap import exact
from backsketch.planning.measure.passes import passes
from backsketch.planning.plan.plan import Bill
from backsketch.planning.profiling.sites import LossFn
from backsketch.planning.profiling.times import timed
from backsketch.theory.cost import time_to_target_ratio
from backsketch.theory.noise import GradientSums
from backsketch.untouched import untouched

__all__ = ["measured_bill"]

_ROUNDS = 7


def measured_bill(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn,
    predicted: Bill,
    draws: int,
    rounds: int = _ROUNDS,
) -> Bill:
    """Step time in interleaved rounds, extra variance over the batches, saved bytes."""
    data = list(batches)
    if len(data) < 2:
        raise ValueError(f"measure: needs at least two batches, got {len(data)}")
    with untouched(model, training=True, seed=0):
        errors, sums = _noise(model, data, loss_fn, draws)
        ratio = _time_ratio(model, data[0], loss_fn, rounds)
        size = kept_by(model, lambda: loss_fn(model, data[0])).total
    sgd = sums.sgd_variance
    spread = stdev(errors) / len(errors) ** 0.5
    omega = fmean(errors) / sgd if sgd > 0 else math.inf if any(errors) else 0.0
    return replace(
        predicted,
        time_ratio=ratio,
        extra_variance=omega,
        saved_bytes=size,
        rho=time_to_target_ratio(ratio, 1 + omega, sums.noise_scale),
        standard_error=spread / sgd if sgd > 0 else 0.0,
    )


def _noise(
    model: nn.Module, data: list[Any], loss_fn: LossFn, draws: int
) -> tuple[list[float], GradientSums]:
    """``‖ĝ − g‖²`` of each batch, the mean of its draws, and the sums of the exact gradients."""
    errors, sums = [], GradientSums()
    with passes(model, loss_fn) as run:
        everything = [place.index for place in run.places]
        run.gradient(data[0], 0, everything)  # regions prove themselves
        for number, batch in enumerate(data):
            g = run.gradient(batch, number)
            sums.add(g)
            noisy = (run.gradient(batch, number, everything, draw) for draw in range(draws))
            errors.append(fmean(_distance(g, other) for other in noisy))
    return errors, sums


def _distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return sum(float((x.double() - y.double()).square().sum()) for x, y in zip(a, b))


def _time_ratio(model: nn.Module, batch: Any, loss_fn: LossFn, rounds: int) -> float:
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        torch.autograd.grad(loss_fn(model, batch), parameters, allow_unused=True)

    ratios = []
    for turn in range(rounds + 2):
        sketched, _ = timed(step)
        with exact(model):
            plain, _ = timed(step)
        if turn > 1:
            ratios.append(sketched / plain)
    return statistics.median(ratios)
