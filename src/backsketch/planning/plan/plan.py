"""``Plan``: which sketch goes where, what that is expected to cost, and what it was measured to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from backsketch.estimators import Sketch, parse
from backsketch.memory import kept_by
from backsketch.nn.swap import exact, is_swapped
from backsketch.planning.measure.errors import extra_variance
from backsketch.planning.measure.passes import LossFn
from backsketch.planning.measure.timing import OF_A_PLAN, Effort, compared
from backsketch.theory.cost import time_to_target_ratio
from backsketch.untouched import untouched

__all__ = ["CAUTION", "LEAST_GAIN", "LEAST_SAVING", "CostEstimate", "Plan", "measured_ratio"]

CAUTION = 2.0
"""Standard errors of a timing by which a sketch has to win: the best of many noisy timings is too good."""


LEAST_SAVING = 0.02
"""Of a step's time: less is not worth a sketch, or a change of one."""

LEAST_GAIN = 0.01
"""Of the time to a target: less is not worth leaving exact training."""


@dataclass(frozen=True)
class CostEstimate:
    """What a plan costs.

    Attributes:
        time_ratio: of a step, exact = 1.
        extra_variance: in units of SGD's.
        saved_bytes: kept for the backward.
        rho: time to a target relative to exact training.
        smaller_batch: the best fraction of the batch, and its own rho.
        standard_error: of ``extra_variance`` over batches and draws, where that was measured.
        time_error: the standard error of ``time_ratio``.
    """

    time_ratio: float
    extra_variance: float
    saved_bytes: int
    rho: float
    smaller_batch: tuple[float, float] = (1.0, 1.0)
    standard_error: float = 0.0
    time_error: float = 0.0

    @property
    def cautious_ratio(self) -> float:
        """``time_ratio`` if a step takes as long as the timings leave possible."""
        return self.time_ratio + CAUTION * self.time_error

    @property
    def cautious_rho(self) -> float:
        """``rho`` for such a step."""
        return self.rho * self.cautious_ratio / self.time_ratio if self.time_ratio else self.rho

    def __str__(self) -> str:
        return (
            f"a step takes {self.time_ratio:.2f} of exact, extra variance {self.extra_variance:.3f} of SGD's, "
            f"{self.saved_bytes / 2**20:.1f} MiB saved; time to a target {self.rho:.2f} of exact"
        )


def _measured_cost(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn[Any],
    predicted: CostEstimate,
    draws: int,
) -> CostEstimate:
    """What a sketched model costs, beside what was predicted of it: see :meth:`Plan.measure`."""
    data = list(batches)
    if len(data) < 2:
        raise ValueError(f"measure: needs at least two batches, got {len(data)}")
    with untouched(model, training=True, seed=0):
        noise = extra_variance(model, data, loss_fn, draws)
        ratio, error = measured_ratio(model, data[0], loss_fn, OF_A_PLAN)
        size = kept_by(model, lambda: loss_fn(model, data[0])).total
    return replace(
        predicted,
        time_ratio=ratio,
        extra_variance=noise.omega,
        saved_bytes=size,
        rho=time_to_target_ratio(ratio, 1 + noise.omega, noise.sums.noise_scale),
        standard_error=noise.standard_error,
        time_error=error,
    )


def measured_ratio(
    model: nn.Module, batch: Any, loss_fn: LossFn[Any], effort: Effort
) -> tuple[float, float]:
    """Seconds of a sketched step over those of an exact one, and the standard error; both have been run before."""
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        torch.autograd.grad(loss_fn(model, batch), parameters, allow_unused=True)

    def exactly() -> None:
        with exact(model):
            step()

    (difference,), base = compared(exactly, [step], effort, warm=True)
    return max(1 + difference.seconds / base.seconds, 0.0), difference.error / base.seconds


@dataclass(frozen=True)
class Plan:
    """Rules for :func:`backsketch.sketch_`, with what they cost.

    ``bs.sketch_(model, plan)`` applies it. ``reason`` says why a plan is exact or keeps to
    8-bit products, and what would be better.
    """

    texts: Mapping[str, str]
    predicted: CostEstimate
    reason: str = ""
    exact_names: tuple[str, ...] = field(default=(), repr=False)
    _measured: list[CostEstimate] = field(default_factory=list, repr=False, compare=False)

    @property
    def measured(self) -> CostEstimate | None:
        """What :meth:`measure` found last, None before."""
        return self._measured[-1] if self._measured else None

    def measure(
        self, model: nn.Module, batches: Iterable[Any], loss_fn: LossFn[Any], *, draws: int = 2
    ) -> CostEstimate:
        """Measure what this plan costs on a model that it was applied to; ``predicted`` stands beside it.

        Args:
            model: after ``bs.sketch_(model, plan)``.
            batches: at least two.
            loss_fn: ``loss_fn(model, batch)`` returns the scalar mean loss of a batch.
            draws: of the sketches, on each batch.

        Returns:
            A :class:`CostEstimate`; ``standard_error`` says how far its extra variance can be trusted.

        Raises:
            ValueError: the model is not sketched, or there are fewer than two batches.
        """
        if not self.is_exact and not any(is_swapped(m) for m in model.modules()):
            raise ValueError(
                "measure: the model is not sketched; call bs.sketch_(model, plan) first"
            )
        self._measured.append(_measured_cost(model, batches, loss_fn, self.predicted, draws))
        return self._measured[-1]

    @property
    def rules(self) -> dict[str, Sketch | None]:
        """What :func:`backsketch.sketch_` reads: patterns and sketches, every layer exact in the exact plan."""
        if not self.texts:
            return dict.fromkeys(self.exact_names or ("*",), None)
        return {pattern: parse(text) for pattern, text in self.texts.items()}

    @property
    def is_exact(self) -> bool:
        """Whether nothing is sketched."""
        return not self.texts

    def __str__(self) -> str:
        lines = [f"{pattern or '(model)':<32} {text}" for pattern, text in self.texts.items()]
        return "\n".join([*lines, str(self.predicted), *([self.reason] if self.reason else [])])
