"""Water-filling and systematic sampling in one call to ``draw.cpp``, for scores on the host."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from backsketch.native import Source

__all__ = ["SOURCE", "draw"]

SOURCE = Source(Path(__file__).with_name("draw.cpp"), "-fopenmp-simd")
_P, _I, _D = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


@lru_cache(maxsize=1)
def _functions() -> dict[torch.dtype, Callable[..., None]]:
    """The compiled function of each type of score; none without a compiler."""
    library = SOURCE.library()
    if library is None:
        return {}
    single, double = library.backsketch_draw_f32, library.backsketch_draw_f64
    for function in (single, double):
        function.argtypes, function.restype = (_P, _P, _I, _I, _D, _D, _P, _P), None
    return {torch.float32: single, torch.float64: double}


def draw(
    scores: Tensor, k: int, u: float, floor: float, order: Tensor | None = None
) -> tuple[Tensor, Tensor] | None:
    """Indices and weights of ``k`` rows, as :func:`backsketch.sampling.design.few` finds them.

    Args:
        scores: ``(n,)`` on the host.
        k: how many, ``1 <= k <= n``.
        u: a uniform number in [0, 1).
        floor: see :func:`backsketch.sampling.inclusion_probabilities`.
        order: int64 ``(n,)``, in which the rows come before the draw; those drawn come in their own.

    Returns:
        int64 ``(k,)`` and ``(k,)`` of the type of the scores; None where there is no compiled function for them.
    """
    function = _functions().get(scores.dtype)
    if function is None or not scores.is_contiguous():
        return None
    indices, weights = torch.empty(k, dtype=torch.int64), torch.empty(k, dtype=scores.dtype)
    n, at = scores.shape[0], scores.data_ptr()
    function(
        None if order is None else order.data_ptr(),
        at,
        n,
        k,
        u,
        floor,
        indices.data_ptr(),
        weights.data_ptr(),
    )
    return indices, weights
