"""The closed forms themselves: optimality, and agreement with brute force."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy.optimize import minimize

from backsketch import theory
from backsketch.sampling import inclusion_probabilities


def sampling_variance(pi, squares):
    return float(theory.horvitz_thompson(pi, squares))


def random_probabilities(n, k, generator):
    """A random point of the feasible set: sum k, each in (0, 1]."""
    return inclusion_probabilities(torch.rand(n, generator=generator) + 1e-3, k)


@pytest.mark.parametrize(("n", "k"), [(6, 2), (10, 4), (15, 11)])
def test_no_other_inclusion_probabilities_have_less_variance(n, k):
    generator = torch.Generator().manual_seed(n)
    norms = torch.rand(n, generator=generator, dtype=torch.float64) ** 3 + 0.01
    best = float(theory.minimal_sampling(norms, k))
    for _ in range(3000):
        other = random_probabilities(n, k, generator)
        assert sampling_variance(other, norms.square()) >= best * (1 - 1e-9)
    found = minimize(
        lambda p: float((norms.numpy() ** 2 / p).sum()),
        x0=[k / n] * n,
        bounds=[(1e-4, 1)] * n,
        constraints={"type": "eq", "fun": lambda p: p.sum() - k},
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-12},
    )
    assert found.success
    assert found.fun - float(norms.square().sum()) == pytest.approx(best, rel=1e-4)
    # The mutation: proportional to the squares instead of the norms is worse.
    wrong = inclusion_probabilities(norms.square(), k)
    assert sampling_variance(wrong, norms.square()) > best * 1.001


def test_the_low_rank_formula_is_the_one_in_the_design():
    sigma = torch.tensor([9.0, 4.0, 1.0, 0.7, 0.5, 0.3], dtype=torch.float64)
    rank = 3
    pi = inclusion_probabilities(sigma, rank)
    m = int((pi >= 1 - 1e-12).sum())
    tail = sigma[m:]
    expected = tail.sum() ** 2 / (rank - m) - tail.square().sum()
    assert float(theory.low_rank(sigma, rank)) == pytest.approx(float(expected))
    assert float(theory.low_rank(sigma, 6)) == 0


def test_no_other_unbiased_low_rank_scheme_tried_has_less_variance():
    """Rank-one terms in any other orthonormal basis, with probabilities optimal for that basis."""
    generator = torch.Generator().manual_seed(3)
    matrix = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    matrix = matrix * torch.tensor([4.0, 2.0, 1.0, 0.5, 0.1])
    best = float(theory.low_rank(torch.linalg.svdvals(matrix), 2))
    for _ in range(500):
        q, _ = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64))
        norms = (matrix @ q).norm(dim=0)
        assert float(theory.minimal_sampling(norms, 2)) >= best * (1 - 1e-9)


def test_neither_an_optimizer_over_bases_nor_the_usual_rank_r_sketches_have_less_variance():
    generator = torch.Generator().manual_seed(4)
    matrix = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    matrix = matrix * torch.tensor([3.0, 1.5, 0.7, 0.2])
    best = float(theory.low_rank(torch.linalg.svdvals(matrix), 2))

    def in_basis(skew):
        a = torch.zeros(4, 4, dtype=torch.float64)
        a[tuple(torch.triu_indices(4, 4, 1))] = torch.as_tensor(skew)
        return float(
            theory.minimal_sampling((matrix @ torch.linalg.matrix_exp(a - a.T)).norm(dim=0), 2)
        )

    for _ in range(3):  # the optimizer comes as close as it can, and no closer
        start = torch.randn(6, generator=generator, dtype=torch.float64).numpy()
        found = minimize(in_basis, start, method="Nelder-Mead", options={"maxfev": 1500})
        assert found.fun >= best * (1 - 1e-9)
    assert found.fun == pytest.approx(best, rel=0.05)
    columns = float(theory.minimal_sampling(matrix.norm(dim=0), 2))
    signs = theory.variance.pair_energy(matrix.T, torch.eye(4, dtype=torch.float64)) / 2
    assert min(columns, float(signs)) > best


def brute_force_joint(pi, k, steps=20_000):
    edges = torch.cat([torch.zeros(1, dtype=torch.float64), pi.cumsum(0)])
    u = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    joint = torch.zeros(len(pi), len(pi), dtype=torch.float64)
    for point in u:
        hits = point + torch.arange(k, dtype=torch.float64)
        member = ((edges[:-1, None] <= hits) & (hits < edges[1:, None])).any(1).double()
        joint += member[:, None] * member / steps
    return joint


def test_the_joint_inclusion_probabilities_of_systematic_sampling():
    pi = inclusion_probabilities(torch.tensor([0.3, 1.0, 0.2, 0.9, 4.0, 0.6]), 3)
    joint = theory.joint_inclusion_systematic(pi)
    torch.testing.assert_close(joint, brute_force_joint(pi, 3), atol=3e-4, rtol=0)
    torch.testing.assert_close(joint.diagonal(), pi)
    torch.testing.assert_close(joint.sum(1), 3 * pi)  # fixed size: sum_j pi_ij = k pi_i


@pytest.mark.parametrize("seed", range(4))
def test_the_variance_of_systematic_sampling_is_that_of_the_joint_probabilities(seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(40, generator=generator) ** 3
    scores[::7] = 0 if seed % 2 else 1  # rows without a chance, and ties
    pi = inclusion_probabilities(scores, 9)
    c = torch.randn(40, 5, generator=generator, dtype=torch.float64) * (scores > 0)[:, None]
    joint = theory.joint_inclusion_systematic(pi)
    ratio = joint / (pi[:, None] * pi)
    slow = torch.where(ratio.isfinite(), (ratio - 1) * (c @ c.T), 0.0).sum()
    assert float(theory.systematic(pi, c @ c.T)) == pytest.approx(float(slow), rel=1e-9)


def test_stratification_helps_where_neighbours_are_alike_and_hurts_where_a_period_fits():
    pi = torch.full((12,), 0.25, dtype=torch.float64)
    smooth = torch.linspace(1, 2, 12, dtype=torch.float64)
    periodic = torch.tensor([2.0, 0.5, 0.5, 0.5] * 3, dtype=torch.float64)
    for values, better in ((smooth, True), (periodic, False)):
        independent = theory.horvitz_thompson(pi, values.square())
        systematic = theory.systematic(pi, values[:, None] * values)
        assert (systematic < independent) == better


def test_horvitz_thompson_by_enumeration_of_independent_draws():
    pi = torch.tensor([0.3, 0.8, 0.5], dtype=torch.float64)
    c = torch.tensor([[1.0, 2.0], [0.5, -1.0], [3.0, 0.0]], dtype=torch.float64)
    total = 0.0
    for z in itertools.product([0, 1], repeat=3):
        z = torch.tensor(z, dtype=torch.float64)
        probability = float((pi**z * (1 - pi) ** (1 - z)).prod())
        estimate = (c * (z / pi)[:, None]).sum(0)
        total += probability * float((estimate - c.sum(0)).square().sum())
    assert sampling_variance(pi, c.square().sum(1)) == pytest.approx(total)


def test_rademacher_by_enumeration():
    """One row of signs over three rows: all eight sign vectors."""
    generator = torch.Generator().manual_seed(0)
    g, x = (torch.randn(3, d, generator=generator, dtype=torch.float64) for d in (2, 4))
    total = 0.0
    for s in itertools.product([-1.0, 1.0], repeat=3):
        s = torch.tensor(s, dtype=torch.float64)
        estimate = (g.T @ s)[:, None] * (s @ x)
        total += float((estimate - g.T @ x).square().sum()) / 8
    pairs = theory.variance.pair_energy(g, x)
    assert float(theory.variance.rademacher(1, pairs)) == pytest.approx(total)
    assert float(theory.variance.srht(4, 4, pairs)) == 0


# Epochs against cost ------------------------------------------------------------------------------


def steps_to_target(noise: float, target: float = 1e-3) -> int:
    """Steps of the best step size on f(x) = x²/2 with relative gradient noise ``noise``, in expectation."""
    value, steps = 1.0, 0
    while value > target:
        value *= 1 - 1 / (1 + noise)  # E f after one step of size 1 / (1 + noise)
        steps += 1
    return steps


@pytest.mark.parametrize(
    ("c", "v", "beta"), [(0.5, 1.3, 200.0), (0.7, 1.1, 80.0), (0.4, 2.0, 150.0)]
)
def test_the_time_to_a_target_follows_the_formula(c, v, beta):
    measured = c * steps_to_target(beta * v) / steps_to_target(beta)
    predicted = theory.time_to_target_ratio(c, v, beta)
    assert measured == pytest.approx(predicted, rel=0.02)
    # The mutation: leaving the variance out is visibly wrong.
    assert measured != pytest.approx(theory.time_to_target_ratio(c, 1.0, beta), rel=0.05)


def test_uniform_masks_never_pay():
    for p in torch.linspace(0.01, 1, 100).tolist():
        cost = theory.layer_step_cost(p, p)
        assert theory.time_to_target_ratio(cost, 1 / p, math.inf) >= 1 - 1e-9


def test_a_smaller_batch_pays_only_without_noise():
    assert theory.smaller_batch_ratio(0.25, 0.0) == 0.25
    assert theory.smaller_batch_ratio(0.25, math.inf) == 1
    assert theory.smaller_batch_ratio(0.25, 3.0) == pytest.approx((0.25 + 3) / 4)


@pytest.mark.parametrize("beta", [0.5, 4.0, math.inf])
def test_break_even_is_where_the_ratio_is_one(beta):
    omega = theory.break_even_extra_variance(0.6, beta)
    assert theory.time_to_target_ratio(0.6, 1 + omega, beta) == pytest.approx(1)


def test_step_costs():
    assert theory.region_step_cost(1.0) == pytest.approx(1)
    assert theory.region_step_cost(1.0, "recompute") == pytest.approx(4 / 3)  # checkpointing
    assert theory.region_step_cost(0.25) == pytest.approx(theory.layer_step_cost(0.25, 0.25))
    for wrong in ({"keep": 1.5}, {"keep": 0.5, "mode": "other"}):
        with pytest.raises(ValueError, match="must"):
            theory.region_step_cost(**wrong)
    with pytest.raises(ValueError, match="v must"):
        theory.time_to_target_ratio(1, 0.5, 1)
