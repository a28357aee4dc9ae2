"""Never slower in silence: what the guard does under clocks that lie, and what the budget leaves to a profile."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import backsketch as bs
from backsketch.nn.swap import is_swapped
from backsketch.planning import Budget


class Clock:
    """A clock that knows nothing but what it is told a step takes.

    Args:
        exact: seconds of exact steps, one after the other, again and again.
        sketched: the same of sketched ones.
    """

    def __init__(self, exact, sketched):
        self.now, self._steps = (
            0.0,
            {True: itertools.cycle(exact), False: itertools.cycle(sketched)},
        )

    def __call__(self) -> float:
        return self.now

    def step(self, model: nn.Module) -> str:
        sites = [m for m in model.modules() if is_swapped(m)]
        exact = all(m.__dict__.get("_backsketch_exact") for m in sites)
        self.now += next(self._steps[exact])
        return "e" if exact else "s"


def model(sketch=None) -> nn.Sequential:
    found = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    bs.sketch_(found, sketch or bs.Rows(keep=0.5))
    return found


def walk(guard: bs.SpeedGuard, net: nn.Module, clock: Clock, steps: int) -> str:
    """What kinds of steps were made."""
    kinds = ""
    for _ in range(steps):
        guard.step()
        kinds += clock.step(net)
        assert guard.is_exact == (kinds[-1] == "e")
    return kinds


def test_sketches_that_the_clock_says_are_faster_stay():
    net, clock = model(), Clock([1.0], [0.7])
    guard = bs.SpeedGuard(net, clock)
    kinds = walk(guard, net, clock, 100)
    assert kinds == "essee" + "ssee" * 3 + "s" + "s" * 82
    assert guard.pays
    assert guard.ratio == pytest.approx(0.7)
    assert guard.exact_seconds == pytest.approx(1.0)
    assert "0.70 ± 0.00 of an exact one" in guard.verdict


def test_sketches_that_the_clock_says_are_slower_go():
    net, clock = model(), Clock([1.0], [1.1])
    guard = bs.SpeedGuard(net, clock)
    kinds = walk(guard, net, clock, 100)
    assert kinds[18:] == "e" * 82
    assert guard.pays is False
    assert "back to exact steps: a sketched step takes 1.10 ± 0.00" in guard.verdict
    assert not any(is_swapped(m) for m in net.modules())


def test_the_first_steps_of_each_kind_may_take_as_long_as_they_like():
    net, clock = model(), Clock([50.0, *[1.0] * 99], [90.0, *[0.7] * 99])
    guard = bs.SpeedGuard(net, clock)
    walk(guard, net, clock, 20)
    assert guard.ratio == pytest.approx(0.7)


def test_a_machine_that_grows_slower_favours_neither():
    net, clock = model(), Clock([1.0], [0.98])
    guard = bs.SpeedGuard(net, clock)
    for step in range(19):
        guard.step()
        before = clock.now
        clock.step(net)
        clock.now = before + (clock.now - before) * (1 + 0.05 * step)
    assert guard.ratio == pytest.approx(0.98, abs=0.02)


def test_what_cannot_be_known_is_tried_longer_and_then_dropped():
    net, clock = model(), Clock([1.0, 2.0, 1.5], [2.0, 1.0, 1.5])
    guard = bs.SpeedGuard(net, clock)
    kinds = walk(guard, net, clock, 60)
    assert kinds[:50].count("e") == 25
    assert kinds[50:] == "e" * 10
    assert "no gain can be seen" in guard.verdict


def test_it_is_tried_again_and_a_gain_that_has_gone_is_noticed():
    net, clock = model(), Clock([1.0], [*[0.5] * 110, *[1.5] * 1000])
    guard = bs.SpeedGuard(net, clock)
    kinds = walk(guard, net, clock, 240)
    assert kinds[18:218] == "s" * 200
    assert guard.pays is False
    assert kinds[236:] == "eeee"


def test_sketches_that_a_controller_holds_exact_are_not_judged():
    net, clock = model(), Clock([1.0], [0.5])
    guard = bs.SpeedGuard(net, clock)
    walk(guard, net, clock, 30)
    for site in (net[0], net[2]):
        bs.nn.swap.resketch_(site, bs.Rows(keep=1.0))
    clock._steps[False] = itertools.cycle([1.2])
    walk(guard, net, clock, 300)
    assert guard.pays


@pytest.mark.parametrize("stop_at", [3, 9, 17, 18, 40])
def test_a_resumed_guard_makes_the_steps_that_it_would_have_made(stop_at):
    def run(stop: int | None) -> tuple[str, object]:
        net, clock = model(), Clock([1.0], [0.5])
        guard = bs.SpeedGuard(net, clock)
        kinds = walk(guard, net, clock, stop or 60)
        if stop:
            state = guard.state_dict()
            net, clock = model(), Clock([1.0], [0.5])
            guard = bs.SpeedGuard(net, clock)
            guard.load_state_dict(state)
            kinds += walk(guard, net, clock, 60 - stop)
        return kinds, guard.state_dict()

    assert run(stop_at) == run(None)


def test_every_step_is_unbiased_or_exact_and_closing_ends_a_trial():
    net, clock = model(bs.Int8()), Clock([1.0], [0.7])
    guard = bs.SpeedGuard(net, clock)
    guard.step()  # an exact one
    x = torch.randn(8, 64)
    net(x).sum().backward()
    sketched = [p.grad.clone() for p in net.parameters()]
    bs.restore_(net)
    net.zero_grad()
    net(x).sum().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(sketched, net.parameters()))
    bs.sketch_(net, bs.Int8())
    guard = bs.SpeedGuard(net, clock)
    guard.step()
    guard.close()
    assert clock.step(net) == "s"


def test_a_model_without_sketches_is_refused():
    with pytest.raises(ValueError, match="not sketched"):
        bs.SpeedGuard(nn.Linear(2, 2))


def test_a_budget_counts_what_is_spent():
    budget = Budget(expected=1000.0)
    assert budget.affords(30.0)
    budget.spent += 20.0
    assert budget.left == pytest.approx(10.0)
    assert not budget.affords(11.0)
