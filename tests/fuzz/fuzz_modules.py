"""Random modules: a small language of layers, and what builds them.

A :class:`Node` is plain data, so that a failing case can be made smaller and pasted. Vectors and tokens have
``WIDTH`` features in their last dimension, images have ``WIDTH`` channels; every node keeps the shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import backsketch as bs

WIDTH = 8
SIZES = {"vectors": (8,), "tokens": (5, 8), "images": (8, 5, 5)}
"""Shape of one sample of each kind of input."""


@dataclass(frozen=True)
class Node:
    """A layer, or a structure around other nodes."""

    kind: str
    children: tuple[Node, ...] = ()

    def __repr__(self) -> str:
        return f"Node({self.kind!r}, {self.children})" if self.children else f"Node({self.kind!r})"

    def kinds(self) -> set[str]:
        """Its own kind and those of all nodes inside."""
        return {self.kind}.union(*(child.kinds() for child in self.children))


class Around(nn.Module):
    """Base of the structures: a module around others."""

    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleList(inner)


class Residual(Around):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner[0](x)


class ResidualInPlace(Around):
    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        y += self.inner[0](x)
        return y


class Shared(Around):
    """The same module twice in one forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner[0](torch.tanh(self.inner[0](x)))


class Sum(Around):
    """Branches that share an input and a cotangent."""

    def forward(self, x: Tensor) -> Tensor:
        return sum(m(x) for m in self.inner) / len(self.inner)


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


class Checkpointed(Around):
    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner[0], x, use_reentrant=self.reentrant)


class Reentrant(Checkpointed):
    reentrant = True


class Hooked(Around):
    """Hooks that change what passes: the output, its gradient, and the weights' gradients."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        inner.register_forward_hook(lambda module, inputs, y: y * 1.5)
        for parameter in inner.parameters():
            if parameter.requires_grad:
                parameter.register_hook(lambda g: g * 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner[0](x)
        if y.requires_grad:
            y.register_hook(lambda g: g * 2)
        return y


class Gate(nn.Module):
    """Views of one output, one of them changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.fc(x).chunk(2, -1)
        return a * torch.sigmoid(b)


class Halves(nn.Module):
    """A layer on a strided view of its input, put back by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH // 2, WIDTH // 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[..., ::2], self.fc(x[..., 1::2])], -1)


class Attention(nn.Module):
    """Functional attention on views of one projection."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.attend = bs.nn.DotProductAttention()

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).movedim(-2, 1).unbind(-2)
        return self.proj(self.attention(q, k, v).movedim(1, -2).flatten(-2))


class ModuleAttention(Attention):
    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attend(q, k, v)


class MultiHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class MultiHeadWithWeights(MultiHead):
    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


class Indexed(nn.Module):
    """A table that is looked up and multiplied in."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.table = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.randn(3, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.table[torch.arange(x.shape[-2], device=x.device) % 3]


class OverTokens(nn.Module):
    """A convolution along the tokens, on a transposed view."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


def _mlp(activation: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 12), activation, nn.Linear(12, WIDTH))


def _then_in_place(layer: nn.Module, activation: Callable[..., nn.Module]) -> nn.Module:
    return nn.Sequential(layer, activation(inplace=True))


def _frozen(inner: nn.Module) -> nn.Module:
    return inner.requires_grad_(False)


def _conv(kernel: int, **options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Conv2d(WIDTH, WIDTH, kernel, padding="same", **options)


def _strided_and_back() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(WIDTH, 4, 3, stride=2), nn.SiLU(), nn.ConvTranspose2d(4, WIDTH, 3, stride=2)
    )


WITHOUT_WEIGHTS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.1),
    "hardtanh": nn.Hardtanh,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "softplus": nn.Softplus,
    "dropout": lambda: nn.Dropout(0.2),
}
ON_FEATURES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "linear_without_bias": lambda: nn.Linear(WIDTH, WIDTH, bias=False),
    "linear_relu_": lambda: _then_in_place(nn.Linear(WIDTH, WIDTH), nn.ReLU),
    "linear_silu_": lambda: _then_in_place(nn.Linear(WIDTH, WIDTH), nn.SiLU),
    "mlp": lambda: _mlp(nn.GELU()),
    "mlp_in_place": lambda: _mlp(nn.ReLU(inplace=True)),
    "layer_norm": lambda: nn.LayerNorm(WIDTH),
    "rms_norm": lambda: nn.RMSNorm(WIDTH),
    "tied": Tied,
    "gate": Gate,
    "halves": Halves,
    "indexed": Indexed,
}
LEAVES: dict[str, dict[str, Callable[[], nn.Module]]] = {
    "vectors": {**ON_FEATURES, "batch_norm": lambda: nn.BatchNorm1d(WIDTH)},
    "tokens": {
        **ON_FEATURES,
        "attention": Attention,
        "module_attention": ModuleAttention,
        "multi_head": MultiHead,
        "multi_head_with_weights": MultiHeadWithWeights,
        "conv_over_tokens": OverTokens,
    },
    "images": {
        "conv": _conv(3),
        "conv_without_bias": _conv(3, bias=False),
        "conv_relu_": lambda: _then_in_place(_conv(3)(), nn.ReLU),
        "grouped_hardtanh_": lambda: _then_in_place(_conv(3, groups=2)(), nn.Hardtanh),
        "pointwise": _conv(1),
        "grouped": _conv(3, groups=2),
        "depthwise": _conv(3, groups=WIDTH),
        "dilated": _conv(3, dilation=2),
        "reflecting": _conv(3, padding_mode="reflect"),
        "batch_norm": lambda: nn.BatchNorm2d(WIDTH),
        "group_norm": lambda: nn.GroupNorm(2, WIDTH),
        "strided_and_back": _strided_and_back,
        "pooled": lambda: nn.Sequential(nn.MaxPool2d(3, 1, 1), _conv(1)(), nn.AvgPool2d(3, 1, 1)),
    },
}
STRUCTURES: dict[str, tuple[int, Callable[..., nn.Module]]] = {
    "sequential": (2, nn.Sequential),
    "residual": (1, Residual),
    "residual_in_place": (1, ResidualInPlace),
    "shared": (1, Shared),
    "sum": (2, Sum),
    "checkpoint": (1, Checkpointed),
    "reentrant_checkpoint": (1, Reentrant),
    "hooked": (1, Hooked),
    "frozen": (1, _frozen),
}
"""Name to number of children and builder."""


def build(node: Node, domain: str) -> nn.Module:
    """The module that a node describes."""
    if node.kind in STRUCTURES:
        _, make = STRUCTURES[node.kind]
        return make(*(build(child, domain) for child in node.children))
    return {**LEAVES[domain], **WITHOUT_WEIGHTS}[node.kind]()


class Model(nn.Module):
    """A stem, the random blocks and a head; the output is a tensor, a tuple or a dict."""

    def __init__(self, nodes: tuple[Node, ...], domain: str, output: str) -> None:
        super().__init__()
        self.domain, self.output = domain, output
        images = domain == "images"
        self.stem = nn.Conv2d(WIDTH, WIDTH, 1) if images else nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.Sequential(*(build(node, domain) for node in nodes))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Any:
        h = self.blocks(self.stem(x))
        y = self.head(h.mean((2, 3)) if self.domain == "images" else h)
        return {"tensor": y, "tuple": (y, h), "dict": {"y": y, "features": [h]}}[self.output]
