r"""A row mask on a cotangent: full shape, few non-zero rows.

.. math:: \hat g_i = g_i \, 1[i \in S] / \pi_i

The forward pass returns its input unchanged. Regions and row sketches upstream see the zero rows in
their scores and never draw them: ``k`` shrinks with the mask, without a second draw's noise.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from backsketch import sampling

__all__ = ["mask_rows", "masked_rows"]


def masked_rows(cotangent: Tensor, keep: float, row_dims: int) -> Tensor:
    """An unbiased estimate of ``cotangent`` with at most ``ceil(keep * n)`` non-zero rows."""
    n = math.prod(cotangent.shape[:row_dims])
    if n == 0:
        return cotangent
    rows = cotangent.reshape(n, -1)
    dtype = torch.promote_types(rows.dtype, torch.float32)
    scores = torch.linalg.vector_norm(rows, dim=1, dtype=dtype)
    sample = sampling.draw(scores, sampling.num_kept(n, keep), sampling.next_seed(cotangent))
    weights = torch.zeros_like(scores).index_put((sample.indices,), sample.weights)
    # Not a product: a dropped row must be zero even where the cotangent is not finite.
    kept = torch.where(weights[:, None] > 0, rows * weights[:, None].to(rows.dtype), 0.0)
    return kept.to(cotangent.dtype).view(cotangent.shape)


class _Mask(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, keep: float, row_dims: int) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.keep, ctx.row_dims = inputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None]:
        return masked_rows(cotangent, ctx.keep, ctx.row_dims), None, None


def mask_rows(x: Tensor, keep: float, row_dims: int = 1) -> Tensor:
    """The identity, with a backward pass that keeps a fraction ``keep`` of the rows.

    Args:
        x: at least ``row_dims`` dimensions, the leading ones counting rows.
        keep: fraction in (0, 1].
        row_dims: 1 for samples, 2 for tokens.

    Raises:
        ValueError: ``x`` has too few dimensions.
    """
    if x.dim() < row_dims:
        raise ValueError(
            f"a mask over {row_dims} leading dimensions cannot act on an output of shape {tuple(x.shape)}"
        )
    return _Mask.apply(x, keep, row_dims) if keep < 1 else x


def mask_outputs(outputs: Any, keep: float, row_dims: int) -> Any:
    """Mask every differentiable tensor among a module's outputs, each with a draw of its own."""

    def masked(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            return mask_rows(leaf, keep, row_dims)
        return leaf

    return pytree.tree_map(masked, outputs)
