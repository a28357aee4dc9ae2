"""Draws and the norms of rows on an NVIDIA GPU, each one Triton kernel; PyTorch takes some fifty for a draw."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from backsketch.gpu import on, signed, why_not
from backsketch.sampling.stream import mix

__all__ = ["agrees", "draw", "draws", "row_norms", "works"]

_CHUNK = 4096
_MOST = 1 << 20  # rows, above which one program is slower than many of PyTorch's
_EXACT = {"enable_fp_fusion": False}
_WIDE = 4096  # columns from which a program takes one row


def row_norms(rows: Tensor, factors: Tensor | None = None) -> Tensor:
    """Euclidean norms ``(n,)`` in float64 of ``(n, d)``, float32 or half precision, of any magnitude.

    Args:
        rows: on a GPU.
        factors: ``(d,)`` float32, by which the columns are multiplied before.
    """
    from backsketch.sampling import triton_kernels

    kernels: Any = triton_kernels
    rows = rows.contiguous()
    n, d = rows.shape
    out = rows.new_empty(n, dtype=torch.float64)
    shape = {"ROWS": 1, "COLUMNS": 4096} if d >= _WIDE else {"ROWS": 8, "COLUMNS": 256}
    with on(rows.device):
        kernels.row_norms[(-(-n // shape["ROWS"]),)](
            rows, factors, out, n, d, HAS_FACTORS=factors is not None, num_warps=8, **shape
        )
    return out


def draw(
    scores: Tensor, k: int, seed: int, stream: int, u: float, floor: float, block: int | None
) -> tuple[Tensor, Tensor]:
    """Indices and weights of ``k`` of ``n`` rows, as :mod:`backsketch.sampling.operators` describes them.

    Args:
        scores: ``(n,)`` floating point, on a GPU.
        k: how many, ``1 <= k <= n``.
        seed: with ``stream``, what the order of the blocks is a function of.
        stream: see ``seed``.
        u: a uniform number in [0, 1).
        floor: see :func:`backsketch.sampling.inclusion_probabilities`.
        block: consecutive rows that stay together in a random order; None for the natural one.
    """
    from backsketch.sampling import triton_kernels

    kernels: Any = triton_kernels
    scores = scores.contiguous()
    n = scores.shape[0]
    size = 1 if block is None else block
    blocks = n // size
    bits = max(blocks - 1, 1).bit_length()
    word = mix(seed, stream, 1)
    chunk = min(_CHUNK, 1 << max(n - 1, 15).bit_length())
    chosen = scores.new_empty(n, dtype=torch.float64)
    indices, weights = scores.new_empty(k, dtype=torch.int64), scores.new_empty(k)
    with on(scores.device):
        kernels.draw[(1,)](
            scores, chosen, indices, weights, n, k, int(u * 2**32), float(floor), blocks, size,
            bits // 2, bits - bits // 2, signed(word & 0xFFFFFFFF), signed(word >> 32 & 0xFFFFFFFF),
            SHUFFLED=block is not None, CHUNK=chunk, num_warps=16, **_EXACT,
        )  # fmt: skip
    return indices, weights


def works(device: torch.device) -> bool:
    """Whether there are kernels for this device."""
    return not why_not(device, agrees)


def draws(scores: Tensor) -> bool:
    """Whether :func:`draw` takes these scores."""
    fits = scores.dtype in (torch.float32, torch.float64) and scores.shape[0] <= _MOST
    return scores.device.type == "cuda" and fits and works(scores.device)


def agrees(device: torch.device) -> bool:
    """The self-test: rows, weights and norms are those of PyTorch's own operators."""
    from backsketch.sampling.design import inclusion_probabilities, systematic

    x = torch.randn(300, 40, generator=torch.Generator().manual_seed(0)).exp()
    norms = row_norms(x.to(device)).cpu()
    if not torch.allclose(norms, x.double().norm(dim=1), rtol=1e-6):
        return False
    indices, weights = (t.cpu() for t in draw(norms.to(device), 77, 3, 0, 0.375, 0.0, None))
    pi = inclusion_probabilities(norms, 77)
    expected = systematic(pi, 77, 0.375)
    same = torch.equal(indices, expected) and torch.allclose(weights, 1 / pi[expected], rtol=1e-9)
    shuffled = draw(norms.to(device), 77, 3, 0, 0.375, 0.0, 10)[0].cpu()
    return same and shuffled.unique().numel() == 77
