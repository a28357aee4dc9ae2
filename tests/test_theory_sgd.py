"""The convergence theorems: they hold, and none survives a constant that is half as large."""

from __future__ import annotations

import math

import pytest
import torch

import backsketch as bs
from backsketch import theory
from backsketch.theory.sgd import (
    Noise,
    convex_bound,
    convex_steps,
    max_step_size,
    noise,
    nonconvex_bound,
    nonconvex_steps,
    strongly_convex_bound,
    strongly_convex_steps,
)

NOISES = [Noise(0.0, 0.0), Noise(0.0, 3.0), Noise(2.0, 0.0), Noise(1.5, 3.0)]


def halved(n: Noise) -> Noise:
    return Noise(n.relative / 2, n.additive / 2)


def quadratic_gaps(steps, step, eigenvalues, start, n: Noise):
    """``E f(x_t)`` of SGD on ``sum_j λ_j x_j² / 2``, exactly: second moments obey a linear recursion.

    The gradient is multiplied by 1 + √m ξ and moved by noise of variance V, spread evenly.
    """
    squares, gaps, slopes = start**2, [], []
    for _ in range(steps + 1):
        gaps.append(float((eigenvalues * squares).sum() / 2))
        slopes.append(float((eigenvalues**2 * squares).sum()))
        kept = (1 - step * eigenvalues) ** 2 + step**2 * eigenvalues**2 * n.relative
        squares = kept * squares + step**2 * n.additive / len(start)
    return gaps, slopes


@pytest.mark.parametrize("n", NOISES)
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_theorem_1_is_an_equality_on_an_isotropic_quadratic(n, share):
    smoothness = 2.0
    step = share * max_step_size(smoothness, n.relative)
    start = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    gaps, _ = quadratic_gaps(40, step, torch.full((3,), smoothness, dtype=torch.float64), start, n)
    for steps in (0, 1, 7, 40):
        bound = strongly_convex_bound(steps, step, gaps[0], smoothness, smoothness, n)
        assert gaps[steps] == pytest.approx(bound, rel=1e-10, abs=1e-14)
        if steps and n != NOISES[0]:  # the mutation: half the noise promises too much
            wrong = strongly_convex_bound(steps, step, gaps[0], smoothness, smoothness, halved(n))
            assert gaps[steps] > wrong


@pytest.mark.parametrize("n", NOISES)
def test_theorem_1_holds_on_an_ill_conditioned_quadratic(n):
    eigenvalues = torch.logspace(-1.5, 0.5, 20, dtype=torch.float64)
    low, high = float(eigenvalues.min()), float(eigenvalues.max())
    start = torch.ones(20, dtype=torch.float64)
    for share in (0.1, 0.5, 1.0):
        step = share * max_step_size(high, n.relative)
        gaps, _ = quadratic_gaps(400, step, eigenvalues, start, n)
        for steps, gap in enumerate(gaps):
            assert gap <= strongly_convex_bound(steps, step, gaps[0], high, low, n) * (1 + 1e-12)


@pytest.mark.parametrize("n", NOISES[1:])
@pytest.mark.parametrize("low", [0.5, 2.0])
def test_the_steps_of_theorem_1_reach_the_target(n, low):
    eigenvalues = torch.tensor([low, 2.0], dtype=torch.float64)
    start = torch.tensor([2.0, 1.0], dtype=torch.float64)
    gap = float((eigenvalues * start**2).sum() / 2)

    def reached(target, assumed):
        plan = strongly_convex_steps(target, gap, 2.0, low, assumed)
        return quadratic_gaps(plan.steps, plan.step_size, eigenvalues, start, n)[0][-1]

    for target in (0.3, 0.03):
        assert reached(target, n) <= target
        if low == 2.0 and n.additive:  # the mutation: planned for less noise than there is
            assert reached(target, Noise(n.relative, n.additive / 4)) > target


def huber(x, width):
    """``|x|`` with a quadratic bottom of this width: convex, smooth with L = 1 / width."""
    small = x.abs() < width
    value = torch.where(small, x**2 / (2 * width) + width / 2, x.abs())
    return value - width / 2, torch.where(small, x / width, x.sign())


def test_theorem_2_holds_and_half_its_noise_does_not():
    """On ``|x|`` the step inequality is tight: expected gap ``η(1 + V)/2`` against the bound's ``ηV/2b``."""
    generator = torch.Generator().manual_seed(1)
    width, variance, steps, chains = 1.0, 1e4, 16_000, 200
    step = 0.02 * max_step_size(1 / width)
    n = Noise(0.0, variance)
    x = torch.full((chains,), 1.0, dtype=torch.float64)
    mean_gap, mean_x = torch.zeros(chains), torch.zeros(chains)
    for _ in range(steps):
        value, slope = huber(x, width)
        mean_gap += value / steps
        mean_x += x / steps
        sign = torch.randint(2, (chains,), generator=generator) * 2 - 1
        x = x - step * (slope + variance**0.5 * sign)
    bound = convex_bound(steps, step, 1.0, 1 / width, n)
    measured, error = float(mean_gap.mean()), float(mean_gap.std() / chains**0.5)
    averaged = float(huber(mean_x, width)[0].mean())
    assert measured - 5 * error <= bound
    assert averaged <= bound
    assert measured - 5 * error > convex_bound(steps, step, 1.0, 1 / width, halved(n))


@pytest.mark.parametrize("n", [Noise(0.0, 0.05), Noise(1.0, 0.02)])
def test_theorem_3_holds_on_a_non_convex_function_and_half_its_noise_does_not(n):
    """``Σ 1 − cos x_j``, started near the top, with L = 1."""
    generator = torch.Generator().manual_seed(2)
    steps, step, chains = 1200, 0.5 * max_step_size(1.0, n.relative), 500
    x = torch.full((chains, 2), 2.9, dtype=torch.float64)
    gap = float((1 - x.cos()).sum(1)[0])
    squares = torch.zeros(chains, dtype=torch.float64)
    for _ in range(steps):
        slope = x.sin()
        squares += slope.square().sum(1) / steps
        scale = torch.randn(chains, 1, generator=generator, dtype=torch.float64)
        move = torch.randn(chains, 2, generator=generator, dtype=torch.float64)
        noisy = slope * (1 + n.relative**0.5 * scale) + (n.additive / 2) ** 0.5 * move
        x = x - step * noisy
    measured, error = float(squares.mean()), float(squares.std() / chains**0.5)
    assert measured - 5 * error <= nonconvex_bound(steps, step, gap, 1.0, n)
    if n.relative == 0:  # with relative noise the bound has room on this function
        assert measured - 5 * error > nonconvex_bound(steps, step, gap, 1.0, halved(n))


def test_theorem_3_is_an_equality_in_the_stationary_regime_of_a_quadratic():
    n, smoothness = Noise(0.7, 2.0), 3.0
    step = max_step_size(smoothness, n.relative)
    start = torch.zeros(2, dtype=torch.float64)
    eigenvalues = torch.full((2,), smoothness, dtype=torch.float64)
    _, slopes = quadratic_gaps(4000, step, eigenvalues, start, n)
    mean = sum(slopes) / len(slopes)
    assert mean == pytest.approx(nonconvex_bound(4000, step, 0.0, smoothness, n), rel=1e-3)


def test_the_steps_of_theorems_2_and_3_are_what_the_bounds_promise():
    n = Noise(0.5, 4.0)
    for target in (0.5, 0.01):
        plan = convex_steps(target, 3.0, 2.0, n)
        assert convex_bound(plan.steps, plan.step_size, 3.0, 2.0, n) <= target * (1 + 1e-9)
        plan = nonconvex_steps(target, 3.0, 2.0, n)
        assert nonconvex_bound(plan.steps, plan.step_size, 3.0, 2.0, n) <= target * (1 + 1e-9)


def test_where_noise_dominates_the_steps_of_all_three_theorems_grow_with_v():
    for omega in (0.5, 3.0):
        exact, sketched = noise(50.0), noise(50.0, extra=omega)
        pairs = [
            [strongly_convex_steps(1e-3, 1.0, 2.0, 1.0, n).steps for n in (exact, sketched)],
            [convex_steps(1e-3, 1.0, 2.0, n).steps for n in (exact, sketched)],
            [nonconvex_steps(1e-3, 1.0, 2.0, n).steps for n in (exact, sketched)],
        ]
        for before, after in pairs:
            assert after / before == pytest.approx(1 + omega, rel=1e-3)
    assert theory.time_to_target_ratio(1.0, 1 + omega, math.inf) == 1 + omega


def test_the_bound_holds_for_a_sketched_logistic_regression():
    """Full batches, so that all noise is the sketch's; its variance from the closed form along the path."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    y = (x @ torch.randn(6, 1, generator=generator, dtype=torch.float64)).sign()
    reg, sketch = 0.2, bs.Rows(keep=0.25, scores="uniform", design="independent")
    smoothness = float(torch.linalg.eigvalsh(x.T @ x / 40)[-1]) / 4 + reg

    def objective(w, est=None):
        z = bs.ops.linear(x, w, None, est) if est else x @ w.T
        return torch.nn.functional.softplus(-y * z).mean() + reg / 2 * w.square().sum()

    best = torch.zeros(1, 6, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([best], max_iter=200, tolerance_grad=1e-12)
    solver.step(lambda: (solver.zero_grad(), (loss := objective(best)).backward(), loss)[-1])
    lowest = float(objective(best.detach()))
    steps, step = 60, 0.5 / smoothness
    gaps, largest = torch.zeros(30, steps + 1), 0.0
    for chain in range(30):
        w = torch.zeros(1, 6, dtype=torch.float64, requires_grad=True)
        for t in range(steps + 1):
            gaps[chain, t] = float(objective(w.detach())) - lowest
            cotangent = -y * torch.sigmoid(-y * (x @ w.detach().T)) / 40
            op = bs.ops.linear.__globals__["_LINEAR"]
            largest = max(largest, float(sketch.weight_variance(op, cotangent, x)))
            (gradient,) = torch.autograd.grad(objective(w, sketch), w)
            w = (w.detach() - step * gradient).requires_grad_()
    n, mean = Noise(0.0, largest), gaps.mean(0)
    errors = gaps.std(0) / 30**0.5
    for t in range(steps + 1):
        bound = strongly_convex_bound(t, step, float(gaps[0, 0]), smoothness, reg, n)
        assert float(mean[t] - 5 * errors[t]) <= bound
    # Without the noise term the theorem would be wrong here.
    silent = strongly_convex_bound(10_000, step, float(gaps[0, 0]), smoothness, reg, Noise(0, 0))
    assert float(mean[-1] - 5 * errors[-1]) > silent


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: strongly_convex_bound(1, 1.0, 1.0, 2.0, 1.0, Noise(0, 0)), "less than"),
        (lambda: strongly_convex_bound(1, 0.1, 1.0, 2.0, 3.0, Noise(0, 0)), "strong_convexity"),
        (lambda: convex_bound(1, 0.5, 1.0, 2.0, Noise(0, 0)), "less than"),
        (lambda: nonconvex_bound(0, 0.5, 1.0, 2.0, Noise(0, 0)), "steps must be positive"),
        (lambda: noise(-1.0), "sgd_variance"),
        (lambda: strongly_convex_steps(0.0, 1.0, 2.0, 1.0, Noise(0, 0)), "target"),
    ],
)
def test_constants_out_of_range_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Steps to a target ----------------------------------------------------------------------------------------


def noisy_quadratic(step, eigenvalues, covariance, start, steps):
    """``E f`` of SGD with gradient covariance diag(C), exactly."""
    squares, gaps = start**2, []
    for _ in range(steps + 1):
        gaps.append(float((eigenvalues * squares).sum() / 2))
        squares = (1 - step * eigenvalues) ** 2 * squares + step**2 * covariance
    return gaps


@pytest.mark.parametrize("step", [0.02, 0.1, 0.3])
def test_bias_and_noise_add_up_exactly_on_a_quadratic(step):
    eigenvalues = torch.logspace(-2, 0.5, 12, dtype=torch.float64)
    covariance = torch.linspace(0.1, 0.4, 12, dtype=torch.float64) ** 2
    start = torch.ones(12, dtype=torch.float64)
    total = float(covariance.sum())
    spectrum = list(zip(eigenvalues.tolist(), (covariance / total).tolist()))
    noisy = noisy_quadratic(step, eigenvalues, covariance, start, 300)
    quiet = noisy_quadratic(step, eigenvalues, 0 * covariance, start, 300)
    for t in (1, 10, 300):
        predicted = quiet[t] + theory.noise_floor(step, total, spectrum, t)
        assert noisy[t] == pytest.approx(predicted, rel=1e-9)
    # Small steps: the plain variance decides, whatever the curvature.
    assert theory.noise_floor(1e-4, total, spectrum) == pytest.approx(1e-4 * total / 4, rel=1e-3)
    # The mutation: half the noise.
    assert noisy[300] > 1.01 * (quiet[300] + theory.noise_floor(step, total / 2, spectrum, 300))
    # And the number of steps follows.
    target = noisy[150]
    times = [step * t for t in range(301)]
    found = theory.steps_to_target(step, target, times, quiet, total, spectrum)
    assert found == pytest.approx(150, abs=1)


def test_a_target_below_the_noise_is_out_of_reach():
    times, gaps, spectrum = [0.0, 1.0, 50.0], [1.0, 0.5, 1e-9], [(1.0, 1.0)]
    assert theory.steps_to_target(0.1, 0.1, times, gaps, 40.0, spectrum) == math.inf
    assert theory.noise_floor(2.5, 1.0, spectrum) == math.inf
    assert theory.steps_to_target(0.1, 2.0, times, gaps, 0.0, spectrum) == 0.0
    for wrong in (
        lambda: theory.noise_floor(0.0, 1.0, spectrum),
        lambda: theory.steps_to_target(0.1, 0.1, [0.0], [1.0], 0.0, spectrum),
    ):
        with pytest.raises(ValueError, match=r"must|need"):
            wrong()
