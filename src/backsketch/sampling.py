"""Inclusion probabilities, fixed-size designs, and the only randomness of the library.

Every random number comes from one private counter: the opaque operator ``next_seed`` turns
``(seed, rank, counter)`` into a 64-bit seed, and everything else (:func:`draw`, :func:`uniform_like`,
:func:`signs`) is a *pure function* of that seed. A compiler may therefore move, repeat or merge the
pure part freely; only ``next_seed`` is stateful, it is opaque, and it takes tensor arguments so that
it stays in the graph, forward or backward, where it was written. Plain ``torch.rand`` inside an
``autograd.Function`` does not have this property: the min-cut partitioner redraws it in the backward
pass and silently pairs row i of one operand with row j of another.

The user's global random stream is never read or advanced.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "DESIGNS",
    "Keys",
    "Sample",
    "draw",
    "get_rng_state",
    "inclusion_probabilities",
    "key_of",
    "keyed",
    "next_seed",
    "num_kept",
    "num_live_kept",
    "operator",
    "seed",
    "set_rng_state",
    "signs",
    "uniform_like",
]

_MASK64 = (1 << 64) - 1
_FEW = 64  # rows on the CPU up to which plain numbers are faster than operators
_SORT_UP_TO = 1024  # on the CPU; above, linear passes that look at their result are faster


class Sample(NamedTuple):
    """Rows drawn without replacement, with their Horvitz-Thompson weights.

    ``indices`` are int64 and ascending; ``weights`` are ``1 / pi`` of the drawn rows, so that
    ``E[sum_j weights[j] * f[indices[j]]] = sum_i f[i]`` for any ``f`` that vanishes where ``pi`` does.
    """

    indices: Tensor
    weights: Tensor


# --------------------------------------------------------------------------------------------------
# State
# --------------------------------------------------------------------------------------------------


class _Stream:
    """The library's random state: a base seed and the number of seeds handed out so far."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.seed = 0
        self.counter = 0
        self.keys: Keys | None = None

    def advance(self) -> int:
        # Autograd runs one thread per device: the counter must not be torn between them.
        with self.lock:
            self.counter += 1
            return self.counter


_STREAM = _Stream()


def _mix(*words: int) -> int:
    """Hash integers to 63 well-mixed bits (splitmix64 finaliser, Steele et al. 2014)."""
    state = 0
    for word in words:
        state = (state + (word & _MASK64) + 0x9E3779B97F4A7C15) & _MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state ^= state >> 31
    return state >> 1


def _rank() -> int:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return int(os.environ.get("RANK", "0"))


def seed(n: int) -> None:
    """Restart backsketch's private random stream from the integer ``n``.

    Ranks of a distributed job draw different numbers from the same ``n``: the rank is mixed in.
    PyTorch's and NumPy's global streams are not touched.

    Raises:
        TypeError: ``n`` is not an integer.
    """
    if isinstance(n, bool) or not isinstance(n, int):
        raise TypeError(f"backsketch.seed needs an int, got {n!r}")
    with _STREAM.lock:
        _STREAM.seed, _STREAM.counter = n, 0


def get_rng_state() -> dict[str, int]:
    """The state of the private random stream, as a plain dict that any checkpoint can hold."""
    with _STREAM.lock:
        return {"seed": _STREAM.seed, "counter": _STREAM.counter}


def set_rng_state(state: dict[str, int]) -> None:
    """Continue the private random stream exactly where :func:`get_rng_state` saw it.

    Raises:
        ValueError: ``state`` is not something that :func:`get_rng_state` returned.
    """
    if not isinstance(state, dict) or set(state) != {"seed", "counter"}:
        raise ValueError(
            f"set_rng_state needs what get_rng_state returned, a dict of seed and counter; got {state!r}"
        )
    with _STREAM.lock:
        _STREAM.seed, _STREAM.counter = int(state["seed"]), int(state["counter"])


class Keys:
    """Names for draws, so that a measurement can repeat them: see :func:`keyed`.

    A seed is then a pure function of ``(pass, site, how many draws the site has made in this pass)``: what
    the other sites do, or whether they draw at all, does not change it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.restart(0)

    def restart(self, *words: int) -> None:
        """Begin a pass called ``words``. The same name gives the same draws."""
        with self._lock:
            self._pass, self._site = words, -1
            self._counts: dict[int, int] = {}

    def at(self, site: int) -> None:
        """The draws that follow are those of ``site``."""
        self._site = site

    def next(self) -> int:
        with self._lock:
            site = self._site
            count = self._counts[site] = self._counts.get(site, 0) + 1
            return _mix(_rank(), *self._pass, site, count)


@contextmanager
def keyed() -> Iterator[Keys]:
    """Inside the block seeds come from names instead of the counter, which does not move.

    For measurements that switch sites on and off one by one and need all else equal (common random
    numbers). The state is the process's, like the counter's: not for use while another thread trains.

    Example:
        >>> with keyed() as keys:
        ...     keys.restart(7)
        ...     keys.at(3)
        ...     first = int(next_seed())
        ...     keys.restart(7)
        ...     keys.at(2)
        ...     other = int(next_seed())
        ...     keys.at(3)
        ...     again = int(next_seed())
        >>> first == again, first == other
        (True, False)
    """
    before, _STREAM.keys = _STREAM.keys, Keys()
    try:
        yield _STREAM.keys
    finally:
        _STREAM.keys = before


# --------------------------------------------------------------------------------------------------
# Mathematics
# --------------------------------------------------------------------------------------------------


def num_kept(n: int, keep: float) -> int:
    """How many of ``n`` rows a fraction ``keep`` stands for: rounded up, at least one."""
    # The small slack keeps 0.1 * 10 at one row: products of decimal fractions overshoot by an ulp.
    return torch.sym_max(1, math.ceil(keep * n - 1e-6))


def num_live_kept(scores: Tensor, keep: float) -> int:
    """:func:`num_kept`, but no more than there are rows with a positive score.

    They are counted where that waits for nothing, in eager code on the CPU. Elsewhere zero rows, below a
    mask, say, may be drawn for nothing.
    """
    k = num_kept(scores.shape[0], keep)
    countable = (
        scores.device.type == "cpu"
        and type(scores) is Tensor
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.is_functorch_wrapped_tensor(scores)
    )
    return max(1, min(k, int(torch.count_nonzero(scores)))) if countable else k


def inclusion_probabilities(scores: Tensor, k: int, floor: float = 0.0) -> Tensor:
    r"""Water-filling: the probabilities that minimise :math:`\sum_i s_i^2/\pi_i` at expected size k.

    .. math:: \pi_i = \min(1, s_i/\lambda), \qquad \sum_i \pi_i = k .

    By the Karush-Kuhn-Tucker conditions the minimiser is proportional to ``s`` below the cap and 1
    above it; :math:`\lambda` follows from one sort and one cumulative sum.

    Args:
        scores: ``(n,)``, non-negative. A non-finite score is drawn surely (up to ``k`` of them), so
            that NaN and Inf reach the gradients. If fewer than ``k`` scores are positive, those rows
            are sure and the rest share what is left.
        k: expected number of rows, ``1 <= k <= n``.
        floor: weight in [0, 1] of a uniform distribution mixed in, ``pi >= floor * k / n``. Needed
            where a zero score does not imply a zero contribution.

    Returns:
        float64 ``(n,)``, summing to ``k``.
    """
    n = scores.shape[0]
    s = scores.to(torch.float64)
    on_host = s.device.type == "cpu"
    if not on_host or not math.isfinite(float(s.sum())):
        bad = ~torch.isfinite(s)
        s = torch.where(bad.any(), bad.to(s.dtype), s)
    by_passes = on_host and n > _SORT_UP_TO
    lam = _level_by_passes(s, k) if by_passes else _level_by_sorting(s, k)
    pi = (s / lam).clamp(max=1.0)
    if not on_host or lam == 0:
        positive = s > 0
        num_positive = positive.sum().to(s.dtype)  # integers would divide in float32
        rest = (k - num_positive) / (n - num_positive).clamp(min=1)
        pi = torch.where(lam > 0, pi, torch.where(positive, 1.0, rest))
    return (1 - floor) * pi + floor * k / n if floor else pi


def _level_by_sorting(s: Tensor, k: int) -> Tensor:
    """The water level lambda, from one sort and one cumulative sum: no step waits for the device."""
    n = s.shape[0]
    ascending = torch.sort(s).values
    tail = ascending.cumsum(0)  # sums of the j+1 smallest: no cancellation, whatever the spread
    free = torch.arange(1 - (n - k), k + 1, device=s.device)  # budget left for a tail of j+1 rows
    fits = (free > 0) & (ascending * free <= tail)
    last = (fits * torch.arange(n, device=s.device)).amax()
    return tail[last] / free[last]


def _level_by_passes(s: Tensor, k: int) -> Tensor:
    """The same level by raising the number of sure rows until it is stable: some ten linear passes.

    The level only falls, so the sure rows only grow, and there are fewer than k of them.
    """
    sure, lam = 0, s.sum() / k
    while (found := int((over := s > lam).sum())) > sure:
        sure = found
        lam = s.masked_fill(over, 0.0).sum() / (k - sure)
    return lam


def _systematic(pi: Tensor, k: int, u: float) -> Tensor:
    """Systematic sampling (Madow 1949): exactly k rows with inclusion probabilities ``pi``.

    One uniform number in [0, 1) and one cumulative sum. In the order given it also stratifies:
    neighbours are rarely drawn together.
    """
    edges = pi.cumsum(0)
    edges = edges * (k / edges[-1])
    points = torch.arange(k, device=pi.device, dtype=pi.dtype) + u
    return torch.searchsorted(edges, points, right=True).clamp(max=pi.shape[0] - 1)


def _few(scores: Sequence[float], k: int, u: float, floor: float) -> tuple[list[int], list[float]]:
    """Water-filling and systematic sampling of a few rows in plain numbers.

    The same steps as :func:`inclusion_probabilities` and :func:`_systematic`, of which each costs an
    operator's launch there.
    """
    n = len(scores)
    s = scores
    if not all(map(math.isfinite, s)):
        s = [0.0 if math.isfinite(x) else 1.0 for x in s]
    lam, tail = 0.0, 0.0
    for j, x in enumerate(sorted(s)):
        tail += x
        free = k - (n - 1 - j)
        if free > 0 and x * free <= tail:
            lam = tail / free
    if lam > 0:
        pi = [x / lam if x < lam else 1.0 for x in s]
    else:
        positive = sum(x > 0 for x in s)
        rest = (k - positive) / max(n - positive, 1)
        pi = [1.0 if x > 0 else rest for x in s]
    if floor:
        pi = [(1 - floor) * p + floor * k / n for p in pi]
    scale = k / sum(pi)
    edge = 0.0
    indices: list[int] = []
    for i, p in enumerate(pi):
        edge += p * scale
        while len(indices) < k and len(indices) + u < edge:
            indices.append(i)
    indices += [n - 1] * (k - len(indices))  # rounding at the very end
    return indices, [1 / pi[i] if pi[i] > 0 else 0.0 for i in indices]


def _draw_systematic(pi: Tensor, k: int, seed: int, stream: int) -> Tensor:
    return _systematic(pi, k, _unit(seed, stream))


def _draw_permuted(pi: Tensor, k: int, seed: int, stream: int) -> Tensor:
    generator = _generator(pi.device, seed, stream)
    order = torch.randperm(pi.shape[0], device=pi.device, generator=generator)
    return order[_systematic(pi[order], k, _unit(seed, stream))].sort().values


_FIXED_SIZE = {"systematic": _draw_systematic, "permuted": _draw_permuted}

DESIGNS = (*_FIXED_SIZE, "independent")
"""``systematic`` in the natural order, ``permuted`` (systematic in random order), and
``independent`` (Bernoulli: every row is returned, the dropped ones with weight zero; the reference
whose variance formulas are exact, it saves nothing)."""


# --------------------------------------------------------------------------------------------------
# Operators
# --------------------------------------------------------------------------------------------------

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

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        results = [
            operator(*(a if dim is None else a.select(dim, i) for a, dim in zip(args, in_dims)))
            for i in range(info.batch_size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        parts = tuple(torch.stack(part) for part in zip(*results))
        return parts, (0,) * len(parts)

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


def _generator(device: torch.device, seed: int, stream: int) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(_mix(seed, stream))


def _unit(seed: int, stream: int) -> float:
    """A uniform number in [0, 1) of 53 bits; apart from what the generator of the stream gives."""
    return (_mix(seed, stream, 0) >> 10) * 2.0**-53


def _fresh() -> int:
    if _STREAM.keys is not None:
        return _STREAM.keys.next()
    return _mix(_STREAM.seed, _rank(), _STREAM.advance())


def key_of(seed: Tensor, stream: int) -> tuple[int, int]:
    """Two 32-bit words for a counter-based hash, from a seed and the number of a stream."""
    word = _mix(int(seed), stream)
    return word & 0xFFFFFFFF, word >> 32


def _next_seed_impl(anchors: Sequence[Tensor]) -> Tensor:
    return torch.tensor(_fresh())


def _draw_impl(
    scores: Tensor, k: int, seed: Tensor, stream: int, design: str, floor: float
) -> tuple[Tensor, Tensor]:
    return _drawn(scores, k, int(seed), stream, design, floor)


def _drawn(
    scores: Tensor, k: int, seed: int, stream: int, design: str, floor: float
) -> tuple[Tensor, Tensor]:
    if design == "systematic" and scores.shape[0] <= _FEW and scores.device.type == "cpu":
        chosen, weights = _few(scores.tolist(), k, _unit(seed, stream), floor)
        return torch.tensor(chosen), torch.tensor(weights, dtype=scores.dtype)
    pi = inclusion_probabilities(scores, k, floor)
    if design == "independent":
        generator = _generator(scores.device, seed, stream)
        kept = torch.rand(pi.shape, dtype=pi.dtype, device=pi.device, generator=generator) < pi
        indices = torch.arange(pi.shape[0], device=pi.device)
        return indices, torch.where(kept, 1 / pi, 0.0).to(scores.dtype)
    indices = _FIXED_SIZE[design](pi, k, seed, stream)
    # A row without a chance can only be hit by rounding at the ends; its weight must not be infinite.
    drawn = pi[indices]
    return indices, torch.where(drawn > 0, 1 / drawn, 0.0).to(scores.dtype)


def _draw_fake(
    scores: Tensor, k: int, seed: Tensor, stream: int, design: str, floor: float
) -> tuple[Tensor, Tensor]:
    size = scores.shape[0] if design == "independent" else k
    return scores.new_empty(size, dtype=torch.int64), scores.new_empty(size)


def _uniform_impl(like: Tensor, seed: Tensor, stream: int) -> Tensor:
    generator = _generator(like.device, int(seed), stream)
    return torch.rand(like.shape, device=like.device, generator=generator)


def _signs_impl(like: Tensor, rows: int, columns: int, seed: Tensor, stream: int) -> Tensor:
    generator = _generator(like.device, int(seed), stream)
    bits = torch.randint(2, (rows, columns), device=like.device, generator=generator)
    return bits.to(like.dtype).mul_(2).sub_(1)


_next_seed = operator(
    "next_seed(Tensor[] anchors) -> Tensor",
    _next_seed_impl,
    lambda anchors: torch.empty((), dtype=torch.int64, device="cpu"),
    _next_seed_vmap,
)
_draw = operator(
    "draw(Tensor scores, SymInt k, Tensor seed, int stream, str design, float floor)"
    " -> (Tensor, Tensor)",
    _draw_impl,
    _draw_fake,
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
) -> Sample:
    """Draw ``k`` of ``n`` rows with the optimal inclusion probabilities of ``scores``.

    Args:
        scores: ``(n,)`` floating point, see :func:`inclusion_probabilities`.
        k: number of rows, ``1 <= k <= n``.
        seed: what :func:`next_seed` returned.
        stream: an integer that makes several draws from one seed independent.
        design: one of :data:`DESIGNS`.
        floor: see :func:`inclusion_probabilities`; None is zero.

    Returns:
        :class:`Sample` of ``k`` rows (of ``n`` for the independent design).
    """
    # A constant of the code, because a compiler may make a symbol of a default argument that is a float.
    floor = 0.0 if floor is None else floor
    return Sample(*_draw(scores, k, seed, stream, design, floor))


def draw_live(scores: Tensor, keep: float, live: int | None = None) -> Sample | None:
    """:func:`draw` of a fraction ``keep`` of the rows with a positive score, with a fresh seed.

    Without an operator around it: only for code that no compiler and no function transform ever sees.

    Args:
        scores: ``(n,)`` floating point.
        keep: the fraction.
        live: how many scores are positive; None counts them, which on an accelerator waits for it.

    Returns:
        The sample, or None where that is all rows.
    """
    n = scores.shape[0]
    few = scores.tolist() if n <= _FEW and scores.device.type == "cpu" else None
    if live is None:
        live = int(torch.count_nonzero(scores)) if few is None else n - few.count(0.0)
    k = num_kept(live, keep)
    if k >= n:
        return None
    if few is None:
        return Sample(*_drawn(scores, k, _fresh(), 0, "systematic", 0.0))
    indices, weights = _few(few, k, _unit(_fresh(), 0), 0.0)
    return Sample(torch.tensor(indices), torch.tensor(weights, dtype=scores.dtype))


def uniform_like(like: Tensor, seed: Tensor, stream: int = 0) -> Tensor:
    """Independent float32 uniforms in [0, 1) of the shape and device of ``like``."""
    return _uniform(like, seed, stream)


def signs(like: Tensor, rows: int, columns: int, seed: Tensor, stream: int = 0) -> Tensor:
    """Independent random signs ``(rows, columns)`` of the dtype and device of ``like``."""
    return _signs(like, rows, columns, seed, stream)
