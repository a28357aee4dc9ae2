"""Stochastic rounding: the compiled kernels are the eager definition bit for bit, and the law is the right one."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch

from backsketch.ops.reference import rounded_slowly
from backsketch.rounding import Rounding, eager, native
from backsketch.sampling import next_seed

native_only = pytest.mark.skipif(
    native.library() is None, reason=f"no compiled kernels: {native.SOURCE.why_not()}"
)
SIZES = [1, 5, 64, 100, 1000, 40_000]


@native_only
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_compiled_and_eager_agree_bit_for_bit(bits):
    kernels = native.library()
    for n, group, twice in itertools.product(SIZES, (8, 24, 64, 128), (False, True)):
        x = torch.randn(n) * 10.0 ** (n % 5 - 2)
        key = (n, 2**31 + group)
        compiled, plain = (m.pack(x, key, bits, group, twice) for m in (kernels, eager))
        assert torch.equal(compiled[0], plain[0])
        assert torch.equal(compiled[1], plain[1])
        for which in (0, 1) if twice else (-1,):
            restored = [m.restore(*plain, n, bits, group, which) for m in (kernels, eager)]
            assert torch.equal(*restored)
        if not twice:
            assert torch.equal(*(m.times(x, *plain, bits, group) for m in (kernels, eager)))


@native_only
@pytest.mark.parametrize("n", SIZES)
def test_compiled_and_eager_masks_agree(n):
    kernels, x = native.library(), torch.randn(n)
    x[n // 2] = torch.nan
    for low, high in ((0.0, torch.inf), (-0.5, 0.5)):
        masks = [m.mask(x, low, high) for m in (kernels, eager)]
        assert torch.equal(*masks)
        for outside in (0.0, 0.2):
            pair = [m.masked(x.abs(), masks[0], outside) for m in (kernels, eager)]
            torch.testing.assert_close(*pair, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_is_the_slow_definition_entry_by_entry(bits):
    x, seed = torch.randn(200), next_seed()
    rounding = Rounding(bits, 24)
    fast = rounding.restore(rounding.pack(x, seed), (200,), x)
    torch.testing.assert_close(fast, rounded_slowly(x, seed, bits, 24), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize(
    "run", [eager, pytest.param(None, marks=native_only)], ids=["eager", "native"]
)
def test_the_highest_entry_is_not_rounded_beyond_the_last_level(run, twice):
    """With 8 bits, distance and random bits fill all that float32 has: it would wrap to the lowest level."""
    ends = torch.randn(2**16, 2).sort(dim=1).values
    x = torch.cat([ends[:, :1], ends[:, 1:].expand(-1, 63)], 1)
    packed = (run or native.library()).pack(x.flatten(), (1, 2), 8, 64, twice)
    for which in (0, 1) if twice else (-1,):
        restored = eager.restore(*packed, x.numel(), 8, 64, which).view_as(x)
        assert bool(((restored - x).abs() <= 1.01 * packed[1][:, 1:]).all())


@pytest.mark.parametrize("twice", [False, True])
def test_an_entry_goes_up_as_often_as_it_should(twice):
    """Ten thousand copies of each of a few numbers between two levels."""
    fractions = torch.linspace(0, 1, 11)
    group = torch.cat([torch.tensor([0.0, 1.0]), fractions[1:-1], torch.zeros(5)])
    x = group.repeat(10_000)
    rounding = Rounding(1, 16)
    for which in (0, 1) if twice else (-1,):
        packed = rounding.pack(x, next_seed(), twice=twice)
        mean = rounding.restore(packed, x.shape, x, which).view(-1, 16).mean(0)
        assert bool(((mean - group).abs() < 6 * 0.5 / 100).all())


def test_two_roundings_are_independent_of_each_other():
    x = torch.rand(64 * 5000)
    rounding = Rounding(1, 64)
    packed = rounding.pack(x, next_seed(), twice=True)
    errors = [rounding.restore(packed, x.shape, x, which) - x for which in (0, 1)]
    spread = float(errors[0].std() * errors[1].std())
    assert abs(float((errors[0] * errors[1]).mean())) < 6 * spread / len(x) ** 0.5
    assert spread > 0.01


def test_neighbours_and_seeds_are_uncorrelated():
    x = torch.rand(64 * 5000)
    rounding = Rounding(2, 64)
    first, second = (
        rounding.restore(rounding.pack(x, next_seed()), x.shape, x) - x for _ in range(2)
    )
    spread = float(first.var()) / len(x) ** 0.5
    for lag in (1, 2, 31, 32, 33, 64):
        assert abs(float((first[lag:] * first[:-lag]).mean())) < 6 * spread
    assert abs(float((first * second).mean())) < 6 * spread


def test_the_extremes_of_a_group_are_exact():
    x = torch.randn(64 * 50)
    rounding = Rounding(2, 64)
    back = rounding.restore(rounding.pack(x, next_seed()), x.shape, x).view(-1, 64)
    groups = x.view(-1, 64)
    torch.testing.assert_close(back.amin(1), groups.amin(1))
    torch.testing.assert_close(back.amax(1), groups.amax(1))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("twice", [False, True])
def test_a_nonfinite_entry_takes_its_group_with_it_and_no_other(bad, twice):
    x = torch.randn(200)
    x[70] = bad
    rounding = Rounding(4, 64)
    back = rounding.restore(rounding.pack(x, next_seed(), twice=twice), x.shape, x, twice - 1)
    assert bool(back[64:128].isnan().all())
    assert int(back.isnan().sum()) == 64


def test_nothing_is_compiled_at_import_and_eager_takes_over_without_a_compiler():
    code = """
import os
os.environ.update(PATH="", CXX="")
import torch, backsketch as bs
from backsketch.rounding import native
assert not native.SOURCE.tried
layer = torch.nn.Linear(8, 8)
bs.sketch_(layer, bs.Quantized(bits=4))
layer(torch.randn(4, 8)).sum().backward()
assert native.library() is None
print(native.SOURCE.why_not())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "no C++ compiler" in done.stdout
