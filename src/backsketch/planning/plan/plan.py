"""``Plan``: which sketch goes where, what is expected of it, and what came of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from backsketch.estimators import Sketch, parse
from backsketch.nn.swap import is_swapped
from backsketch.planning.measure.passes import LossFn
from backsketch.planning.plan.estimate import CostEstimate, measured_cost

__all__ = ["Plan"]


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
        self._measured.append(measured_cost(model, batches, loss_fn, self.predicted, draws))
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
