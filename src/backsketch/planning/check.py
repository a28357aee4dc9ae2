"""The bill of a plan, measured on the model that it was applied to."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from backsketch.memory import kept_by
from backsketch.nn.swap import exact
from backsketch.planning.passes import passes
from backsketch.planning.plan import Bill
from backsketch.planning.slots import LossFn
from backsketch.theory.cost import time_to_target_ratio
from backsketch.theory.noise import GradientSums
from backsketch.untouched import untouched

__all__ = ["measured_bill"]

_ROUNDS = 7


def measured_bill(
    model: nn.Module, batches: Iterable[Any], loss_fn: LossFn, predicted: Bill
) -> Bill:
    """Step time in interleaved rounds, extra variance over the batches, saved bytes."""
    data = list(batches)
    if len(data) < 2:
        raise ValueError(f"measure: needs at least two batches, got {len(data)}")
    with untouched(model, training=True, seed=0):
        variance, beta = _noise(model, data, loss_fn)
        ratio = _time_ratio(model, data[0], loss_fn)
        size = kept_by(model, lambda: loss_fn(model, data[0])).total
    rho = time_to_target_ratio(ratio, 1 + variance, beta)
    return replace(predicted, time_ratio=ratio, extra_variance=variance, saved_bytes=size, rho=rho)


def _noise(model: nn.Module, data: list[Any], loss_fn: LossFn) -> tuple[float, float]:
    error, sums = 0.0, GradientSums()
    with passes(model, loss_fn) as run:
        everything = [place.index for place in run.places]
        run.gradient(data[0], 0, everything)  # regions prove themselves
        for number, batch in enumerate(data):
            g = [t.double() for t in run.gradient(batch, number)]
            sums.add(g)
            for draw in range(2):
                noisy = run.gradient(batch, number, everything, draw)
                error += sum(float((a - b).square().sum()) for a, b in zip(noisy, g)) / 2
    sgd = sums.sgd_variance
    relative = error / len(data) / sgd if sgd > 0 else float("inf") if error else 0.0
    return relative, sums.noise_scale


def _time_ratio(model: nn.Module, batch: Any, loss_fn: LossFn) -> float:
    parameters = [p for p in model.parameters() if p.requires_grad]

    def seconds() -> float:
        start = time.perf_counter()
        torch.autograd.grad(loss_fn(model, batch), parameters, allow_unused=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    ratios = []
    for round_ in range(_ROUNDS + 2):
        sketched = seconds()
        with exact(model):
            plain = seconds()
        if round_ > 1:
            ratios.append(sketched / plain)
    return statistics.median(ratios)
