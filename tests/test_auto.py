"""``bs.Auto`` in a loop of one's own: what it tries, resumes, leaves behind and refuses."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import backsketch as bs
from backsketch.nn.swap import is_swapped
from backsketch.planning.auto import proposals
from steering import Clock, steered_auto

STEPS = 32


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )


def batch_of(step: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(step)
    x = torch.randn(64, 64, generator=g)
    return x, x[:, :10].argmax(1)


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


class Loop:
    """A training of one's own.

    Args:
        clock: that its passes move; None for none.
        in_three_calls: whether the two calls are made that are left to the caller.
        options: of `bs.Auto`.
    """

    def __init__(self, clock: Clock | None, in_three_calls: bool = False, **options: Any) -> None:
        self.model, self.clock, self.in_three_calls = net(), clock, in_three_calls
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        bs.seed(0)
        batches = [batch_of(-1), batch_of(-2)]
        self.auto = bs.Auto(self.model, batches, self.loss, **{"total_steps": STEPS, **options})
        self.done = self.asked = 0

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        self.asked += 1
        return loss_fn(model, batch)

    def train(self, until: int = STEPS) -> Loop:
        for step in range(self.done, until):
            self.auto.step()
            if self.clock is not None:
                self.clock.pass_of(self.model)
            loss_fn(self.model, batch_of(step)).backward()
            if self.in_three_calls:
                self.auto.control()
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.in_three_calls:
                self.auto.stop()
        self.done = until
        return self

    def resumed(self) -> Loop:
        """Another process, from what this one would save."""
        state = self.auto.state_dict(), bs.get_rng_state()
        other = Loop(self.clock, self.in_three_calls)
        other.model.load_state_dict(_plain(self.model))
        other.auto.load_state_dict(state[0])
        bs.set_rng_state(state[1])
        other.done = self.done
        return other


def _plain(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


@pytest.mark.parametrize("in_three_calls", [False, True], ids=["one call", "three calls"])
@pytest.mark.parametrize("family", ["save", "quantized"])
def test_a_loop_that_resumes_is_the_one_that_went_on(family, in_three_calls):
    with steered_auto(family) as clock:
        whole = Loop(clock, in_three_calls).train()
        for stop_at in (1, 3, 27):
            resumed = Loop(clock, in_three_calls).train(stop_at).resumed().train()
            assert resumed.auto.rules == whole.auto.rules != {}
            assert resumed.auto.result().get("log") == whole.auto.result().get("log")
            expected = whole.model.state_dict()
            for name, tensor in resumed.model.state_dict().items():
                assert torch.equal(tensor, expected[name]), (stop_at, name)


def test_without_its_state_a_resumed_loop_differs():
    """The mutation of the test above."""
    with steered_auto("save") as clock:
        whole, cut = Loop(clock).train(), Loop(clock).train(10)
        resumed = cut.resumed()
        resumed.auto.controller = resumed.auto.guard = None
        resumed.train()
    assert not torch.equal(resumed.model[0].weight, whole.model[0].weight)


def test_one_call_a_step_is_enough():
    with steered_auto("save") as clock:
        auto = Loop(clock).train().auto
    assert list(auto.rules) == [""]
    assert auto.report.sketched
    assert auto.guard.pays
    assert auto.controller.log
    assert auto.profile_seconds == 40
    assert auto.steps == STEPS - 1  # the last one has not ended
    auto.close()
    assert auto.steps == STEPS
    assert "region" in str(auto)


def test_sketches_that_are_slower_by_the_clock_go():
    with steered_auto("save", sketched=1.25) as clock:
        loop = Loop(clock).train()
    assert loop.auto.rules == {}
    assert loop.auto.report is None
    assert loop.auto.is_exact
    assert "a sketched step takes 1.25 ± 0.00" in loop.auto.reason
    assert not any(is_swapped(m) for m in loop.model.modules())


@pytest.mark.parametrize(("total_steps", "profiles"), [(100, False), (None, True)])
def test_a_loss_is_asked_for_only_where_there_is_time_for_a_profile(total_steps, profiles):
    with steered_auto("save", share=0.03) as clock:
        loop = Loop(clock, total_steps=total_steps).train(60)
    assert bool(loop.asked) == profiles
    assert bool(loop.auto.rules) == profiles
    told = "a profile would take about 1e+02 s, over 3% of the 1e+02 s"
    assert (told in loop.auto.reason) != profiles
    assert loop.auto.result()["budget_seconds"] == (None if profiles else 3.0)


def test_its_state_is_plain_data():
    with steered_auto("save") as clock:
        loop = Loop(clock).train()
        state = json.loads(json.dumps(loop.auto.state_dict()))
        again = Loop(clock)
        again.auto.load_state_dict(state)
        assert again.auto.state_dict() == state
        assert again.auto.result() == loop.auto.result()


def test_afterwards_no_hook_is_left_and_the_sketches_stay():
    with steered_auto("save") as clock:
        loop = Loop(clock)
        with loop.auto:
            loop.train()
    assert any(is_swapped(m) for m in loop.model.modules())
    bs.restore_(loop.model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in loop.model.modules())
    assert type(loop.model[0]) is nn.Linear


def test_a_training_that_ends_by_an_error_measures_nothing_more(monkeypatch):
    with steered_auto("save") as clock:
        loop = Loop(clock).train(26)
    assert loop.auto.controller is not None
    monkeypatch.setattr(bs.Controller, "step", lambda self: pytest.fail("it looks at a step"))
    with pytest.raises(RuntimeError, match="out of memory"), loop.auto:
        raise RuntimeError("out of memory, say")
    assert loop.auto.steps == loop.auto.usage.steps.total() + loop.auto.exact_steps_before + 9
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in loop.model.modules())


def test_a_trial_leaves_the_controller_out(monkeypatch):
    called = []
    for name in ("step", "skip"):
        monkeypatch.setattr(bs.Controller, name, lambda self, name=name: called.append(name))
    with steered_auto("save") as clock:
        Loop(clock, total_steps=300).train(250)
    runs = [(name, len(list(run))) for name, run in itertools.groupby(called)]
    assert [name for name, _ in runs] == ["step", "skip", "step"]
    assert runs[1][1] == 18


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"total_steps": 0}, "total_steps must be at least 1"),
        ({"sketched": True}, "the model is sketched already"),
    ],
)
def test_what_is_refused(change, message):
    model = net()
    if change.pop("sketched", False):
        bs.sketch_(model, bs.Rows(keep=0.5))
    with pytest.raises(ValueError, match=message):
        bs.Auto(model, [batch_of(0), batch_of(1)], loss_fn, **change)


@pytest.mark.parametrize(
    ("batches", "loss", "message"),
    [
        ([batch_of(0)], loss_fn, "at least two batches"),
        (
            [batch_of(0), batch_of(1)],
            lambda model, batch: model(batch[0]),
            "must return the scalar",
        ),
    ],
)
def test_a_wrong_loss_or_too_few_batches_are_no_reason_to_stay_exact(batches, loss, message):
    with pytest.raises(ValueError, match=message):
        proposals.planned(net(), batches, loss)


def test_a_loss_that_diverged_is_a_reason():
    found = proposals.planned(
        net(), [batch_of(0), batch_of(1)], lambda model, batch: loss_fn(model, batch) * math.nan
    )
    assert found.rules == {}
    assert "nan" in found.reason


def test_random_streams_are_where_they_were_after_a_profile():
    loader = torch.utils.data.DataLoader(
        [(x, y) for x, y in zip(*batch_of(0))], batch_size=16, shuffle=True
    )
    model, before = net(), torch.get_rng_state()
    proposals.planned(model, loader, loss_fn)
    assert torch.equal(torch.get_rng_state(), before)


def test_planning_needs_torch_alone():
    folder = Path(bs.__file__).parent / "planning"
    for path in folder.rglob("*.py"):
        assert "accelerate" not in path.read_text(), path
