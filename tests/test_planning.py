"""Profiles and plans: places found, limits kept, optimality, refusals, a model left as it was."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import backsketch as bs
from backsketch.models import build
from backsketch.planning.record import MaskOption, Option, Profile, SlotProfile
from backsketch.planning.slots import find_slots
from backsketch.planning.solve import choose


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def batches(shape, count=3, size=8):
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(size, *shape, generator=generator),
            torch.randint(10, (size,), generator=generator),
        )
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return build("vit", (3, 16, 16), 10, dim=64, depth=2, patch=4)


@pytest.fixture(scope="module")
def profile(vit):
    return bs.profile(vit, batches((3, 16, 16)), loss_fn, progress=False)


# --- places -----------------------------------------------------------------------------------------


def test_residual_branches_are_found_with_their_rows(vit):
    slots = find_slots(vit, batches((3, 16, 16))[0], loss_fn)
    branches = {s.name: s.row_dims for s in slots if s.kind == "branch"}
    assert branches == {
        "blocks.0.attn": 1, "blocks.0.mlp": 2, "blocks.1.attn": 1, "blocks.1.mlp": 2
    }  # fmt: skip


def test_branches_with_batch_statistics_are_no_regions():
    torch.manual_seed(0)
    model = build("bagnet", (3, 32, 32), 10, width=16)
    slots = find_slots(model, batches((3, 32, 32))[0], loss_fn)
    branches = [s for s in slots if s.kind == "branch"]
    assert branches
    assert all(s.row_dims is None for s in branches)
    assert not any("." not in s.name and s.kind == "branch" for s in slots)  # no whole stages


# --- profile ----------------------------------------------------------------------------------------


def test_a_profile_leaves_everything_as_it_was(vit):
    data = batches((3, 16, 16))
    vit.eval()
    vit.head.weight.grad = torch.ones_like(vit.head.weight)
    before = {k: v.clone() for k, v in vit.state_dict().items()}
    torch.manual_seed(3)
    rng, stream = torch.get_rng_state(), bs.get_rng_state()
    bs.profile(vit, data, loss_fn, progress=False)
    assert torch.equal(torch.get_rng_state(), rng)
    assert bs.get_rng_state() == stream
    assert not any(m.training for m in vit.modules())
    assert not any("Sketched" in type(m).__name__ for m in vit.modules())
    assert all(torch.equal(before[k], v) for k, v in vit.state_dict().items())
    assert torch.equal(vit.head.weight.grad, torch.ones_like(vit.head.weight))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in vit.modules())
    vit.train()
    vit.zero_grad()


def test_a_profile_saves_and_loads(profile, tmp_path):
    profile.save(tmp_path / "profile.json")
    assert Profile.load(tmp_path / "profile.json") == profile
    assert "blocks.0.mlp" in str(profile)


def test_predicted_variance_and_bytes_are_those_measured(vit, profile):
    plan = profile.plan("variance", max_saved_bytes=0.5 * profile.saved_bytes)
    report = bs.sketch_(vit, plan)
    try:
        measured = plan.measure(vit, batches((3, 16, 16)), loss_fn)
    finally:
        bs.restore_(vit)
    assert len(report.sites) >= len(plan.rules)
    assert plan.measured is measured
    assert measured.saved_bytes == pytest.approx(plan.predicted.saved_bytes, rel=0.1)
    assert measured.extra_variance == pytest.approx(plan.predicted.extra_variance, rel=0.5)


def test_bad_input_is_named_and_changes_nothing(vit):
    data = batches((3, 16, 16))
    with pytest.raises(ValueError, match="two batches"):
        bs.profile(vit, [], loss_fn)
    with pytest.raises(ValueError, match="nothing can be measured"):
        bs.profile(vit, data, lambda m, b: loss_fn(m, b) * math.nan)
    with pytest.raises(ValueError, match="nothing to sketch"):
        bs.profile(nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 10)), batches((6,)), loss_fn)
    bs.sketch_(vit, bs.Rows(keep=0.5))
    with pytest.raises(ValueError, match="restore_"):
        bs.profile(vit, data, loss_fn)
    bs.restore_(vit)


# --- plans ------------------------------------------------------------------------------------------


def made(noise_scale=10.0, omega=0.05, seconds=-0.15, masks=()) -> Profile:
    """A profile with three places, each to be sketched in two ways."""

    def options(i: int) -> tuple[Option, ...]:
        rules = {f"b{i}": "region:keep=0.5"}
        cheap = {f"b{i}": "quantized:bits=4"}
        return (
            Option("save", 0.5, rules, 0.0, seconds, omega * (i + 1), 0),
            Option("quantized", 1.0, cheap, 0.02, 0.0, 0.001, -100),
        )

    slots = tuple(SlotProfile(f"b{i}", "branch", 1, (), options(i)) for i in range(3))
    return Profile(slots, tuple(masks), 1.0, 1000, noise_scale, 1.0, "cpu", "2")


def test_the_plan_for_time_is_the_best_of_all_choices():
    profile = made()
    plan = profile.plan()
    best = min(
        bs.theory.time_to_target_ratio(
            1 + sum(o.seconds() for o in chosen if o),
            1 + sum(o.variance for o in chosen if o),
            profile.noise_scale,
        )
        for chosen in itertools.product(*((None, *s.options) for s in profile.slots))
    )
    assert plan.predicted.rho == pytest.approx(best)
    assert set(plan.rules) == {"b0", "b1", "b2"}


def test_limits_are_kept():
    profile = made()
    assert profile.plan(max_extra_variance=0.06).predicted.extra_variance <= 0.06
    assert profile.plan("memory", max_time=1.05).predicted.time_ratio <= 1.05
    assert profile.plan("memory").predicted.saved_bytes == 700
    assert profile.plan("variance", max_saved_bytes=900).predicted.saved_bytes <= 900
    with pytest.raises(ValueError, match="nothing meets"):
        profile.plan(max_saved_bytes=10)


def test_a_mask_shrinks_the_regions_below_it():
    masks = [MaskOption(0.8, 0.001, 1.01)]
    without, having = made(seconds=0.1).plan(), made(seconds=0.1, masks=masks).plan()
    assert without.is_exact
    assert having.is_exact  # a mask alone saves nothing where regions cost more than they save
    plan = made(masks=masks).plan(max_extra_variance=0.5)
    assert plan.predicted.time_ratio >= 1 - 0.45


def test_refusals_say_what_is_better():
    noisy = made(noise_scale=math.inf, omega=2.0).plan()
    assert noisy.is_exact
    assert "no sketch beats exact" in noisy.reason
    quiet = made(noise_scale=0.01, seconds=-0.05).plan()
    assert quiet.is_exact
    assert "smaller batch" in quiet.reason
    assert quiet.predicted.smaller_batch[0] == 0.25
    with pytest.raises(ValueError, match="objective"):
        made().plan("speed")
    with pytest.raises(ValueError, match="positive"):
        made().plan(max_extra_variance=-1)


def test_the_exact_plan_applies_and_leaves_the_model_exact(vit, profile):
    report = bs.sketch_(vit, Profile.plan(made_of(profile)))
    assert not any("Sketched" in type(m).__name__ for m in vit.modules())
    assert report.sites
    bs.restore_(vit)


def made_of(profile: Profile) -> Profile:
    """The same profile with a noise scale so small that nothing pays."""
    return Profile.from_dict({**profile.to_dict(), "noise_scale": 1e-6})


costs = st.lists(
    st.lists(st.tuples(*[st.integers(-20, 20)] * 3), min_size=1, max_size=3), min_size=1, max_size=4
)


@given(costs, st.integers(0, 2), st.integers(-30, 60))
@settings(max_examples=60, deadline=None)
def test_the_solver_finds_the_optimum(costs, minimise, limit):
    costs = [[tuple(map(float, c)) for c in options] for options in costs]
    limits = [math.inf] * 3
    limits[(minimise + 1) % 3] = float(limit)
    totals = [[sum(p) for p in zip(*combination)] for combination in itertools.product(*costs)]
    feasible = [t[minimise] for t in totals if all(x <= b for x, b in zip(t, limits))]
    picked = choose(costs, minimise, tuple(limits))
    if not feasible:
        assert picked is None
        return
    total = [sum(p) for p in zip(*(options[i] for options, i in zip(costs, picked)))]
    assert total[minimise] == pytest.approx(min(feasible), abs=1e-3)
    assert all(t <= b + 1e-6 for t, b in zip(total, limits))
