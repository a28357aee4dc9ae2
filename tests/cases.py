"""The table of cases that the tests run over: every estimator, every kind of layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import backsketch as bs
from backsketch.estimators import Bilinear, Estimator
from backsketch.ops.convolution import TransposedConvolution, bilinear_convolution, columns_first
from backsketch.ops.linear import Linear, TransposedLinear

ESTIMATORS = [
    bs.Elements(keep=0.5),
    bs.Rows(keep=0.5),
    bs.Rows(keep=0.25, scores="uniform"),
    bs.Rows(keep=0.5, scores="l1"),
    bs.Rows(keep=0.5, scores="l2", design="permuted"),
    bs.Rows(keep=0.5, design="independent"),
    bs.Columns(keep=0.5),
    bs.Columns(keep=0.5, scores="uniform"),
    bs.Columns(keep=0.25, scores="l1"),
    bs.Columns(keep=0.5, scores="l2", design="permuted"),
    bs.Columns(keep=0.5, design="independent"),
    bs.LowRank(keep=0.5, method="svd"),
    bs.LowRank(keep=0.5, method="subspace"),
    bs.StoredRows(keep=0.5),
    bs.StoredRows(keep=0.25, scores="uniform"),
    bs.StoredRows(keep=0.5, scores="l1", design="independent"),
    bs.Projection(keep=0.5),
    bs.Projection(keep=0.5, kind="srht"),
    bs.Quantized(bits=1),
    bs.Quantized(bits=2),
    bs.Quantized(bits=4, group_size=16),
    bs.Quantized(bits=8),
    bs.Int8(),
    bs.Int8(save=True),
    bs.Int8(sketch=bs.Rows(keep=0.5)),
    bs.Float8(),
    bs.Float8(save=True),
    bs.Split(grad_weight=bs.Rows(keep=0.5)),
    bs.Split(grad_input=bs.Columns(keep=0.5), grad_weight=bs.StoredRows(keep=0.5)),
]

# One of each family, for the tests where each case is expensive.
FAMILIES = [
    bs.Elements(keep=0.5),
    bs.Rows(keep=0.5),
    bs.Columns(keep=0.5),
    bs.LowRank(keep=0.5, method="svd"),
    bs.LowRank(keep=0.5, method="subspace"),
    bs.StoredRows(keep=0.5),
    bs.Projection(keep=0.5),
    bs.Projection(keep=0.5, kind="srht"),
    bs.Quantized(bits=2),
    bs.Int8(),
    bs.Float8(),
    bs.Split(grad_weight=bs.Rows(keep=0.5)),
]

# Which hooks of Sketch and Estimator a family leaves as they are, on purpose. tests/test_registry.py fails where
# an estimator neither sets a hook nor names it here.
INHERITED: dict[type[Estimator], set[str]] = {
    bs.Elements: {"chooses", "needs_forward_seed", "saves_memory", "needs_pairs", "needs_rows"},
    bs.Rows: {"needs_forward_seed", "saves_memory", "needs_pairs", "needs_rows"},
    bs.Columns: {"needs_forward_seed", "saves_memory", "needs_pairs", "needs_rows"},
    bs.LowRank: {"chooses", "needs_forward_seed", "saves_memory", "needs_pairs", "needs_rows"},
    bs.StoredRows: {"needs_pairs", "needs_rows"},
    bs.Projection: {"chooses", "needs_rows"},
    bs.Quantized: {"chooses", "needs_pairs"},
    bs.Int8: {"needs_pairs"},  # with another estimator inside it has no closed form
    bs.Float8: {"needs_pairs"},
    bs.Exact: {"chooses", "needs_forward_seed", "saves_memory", "needs_pairs"},
}

# Kinds of layers whose products have no 8-bit form: Int8 and Float8 refuse them.
WITHOUT_8_BITS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Layer:
    """A layer's backward products with concrete tensors: x as received, cotangent as received."""

    name: str
    op: Bilinear
    x: Tensor
    weight: Tensor
    cotangent: Tensor

    def __str__(self) -> str:
        return self.name

    @property
    def g(self) -> Tensor:
        """The cotangent in rows form."""
        return self.op.rows(self.cotangent)


def linear(shape: tuple[int, ...] = (12,), d_in: int = 6, d_out: int = 8, seed: int = 0) -> Layer:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, d_in, generator=g)
    weight = torch.randn(d_out, d_in, generator=g)
    cotangent = torch.randn(*shape, d_out, generator=g)
    # Rows and columns of unequal size, or data-dependent scores would have nothing to find.
    cotangent *= torch.linspace(0.2, 2, d_out) * torch.linspace(0.3, 2, shape[-1])[:, None]
    return Layer(f"linear{shape}", Linear(), x, weight, cotangent)


def conv(
    kernel=3, stride=1, padding=0, dilation=1, groups=1, c_in=4, c_out=6, n=6, seed=0
) -> Layer:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, c_in, 6, 7, generator=g)
    weight = torch.randn(c_out, c_in // groups, kernel, kernel, generator=g)
    y = torch.nn.functional.conv2d(x, weight, None, stride, padding, dilation, groups)
    cotangent = torch.randn(y.shape, generator=g) * torch.linspace(0.3, 2, n).view(-1, 1, 1, 1)
    pair = lambda v: (v, v)  # noqa: E731
    op = bilinear_convolution(
        pair(kernel), pair(stride), pair(padding), pair(dilation), groups, (6, 7)
    )  # fmt: skip
    name = f"conv{kernel}x{kernel}-s{stride}-p{padding}-d{dilation}-g{groups}"
    return Layer(name, op, x, weight, cotangent)


def conv_nd(spatial: tuple[int, ...], groups: int = 1, seed: int = 0) -> Layer:
    """A convolution over one or three dimensions, of kernel 2 and stride 2."""
    g, dims = torch.Generator().manual_seed(seed), len(spatial)
    x = torch.randn(5, 4, *spatial, generator=g)
    weight = torch.randn(6, 4 // groups, *(2,) * dims, generator=g)
    one, two = (1,) * dims, (2,) * dims
    op = bilinear_convolution(two, two, one, one, groups, spatial)
    y = op.forward(x, weight, None)
    return Layer(f"conv{dims}d-g{groups}", op, x, weight, torch.randn(y.shape, generator=g))


def transposed_conv(spatial: tuple[int, ...], groups: int = 1, seed: int = 0) -> Layer:
    g, dims = torch.Generator().manual_seed(seed), len(spatial)
    x = torch.randn(5, 4, *spatial, generator=g)
    weight = columns_first(torch.randn(4, 6 // groups, *(3,) * dims, generator=g), groups)
    one, two = (1,) * dims, (2,) * dims
    op = TransposedConvolution((3,) * dims, two, one, one, spatial, groups, one)
    y = op.forward(x, weight, None)
    cotangent = torch.randn(y.shape, generator=g)
    return Layer(f"transposed{dims}d-g{groups}", op, x, weight, cotangent)


class WithoutBias(TransposedLinear):
    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super().forward(x, weight, weight.new_zeros(weight.shape[0]))


def transposed_linear() -> Layer:
    layer = linear((3, 4), seed=9)
    return Layer("transposed linear", WithoutBias(), layer.x, layer.weight, layer.cotangent)


LAYERS = [
    linear(),
    linear((2, 3, 4), seed=1),
    conv(padding=1),
    conv(stride=2, padding=2, dilation=2, seed=1),
    conv(groups=2, padding=1, seed=2),
    conv(groups=4, c_out=4, seed=3),
    conv(kernel=1, n=3, seed=4),
    conv(kernel=1, stride=2, groups=2, seed=5),
    conv_nd((9,), groups=2, seed=6),
    conv_nd((4, 3, 5), seed=7),
    transposed_conv((3, 4), groups=2, seed=8),
    transposed_conv((5,), seed=9),
    transposed_linear(),
]


class SelfAttention(nn.Module):
    """Attention of a sequence to itself, with one tensor as its output."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class HeadAndLoss(nn.Module):
    """A head that knows its loss, and always the same targets."""

    def __init__(self) -> None:
        super().__init__()
        self.head = bs.nn.LinearCrossEntropy(5, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x, torch.arange(len(x), device=x.device) % 7)


# Every kind of layer with products to sketch: a module around one, and its inputs.
# tests/test_registry.py fails where a registered kind has no row here.
ADAPTED: dict[type[nn.Module], tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    nn.Linear: (lambda: nn.Linear(5, 4), lambda: (torch.randn(7, 5),)),
    nn.Conv2d: (lambda: nn.Conv2d(2, 4, 3, padding=1), lambda: (torch.randn(6, 2, 4, 3),)),
    nn.Conv1d: (
        lambda: nn.Conv1d(4, 6, 3, padding="same", groups=2),
        lambda: (torch.randn(5, 4, 6),),
    ),
    nn.Conv3d: (
        lambda: nn.Conv3d(2, 6, (2, 3, 1), padding=1),
        lambda: (torch.randn(5, 2, 3, 4, 2),),
    ),
    nn.ConvTranspose1d: (
        lambda: nn.ConvTranspose1d(4, 6, 3, stride=2),
        lambda: (torch.randn(5, 4, 4),),
    ),
    nn.ConvTranspose2d: (
        lambda: nn.ConvTranspose2d(4, 6, 3, 2, padding=1, output_padding=1, groups=2, dilation=2),
        lambda: (torch.randn(5, 4, 3, 4),),
    ),
    nn.ConvTranspose3d: (
        lambda: nn.ConvTranspose3d(2, 4, 2),
        lambda: (torch.randn(5, 2, 2, 3, 2),),
    ),
    bs.nn.LinearCrossEntropy: (HeadAndLoss, lambda: (torch.randn(9, 5) * 2,)),
    nn.MultiheadAttention: (SelfAttention, lambda: (torch.randn(4, 3, 8),)),
}
