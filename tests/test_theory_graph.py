"""Break-even keeps, the noise scale, growth along a chain, the martingale: closed forms and brute force."""

from __future__ import annotations

import math

import pytest
import torch

import backsketch as bs
from backsketch import theory
from backsketch.ops.linear import Linear


def cost(p, fixed=1 / 3, slope=2 / 3):
    return fixed + slope * p


@pytest.mark.parametrize("kappa", [0.05, 0.3, 0.7, 0.95, 1.0])
@pytest.mark.parametrize("beta", [0.3, 1.0, 5.0, math.inf])
@pytest.mark.parametrize(("fixed", "slope"), [(1 / 3, 2 / 3), (2 / 3, 1 / 3), (1 / 3, 1.0)])
def test_the_break_even_keep_is_the_first_that_pays(kappa, beta, fixed, slope):
    """Against a search over keeps of the ratio itself."""

    def ratio(p):
        v = kappa / p
        if math.isinf(beta):
            return cost(p, fixed, slope) * v
        return cost(p, fixed, slope) * (1 + beta * v) / (1 + beta)

    grid = [i / 20_000 for i in range(1, 20_001)]
    pays = [p for p in grid if ratio(p) <= 1 + 1e-9]
    found = theory.break_even_keep(kappa, beta, fixed=fixed, slope=slope)
    assert found == (pytest.approx(pays[0], abs=1e-4) if pays else None)


def test_uniform_masks_pay_against_exact_only_where_noise_is_low_and_never_against_a_smaller_batch():
    assert theory.break_even_keep(1.0, 0.8) == pytest.approx(0.4)  # beta / 2
    assert theory.break_even_keep(1.0, 50.0) == pytest.approx(1.0)
    for beta in (0.0, 0.5, 3.0, math.inf):
        for p in (0.05, 0.3, 0.8):
            c = theory.layer_step_cost(p, p)
            assert theory.gain_over_smaller_batch(c, 1 / p, beta) >= 1 - 1e-12
    # Uneven scores do beat it.
    assert theory.gain_over_smaller_batch(cost(0.3), theory.unevenness_multiplier(0.3, 0.3), 10) < 1


def test_kappa_over_keep_is_the_multiplier_where_no_row_is_sure_and_a_lower_bound_elsewhere():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(400, generator=generator) ** 2
    kappa = theory.kappa(scores)
    largest = float(scores.mean() / scores.max())  # above this keep, some rows are sure
    for keep in (0.05, 0.2, 0.6):
        k = round(400 * keep)
        exact, law = theory.sampling_multiplier(scores, k), kappa / keep
        if keep < largest:
            assert exact == pytest.approx(law, rel=1e-9)
        else:
            assert exact > law
        assert exact >= theory.unevenness_multiplier(kappa, keep) - 1e-9
    # The mutation: the other ratio of moments is not it.
    wrong = float(scores.mean() / scores.square().mean().sqrt()) / 0.2
    assert theory.sampling_multiplier(scores, 80) != pytest.approx(wrong, rel=0.05)


def test_the_noise_scale_is_unbiased_and_the_naive_one_is_not():
    generator = torch.Generator().manual_seed(0)
    mean, sigma, count = torch.full((50,), 0.1, dtype=torch.float64), 0.5, 4
    variances, squares, naive = [], [], []
    for _ in range(3000):
        g = mean + sigma * torch.randn(count, 50, generator=generator, dtype=torch.float64)
        sums = count, float(g.square().sum()), float(g.sum(0).square().sum())
        variances.append(theory.sgd_variance(*sums))
        squares.append(theory.mean_square(*sums))
        naive.append(sums[2] / count**2)

    def z(values, truth):
        t = torch.tensor(values)
        return abs(float(t.mean()) - truth) / float(t.std() / len(t) ** 0.5)

    assert z(variances, 50 * sigma**2) < 4
    assert z(squares, float(mean.square().sum())) < 4
    assert z(naive, float(mean.square().sum())) > 4  # the mutation


def test_noise_scale_of_few_and_of_useless_gradients():
    assert theory.noise_scale(torch.tensor([[1.0], [-1.0]])) == math.inf
    assert theory.noise_scale(torch.ones(3, 2)) == 0
    with pytest.raises(ValueError, match="two"):
        theory.noise_scale(torch.ones(1, 2))
    assert theory.noise_scale_at(4.0, 0.5) == 8.0


def test_step_costs_of_memory_savers_and_checkpointing():
    assert theory.checkpoint_step_cost() == theory.region_step_cost(1.0, "recompute")
    assert theory.checkpoint_step_cost(0.0) == pytest.approx(1)
    thin = theory.projection_step_cost(0.1, 64, 4096, 4096)
    assert thin == pytest.approx(theory.layer_step_cost(1, 0.1), rel=0.01)
    assert theory.projection_step_cost(0.5, 8192, 768, 768) > 1  # more arithmetic than it saves
    # Against a count of the products themselves.
    n, a, b, keep = 30, 20, 10, 0.5
    products = n * a * b * 2 + int(keep * n) * (n * a + n * b + a * b)
    assert theory.projection_step_cost(keep, n, a, b) == pytest.approx(products / (3 * n * a * b))


# Growth and the martingale ------------------------------------------------------------------------------


def chain(depth, sketch, draws, share_draw=False, seed=0):
    """Cotangents of a linear chain, ``(draws, depth)`` squared norms, and each site's own omega."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(24, 24, generator=generator) / 24**0.5 for _ in range(depth)]
    g0 = torch.randn(16, 24, generator=generator)
    op, squares, omegas, exact = Linear(), torch.zeros(draws, depth), [], g0
    for w in weights:
        after = exact @ w
        omegas.append(float(sketch.input_variance(op, exact, w)) / float(after.square().sum()))
        exact = after
    base = []
    g = g0
    for w in weights:
        g = g @ w
        base.append(float(g.square().sum()))
    for r in range(draws):
        g, seed_ = g0, bs.sampling.next_seed(g0)
        for level, w in enumerate(weights):
            seed_ = seed_ if share_draw else bs.sampling.next_seed(g)
            g = sketch.estimate_input(op, g, w, seed_)
            squares[r, level] = float(g.square().sum()) / base[level]
    return squares, omegas


def test_second_moments_along_a_chain_of_independent_draws_multiply():
    squares, omegas = chain(6, bs.Elements(keep=0.75), draws=1500)
    predicted = theory.second_moment_growth(omegas)
    mean, error = squares.mean(0), squares.std(0) / len(squares) ** 0.5
    # A chain of exact Jacobians bends the noise's directions a little: 5 % of slack on the growth.
    for level, growth in enumerate(predicted):
        assert abs(float(mean[level]) - growth) < 4 * float(error[level]) + 0.05 * growth
    assert float(mean[-1]) > 4
    # The mutation: adding up instead of multiplying.
    added = 1 + sum(omegas)
    assert abs(float(mean[-1]) - added) > 4 * float(error[-1]) + 0.05 * added


def test_a_shared_draw_pays_its_factor_once():
    """Uniform rows with one seed for the whole chain: the rows that were dropped stay dropped."""
    keep = bs.Rows(keep=0.5, scores="uniform", design="independent")
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(24, 24, generator=generator) / 24**0.5 for _ in range(6)]
    g0 = torch.randn(32, 24, generator=generator)
    growth = torch.zeros(2000, 6)
    exact = [g0]
    for w in weights:
        exact.append(exact[-1] @ w)
    for r in range(2000):
        g = keep.estimate_input(Linear(), g0, weights[0], bs.sampling.next_seed(g0))
        for level in range(6):
            growth[r, level] = float(g.square().sum() / exact[level + 1].square().sum())
            g = g @ weights[min(level + 1, 5)]
    mean, error = growth.mean(0), growth.std(0) / 2000**0.5
    for measured, deviation, predicted in zip(mean, error, theory.shared_growth(1.0, 6)):
        assert abs(float(measured) - predicted) < 4.5 * float(deviation)


def test_a_residual_block_pays_for_its_branch_only():
    generator = torch.Generator().manual_seed(0)
    w = 0.3 * torch.randn(24, 24, generator=generator) / 24**0.5
    g = torch.randn(16, 24, generator=generator)
    sketch, op = bs.Elements(keep=0.5), Linear()
    branch = g @ w
    whole = float((g + branch).square().sum())
    omega = float(sketch.input_variance(op, g, w)) / float(branch.square().sum())
    share = float(branch.square().sum()) / whole
    noisy = torch.tensor(
        [
            float((g + sketch.estimate_input(op, g, w, bs.sampling.next_seed(g))).square().sum())
            for _ in range(4000)
        ]
    )
    predicted = 1 + theory.residual_relative_variance(omega, share)
    error = float(noisy.std() / 4000**0.5) / whole
    assert abs(float(noisy.mean()) / whole - predicted) < 4 * error
    assert abs(float(noisy.mean()) / whole - (1 + omega)) > 4 * error  # the mutation: a plain chain


def prefixes(fresh: bool, draws=4000):
    """A product of two scalar masks on a vector: site 2 acts on what site 1 left."""
    generator = torch.Generator().manual_seed(3)
    g = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)

    def mask(keep):
        return (torch.rand(draws, 3, generator=generator) < keep).double() / keep

    first, second = mask(0.5), mask(0.7)
    zeroth = g.expand(draws, 3)
    one = zeroth * first
    return [zeroth, one, (zeroth * mask(0.5) if fresh else one) * second]


def test_the_martingale_differences_add_up_to_the_total():
    found = theory.martingale_decomposition(prefixes(fresh=False))
    assert abs(found.cross) < 4 * found.cross_error
    total = 14 * (1 / (0.5 * 0.7) - 1)
    assert found.total == pytest.approx(total, rel=0.05)
    assert sum(found.parts) == pytest.approx(total, rel=0.05)
    assert found.parts[0] == pytest.approx(14.0, rel=0.05)  # (1/0.5 - 1) * 14
    # The mutation: fresh draws for the second pass break it.
    wrong = theory.martingale_decomposition(prefixes(fresh=True))
    assert abs(wrong.cross) > 4 * wrong.cross_error


@pytest.mark.parametrize("bad", [[torch.zeros(2, 2)], [torch.zeros(1, 2)] * 2])
def test_too_little_for_a_decomposition(bad):
    with pytest.raises(ValueError, match="at least two"):
        theory.martingale_decomposition(bad)


@pytest.mark.parametrize(
    "call",
    [
        lambda: theory.break_even_keep(0.0),
        lambda: theory.break_even_keep(0.5, -1.0),
        lambda: theory.unevenness_multiplier(0.5, 0.0),
        lambda: theory.second_moment_growth([-0.1]),
        lambda: theory.noise_scale_at(1.0, 0.0),
        lambda: theory.checkpoint_step_cost(2.0),
    ],
)
def test_arguments_out_of_range(call):
    with pytest.raises(ValueError, match="must"):
        call()
