"""Layers without a weight product that a memory saver acts on: activations, norms, attention."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from backsketch.nn import DotProductAttention


def with_weights(module: nn.Module) -> nn.Module:
    """Weights that are not all one and biases that are not all zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.rand(p.shape, generator=generator) + 0.5)
    return module


# name -> (module, shape of its input). Piecewise linear functions are exact, the rest is random.
BITS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "relu": (nn.ReLU, (5, 7)),
    "relu6": (nn.ReLU6, (5, 7)),
    "leaky": (lambda: nn.LeakyReLU(0.2), (5, 7)),
    "hardtanh": (lambda: nn.Hardtanh(-0.5, 0.7), (5, 7)),
}
SMOOTH: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "gelu": (nn.GELU, (5, 7)),
    "gelu tanh": (lambda: nn.GELU(approximate="tanh"), (5, 7)),
    "silu": (nn.SiLU, (2, 3, 7)),
    "mish": (nn.Mish, (5, 7)),
    "tanh": (nn.Tanh, (5, 7)),
    "sigmoid": (nn.Sigmoid, (5, 7)),
    "hardswish": (nn.Hardswish, (5, 7)),
    "softplus": (lambda: nn.Softplus(2.0, 1.5), (5, 7)),
    "elu": (lambda: nn.ELU(0.7), (5, 7)),
}
NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "layer norm": (lambda: nn.LayerNorm(6), (4, 3, 6)),
    "layer norm of two": (lambda: nn.LayerNorm((3, 4)), (5, 3, 4)),
    "layer norm, no weights": (lambda: nn.LayerNorm(6, elementwise_affine=False), (12, 6)),
    "layer norm, no bias": (lambda: nn.LayerNorm(6, bias=False), (12, 6)),
    "rms norm": (lambda: nn.RMSNorm(6), (12, 6)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (3, 4, 3, 3)),
    "batch norm": (lambda: nn.BatchNorm1d(4), (9, 4)),
    "batch norm of images": (lambda: nn.BatchNorm2d(3), (3, 3, 4, 4)),
    "batch norm of volumes": (lambda: nn.BatchNorm3d(3), (3, 3, 2, 4, 3)),
    "batch norm, cumulative": (lambda: nn.BatchNorm2d(3, momentum=None), (3, 3, 4, 4)),
    "batch norm, batch only": (
        lambda: nn.BatchNorm2d(3, affine=False, track_running_stats=False),
        (3, 3, 4, 4),
    ),
}


class Attend(nn.Module):
    """Attention whose queries, keys and values are three functions of one input."""

    def __init__(self, is_causal: bool = False) -> None:
        super().__init__()
        self.scales = nn.Parameter(torch.ones(3))
        self.core = DotProductAttention(is_causal=is_causal)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (x.roll(i, -1) * s for i, s in enumerate(self.scales))
        return self.core(q, k, v)


ATTENTION: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "attention": (Attend, (2, 5, 4)),
    "causal attention": (lambda: Attend(is_causal=True), (2, 1, 5, 4)),
}
ROUNDED = {**SMOOTH, **NORMS, **ATTENTION}
CHAIN = {**BITS, **ROUNDED}


def made(name: str) -> tuple[nn.Module, Tensor]:
    """The module with weights that matter, and an input that is not centred."""
    build, shape = CHAIN[name]
    generator = torch.Generator().manual_seed(4)
    return with_weights(build()), torch.randn(shape, generator=generator) * 1.5 + 0.3
