"""Small modules for the region tests: what should be sketched, and what must be refused."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backsketch.regions import Mask, Region, RegionState, attach


def make_region(model: nn.Module, rules: dict[str, Region | Mask]) -> dict[str, RegionState | None]:
    """Attach regions and masks by qualified name; returns their states."""
    return {n: attach(model.get_submodule(n), s, n) for n, s in rules.items()}


class Attention(nn.Module):
    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(d), nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.heads = heads

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        b, t, d = x.shape
        qkv = self.qkv(self.norm(x)).view(b, t, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).reshape(b, t, d))


class Feedforward(nn.Module):
    def __init__(self, d: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(d), nn.Linear(d, 2 * d), nn.Linear(2 * d, d)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down(F.gelu(self.up(self.norm(x)))))


class Block(nn.Module):
    def __init__(self, d: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(d, heads), Feedforward(d, dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(x, mask=mask)
        return x + self.mlp(x)


class ViT(nn.Module):
    def __init__(self, d: int = 8, depth: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, d, 4, 4)
        self.pos = nn.Parameter(torch.randn(1, 4, d) * 0.1)
        self.blocks = nn.ModuleList(Block(d, 2, dropout) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2) + self.pos
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class GPT(nn.Module):
    """Token and position tables, and a causal mask passed as a keyword argument."""

    def __init__(self, d: int = 8, vocabulary: int = 11, length: int = 5) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, d), nn.Embedding(length, d)
        self.block = Block(d, 2)
        self.head = nn.Linear(d, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        t = ids.shape[1]
        x = self.tokens(ids) + self.positions(torch.arange(t, device=ids.device))
        mask = torch.ones(t, t, dtype=torch.bool, device=ids.device).tril()
        return self.head(self.block(x, mask=mask))


class Picked(nn.Module):
    """Pools at a token of each sample, as classifiers on decoders do; a bias is repeated for all, as Bloom's."""

    def __init__(self, d: int = 8, tokens: int = 4) -> None:
        super().__init__()
        self.block, self.head = Block(d, 2), nn.Linear(d, 3)
        self.bias = nn.Parameter(torch.randn(1, tokens, d) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x + self.bias.repeat(x.shape[0], 1, 1))
        hidden = torch.zeros(x.shape[:2], device=x.device)
        hidden[:, 1:] = 1  # as masked autoencoders do
        y = y * (1 + hidden[..., None])
        last = x.sum(-1).argmax(-1)
        few = x.sum(-1).argsort(-1)[:, :2]
        rows = torch.arange(x.shape[0], device=x.device)
        shared = y[rows[:, None], torch.arange(2)[None, :]]  # as transformers reads padding masks
        return self.head(y[rows, last] + y[rows[:, None], few].mean(1) + shared.sum(1))


class CNN(nn.Module):
    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2)
        self.norm = norm if norm is not None else nn.GroupNorm(2, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.a(x)), inplace=True), 2)
        return self.head(F.silu(self.b(x)).mean((2, 3)))


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class Fourier(nn.Module):
    """Tokens mixed as in FNet, then by a filter on their frequencies."""

    def __init__(self, d: int = 8, tokens: int = 8) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(d, d), nn.LayerNorm(d), nn.Linear(d, 4)
        self.filter = nn.Parameter(torch.randn(tokens // 2 + 1, d, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.norm(x + torch.fft.fft2(x, norm="ortho").real)
        frequencies = torch.fft.rfft(x, dim=1) * torch.view_as_complex(self.filter)
        return self.last(torch.fft.irfft(frequencies, n=x.shape[1], dim=1))


class Windows(nn.Module):
    """A Swin-like block over ``(b, 16, d)`` tokens: attention in windows of 4, shifted by 2."""

    def __init__(self, d: int = 8) -> None:
        super().__init__()
        self.inner = WindowAttention(d)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        shifted = torch.roll(x, 2, 1).view(b, 4, 4, d).reshape(b * 4, 4, d)
        y = self.inner(shifted).view(b, t, d)
        return x + torch.roll(y, -2, 1)


class WindowAttention(nn.Module):
    """Rows here are windows, and each kind of window has a mask of its own."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.attn = Attention(d, 2)
        self.register_buffer("bias", torch.randn(4, 4, d))

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        x = (x.view(n // 4, 4, t, d) + self.bias).view(n, t, d)
        return self.attn(x)


class TwoTowers(nn.Module):
    """Two inputs with the same rows; ``contrast`` compares every row with every other one."""

    def __init__(self, contrast: bool) -> None:
        super().__init__()
        self.left, self.right, self.contrast = mlp(6, 8, 4), mlp(5, 8, 4), contrast

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor] | Tensor:
        a, b = self.left(x), self.right(y)
        return a @ b.t() if self.contrast else (a, b)


class GroupedExperts(nn.Module):
    """A mixture of experts as ``transformers`` computes it while it is captured."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        pytest.importorskip("transformers.integrations.moe")  # which registers the operator
        self.up = nn.Parameter(torch.randn(3, width, 2 * width) / width**0.5)
        self.down = nn.Parameter(torch.randn(3, 2 * width, width) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """One expert gets no row."""
        product = torch.ops.transformers.grouped_mm_fallback
        n = x.shape[0]
        ends = torch.tensor([n // 3, n // 3, n], dtype=torch.int32)
        return product(torch.tanh(product(x, self.up, ends)), self.down, ends)
