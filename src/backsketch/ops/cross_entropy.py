r"""A linear head and its cross-entropy without stored logits, and the gradient of some tokens only.

For row i with target t, :math:`z = W x_i + b` and :math:`q = (1-\varepsilon) e_t + \varepsilon/V`,

.. math::
    \ell_i = \mathrm{lse}(z) - q \cdot z + \zeta\, \mathrm{lse}(z)^2, \qquad
    g_i = \partial \ell_i / \partial z = (1 + 2 \zeta\, \mathrm{lse}(z))\, p - q

with :math:`p = \mathrm{softmax}(z)`, smoothing :math:`\varepsilon` and z-loss :math:`\zeta`. The forward pass
makes the logits in chunks of rows and keeps three numbers a row: the loss, :math:`\mathrm{lse}(z)` and a score.
The backward pass draws k of the N rows in a fixed-size design with inclusion probabilities

.. math:: \pi_i \propto |c_i|\, \|g_i\| \sqrt{\|x_i\|^2 + \textstyle\frac1N \sum_j \|x_j\|^2}

(c the cotangent of the losses), makes the logits of these rows again, and sums over them, each divided by
:math:`\pi_i`. Unbiased: the sums are linear in :math:`g_i`, and a row of score zero has :math:`g_i = 0`. The first
term under the root is the row's share in ``grad_weight``, the second stands for ``grad_input``, in which x is
no factor.

Products: 1 in the forward pass, 3 keep in the backward pass; exact autograd has 1 and 2.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from backsketch.ops.autocast import cast_for_autocast
from backsketch.ops.double_backward import without_double_backward
from backsketch.ops.logits import head_gradients, head_losses
from backsketch.sampling import next_seed

__all__ = ["linear_cross_entropy"]

_REDUCTIONS = ("mean", "sum", "none")
_ARITHMETICS = ("exact", "int8")


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    keep: float = 1.0,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    reduction: str = "mean",
    arithmetic: str = "exact",
    chunk_rows: int | None = None,
) -> Tensor:
    """``F.cross_entropy(F.linear(x, weight, bias), targets)`` that stores no logits, with a sampled gradient.

    The value is exact for every ``keep``. What is saved for the backward pass does not depend on the size
    of the vocabulary: x, the targets and two numbers a row.

    Args:
        x: ``(*, in)``. Under autocast it is computed in autocast's dtype.
        weight: ``(classes, in)``; may be the embedding's.
        targets: ``(*)`` whole numbers, the shape of x without its last dimension.
        bias: ``(classes,)`` or None.
        keep: the fraction of the rows whose gradient is computed, in (0, 1]; ignored rows do not count.
        ignore_index: rows with this target have no loss and no gradient.
        label_smoothing: as in ``F.cross_entropy``, in [0, 1].
        z_loss: weight of the squared log of the softmax's denominator, added to each row's loss.
        soft_cap: c in ``c tanh(logits / c)``, applied to the logits before all else.
        reduction: ``"mean"`` over the rows that are not ignored, ``"sum"`` or ``"none"``.
        arithmetic: of the backward's two products: ``"exact"``, or ``"int8"`` for stochastically rounded
            8-bit operands (:class:`backsketch.Int8`; unbiased, too). The logits are exact in either case.
        chunk_rows: rows whose logits exist at a time; by default as many as take 32 MiB, in a backward pass in
            8 bits at least ``in``, so that they are no larger than the gradient of the weight.

    Returns:
        A scalar, or the shape of ``targets`` for the reduction ``"none"``, in float32 or better.

    Raises:
        ValueError: an argument outside its range, or shapes that do not fit.
        RuntimeError: on double backward.

    Source: chunks after cut cross-entropy (Wijmans et al. 2025), without its cut, which is biased.

    Example:
        >>> import torch, backsketch as bs
        >>> x, weight = torch.randn(8, 4), torch.randn(100, 4, requires_grad=True)
        >>> loss = bs.ops.linear_cross_entropy(x, weight, torch.arange(8), keep=0.5)
        >>> loss.backward()
        >>> weight.grad.shape
        torch.Size([100, 4])
    """
    _check(keep, label_smoothing, soft_cap, reduction, arithmetic, chunk_rows)
    _check_shapes(x, weight, targets, bias)
    # The weight is cast inside, chunk by chunk as it were: a saved copy would have the vocabulary's size.
    x, _, _ = cast_for_autocast(x, x, None)
    form = (ignore_index, label_smoothing, z_loss, soft_cap or 0.0, chunk_rows or 0)
    rows, wanted = x.reshape(-1, x.shape[-1]), targets.reshape(-1).long()
    tensors = [t for t in (x, weight, bias) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        is_int8 = arithmetic == "int8"
        losses = _LinearCrossEntropy.apply(rows, weight, bias, wanted, keep, is_int8, form)[0]
    else:
        losses = head_losses(rows, weight, bias, wanted, *form)[0]
    if reduction == "none":
        return losses.view(targets.shape)
    total = losses.sum()
    return total if reduction == "sum" else total / (wanted != ignore_index).sum()


class _LinearCrossEntropy(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        keep: float,
        is_int8: bool,
        form: tuple[Any, ...],
    ) -> tuple[Tensor, Tensor, Tensor]:
        losses, lse, scores = head_losses(x, weight, bias, targets, *form)
        return losses, lse, scores

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, bias, targets, ctx.keep, ctx.is_int8, ctx.form = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, targets, *output[1:])

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor | None, *_: Any) -> tuple[Any, ...]:
        gradients: tuple[Any, ...] = (None, None, None)
        if cotangent is not None:
            needed = tuple(ctx.needs_input_grad[:3])
            gradients = without_double_backward(
                _vjp, ctx.keep, ctx.is_int8, ctx.form, needed, cotangent, *ctx.saved_tensors
            )
        return (*gradients, None, None, None, None)


def _vjp(
    keep: float,
    is_int8: bool,
    form: tuple[Any, ...],
    needed: tuple[bool, ...],
    cotangent: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *rest: Tensor,
) -> tuple[Tensor | None, ...]:
    seed = next_seed(cotangent, weight)
    # The mean over no rows has an infinite one.
    cotangent = torch.where(targets != form[0], cotangent, 0.0)
    found = head_gradients(
        cotangent, x, weight, bias, targets, *rest, seed, keep, is_int8, *needed, *form
    )
    return tuple(gradient if wanted else None for gradient, wanted in zip(found, needed))


def _check(
    keep: float,
    label_smoothing: float,
    soft_cap: float | None,
    reduction: str,
    arithmetic: str,
    chunk_rows: int | None,
) -> None:
    if not 0 < keep <= 1:
        raise ValueError(f"linear_cross_entropy: keep must lie in (0, 1]; got {keep!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(
            f"linear_cross_entropy: label_smoothing must lie in [0, 1]; got {label_smoothing!r}"
        )
    if soft_cap is not None and not 0 < soft_cap < math.inf:
        raise ValueError(
            f"linear_cross_entropy: soft_cap must be positive or None; got {soft_cap!r}"
        )
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"linear_cross_entropy: chunk_rows must be positive; got {chunk_rows!r}")
    for name, value, allowed in (
        ("reduction", reduction, _REDUCTIONS),
        ("arithmetic", arithmetic, _ARITHMETICS),
    ):
        if value not in allowed:
            choices = ", ".join(map(repr, allowed))
            raise ValueError(
                f"linear_cross_entropy: {name} must be one of {choices}; got {value!r}"
            )


def _check_shapes(x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    fits = weight.ndim == 2 and x.ndim > 0 and x.shape[-1] == weight.shape[1]
    if not fits or (bias is not None and bias.shape != weight.shape[:1]):
        shapes = tuple(x.shape), tuple(weight.shape), None if bias is None else tuple(bias.shape)
        raise ValueError(
            "linear_cross_entropy: x must be (*, in), weight (classes, in) and bias (classes,); "
            f"got {shapes[0]}, {shapes[1]} and {shapes[2]}"
        )
    if targets.shape != x.shape[:-1] or targets.is_floating_point():
        raise ValueError(
            f"linear_cross_entropy: targets must be whole numbers of shape {tuple(x.shape[:-1])}; "
            f"got {targets.dtype} of shape {tuple(targets.shape)}"
        )
