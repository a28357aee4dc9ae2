"""The library's random stream: a counter, hashed into seeds; nothing else in the library is random."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = [
    "Keys",
    "fresh",
    "generator_of",
    "get_rng_state",
    "keyed",
    "mix",
    "seed",
    "set_rng_state",
    "unit",
]

_MASK64 = (1 << 64) - 1


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


def mix(*words: int) -> int:
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
            return mix(_rank(), *self._pass, site, count)


@contextmanager
def keyed() -> Iterator[Keys]:
    """Inside the block seeds come from names instead of the counter, which does not move.

    For measurements that switch sites on and off one by one and need all else equal (common random
    numbers). The state is the process's, like the counter's: not for use while another thread trains.

    Example:
        >>> from backsketch.sampling import next_seed
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


def fresh() -> int:
    """The next seed.

    Raises:
        RuntimeError: a CUDA graph is being recorded. It would hold this one seed and repeat its draw for ever.
    """
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a sketched layer cannot be recorded in a CUDA graph, which would repeat one draw for ever: record "
            "the step inside `with backsketch.exact(model):`, or do without the graph"
        )
    if _STREAM.keys is not None:
        return _STREAM.keys.next()
    return mix(_STREAM.seed, _rank(), _STREAM.advance())


def generator_of(device: torch.device, seed: int, stream: int) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(mix(seed, stream))


def unit(seed: int, stream: int) -> float:
    """A uniform number in [0, 1) of 53 bits; apart from what the generator of the stream gives."""
    return (mix(seed, stream, 0) >> 10) * 2.0**-53
