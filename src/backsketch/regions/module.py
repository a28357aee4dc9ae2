"""The mixins that make a module a region or a masked module, in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from backsketch.nn.swap import Swapped, swap_
from backsketch.regions import guards
from backsketch.regions.context import inside
from backsketch.regions.mask import mask_outputs
from backsketch.regions.spec import Mask, Region
from backsketch.regions.state import RegionState, state_of

__all__ = ["MaskedModule", "RegionModule", "attach"]


class RegionModule(Swapped):
    """A module whose backward pass runs on the kept rows, while it trains."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if inside() or self._backsketch.is_exact() or not self._active():
            return super().forward(*args, **kwargs)
        # Late, because it brings in SymPy: a second that `import backsketch` need not take.
        from backsketch.regions.call import call, call_from_compiled

        if torch.compiler.is_compiling():
            return call_from_compiled(self, args, kwargs)
        return call(self, args, kwargs, "plain")


class MaskedModule(Swapped):
    """A module whose output's cotangent loses rows, while it trains."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        if inside() or not self._active():
            return outputs
        return mask_outputs(self, outputs, self._backsketch)


def attach(module: nn.Module, sketch: Region | Mask, name: str = "") -> RegionState | None:
    """Make ``module`` a region or a masked module, in place; undone by ``nn.swap.unswap_``.

    Args:
        module: not swapped yet.
        sketch: what to make of it.
        name: the module's qualified name, for messages.

    Returns:
        The live state of a region, whose ``status`` and ``reason`` change as its guards run; None for
        a mask.

    Raises:
        ValueError: the module cannot be a region, for a reason that shows without running it.
    """
    reason = guards.refusal(module, sketch)
    if reason:
        raise ValueError(f"{name or type(module).__name__}: {reason}")
    swap_(module, MaskedModule if isinstance(sketch, Mask) else RegionModule, sketch)
    return None if isinstance(sketch, Mask) else state_of(module, name)
