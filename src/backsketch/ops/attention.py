r"""Dot-product attention that keeps probabilities, queries, keys, values and output in a few bits.

With :math:`P = \mathrm{softmax}(s\,Q K^\top + M)`, :math:`O = P V` and cotangent G, the backward pass

.. math:: \nabla V = P^\top G, \qquad S = P \circ (G V^\top - \mathrm{rowsum}(G \circ O)), \qquad
          \nabla Q = s\, S K, \qquad \nabla K = s\, S^\top Q

is multilinear in P, Q, K, V and O: linear in each. Each is stochastically rounded on its own, independently
of the others, so the estimates of all three gradients are **exactly unbiased**. (Computing P anew from
rounded Q and K, as a memory-efficient kernel does from exact ones, would be biased: softmax is not linear.)

P has one entry for each pair of a query and a key. It is worth keeping for short sequences only: where
everything that is kept takes more than half of what the exact attention keeps, the attention stays exact.
With 4 bits that is at more than 8 keys for each channel of a head (:func:`pays`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from backsketch.estimators import Estimator
from backsketch.ops.double_backward import without_double_backward
from backsketch.ops.function import as_own_tensor
from backsketch.ops.linear import check_estimator
from backsketch.rounding import Rounding
from backsketch.sampling import next_seed

__all__ = ["attention", "pays"]


def pays(rounding: Rounding, keys: int, channels: int) -> bool:
    """Whether rounding P, Q, K, V and O takes at most half of the exact Q, K, V and O (per query and head)."""
    return rounding.share() * (keys + 4 * channels) <= 4 * channels / 2


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    sketch: Estimator,
) -> Tensor:
    """``F.scaled_dot_product_attention``, bit-identical, that saves a few bits an entry.

    Args:
        q: ``(*, queries, channels)``. k: ``(*, keys, channels)``. v: ``(*, keys, value channels)``.
        mask: boolean (True takes part) or additive, broadcastable to ``(*, queries, keys)``.
        is_causal, scale: as in ``F.scaled_dot_product_attention``; there is no dropout.
        sketch: a memory saver that rounds (``bs.Quantized``). Any other leaves the attention exact, and so
            do sequences for which it would not pay, batch dimensions that broadcast and masks that are
            trained.

    Raises:
        RuntimeError: on double backward.
        TypeError: ``sketch`` is not a layer estimator.
    """
    check_estimator(sketch)
    q, k, v = _cast(q, k, v)
    rounding = sketch.rounding()
    if rounding is None or not _applies(rounding, q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal, scale=scale)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    y: Tensor = _SavedInBits.apply(rounding, q, k, v, mask, is_causal, factor, next_seed(q, k, v))[
        0
    ]
    return y


def _applies(rounding: Rounding, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    trained = any(t.requires_grad for t in (q, k, v)) and torch.is_grad_enabled()
    same = q.shape[:-2] == k.shape[:-2] == v.shape[:-2] and q.numel() > 0 and k.numel() > 0
    fixed = mask is None or not mask.requires_grad
    return trained and same and fixed and pays(rounding, k.shape[-2], q.shape[-1])


def _cast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Autocast's dtype, as ``F.scaled_dot_product_attention`` takes it."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device) or tensors[0].dtype == torch.float64:
        return tensors
    return tuple(t.to(torch.get_autocast_dtype(device)) for t in tensors)


def _probabilities(
    q: Tensor, k: Tensor, mask: Tensor | None, is_causal: bool, factor: float
) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):  # rounded logits would be a bias
        logits = (q.to(wide) @ k.to(wide).transpose(-2, -1)).mul_(factor)
    if is_causal:
        causal = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).tril()
        mask = causal if mask is None else mask
    if mask is not None and mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask, -math.inf)
    elif mask is not None:
        logits = logits + mask
    p = logits.softmax(-1)
    if mask is None or is_causal:
        return p
    # Where nothing may be attended to, F.scaled_dot_product_attention returns zero and softmax NaN.
    return p.masked_fill_(logits.amax(-1, keepdim=True) == -math.inf, 0.0)


class _SavedInBits(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        rounding: Rounding,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        is_causal: bool,
        factor: float,
        seed: Tensor,
    ) -> tuple[Tensor, ...]:
        out = F.scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal, scale=factor)
        q, k = q.contiguous(), k.contiguous()
        p = _probabilities(q, k, mask, is_causal, factor)
        packed = [rounding.pack(t, seed, stream) for stream, t in enumerate((p, q, k, v, out))]
        return as_own_tensor(out), *(part for pair in packed for part in pair)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        rounding, q, k, v, _, _, factor, _ = inputs
        ctx.rounding, ctx.factor, ctx.dtype = rounding, factor, q.dtype
        ctx.shapes = tuple(tuple(t.shape) for t in (q, k, v))
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[1:])

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor | None, *_: Any) -> tuple[Any, ...]:
        gradients: tuple[Any, ...] = (None, None, None)
        if cotangent is not None:
            gradients = without_double_backward(
                _vjp, ctx.rounding, ctx.factor, ctx.shapes, ctx.dtype, cotangent, *ctx.saved_tensors
            )
        return (None, *gradients, None, None, None, None)


def _vjp(
    rounding: Rounding,
    factor: float,
    shapes: tuple[tuple[int, ...], ...],
    dtype: torch.dtype,
    cotangent: Tensor,
    *packed: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    q_shape, k_shape, v_shape = shapes
    p_shape = (*q_shape[:-1], k_shape[-2])
    out_shape = (*q_shape[:-1], v_shape[-1])

    def dequantized(i: int, shape: tuple[int, ...]) -> Tensor:
        return rounding.restore((packed[2 * i], packed[2 * i + 1]), shape, cotangent)

    p = dequantized(0, p_shape)
    g = cotangent.to(p.dtype).contiguous()
    grad_v = p.transpose(-2, -1) @ g
    logits = g @ dequantized(3, v_shape).transpose(-2, -1)
    logits -= (g * dequantized(4, out_shape)).sum(-1, keepdim=True)
    logits *= p * factor
    grad_q = logits @ dequantized(2, k_shape)
    grad_k = logits.transpose(-2, -1) @ dequantized(1, q_shape)
    return grad_q.to(dtype), grad_k.to(dtype), grad_v.to(dtype)
