"""Errors of gradients, and the extra variance: the one computation of both."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from backsketch.planning.measure.passes import LossFn, has_region, passes
from backsketch.theory.noise import GradientSums

__all__ = ["ExtraVariance", "extra_variance", "squared_distance", "squared_errors", "squared_norm"]


def squared_errors(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """``(tensors,)``: ``‖a − b‖²`` of each pair, summed in float64, on the CPU."""
    norms = [torch.linalg.vector_norm(x - y, dtype=torch.float64) for x, y in zip(a, b)]
    return torch.stack(norms).square().cpu() if norms else torch.zeros(0, dtype=torch.float64)


def squared_distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """``‖a − b‖²`` of all tensors together."""
    return float(squared_errors(a, b).sum())


def squared_norm(tensors: Iterable[Tensor | None]) -> float:
    """``‖a‖²`` of all tensors together; None counts as zeros."""
    return sum(
        float(torch.linalg.vector_norm(t.detach(), dtype=torch.float64)) ** 2
        for t in tensors
        if t is not None
    )


@dataclass
class ExtraVariance:
    """What sketched gradients add to SGD's own variance, from the passes of several batches.

    ``errors`` has ``‖ĝ − g‖²`` of each batch, the mean of its draws; ``sums`` the exact gradients.
    """

    errors: list[float] = field(default_factory=list)
    sums: GradientSums = field(default_factory=GradientSums)

    def add(self, exact: Sequence[Tensor], noisy: Iterable[Sequence[Tensor]]) -> None:
        """Take a batch into account: its exact gradient and draws of its sketched one."""
        self.sums.add(exact)
        self.errors.append(fmean(squared_distance(exact, other) for other in noisy))

    @property
    def omega(self) -> float:
        """``ω``, in units of SGD's variance; infinite where that is zero and the errors are not."""
        sgd = self.sums.sgd_variance
        return fmean(self.errors) / sgd if sgd > 0 else math.inf if any(self.errors) else 0.0

    @property
    def standard_error(self) -> float:
        """Of ``omega``, over the batches."""
        sgd = self.sums.sgd_variance
        return stdev(self.errors) / len(self.errors) ** 0.5 / sgd if sgd > 0 else 0.0


def extra_variance(
    model: nn.Module,
    batches: Sequence[Any],
    loss_fn: LossFn[Any],
    draws: int,
    exact: Sequence[Sequence[Tensor]] = (),
) -> ExtraVariance:
    """Measure a sketched model: draws on every batch beside its exact gradient, which ``exact`` may hold."""
    found = ExtraVariance()
    with passes(model, loss_fn) as run:
        everything = [site.index for site in run.sites]
        if any(has_region(site) for site in run.sites):
            run.gradient(batches[0], 0, everything)  # they check their rows
        for number, batch in enumerate(batches):
            gradient = exact[number] if exact else run.gradient(batch, number)
            found.add(gradient, (run.gradient(batch, number, everything, i) for i in range(draws)))
    return found
