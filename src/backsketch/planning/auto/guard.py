"""Never slower in silence: sketched steps are timed against exact ones while a model trains."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from statistics import fmean, median
from typing import Any

from torch import nn

from backsketch.convert import restore_
from backsketch.nn.swap import exact, is_swapped, sketch_of
from backsketch.planning.auto.budget import Stopwatch
from backsketch.planning.control.ranks import gathered
from backsketch.planning.measure.timing import Timing
from backsketch.rules import unwrap

__all__ = ["SpeedGuard"]

_SKIPPED = (
    2  # the first steps of a trial: one of each kind, in which things are compiled and captured
)
_PAIRS = 8  # of an exact and a sketched step, in a trial
_FEWEST = 4  # of them that a verdict needs
_TRIALS = 3  # in a row, after which what is not known to be faster is not
_GAP = 200  # steps until the next trial; twice as many each time


class SpeedGuard:
    r"""Keeps the sketches of a model only while its steps are in fact faster with them.

    The first steps are exact and sketched in turns (exact, sketched, sketched, exact, and so on, so that a machine
    that grows slower or faster favours neither), timed by one clock. The median difference of the pairs decides:
    the sketches stay if it is below zero by more than its standard error. If that is not known after three times
    as many pairs, or they are slower, the model is restored and :attr:`verdict` says why. After two hundred steps,
    and then after twice as many each time, it is tried again: the machine, or the keeps, may have changed.

    Either way every step is unbiased, and an exact one costs no more than it would without a sketch.

    Args:
        model: sketched by :func:`backsketch.sketch_`.
        clock: seconds.

    Attributes:
        pays: whether sketched steps are faster; None until that is known.
        ratio: seconds of a sketched step over those of an exact one; None until measured.
        exact_seconds: of an exact step; None until measured.
        verdict: what was found, in words.

    Raises:
        ValueError: the model is not sketched.

    Example:
        >>> import torch, backsketch as bs
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
        >>> _ = bs.sketch_(model, bs.Int8())
        >>> guard = bs.SpeedGuard(model)
        >>> for _ in range(3):
        ...     guard.step()
        ...     model(torch.randn(128, 64)).square().mean().backward()
        >>> guard.verdict
        'not known yet: exact and sketched steps are timed in turns'
    """

    def __init__(self, model: nn.Module, clock: Callable[[], float] = time.perf_counter) -> None:
        self._model, self._clock = unwrap(model), clock
        if not any(is_swapped(m) for m in self._model.modules()):
            raise ValueError("SpeedGuard: the model is not sketched; call bs.sketch_ first")
        self.pays: bool | None = None
        self.ratio: float | None = None
        self.exact_seconds: float | None = None
        self.verdict = "not known yet: exact and sketched steps are timed in turns"
        self._steps = -1  # number of the present step
        self._from, self._gap, self._trials = 0, _GAP, 1
        self._seconds: dict[int, float] = {}  # of the steps of a trial, by place
        self._watch = Stopwatch(clock)  # of the present step, where it is timed
        self._exactly = ExitStack()

    @property
    def on_trial(self) -> bool:
        """Whether the present step is timed. It should hold nothing but a step: no controller's replay."""
        return self.pays is not False and 0 <= self._place < self._length

    @property
    def is_exact(self) -> bool:
        """Whether the guard makes the present step exact."""
        return self.pays is False or (self.on_trial and self._place % 4 in (0, 3))

    def step(self) -> None:
        """To be called at the beginning of every optimizer step, by every one of several ranks."""
        if self.pays is False:
            return
        self.stop()
        self._steps += 1
        if self._place == 0 and self._sketches_are_exact():
            self._from += self._gap
        if self._place == self._length:
            self._judge()
        if self.on_trial:
            if self.is_exact:
                self._exactly.enter_context(exact(self._model))
            self._watch.start()

    def stop(self) -> None:
        """To be called at the end of a step that something else follows, such as a look at the test data."""
        self._exactly.close()
        self._watch.stop()
        if self._watch.seconds:
            self._seconds[self._place] = self._watch.seconds.pop()

    def close(self) -> None:
        """End a trial: the sketches act again."""
        self._exactly.close()
        self._watch = Stopwatch(self._clock)

    @property
    def _place(self) -> int:
        return self._steps - self._from

    @property
    def _length(self) -> int:
        return _SKIPPED + 2 * _PAIRS * self._trials

    def _sketches_are_exact(self) -> bool:
        """Whether nothing is sketched at the moment: a controller waits until it pays."""
        sketches = [sketch_of(m) for m in self._model.modules() if is_swapped(m)]
        return all(s is not None and s.movable_keep() == 1 for s in sketches)

    def _judge(self) -> None:
        pairs = self._pairs()
        if len(pairs) < _FEWEST:  # a training that was resumed lacks some
            return self._undecided("too few steps were timed")
        difference = Timing.of([sketched - exactly for exactly, sketched in pairs])
        base = median(exactly for exactly, _ in pairs)
        self.exact_seconds, self.ratio = base, 1 + difference.seconds / base
        error = difference.error / base
        told = f"a sketched step takes {self.ratio:.2f} ± {error:.2f} of an exact one"
        if difference.seconds + difference.error < 0:
            self.pays, self.verdict = True, f"{told} ({base * 1000:.4g} ms)"
            self._from, self._trials = self._steps + self._gap, 1
            self._gap *= 2
            self._seconds.clear()
        elif difference.seconds - difference.error > 0:
            self._go_back(f"back to exact steps: {told} ({base * 1000:.4g} ms)")
        else:
            self._undecided(told)

    def _undecided(self, told: str) -> None:
        if self._trials == _TRIALS:
            self._go_back(f"back to exact steps: no gain can be seen, {told}")
        else:
            self._trials += 1

    def _go_back(self, reason: str) -> None:
        self.pays, self.verdict = False, reason
        self._exactly.close()
        restore_(self._model)

    def _pairs(self) -> list[tuple[float, float]]:
        """Seconds of the exact and the sketched step of each pair, the mean over the ranks."""
        places = range(_SKIPPED, self._length)
        timed = [self._seconds.get(place, float("nan")) for place in places]
        found = [fmean(seconds) for seconds in zip(*gathered(timed))]
        pairs = zip(places[::2], found[::2], found[1::2])
        ordered = [(a, b) if place % 4 == 0 else (b, a) for place, a, b in pairs]
        return [pair for pair in ordered if pair[0] == pair[0] and pair[1] == pair[1]]

    def state_dict(self) -> dict[str, Any]:
        """Plain data; a training that resumes makes the steps that it would have made."""
        names = ("pays", "ratio", "exact_seconds", "verdict", *_PRIVATE)
        state = {name.lstrip("_"): getattr(self, name) for name in names}
        return {**state, "seconds": [list(item) for item in self._seconds.items()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`, on a model that is sketched by the same rules."""
        for name in ("pays", "ratio", "exact_seconds", "verdict", *_PRIVATE):
            setattr(self, name, state[name.lstrip("_")])
        self._seconds = {int(place): seconds for place, seconds in state["seconds"]}
        self.close()


_PRIVATE = ("_steps", "_from", "_gap", "_trials")
