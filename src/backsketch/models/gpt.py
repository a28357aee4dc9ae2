"""Decoder-only transformer, pre-norm (Radford et al. 2019).

The blocks are those of the Vision Transformer under a causal mask: every weight matrix is a plain `nn.Linear`,
every residual branch one submodule with its own norm (`blocks.i.attn`, `blocks.i.mlp`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from backsketch.models.vit import Block
from backsketch.nn import LinearCrossEntropy


class GPT(nn.Module):
    """Token and position embeddings, causal blocks, norm, linear head.

    Shapes: tokens `(batch, length)` to logits `(batch, length, vocab_size)`, or with targets
    `(batch, length)` to the mean loss.
    """

    def __init__(
        self,
        vocab_size: int,
        context: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_ratio: int,
        dropout: float,
        tied: bool,
    ):
        super().__init__()
        self.context = context
        self.embed = nn.Embedding(vocab_size, dim)
        self.position = nn.Parameter(torch.zeros(context, dim))
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.Sequential(
            *(Block(dim, heads, mlp_ratio, dropout, is_causal=True) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(dim)
        self.head = LinearCrossEntropy(dim, vocab_size, bias=False)
        self._initialize(depth)
        if tied:
            self.head.weight = self.embed.weight

    def _initialize(self, depth: int) -> None:
        """Normal weights, smaller at the ends of the residual branches, whose sum has 2 depth terms."""
        nn.init.normal_(self.position, std=0.02)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                ends_branch = name.endswith((".proj", ".fc2"))
                nn.init.normal_(
                    module.weight, std=0.02 / math.sqrt(2 * depth) if ends_branch else 0.02
                )
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def features(self, tokens: Tensor) -> Tensor:
        """What the head reads: `(batch, length)` to `(batch, length, dim)`.

        Raises:
            ValueError: the sequence is longer than the context.
        """
        length = tokens.shape[1]
        if length > self.context:
            raise ValueError(
                f"{length} tokens are longer than the context of {self.context} that the model has"
            )
        return self.norm(self.blocks(self.drop(self.embed(tokens) + self.position[:length])))

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        return self.head(self.features(tokens), targets)

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        count: int,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Append `count` tokens to `(batch, length)`, each drawn given the `context` tokens before it."""
        return continued(self, tokens, count, self.context, temperature, generator)


@torch.no_grad()
def continued(
    logits: Callable[[Tensor], Tensor],
    tokens: Tensor,
    count: int,
    context: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """`tokens` `(batch, length)` and `count` more, by any function from tokens to their logits."""
    for _ in range(count):
        last = logits(tokens[:, -context:])[:, -1].float() / temperature
        drawn = torch.multinomial(last.softmax(-1), 1, generator=generator)
        tokens = torch.cat([tokens, drawn], dim=1)
    return tokens


def gpt(
    vocab_size: int,
    *,
    context: int = 128,
    dim: int = 128,
    depth: int = 4,
    heads: int | None = None,
    mlp_ratio: int = 4,
    dropout: float = 0.0,
    tied: bool = True,
) -> GPT:
    """Decoder-only transformer over a vocabulary.

    Args:
        vocab_size: number of different tokens.
        context: the longest sequence.
        dim: width of the tokens.
        depth: number of blocks.
        heads: attention heads; by default one per 32 channels.
        mlp_ratio: hidden width of the MLP branch over `dim`.
        dropout: after the embedding and at the end of each residual branch.
        tied: the head's weight is the embedding's.

    Raises:
        ValueError: a size is not positive, or `dim` is not a whole number of heads.

    Example:
        >>> model = gpt(256, dim=64, depth=2)
        >>> model(torch.zeros(2, 16, dtype=torch.long)).shape
        torch.Size([2, 16, 256])
    """
    heads = max(dim // 32, 1) if heads is None else heads
    if min(vocab_size, context, dim, depth, heads, mlp_ratio) < 1:
        raise ValueError(
            f"every size must be positive, got vocabulary {vocab_size}, context {context}, dim {dim}, "
            f"depth {depth}, heads {heads}, mlp_ratio {mlp_ratio}"
        )
    if dim % heads:
        raise ValueError(f"dim {dim} is not a multiple of the {heads} heads")
    return GPT(vocab_size, context, dim, depth, heads, mlp_ratio, dropout, tied)
