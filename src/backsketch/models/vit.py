"""Vision Transformer, pre-norm (Dosovitskiy et al., ICLR 2021).

Every weight matrix is a plain `nn.Linear`, and every residual branch is one submodule that contains
its own norm (`blocks.i.attn`, `blocks.i.mlp`), so that a sketch or a region can be put on either.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from backsketch.nn import DotProductAttention


class Attention(nn.Module):
    """Residual branch `proj(attention(norm(x)))`. Shapes: `(batch, tokens, dim)` to the same."""

    def __init__(self, dim: int, heads: int, dropout: float = 0.0, is_causal: bool = False):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.core = DotProductAttention(is_causal=is_causal)
        self.proj = nn.Linear(dim, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        qkv = self.qkv(self.norm(x)).view(batch, tokens, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (batch, heads, tokens, dim / heads)
        out = self.core(q, k, v)
        return self.drop(self.proj(out.transpose(1, 2).reshape(batch, tokens, dim)))


class Mlp(nn.Module):
    """Residual branch `fc2(gelu(fc1(norm(x))))`; tokens do not interact.

    Shapes: `(batch, tokens, dim)` to the same.
    """

    def __init__(self, dim: int, hidden: int, dropout: float = 0.0):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.act(self.fc1(self.norm(x)))))


class Block(nn.Module):
    """Two residual branches. Shapes: `(batch, tokens, dim)` to the same."""

    def __init__(
        self, dim: int, heads: int, mlp_ratio: int, dropout: float = 0.0, is_causal: bool = False
    ):
        super().__init__()
        self.attn = Attention(dim, heads, dropout, is_causal)
        self.mlp = Mlp(dim, mlp_ratio * dim, dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.mlp(x)


class ViT(nn.Module):
    """Patches, blocks, norm, mean over tokens, linear head.

    Shapes: input `(batch, channels, height, width)`, output `(batch, num_classes)`.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        patch: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_ratio: int,
        dropout: float,
    ):
        super().__init__()
        channels, height, width = image_shape
        tokens = (height // patch) * (width // patch)
        self.patch = patch
        self.embed = nn.Linear(channels * patch * patch, dim)
        self.position = nn.Parameter(torch.zeros(1, tokens, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads, mlp_ratio, dropout) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)
        nn.init.trunc_normal_(self.position, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def patches(self, x: Tensor) -> Tensor:
        """Cut into patches: `(batch, c, h, w)` to `(batch, tokens, c * patch * patch)`."""
        batch, channels, height, width = x.shape
        p = self.patch
        cut = x.view(batch, channels, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)
        return cut.reshape(batch, -1, channels * p * p)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(self.patches(x)) + self.position
        x = self.norm(self.blocks(x))
        return self.head(x.mean(dim=1))


def vit(
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    patch: int | None = None,
    dim: int = 96,
    depth: int = 4,
    heads: int | None = None,
    mlp_ratio: int = 4,
    dropout: float = 0.0,
) -> ViT:
    """Vision Transformer on images of one size.

    Args:
        image_shape: `(channels, height, width)`.
        num_classes: outputs.
        patch: side of a patch; by default a quarter of a small image (32x32: patch 8, 16 tokens),
            and 16 from 64 pixels on.
        dim: width of the tokens.
        depth: number of blocks.
        heads: attention heads; by default one per 32 channels.
        mlp_ratio: hidden width of the MLP branch over `dim`.
        dropout: at the end of each residual branch.

    Raises:
        ValueError: a size is not positive, the image is not a whole number of patches, or `dim` of heads.

    Example:
        >>> model = vit((3, 32, 32), 10, dim=192, depth=6, patch=4)
        >>> model(torch.zeros(2, 3, 32, 32)).shape, model.position.shape[1]
        (torch.Size([2, 10]), 64)
    """
    _, height, width = image_shape
    side = min(height, width)
    if patch is None:
        patch = 16 if side >= 64 else max(side // 4, 1)
    heads = max(dim // 32, 1) if heads is None else heads
    if min(dim, depth, heads, patch, mlp_ratio) < 1:
        raise ValueError(
            f"every size must be positive, got dim {dim}, depth {depth}, heads {heads}, patch {patch}, "
            f"mlp_ratio {mlp_ratio}"
        )
    if height % patch or width % patch:
        raise ValueError(
            f"images of {height}x{width} pixels are not a whole number of {patch}x{patch} patches"
        )
    if dim % heads:
        raise ValueError(f"dim {dim} is not a multiple of the {heads} heads")
    return ViT(image_shape, num_classes, patch, dim, depth, heads, mlp_ratio, dropout)
