"""Refusals that need no forward pass: submodules that are known to relate rows."""

from __future__ import annotations

from torch import nn

from backsketch.regions.spec import Mask, Region
from backsketch.torch_private import BatchNormBase, LossBase

__all__ = ["refusal"]


def refusal(module: nn.Module, sketch: Region | Mask) -> str | None:
    """Why ``module`` cannot be a region or masked, or None where running it has to tell.

    A mask acts on an output, whatever made it; a region that keeps all rows needs none to be independent.
    """
    if "forward" in module.__dict__:
        return (
            "its forward was replaced on the instance, which would bypass the sketch; accelerate does that under "
            "mixed precision: sketch the model before accelerator.prepare"
        )
    if isinstance(sketch, Mask) or sketch.keep == 1:
        return None
    for name, child in module.named_modules():
        reason = _couples_rows(child)
        if reason:
            where = f"{name!r} ({type(child).__name__})" if name else type(child).__name__
            return f"{where} {reason}"
    return None


def _couples_rows(module: nn.Module) -> str | None:
    if isinstance(module, BatchNormBase):
        uses_batch = module.training or not module.track_running_stats
        if uses_batch:
            return (
                "normalises with statistics of the batch, which couples its rows: put it in eval mode, "
                "replace it by GroupNorm, or end the region before it"
            )
    if isinstance(module, LossBase) and getattr(module, "reduction", "none") != "none":
        return "reduces a loss over the rows: end the region before the loss"
    return None
