"""``nn.MultiheadAttention``: its projections are read as weights, so the module needs an adapter of its own.

The attention itself is exact, except under an estimator that rounds, where it may keep its operands in a few
bits (:mod:`backsketch.ops.attention`; not with dropout or with ``need_weights``). The order of operations is
that of ``torch.nn.functional.multi_head_attention_forward``, so that the forward values are bit-identical.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backsketch import ops
from backsketch.estimators import Bilinear
from backsketch.nn.registry import Adapter, register
from backsketch.nn.swap import Swapped
from backsketch.ops.linear import Linear

__all__ = ["SketchedMultiheadAttention"]


class SketchedMultiheadAttention(Swapped, nn.MultiheadAttention):
    """Multi-head attention whose four projections are sketched while it trains."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if not self._active():
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask,
                average_attn_weights, is_causal,
            )  # fmt: skip
        _check_masks(key_padding_mask, attn_mask, is_causal)
        batched = query.dim() == 3
        query, key, value = self._sequence_first(query, key, value, batched)
        if not batched and key_padding_mask is not None:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        if is_causal and key_padding_mask is None and not need_weights:
            attn_mask = None
        else:
            is_causal = is_causal and key_padding_mask is None
        self._check_shapes(query, key, value, key_padding_mask, attn_mask)

        q, k, v = self._project(query, key, value)
        q, k, v, mask = self._heads(q, k, v, key_padding_mask, attn_mask)
        length, batch = query.shape[:2]
        weights = None
        if need_weights:
            mixed, weights = self._attend_with_weights(q, k, v, mask)
            mixed = mixed.transpose(0, 1).reshape(length * batch, self.embed_dim)
        else:
            mixed = self._attend(q, k, v, mask, is_causal, batch)
            mixed = mixed.permute(2, 0, 1, 3).contiguous().view(batch * length, self.embed_dim)
        out = ops.linear(mixed, self.out_proj.weight, self.out_proj.bias, self._backsketch)
        out = out.view(length, batch, self.embed_dim)
        return self._restore_layout(out, weights, batched, average_attn_weights, batch)

    # Layout --------------------------------------------------------------------------------------

    def _sequence_first(
        self, query: Tensor, key: Tensor, value: Tensor, batched: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``(length, batch, dim)``; batched tensors that are one object stay one object."""
        if not batched:
            # As PyTorch does it: three tensors, hence three products, and the same rounding.
            return query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
        if not self.batch_first:
            return query, key, value
        k = key.transpose(1, 0)
        q = k if query is key else query.transpose(1, 0)
        return q, k, k if value is key else value.transpose(1, 0)

    def _check_shapes(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        padding: Tensor | None,
        mask: Tensor | None,
    ) -> None:
        """Refuse what PyTorch refuses: most of it would broadcast into a wrong result."""
        if not query.dim() == key.dim() == value.dim() == 3:
            raise RuntimeError(
                "MultiheadAttention: query, key and value must all be 2-D (unbatched) or all be 3-D"
            )
        length, batch = query.shape[:2]
        source = key.shape[0]
        expected: list[tuple[str, Tensor | None, list[tuple[int, ...]]]] = [
            ("query", query, [(length, batch, self.embed_dim)]),
            ("key", key, [(source, batch, self.kdim)]),
            ("value", value, [(source, batch, self.vdim)]),
            ("key_padding_mask", padding, [(batch, source)]),
            ("attn_mask", mask, [(length, source), (batch * self.num_heads, length, source)]),
        ]
        for name, tensor, shapes in expected:
            if tensor is not None and tuple(tensor.shape) not in shapes:
                wanted = " or ".join(str(shape) for shape in shapes)
                raise RuntimeError(
                    f"MultiheadAttention: {name} has shape {tuple(tensor.shape)}, but should have {wanted} "
                    "(sequence first)"
                )

    def _restore_layout(
        self, out: Tensor, weights: Tensor | None, batched: bool, average: bool, batch: int
    ) -> tuple[Tensor, Tensor | None]:
        if weights is not None:
            weights = weights.view(batch, self.num_heads, *weights.shape[1:])
            weights = weights.mean(dim=1) if average else weights
        if not batched:
            return out.squeeze(1), None if weights is None else weights.squeeze(0)
        return out.transpose(1, 0) if self.batch_first else out, weights

    # Projections ---------------------------------------------------------------------------------

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sketch, bias = self._backsketch, self.in_proj_bias
        dim = self.embed_dim
        if self.in_proj_weight is not None and key is value:
            weight = self.in_proj_weight
            if query is key:
                packed = ops.linear(query, weight, bias, sketch)
                q, k, v = _unpack(packed, 3, dim)
                return q, k, v
            w_q, w_kv = weight.split([dim, 2 * dim])
            b_q, b_kv = (None, None) if bias is None else bias.split([dim, 2 * dim])
            k, v = _unpack(ops.linear(key, w_kv, b_kv, sketch), 2, dim)
            return ops.linear(query, w_q, b_q, sketch), k, v
        if self.in_proj_weight is not None:
            parts = self.in_proj_weight.chunk(3)
        else:
            parts = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        q, k, v = (
            ops.linear(x, w, b, sketch) for x, w, b in zip((query, key, value), parts, biases)
        )
        return q, k, v

    def _heads(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        padding: Tensor | None,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """``(batch * heads, length, head_dim)`` and the additive mask, with the extra keys appended."""
        batch = q.shape[1]
        padding, mask = _additive(padding, q.dtype), _additive(mask, q.dtype)
        if mask is not None and mask.dim() == 2:
            mask = mask.unsqueeze(0)
        extra = 0
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.repeat(1, batch, 1)])
            v = torch.cat([v, self.bias_v.repeat(1, batch, 1)])
            extra += 1

        def split(x: Tensor) -> Tensor:
            return x.view(x.shape[0], batch * self.num_heads, self.head_dim).transpose(0, 1)

        q, k, v = split(q), split(k), split(v)
        if self.add_zero_attn:
            zero = k.new_zeros(k.shape[0], 1, k.shape[2])
            k, v = torch.cat([k, zero], dim=1), torch.cat([v, zero], dim=1)
            extra += 1
        mask = mask if mask is None or not extra else F.pad(mask, (0, extra))
        if padding is not None:
            padding = F.pad(padding, (0, extra)) if extra else padding
            padding = padding.view(batch, 1, 1, -1).expand(-1, self.num_heads, -1, -1)
            padding = padding.reshape(batch * self.num_heads, 1, -1)
            mask = padding if mask is None else mask + padding
        return q, k, v, mask

    # Attention -----------------------------------------------------------------------------------

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, batch: int
    ) -> Tensor:
        if mask is not None:
            shared = mask.shape[0] == 1
            mask = (
                mask.unsqueeze(0) if shared else mask.view(batch, self.num_heads, *mask.shape[1:])
            )
        q, k, v = (x.view(batch, self.num_heads, x.shape[1], self.head_dim) for x in (q, k, v))
        if self.dropout > 0:
            return F.scaled_dot_product_attention(q, k, v, mask, self.dropout, is_causal)
        return ops.attention(q, k, v, mask, is_causal, sketch=self._backsketch)

    def _attend_with_weights(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        scaled = q * math.sqrt(1.0 / float(self.head_dim))
        keys = k.transpose(-2, -1)
        logits = torch.bmm(scaled, keys) if mask is None else torch.baddbmm(mask, scaled, keys)
        weights = F.softmax(logits, dim=-1)
        if self.dropout > 0:
            weights = F.dropout(weights, p=self.dropout)
        return torch.bmm(weights, v), weights


def _unpack(packed: Tensor, parts: int, dim: int) -> Tensor:
    packed = packed.unflatten(-1, (parts, dim))
    return packed.unsqueeze(0).transpose(0, -2).squeeze(-2).contiguous()


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A boolean mask (True = hidden) as numbers to add to the logits."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


def _check_masks(padding: Tensor | None, mask: Tensor | None, is_causal: bool) -> None:
    if is_causal and mask is None:
        raise RuntimeError("MultiheadAttention: is_causal is a hint that needs attn_mask beside it")
    for name, tensor in (("key_padding_mask", padding), ("attn_mask", mask)):
        if tensor is not None and not (tensor.dtype == torch.bool or tensor.is_floating_point()):
            raise RuntimeError(f"MultiheadAttention: {name} must be boolean or floating point")


def _weights(module: nn.Module) -> list[tuple[Bilinear, Tensor]]:
    assert isinstance(module, nn.MultiheadAttention)
    if module.in_proj_weight is not None:
        inner = [module.in_proj_weight]
    else:
        inner = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
    return [(Linear(), weight) for weight in (*inner, module.out_proj.weight)]


register(Adapter(nn.MultiheadAttention, SketchedMultiheadAttention, _weights))
