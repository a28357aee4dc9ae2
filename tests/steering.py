"""``--sketch auto`` under a profile and clocks that say what a test wants, with the same numbers in every run."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from torch import Tensor, nn

import backsketch as bs
from backsketch.integrations import session
from backsketch.nn.swap import is_swapped
from backsketch.planning.auto import proposals
from backsketch.planning.measure import timing
from backsketch.train import images, run

__all__ = ["Clock", "steered", "steered_auto"]


class Clock:
    """A step takes a second, or ``sketched`` seconds where something is sketched in it."""

    def __init__(self, sketched: float) -> None:
        self.sketched, self.now = sketched, 0.0

    def __call__(self) -> float:
        return self.now

    def pass_of(self, model: nn.Module) -> None:
        """A forward pass of training begins."""
        sites = [m for m in model.modules() if is_swapped(m)]
        exact = all(m.__dict__.get("_backsketch_exact") for m in sites)
        self.now += 1.0 if exact else self.sketched


@contextmanager
def steered(
    family: str, *, sketched: float = 0.5, in_8_bits: bool = False, share: float = math.inf
) -> Iterator[Clock]:
    """Inside, ``--sketch auto`` finds what it is to find; yields the clock for trainers that a test makes itself.

    See :func:`steered_auto` for the arguments.
    """
    loss = images.ImageData.loss
    with steered_auto(family, sketched=sketched, in_8_bits=in_8_bits, share=share) as clock:

        def timed_loss(self: images.ImageData, model: nn.Module, batch: Any) -> Tensor:
            clock.pass_of(model)
            return loss(self, model, batch)

        trainer = functools.partial(run.Trainer, now=clock)
        with (
            patch.object(images.ImageData, "loss", timed_loss),
            patch.object(run, "Trainer", trainer),
        ):
            yield clock


@contextmanager
def steered_auto(
    family: str, *, sketched: float = 0.5, in_8_bits: bool = False, share: float = math.inf
) -> Iterator[Clock]:
    """Inside, :class:`backsketch.Auto` finds what it is to find, under a clock that :meth:`Clock.pass_of` moves.

    By the clock of the profile everything takes equally long. The times of a machine decide how often a sketch is
    timed, hence which draw its error is that of, and which sketches are combined: two profiles would differ in
    more than their seconds.

    Args:
        family: of sketches that saves half of a step, where the others cost as much.
        sketched: seconds of a sketched step by the clock; an exact one takes 1.
        in_8_bits: whether 8-bit products are tried first.
        share: of the time of the run that may go into a profile.
    """
    clock, measured = Clock(sketched), proposals.profile

    def profile(*arguments: Any, **options: Any) -> bs.Profile:
        now = clock.now
        found = measured(*arguments, **options)
        clock.now = (
            now + 40
        )  # of the passes in it, some are made for as long as they are not precise enough
        sites = tuple(
            replace(
                site, backward_seconds=None, options=tuple(_priced(o, family) for o in site.options)
            )
            for site in found.sites
        )
        return replace(found, sites=sites, step_seconds=1.0, forward_seconds=0.0)

    def nothing(model: nn.Module) -> proposals.Proposal:
        return proposals.Proposal({}, "no 8-bit products here")

    auto = functools.partial(bs.Auto, share=share, clock=clock)
    found = proposals.in_8_bits if in_8_bits else nothing
    with (
        patch.object(proposals, "profile", profile),
        patch.object(proposals, "in_8_bits", found),
        patch.object(bs, "Auto", auto),
        patch.object(session, "Auto", auto),
        patch.object(timing, "time", _even_clock()),
    ):
        yield clock


def _even_clock() -> SimpleNamespace:
    """In place of the module ``time``: clocks that are a millisecond later whenever they are read."""
    reads = itertools.count()
    read = lambda: next(reads) / 1000  # noqa: E731
    return SimpleNamespace(perf_counter=read, thread_time=read)


def _priced(option: Any, family: str) -> Any:
    fixed = -0.5 if option.family == family else 0.5
    return replace(option, fixed_seconds=fixed, live_seconds=0.0, error_seconds=0.0)
