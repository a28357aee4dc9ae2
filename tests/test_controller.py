"""The controller: estimates against Monte Carlo, the target held, refusals, resume, nothing left behind."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import backsketch as bs
from backsketch import sampling
from backsketch.planning import Profile
from backsketch.planning.control import calibration, observer
from backsketch.planning.control.costs import StepCosts
from backsketch.planning.control.estimate import Estimate
from backsketch.planning.control.observer import Observer
from backsketch.planning.control.schedule import Schedule
from backsketch.planning.control.sites import movable_sites
from backsketch.planning.measure.recorder import unseen
from backsketch.planning.measure.replay import Recorder
from backsketch.planning.measure.rows import RowCurve, row_curve
from backsketch.planning.measure.step import extra_variance
from backsketch.planning.plan.choices import frontier
from backsketch.planning.profiling.families import FINE_LADDER
from backsketch.planning.profiling.records import Option, SiteProfile
from backsketch.regions import record_scores
from backsketch.theory.noise import GradientSums
from backsketch.theory.variance import minimal_sampling
from helpers import monte_carlo

SIZE = 64


def mlp(inputs=64, width=128):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(inputs, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, 10),
    )


@pytest.fixture(scope="module")
def digits():
    from sklearn.datasets import load_digits

    found = load_digits()
    x = torch.tensor(found.data, dtype=torch.float32) / 8 - 1
    return x, torch.tensor(found.target)


def drawn(data, seed, count=1, size=SIZE):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(len(data[0]), (size,), generator=generator) for _ in range(count)]
    return [(data[0][r], data[1][r]) for r in rows]


def loss_of(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def train(model, data, steps, control=None, *, first=0, lr=0.05, parts=1, momentum=0.0):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    for step in range(first, first + steps):
        for batch in drawn(data, step, parts):
            (loss_of(model, batch) / parts).backward()
        if control is not None:
            control.step()
        optimizer.step()
        optimizer.zero_grad()


# --- the parts --------------------------------------------------------------------------------------


def test_the_row_curve_is_the_water_filling_variance_at_every_keep():
    torch.manual_seed(0)
    for scores in (torch.rand(50), torch.randn(128).exp() ** 3, torch.ones(20)):
        padded = torch.cat([scores, torch.zeros(9)])  # rows that a mask dropped
        found = row_curve(padded, FINE_LADDER)
        for keep, error in zip(FINE_LADDER, found.errors):
            k = sampling.num_kept(len(scores), keep)
            expected = float(minimal_sampling(scores, k)) if k < len(scores) else 0.0
            assert error == pytest.approx(expected, rel=1e-6, abs=1e-9 * found.energy)
    both = row_curve(torch.stack([torch.arange(1.0, 9.0), torch.ones(8)]), (0.5,))
    alone = [row_curve(s, (0.5,)).errors[0] for s in (torch.arange(1.0, 9.0), torch.ones(8))]
    assert both.errors[0] == pytest.approx(sum(alone))
    assert both.count == 2


@pytest.mark.parametrize(
    ("sketch", "share"),
    [
        (bs.Region(keep=0.5), 0.2),
        (bs.Rows(keep=0.5), 0.4),
        (bs.Split(grad_weight=bs.Rows(keep=0.5)), 0.4),
        (bs.Rows(keep=0.5, scores="uniform"), 0.5),
        (bs.Columns(keep=0.5), 0.5),
    ],
    ids=str,
)
def test_below_a_mask_a_site_costs_the_rows_that_it_keeps(sketch, share):
    model = mlp()
    bs.sketch_(model, {"": bs.Mask(keep=0.4), "2": sketch})
    sites = movable_sites(model)
    costs = StepCosts((0.0, -0.6), (0.0, 0.6))
    assert costs.step(sites, (1, 0.5)) == pytest.approx(0.4 + 0.6 * 0.5)
    assert costs.step(sites, (0.4, 0.5)) == pytest.approx(0.4 + 0.6 * share)
    assert costs.step(sites, (0.4, 1)) == 1


def timed_layers() -> Profile:
    """Two layers, of which only rows of the weight gradient were timed: they save 0.06 of a step at keep 0."""
    options = tuple(
        Option(
            "weights",
            k,
            dict.fromkeys(("0", "2"), str(bs.Split(grad_weight=bs.Rows(k)))),
            -0.06,
            0.06 * k,
            0.1,
            0,
        )
        for k in (0.5, 0.3)
    )
    site = SiteProfile("body", "branch", None, ("0", "2"), options, backward_seconds=0.4)
    return Profile((site,), (), 1.0, 1000, 1.0, 1.0, "cpu", "2")


@pytest.mark.parametrize(
    ("sketch", "cost"),
    [
        (bs.Split(grad_weight=bs.Rows(keep=0.5)), 1 - 0.03 * 0.5),  # as timed: half of it a layer
        (bs.Rows(keep=0.5), 1 - 0.2 * 0.5),  # both products: half of the layer's backward pass
        (bs.Columns(keep=0.5), 1 - 0.2 * 0.5),
        (bs.StoredRows(keep=0.5), 1 - 0.1 * 0.5),  # one of two products
        (
            bs.Int8(sketch=bs.Rows(keep=0.5)),
            1 - 0.2 * 0.25 * 0.5,
        ),  # a keep of products that cost a quarter
        (bs.Split(grad_input=bs.Rows(keep=0.5)), 1 - 0.1 * 0.5),
    ],
    ids=str,
)
def test_a_site_is_costed_by_its_own_sketch(sketch, cost):
    """Not as rows of the weight gradient, which is all that a profile times at a layer."""
    model = mlp()
    bs.sketch_(model, {"2": sketch})
    sites = movable_sites(model)
    costs = StepCosts.from_profile(timed_layers(), sites)
    assert costs.step(sites, (0.5,)) == pytest.approx(cost)


def test_a_site_that_the_profile_does_not_have_is_named():
    model = mlp()
    bs.sketch_(model, {"4": bs.Rows(keep=0.5)})
    with pytest.raises(ValueError, match=r"no time of rows:keep=0\.5 at '4'"):
        bs.Controller(model, profile=timed_layers())


def test_the_frontier_is_the_best_that_each_variance_allows():
    sites = [[(0, 0), (-2.0, 1), (-3.0, 4)], [(0, 0), (-1.0, 0.2), (-3.0, 1.0)], [(0, 0), (1.0, 0)]]
    everything = [
        (sum(o[0] for o in chosen), sum(o[1] for o in chosen))
        for chosen in itertools.product(*sites)
    ]
    found = list(frontier(sites))
    assert len(found) == 5
    for picked, cost, variance in found:
        assert (cost, variance) == pytest.approx(
            tuple(sum(sites[s][i][part] for s, i in enumerate(picked)) for part in range(2))
        )
        assert cost <= min(c for c, v in everything if v <= variance + 1e-12)
    assert all(v <= 1.5 for _, _, v in frontier(sites, 1.5))


def test_early_replays_do_not_outweigh_late_ones_and_go():
    estimate = Estimate((1.0, 0.5), 2, expects_one=False)

    def replay(step, growth, error_of):
        found = {s: RowCurve((0.0, error_of), 1.0) for s in range(2)}
        error = growth * 2 * error_of  # the weight of a site that was never alone is one
        parts = calibration.Measured(1.0, 1.0, error, {}, found, {})
        estimate.update(parts, (0.5, 0.5), {}, 1, step)

    replay(1, 1.0, 10.0)
    for step in (2, 3, 4):
        replay(step, 2.0, 0.1)
    assert estimate.growth == pytest.approx(1.75)
    for step in range(5, 9):
        replay(step, 2.0, 0.1)
    assert estimate.growth == pytest.approx(2.0)


def measured(data, seed):
    """What one calibration of a fresh model finds."""
    model = mlp()
    bs.sketch_(model, {"0": bs.Rows(keep=0.5)})
    recorder = Recorder(model)
    loss_of(model, drawn(data, seed)[0]).backward()
    recorder.close()
    sites = movable_sites(model)
    return calibration.measure(model, recorder, sites, (0.5,), {}, FINE_LADDER, seed, False)


def check_halves(data):
    found = [measured(data, seed) for seed in range(30)]
    sums = GradientSums()
    model = mlp()
    for batch in drawn(data, 999, 30):
        sums.add(torch.autograd.grad(loss_of(model, batch), list(model.parameters())))
    sgd = math.fsum(m.sgd for m in found) / len(found)
    square = math.fsum(m.square for m in found) / len(found)
    assert sgd == pytest.approx(sums.sgd_variance, rel=0.25)
    assert sgd / square == pytest.approx(sums.noise_scale, rel=0.35)


def test_two_halves_of_a_batch_show_the_variance_over_batches(digits):
    check_halves(digits)


def test_halves_that_are_off_by_a_factor_of_two_are_noticed(digits, monkeypatch):
    distance = calibration.squared_distance
    monkeypatch.setattr(calibration, "squared_distance", lambda a, b: 2 * distance(a, b))
    with pytest.raises(AssertionError):
        check_halves(digits)


def test_ranks_that_cannot_measure_leave_the_sums_and_the_work_as_they_are():
    work = {"0": calibration.Work(10.0, 1), "2": calibration.Work(30.0, 2)}
    curves = {0: RowCurve((0.0, 0.5), 2.0), 2: RowCurve((0.0, 0.25), 1.0, 3)}
    found = calibration.Measured(1.0, 2.0, 0.5, {0: 4.0, 2: 0.0}, curves, work)
    double = calibration.Measured(
        2.0, 4.0, 1.0, {0: 8.0, 2: 0.0}, {i: s + s for i, s in curves.items()}, work
    )

    for ranks, total in [
        ((found,), found),
        ((found, None), found),
        ((None, None, found), found),
        ((found, None, found), double),
        ((None, None), None),
        ((found, dataclasses.replace(found, error=math.nan)), None),
    ]:
        assert calibration.over_ranks(ranks) == total


# --- the target is held -----------------------------------------------------------------------------


def check_estimate(data, rules):
    """At weights that stay, the estimate is what a Monte Carlo finds."""
    model = mlp()
    bs.sketch_(model, rules)
    train(model, data, 100)
    control = bs.Controller(model, 0.1, interval=4)
    train(model, data, 360, control, first=100, lr=0.0)
    omega, beta = monte_carlo(model, drawn(data, 10_000, 60), loss_of)
    assert control.extra_variance == pytest.approx(omega, rel=0.35)
    assert control.noise_scale == pytest.approx(beta, rel=0.5)
    assert 0.05 <= omega <= 0.15
    return control


def check_held(data, rules, target=0.1):
    """Through a training the extra variance stays near its target."""
    model = mlp()
    bs.sketch_(model, rules)
    found, at = [], (60, 120, 180, 240)
    with bs.Controller(model, target, interval=30) as control:
        for first, last in itertools.pairwise((0, *at)):
            train(model, data, last - first, control, first=first)
            omega, _ = monte_carlo(model, drawn(data, 10_000 + last, 24), loss_of, 2)
            found.append((control.extra_variance, omega, *control.keeps.values()))
    assert sum(0.4 * target <= omega <= 1.5 * target for _, omega, *_ in found) >= 3, found
    assert len(control.log) >= 2
    return control


def test_a_region_is_held_at_its_target(digits):
    control = check_held(digits, bs.Region(keep=0.5))
    assert control.keeps[""] in FINE_LADDER
    assert 0.85 < control.effective_batch < 0.97
    assert "your effective batch is now 0.9" in control.advice
    assert "target 0.1" in str(control)


def test_layers_and_masks_are_held_together_at_their_target(digits):
    rules = {"": bs.Mask(keep=0.7), "0": bs.Split(grad_weight=bs.Rows(keep=0.5)), "2": bs.Rows(0.5)}
    control = check_held(digits, rules)
    assert set(control.keeps) == {"", "0", "2"}


@pytest.mark.fast_cases("region")
@pytest.mark.parametrize(
    "rules",
    [bs.Region(keep=0.5), {"": bs.Mask(keep=0.7), "0": bs.Rows(keep=0.5), "2": bs.Columns(0.8)}],
    ids=["region", "mask and layers"],
)
def test_the_estimate_is_what_a_monte_carlo_finds(digits, rules):
    check_estimate(digits, rules)


def test_a_variance_of_sgd_that_is_off_by_a_factor_of_two_is_noticed(digits, monkeypatch):
    measure = observer.measure

    def wrong(*arguments):
        found = measure(*arguments)
        return dataclasses.replace(found, sgd=2 * found.sgd)

    monkeypatch.setattr(observer, "measure", wrong)
    with pytest.raises(AssertionError):
        check_estimate(digits, bs.Region(keep=0.5))


def test_without_a_target_the_time_to_a_loss_is_the_least(digits):
    model = mlp()
    bs.sketch_(model, bs.Region(keep=0.5))
    control = bs.Controller(model, None, interval=20)
    train(model, digits, 100, control)
    (keep,) = control.keeps.values()
    estimate, beta = control._observer.estimate, control.noise_scale
    rho = {
        k: bs.theory.time_to_target_ratio(
            bs.theory.region_step_cost(k), 1 + estimate.total((k,)), beta
        )
        for k in estimate.ladder
    }
    assert rho[keep] < min(rho.values()) + 0.06  # the first layer has no input gradient; hysteresis


def test_accumulated_micro_batches_share_one_gradient(digits):
    found = {}
    for parts in (1, 4):
        model = mlp()
        bs.sketch_(model, bs.Region(keep=0.5))
        control = bs.Controller(model, 0.1, interval=2)
        train(model, digits, 12, control, parts=parts, lr=0.0)
        found[parts] = control._observer.estimate.total((0.5,)), control.noise_scale
    assert found[4][0] == pytest.approx(found[1][0], rel=0.4)
    assert found[4][1] == pytest.approx(found[1][1] / 4, rel=0.4)


# --- phases, resume, what is left alone -------------------------------------------------------------


@pytest.mark.parametrize("skipped", [True, False], ids=["skipped", "mutation"])
def test_steps_that_are_skipped_show_nothing(digits, skipped):
    """Else their passes would count as micro-batches of the next step, and its noise as that of their mean."""

    def noise(others):
        model = mlp()
        bs.sketch_(model, {"2": bs.Region(keep=0.5)})
        with bs.Controller(model, 0.1) as control:
            for batch in drawn(digits, 1, others):
                loss_of(model, batch).backward()
            if others and skipped:
                control.skip()
            train(model, digits, 1, control)
            return control.noise_scale

    assert (noise(4) == noise(0)) == skipped


def test_warm_up_and_finish_are_exact(digits):
    model = mlp()
    bs.sketch_(model, bs.Region(keep=0.5))
    control = bs.Controller(model, 0.1, warmup=5, finish=4, total_steps=30, interval=5)
    seen = []
    for step in range(30):
        train(model, digits, 1, control, first=step)
        seen.append(control.keeps[""])
    assert set(seen[:4]) == {1.0}
    assert max(seen[5:25]) < 1
    assert set(seen[26:]) == {1.0}
    assert [c.reason for c in control.log if "exact" in c.reason] == [
        "exact warm-up of 5 steps", "exact finish"
    ]  # fmt: skip
    assert control.advice.startswith("the gradients are exact")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_resumed_run_takes_the_time_of_a_step_from_its_own_steps():
    """A replay of 10 s after nine steps of 20 s in all: the next one in 450 steps, at 1 % of the time."""
    schedule = Schedule(clock=lambda: 0.0)
    schedule.load_state_dict(
        {"steps": 10_000, "due": 10_009, "gap": 1000, "look": 10_020, "retries": 0}
    )
    for _ in range(9):
        assert schedule.replays_next == (schedule.steps == 10_008)
        schedule.step()
    schedule.replayed(10.0, schedule.seconds_per_step(20.0))
    assert schedule.gap == 450
    assert schedule.due == 10_459


@pytest.mark.parametrize(
    "rules",
    [bs.Region(keep=0.5), {"0": bs.Rows(keep=0.5), "2": bs.Region(keep=0.5)}],
    ids=["region", "layer and region"],
)
def test_a_run_that_was_interrupted_between_two_looks_goes_on_as_if_it_was_not(
    digits, rules, monkeypatch
):
    monkeypatch.setattr(Observer.__init__, "__defaults__", (3 * SIZE,))  # three vectors of scores

    def made():
        model = mlp()
        bs.sketch_(model, rules)
        loss_of(model, drawn(digits, 0)[0]).backward()  # exact: each region checks its rows
        model.zero_grad()
        bs.seed(0)
        return model, bs.Controller(model, 0.1, interval=50)

    whole, never_saved = made()
    train(whole, digits, 135, never_saved)
    model, control = made()
    train(model, digits, 121, control)
    weights, state = copy.deepcopy(model.state_dict()), json.loads(json.dumps(control.state_dict()))
    assert [[t[1], len(t[2])] for t in state["traces"][0]] == [[3, 2]]
    stream = bs.get_rng_state()
    again, resumed = made()
    again.load_state_dict(weights)
    resumed.load_state_dict(state)
    assert json.loads(json.dumps(resumed.state_dict())) == state
    bs.set_rng_state(stream)
    train(again, digits, 14, resumed, first=121)
    assert len(resumed.log) > 1
    assert resumed.state_dict() == never_saved.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters()))
    del state["traces"]  # as those of earlier versions
    resumed.load_state_dict(state)
    assert not any(t[2] for t in resumed.state_dict()["traces"][0])
    with pytest.raises(ValueError, match="made with target"):
        bs.Controller(again, 0.2).load_state_dict(state)


def test_a_measurement_between_two_steps_is_not_taken_for_a_step(digits):
    model = mlp()
    bs.sketch_(model, bs.Region(keep=0.5))
    train(model, digits, 1)
    recorder, scores = Recorder(model), record_scores(model, 4)
    assert extra_variance(model, drawn(digits, 0, 2), loss_of) > 0
    assert (recorder.call, recorder.count, len(scores)) == (None, 0, 0)
    train(model, digits, 1)
    assert (recorder.count, len(scores)) == (1, 1)


def test_a_measurement_in_another_thread_hides_no_step_of_this_one(digits):
    model, begun, done = mlp(), threading.Event(), threading.Event()

    def measure():
        with unseen(nn.Identity()):
            begun.set()
            done.wait()

    recorder, thread = Recorder(model), threading.Thread(target=measure)
    thread.start()
    begun.wait()
    loss_of(model, drawn(digits, 0)[0]).backward()
    done.set()
    thread.join()
    assert recorder.count == 1


def test_measuring_leaves_no_trace(digits):
    runs = []
    for controlled in (False, True):
        torch.manual_seed(0)
        bs.seed(0)
        model = nn.Sequential(mlp(), nn.Dropout(0.2), nn.BatchNorm1d(10))
        bs.sketch_(model, {"0": bs.Region(keep=0.5)})
        control = bs.Controller(model, 0.1) if controlled else None
        torch.manual_seed(1)
        loss_of(model, drawn(digits, 0)[0]).backward()
        user_grad = model[0][0].weight.grad.clone()
        if control is not None:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(control, "_decide", lambda: None)
                control.step()
                control.close()
            assert control.extra_variance > 0
        assert torch.equal(model[0][0].weight.grad, user_grad)
        assert not any(
            m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules()
        )
        runs.append([torch.get_rng_state(), bs.get_rng_state(), *model.state_dict().values()])
    same = [a == b if isinstance(a, dict) else torch.equal(a, b) for a, b in zip(*runs)]
    assert all(same)


def test_an_armed_model_copies_and_pickles_and_is_restored(digits):
    model = mlp()
    bs.sketch_(model, bs.Region(keep=0.5))
    with bs.Controller(model, 0.1) as control:
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            loss_of(twin, drawn(digits, 0)[0]).backward()
        assert control._observer._recorder.call is None  # a copy's calls are not the model's
        train(model, digits, 8, control)
        bs.restore_(model)
        with pytest.raises(RuntimeError, match="changed or removed"):
            train(model, digits, 40, control)
    assert type(model) is nn.Sequential
    assert "_backsketch" not in model.__dict__
    with pytest.raises(RuntimeError, match="closed"):
        control.step()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_layers_use_no_more_plans_than_allowed(digits):
    torch._dynamo.reset()
    model = mlp()
    bs.sketch_(model, bs.Rows(keep=0.5))
    compiled = torch.compile(model, backend="eager")
    control = bs.Controller(compiled, 0.1, max_plans=3, interval=10)
    torch._dynamo.utils.counters.clear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for step in range(60):
        loss_of(compiled, drawn(digits, step)[0]).backward()
        control.step()
        optimizer.step()
        optimizer.zero_grad()
    assert control.noise_scale is not None
    assert len({tuple(c.after.values()) for c in control.log}) <= 3
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


def test_the_keep_of_a_region_recompiles_nothing(digits):
    model = mlp()
    bs.sketch_(model, bs.Region(keep=0.5))
    control = bs.Controller(model, 0.1, interval=20)
    train(model, digits, 4, control)
    torch._dynamo.utils.counters.clear()
    train(model, digits, 60, control, first=4, momentum=0.9)
    assert len({c.after[""] for c in control.log}) > 2
    assert not torch._dynamo.utils.counters["stats"]


# --- refusals and errors ----------------------------------------------------------------------------


def test_where_sketches_cannot_pay_everything_is_exact_and_the_log_says_why(digits):
    x, y = digits

    def reason(model, batches, target=0.05, size=2.0):
        bs.sketch_(model, bs.Region(keep=0.5))
        control = bs.Controller(model, target, interval=3)
        for batch in batches:
            loss = loss_of(model, batch) if isinstance(batch, tuple) else model(batch).sum() * size
            loss.backward()
            control.step()
        assert set(control.keeps.values()) == {1.0}
        assert control.effective_batch == 1
        return control.log[-1].reason

    assert "multiply-adds" in reason(mlp(64, 8), drawn(digits, 0, 4))
    same = [(x[:1].expand(SIZE, -1), y[:1].expand(SIZE))] * 4
    assert "SGD's own variance is zero" in reason(mlp(), same)
    alike = [torch.randn(SIZE, 64) * 1e-4 + 1 for _ in range(4)]
    assert "noise scale" in reason(mlp(), alike)
    even = [torch.randn(SIZE, 64) for _ in range(6)]  # every row's cotangent is ones
    assert "rows matter alike" in reason(nn.Sequential(nn.Linear(64, 512)), even, target=0.02)


class WithLoss(nn.Module):
    """Returns its loss alone, as a mean or a sum over the samples."""

    def __init__(self, body, reduction):
        super().__init__()
        self.body, self.reduction = body, reduction

    def forward(self, x, y):
        return F.cross_entropy(self.body(x), y, reduction=self.reduction)


def measured_with_its_loss(digits, reduction, loss_inside):
    """Noise scale and extra variance after some steps at the weights of the start."""
    torch.manual_seed(0)
    model = WithLoss(mlp(), reduction)
    # These batches, drawn in their order, are a case in which a region pays from the first step on.
    bs.sketch_(model, {"body": bs.Region(keep=0.5, design="systematic")})
    control = bs.Controller(model if loss_inside else model.body, 0.05, interval=1)
    for x, y in drawn(digits, 0, 4):
        model(x, y).backward()
        control.step()
    return control.noise_scale, control.extra_variance


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_model_that_returns_its_loss_is_measured_as_one_that_returns_its_outputs(
    digits, reduction, monkeypatch
):
    expected = measured_with_its_loss(digits, reduction, loss_inside=False)
    noise, omega = measured_with_its_loss(digits, reduction, loss_inside=True)
    assert noise == pytest.approx(expected[0], rel=1e-3)
    assert 0 < omega < 3 * expected[1]  # the prior of a region over the whole model is another
    # The mutation: a sum taken for a mean, and the other way round.
    right = calibration._distance
    monkeypatch.setattr(calibration, "_distance", lambda *parts: -right(*parts))
    wrong = measured_with_its_loss(digits, reduction, loss_inside=True)[0]
    assert abs(wrong / noise - 1) > 0.2


def test_a_model_that_is_never_called_is_told_so(digits):
    model = mlp()
    bs.sketch_(model, bs.Region(keep=0.5))
    control = bs.Controller(model)
    for _ in range(8):
        control.step()
    assert "no training call of the model was seen" in control.log[-1].reason


def test_bad_input_is_named_and_changes_nothing():
    model = mlp()
    with pytest.raises(ValueError, match="sketch_"):
        bs.Controller(model)
    bs.sketch_(model, bs.Quantized(bits=4))
    with pytest.raises(ValueError, match="keep to move"):
        bs.Controller(model)
    bs.sketch_(model, bs.Region(keep=0.33))
    wrong = [
        ({"target_extra_variance": -1}, "positive"),
        ({"target_extra_variance": math.nan}, "positive"),
        ({"warmup": -1}, "warmup"),
        ({"finish": 3}, "total_steps"),
        ({"warmup": 3, "finish": 3, "total_steps": 5}, "at least warmup"),
        ({"overhead": 0}, "overhead"),
        ({"interval": 0}, "interval"),
        ({"max_plans": 0.5}, "max_plans"),
    ]
    for arguments, words in wrong:
        with pytest.raises(ValueError, match=words):
            bs.Controller(model, **arguments)
    with pytest.raises(TypeError, match=r"nn\.Module"):
        bs.Controller("model")
    assert model._backsketch == bs.Region(keep=0.33)
    assert not model._forward_hooks
    assert 0.33 in bs.Controller(model)._observer.estimate.ladder


# --- theory -----------------------------------------------------------------------------------------


def test_the_advice_is_the_scaling_rule_of_the_effective_batch():
    factor = bs.theory.learning_rate_factor
    assert bs.theory.effective_batch(1.0) == 0.5
    assert factor(0.25, "sgd") == pytest.approx(0.8)
    assert factor(0.25, "adam") == pytest.approx(0.8**0.5)
    assert factor(0.25, "sgd", 1e9) == pytest.approx(0.8)
    assert factor(0.25, "sgd", 0.0) == 1
    for wrong in ({"extra_variance": -0.1}, {"optimizer": "lion"}, {"noise_scale": -1.0}):
        with pytest.raises(ValueError, match="must"):
            factor(**{"extra_variance": 0.1, **wrong})
