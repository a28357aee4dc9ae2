"""The arguments of a controller: what is called, and numbers within their range."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from backsketch.torch_private import is_compiled_in_place

__all__ = ["called_module", "check"]


def called_module(model: nn.Module) -> nn.Module:
    """The module whose calls can be recorded: the compiled one where there is one, else the user's own.

    Raises:
        ValueError: the model was compiled in place.
    """
    while isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        model = model.module
    if is_compiled_in_place(model):
        raise ValueError(
            "Controller: the model was compiled in place by model.compile(), which hides its calls; use "
            "model = torch.compile(model) and give that to the controller"
        )
    return model


def check(
    sites: Any,
    target: Any,
    warmup: Any,
    finish: Any,
    total: Any,
    interval: Any,
    overhead: Any,
    plans: Any,
) -> None:
    """All problems of a controller's arguments in one ``ValueError``."""

    def number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool)

    problems = []
    if not sites:
        problems.append(
            "the model has no sketch with a keep to move; call bs.sketch_(model, ...) first, with regions, masks, "
            "or estimators such as bs.Rows"
        )
    if target is not None and not (number(target) and 0 < target < math.inf):
        problems.append(f"target_extra_variance must be positive, or None; got {target!r}")
    counts = {"warmup": (warmup, 0), "finish": (finish, 0), "total_steps": (total, 1)}
    counts |= {"interval": (interval, 1), "max_plans": (plans, 1)}
    for name, (value, least) in counts.items():
        optional = value is None and name not in ("warmup", "finish")
        if not optional and not (number(value) and value == int(value) and value >= least):
            problems.append(f"{name} must be a whole number of at least {least}; got {value!r}")
    if not (number(overhead) and 0 < overhead < 1):
        problems.append(f"overhead must lie in (0, 1); got {overhead!r}")
    if not problems and finish and (total is None or warmup + finish > total):
        problems.append(
            f"finish needs total_steps, of at least warmup + finish; got total_steps={total!r}"
        )
    if problems:
        raise ValueError("Controller: " + "; ".join(problems))
