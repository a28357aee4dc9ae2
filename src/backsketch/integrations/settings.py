"""What a user asks a callback to do, checked before the first step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from backsketch.estimators import Sketch, parse
from backsketch.planning import Plan
from backsketch.planning.auto.auto import TARGET

__all__ = ["AUTO", "Settings"]

AUTO = "auto"

Rules = Any  # what `sketch_` takes


@dataclass(frozen=True)
class Settings:
    """The arguments that the callbacks share; see there."""

    sketch: Any = AUTO
    target_extra_variance: float | None = None
    strict: bool = False
    interval: int = 300
    seed: int | None = None
    measure: bool = True

    def __post_init__(self) -> None:
        problems = [*self._of_sketch(), *self._of_numbers()]
        if problems:
            raise ValueError("SketchCallback: " + "; ".join(problems))
        if not (isinstance(self.sketch, str | Sketch | Plan | Mapping) or callable(self.sketch)):
            raise TypeError(
                "SketchCallback: sketch must be 'auto', a sketch or its text such as 'rows:keep=0.5', rules, "
                f"a plan, or a function of the model that returns rules; got {self.sketch!r}"
            )

    def _of_sketch(self) -> list[str]:
        texts = self.sketch.values() if isinstance(self.sketch, Mapping) else [self.sketch]
        problems = []
        for text in texts:
            if isinstance(text, str) and (text != AUTO or text is not self.sketch):
                try:
                    parse(text)
                except ValueError as error:
                    problems.append(str(error))
        return problems

    def _of_numbers(self) -> list[str]:
        problems, target = [], self.target_extra_variance
        if target is not None and not (_is_number(target) and 0 < target < math.inf):
            problems.append(f"target_extra_variance must be positive, or None; got {target!r}")
        if not (isinstance(self.interval, int) and self.interval >= 1):
            problems.append(f"interval must be a whole number of at least 1; got {self.interval!r}")
        if self.seed is not None and (
            isinstance(self.seed, bool) or not isinstance(self.seed, int)
        ):
            problems.append(f"seed must be a whole number, or None; got {self.seed!r}")
        return problems

    @property
    def is_auto(self) -> bool:
        """Whether a profile decides."""
        return isinstance(self.sketch, str) and self.sketch == AUTO

    @property
    def target(self) -> float | None:
        """Of the controller; None for none."""
        return (
            TARGET
            if self.is_auto and self.target_extra_variance is None
            else self.target_extra_variance
        )

    def rules(self, model: nn.Module) -> Rules:
        """What :func:`backsketch.sketch_` is given for a model."""
        sketch = self.sketch
        if not isinstance(sketch, str | Sketch | Plan | Mapping):
            make: Callable[[nn.Module], Rules] = sketch
            sketch = make(model)
        if isinstance(sketch, str):
            return parse(sketch)
        if isinstance(sketch, Mapping):
            return {k: parse(v) if isinstance(v, str) else v for k, v in sketch.items()}
        return sketch


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
