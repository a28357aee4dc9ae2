"""Draws as opaque operators: pure functions of a seed that a compiler may move but not look into."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from backsketch.sampling import gpu, native
from backsketch.sampling.design import (
    few,
    inclusion_probabilities,
    num_kept,
    order_of,
    systematic,
)
from backsketch.sampling.stream import fresh, generator_of, mix, unit

__all__ = [
    "Sample",
    "draw",
    "draw_live",
    "key_of",
    "next_seed",
    "operator",
    "row_norms",
    "signs",
    "uniform_like",
]

_IN_PYTHON = 64  # rows on the CPU up to which plain numbers are faster than operators


class Sample(NamedTuple):
    """Rows drawn without replacement, with their Horvitz-Thompson weights.

    ``indices`` are int64 and ascending; ``weights`` are ``1 / pi`` of the drawn rows, so that
    ``E[sum_j weights[j] * f[indices[j]]] = sum_i f[i]`` for any ``f`` that vanishes where ``pi`` does.
    """

    indices: Tensor
    weights: Tensor


_LIB = torch.library.Library("backsketch", "FRAGMENT")


def operator(schema: str, implementation: Any, fake: Any, vmap: Any = None) -> Any:
    """Define an opaque operator ``backsketch::name``: its implementation, shapes and vmap rule."""
    name = schema.split("(")[0]
    _LIB.define(schema)
    _LIB.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"backsketch::{name}", fake, lib=_LIB)
    operator = getattr(torch.ops.backsketch, name).default
    torch.library.register_vmap(f"backsketch::{name}", vmap or _one_by_one(operator), lib=_LIB)
    return operator


def _one_by_one(operator: Any) -> Any:
    """The vmap rule of a pure operator: a loop over the samples."""

    def at(argument: Any, dim: Any, i: int) -> Any:
        if isinstance(dim, list | tuple):
            return [at(a, d, i) for a, d in zip(argument, dim)]
        return argument if dim is None else argument.select(dim, i)

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        results = [
            operator(*(at(a, dim, i) for a, dim in zip(args, in_dims)))
            for i in range(info.batch_size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        parts = [torch.stack(part) for part in zip(*results)]
        several = type(results[0])
        return several(parts), several([0] * len(parts))

    return rule


def _next_seed_vmap(info: Any, in_dims: Any, anchors: Sequence[Tensor]) -> tuple[Tensor, Any]:
    if info.randomness == "error":
        raise RuntimeError(
            "a sketched layer is random: call torch.func.vmap with randomness='different' or 'same', "
            "or put the call inside `with backsketch.exact(model):`"
        )
    if info.randomness == "same":
        return _next_seed([]), None
    return torch.stack([_next_seed([]) for _ in range(info.batch_size)]), 0


def key_of(seed: Tensor, stream: int) -> tuple[int, int]:
    """Two 32-bit words for a counter-based hash, from a seed and the number of a stream."""
    word = mix(int(seed), stream)
    return word & 0xFFFFFFFF, word >> 32


def _next_seed_impl(anchors: Sequence[Tensor]) -> Tensor:
    return torch.tensor(fresh())


def _draw_impl(
    scores: Tensor, k: int, seed: Tensor, stream: int, design: str, floor: float, block: int
) -> tuple[Tensor, Tensor]:
    return _drawn(scores, k, int(seed), stream, design, floor, block)


def _drawn(
    scores: Tensor, k: int, seed: int, stream: int, design: str, floor: float, block: int
) -> tuple[Tensor, Tensor]:
    if design == "independent":
        return _independent(scores, k, seed, stream, floor)
    u = unit(seed, stream)
    if gpu.draws(scores):
        size = {"shuffled": block, "permuted": 1}.get(design)
        shuffles = size is not None and size < scores.shape[0]
        return gpu.draw(scores, k, seed, stream, u, floor, size if shuffles else None)
    order = order_of(design, scores.shape[0], block, scores.device, seed, stream)
    drawn = native.draw(scores, k, u, floor, order) if scores.device.type == "cpu" else None
    if drawn is not None:
        return drawn
    if order is None:
        return _systematic(scores, k, u, floor)
    indices, weights = _systematic(scores[order], k, u, floor)
    indices, places = order[indices].sort()
    return indices, weights[places]


def _systematic(scores: Tensor, k: int, u: float, floor: float) -> tuple[Tensor, Tensor]:
    """Systematic sampling in the order given, without compiled functions."""
    if scores.device.type == "cpu" and scores.shape[0] <= _IN_PYTHON:
        chosen, weights = few(scores.tolist(), k, u, floor)
        return torch.tensor(chosen), torch.tensor(weights, dtype=scores.dtype)
    pi = inclusion_probabilities(scores, k, floor)
    indices = systematic(pi, k, u)
    # A row without a chance can only be hit by rounding at the ends; its weight must not be infinite.
    chances = pi[indices]
    return indices, torch.where(chances > 0, 1 / chances, 0.0).to(scores.dtype)


def _independent(
    scores: Tensor, k: int, seed: int, stream: int, floor: float
) -> tuple[Tensor, Tensor]:
    pi = inclusion_probabilities(scores, k, floor)
    generator = generator_of(scores.device, seed, stream)
    kept = torch.rand(pi.shape, dtype=pi.dtype, device=pi.device, generator=generator) < pi
    indices = torch.arange(pi.shape[0], device=pi.device)
    return indices, torch.where(kept, 1 / pi, 0.0).to(scores.dtype)


def _draw_fake(
    scores: Tensor, k: int, seed: Tensor, stream: int, design: str, floor: float, block: int
) -> tuple[Tensor, Tensor]:
    size = scores.shape[0] if design == "independent" else k
    return scores.new_empty(size, dtype=torch.int64), scores.new_empty(size)


def _row_norms_impl(rows: Tensor, factors: Tensor | None) -> Tensor:
    if factors is not None:
        largest = factors.amax()
        factors = (factors / torch.where(largest > 0, largest, 1.0)).to(torch.float32)
    if gpu.works(rows.device):
        return gpu.row_norms(rows, factors)
    scaled = rows if factors is None else rows.to(torch.float64) * factors
    return torch.linalg.vector_norm(scaled, dim=1, dtype=torch.float64)


def _uniform_impl(like: Tensor, seed: Tensor, stream: int) -> Tensor:
    generator = generator_of(like.device, int(seed), stream)
    return torch.rand(like.shape, device=like.device, generator=generator)


def _signs_impl(like: Tensor, rows: int, columns: int, seed: Tensor, stream: int) -> Tensor:
    generator = generator_of(like.device, int(seed), stream)
    bits = torch.randint(2, (rows, columns), device=like.device, generator=generator)
    return bits.to(like.dtype).mul_(2).sub_(1)


_next_seed = operator(
    "next_seed(Tensor[] anchors) -> Tensor",
    _next_seed_impl,
    lambda anchors: torch.empty((), dtype=torch.int64, device="cpu"),
    _next_seed_vmap,
)
_draw = operator(
    "draw(Tensor scores, SymInt k, Tensor seed, int stream, str design, float floor,"
    " SymInt block) -> (Tensor, Tensor)",
    _draw_impl,
    _draw_fake,
)
_row_norms = operator(
    "row_norms(Tensor rows, Tensor? factors) -> Tensor",
    _row_norms_impl,
    lambda rows, factors: rows.new_empty(rows.shape[0], dtype=torch.float64),
)
_uniform = operator(
    "uniform_like(Tensor like, Tensor seed, int stream) -> Tensor",
    _uniform_impl,
    lambda like, seed, stream: torch.empty(like.shape, device=like.device),
)
_signs = operator(
    "signs(Tensor like, SymInt rows, SymInt columns, Tensor seed, int stream) -> Tensor",
    _signs_impl,
    lambda like, rows, columns, seed, stream: like.new_empty(rows, columns),
)


def row_norms(rows: Tensor, factors: Tensor | None = None) -> Tensor | None:
    """Euclidean norms ``(n,)`` in float64 of rows of any magnitude in one pass; None where nothing does it.

    Args:
        rows: ``(n, d)``; on a GPU there is a kernel for float32 and half precision.
        factors: ``(d,)``, by which the columns are multiplied before; up to a common factor.
    """
    narrow = rows.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if rows.device.type != "cuda" or not narrow or not rows.numel():
        return None
    return _row_norms(rows, factors)


def next_seed(*anchors: Tensor) -> Tensor:
    """A fresh seed: int64, zero-dimensional, on the CPU (so no device is ever waited for).

    Args:
        anchors: tensors that place the call in a compiled graph: the cotangent for a draw that
            belongs to the backward pass, the input and the weight for one that belongs to the
            forward pass. Two calls in one graph need different anchors, or the compiler may merge
            them into one (which correlates two sites, and biases neither).
    """
    return _next_seed(anchors)


def draw(
    scores: Tensor,
    k: int,
    seed: Tensor,
    stream: int = 0,
    design: str = "systematic",
    floor: float | None = None,
    block: int = 1,
) -> Sample:
    """Draw ``k`` of ``n`` rows with the optimal inclusion probabilities of ``scores``.

    Args:
        scores: ``(n,)`` floating point, see :func:`inclusion_probabilities`.
        k: number of rows, ``1 <= k <= n``.
        seed: what :func:`next_seed` returned.
        stream: an integer that makes several draws from one seed independent.
        design: one of :data:`ROW_DESIGNS`.
        floor: see :func:`inclusion_probabilities`; None is zero.
        block: see :func:`order_of`.

    Returns:
        :class:`Sample` of ``k`` rows (of ``n`` for the independent design).
    """
    # A constant of the code, because a compiler may make a symbol of a default argument that is a float.
    floor = 0.0 if floor is None else floor
    return Sample(*_draw(scores, k, seed, stream, design, floor, block))


def draw_live(
    scores: Tensor,
    keep: float,
    live: int | None = None,
    design: str = "systematic",
    block: int = 1,
) -> Sample | None:
    """:func:`draw` of a fraction ``keep`` of the rows with a positive score, with a fresh seed.

    Without an operator around it: only for code that no compiler and no function transform ever sees.

    Args:
        scores: ``(n,)`` floating point.
        keep: the fraction.
        live: how many scores are positive; None counts them, which on an accelerator waits for it.
        design: one of :data:`ROW_DESIGNS`.
        block: see :func:`order_of`.

    Returns:
        The sample, or None where that is all rows.
    """
    n = scores.shape[0]
    if live is None:
        live = int(torch.count_nonzero(scores))
    k = num_kept(live, keep)
    return None if k >= n else Sample(*_drawn(scores, k, fresh(), 0, design, 0.0, block))


def uniform_like(like: Tensor, seed: Tensor, stream: int = 0) -> Tensor:
    """Independent float32 uniforms in [0, 1) of the shape and device of ``like``."""
    return _uniform(like, seed, stream)


def signs(like: Tensor, rows: int, columns: int, seed: Tensor, stream: int = 0) -> Tensor:
    """Independent random signs ``(rows, columns)`` of the dtype and device of ``like``."""
    return _signs(like, rows, columns, seed, stream)
