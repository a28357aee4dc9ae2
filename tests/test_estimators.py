"""Every estimator at every kind of layer: unbiased, of the variance that is written down, and the same
draw by draw as its slow twin."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import backsketch as bs
from backsketch.estimators import Bilinear
from backsketch.ops.reference import sketched_vjp
from backsketch.sampling import next_seed
from backsketch.testing import Moments, _check_directions, _check_entries
from cases import ESTIMATORS, FAMILIES, LAYERS, Layer, conv, linear
from mutations import round_to_nearest

DRAWS = 200
Z = 6.0


def vjp(estimator, layer: Layer, backward_seed=None, forward_seed=None):
    """``(grad_input, grad_weight)`` of one draw, in rows form."""
    forward_seed = next_seed(layer.x) if forward_seed is None else forward_seed
    backward_seed = next_seed(layer.g) if backward_seed is None else backward_seed
    stored = estimator.store(layer.op, layer.x, forward_seed)
    return (
        estimator.estimate_input(layer.op, layer.g, layer.weight, backward_seed),
        estimator.estimate_weight(layer.op, layer.g, stored, backward_seed),
    )


def exact_vjp(layer: Layer):
    op = layer.op
    return op.input_vjp(layer.g, layer.weight), op.weight_vjp(layer.g, op.rows(layer.x))


def moments(estimator, layer: Layer, draws: int = DRAWS, mutate=lambda gradients: gradients):
    collected = [Moments(g) for g in exact_vjp(layer)]
    for _ in range(draws):
        for m, gradient in zip(collected, mutate(vjp(estimator, layer))):
            m.add(gradient)
    return dict(zip(("grad_input", "grad_weight"), collected))


def check(collected):
    for name, m in collected.items():
        _check_entries(name, m, Z)
        _check_directions(name, m, Z)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_the_exact_products_are_autograds(layer: Layer):
    x = layer.x.clone().requires_grad_()
    weight = layer.weight.clone().requires_grad_()
    y = layer.op.forward(x, weight, None)
    expected = torch.autograd.grad(y, (x, weight), layer.cotangent)
    grad_input, grad_weight = exact_vjp(layer)
    grad_input = layer.op.unrows(grad_input, tuple(x.shape))
    torch.testing.assert_close(grad_input, expected[0])
    torch.testing.assert_close(grad_weight.view_as(weight), expected[1])


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_agrees_with_its_slow_twin_draw_by_draw(estimator, layer: Layer):
    if isinstance(estimator, bs.Int8 | bs.Float8) and (estimator.save or estimator.sketch):
        pytest.skip("kept codes and gathered rows have other random numbers; see test_products")
    if isinstance(estimator, bs.LowRank) and estimator.method == "subspace":
        pytest.skip("the subspace method is its own definition; its unbiasedness is tested")
    if reason := estimator.refusal(layer.op, layer.weight):
        assert "8-bit" in reason
        assert layer.name.startswith("transposed")
        pytest.skip(reason)
    for _ in range(3):
        forward, backward = next_seed(layer.x), next_seed(layer.g)
        fast = vjp(estimator, layer, backward, forward)
        slow = sketched_vjp(estimator, layer.op, layer.g, layer.weight, layer.x, backward, forward)
        for a, b in zip(fast, slow):
            torch.testing.assert_close(a.view_as(b), b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


# At a linear layer each, the families at a convolution of groups, and the others in turn at the other two.
PLACED = [
    *((e, LAYERS[0]) for e in ESTIMATORS),
    *((e, LAYERS[4]) for e in FAMILIES),
    *zip(ESTIMATORS, itertools.cycle([LAYERS[2], LAYERS[6]])),
]


@pytest.mark.fast_cases("linear(12,)", str(LAYERS[4]))
@pytest.mark.parametrize(("estimator", "layer"), PLACED, ids=str)
def test_is_unbiased(estimator, layer: Layer):
    check(moments(estimator, layer))


def closed_form(estimator, layer: Layer):
    return {
        "grad_input": estimator.input_variance(layer.op, layer.g, layer.weight),
        "grad_weight": estimator.weight_variance(layer.op, layer.g, layer.x),
    }


HAVE_CLOSED_FORM = [
    e
    for e in ESTIMATORS
    if getattr(e, "design", "") != "permuted"
    and getattr(e, "method", "") != "subspace"
    and not (isinstance(e, bs.Int8 | bs.Float8) and (e.save or e.sketch))
]


@pytest.mark.fast_cases(
    *[f"{e}-linear(2, 3, 4)" for e in FAMILIES if e in HAVE_CLOSED_FORM and e != bs.Float8()]
)
@pytest.mark.parametrize(
    ("estimator", "layer"),
    [
        *((e, LAYERS[1]) for e in HAVE_CLOSED_FORM),
        *zip(HAVE_CLOSED_FORM, itertools.cycle([LAYERS[3], LAYERS[4]])),
    ],
    ids=str,
)
def test_the_closed_form_variance_is_the_measured_one(estimator, layer: Layer):
    """A coarse check of everything; the fine one, at 8,000 draws, is below."""
    measured = moments(estimator, layer, draws=600)
    for name, predicted in closed_form(estimator, layer).items():
        tolerance = 0.2 * float(predicted) + 1e-6 * float(measured[name].exact.square().sum())
        assert float(measured[name].variance) == pytest.approx(float(predicted), abs=tolerance), (
            name
        )


@pytest.mark.slow
@pytest.mark.parametrize("estimator", [e for e in FAMILIES if e in HAVE_CLOSED_FORM], ids=str)
def test_the_closed_form_variance_within_five_per_cent_at_8_000_draws(estimator):
    layer = linear((8,), 4, 6, seed=3)
    exact, squared = exact_vjp(layer), torch.zeros(2, dtype=torch.float64)
    draws = 8_000
    for _ in range(draws):
        for i, gradient in enumerate(vjp(estimator, layer)):
            squared[i] += (gradient - exact[i]).square().sum()
    for variance, (name, predicted) in zip(squared / draws, closed_form(estimator, layer).items()):
        assert float(variance) == pytest.approx(float(predicted), rel=0.05, abs=1e-9), name
        # The mutation: a formula that is off by a tenth (or one row in eight) would be seen.
        assert not math.isclose(float(variance), 1.1 * float(predicted) + 1e-3, rel_tol=0.05)


def test_the_permuted_order_has_no_closed_form_and_says_so():
    layer = LAYERS[0]
    with pytest.raises(ValueError, match="no closed form"):
        bs.Rows(keep=0.5, design="permuted").weight_variance(layer.op, layer.g, layer.x)


def moments_of(first: float, second: float) -> bs.testing.Moments:
    """500 draws of two entries: one always the same, the other with a sign of its own."""
    m = bs.testing.Moments(torch.ones(2))
    for i in range(500):
        m.add(torch.tensor([first, second if i % 2 else 2 - second]))
    return m


def test_a_row_that_was_never_missed_is_no_bias_unless_nothing_is_random():
    bs.testing._check_entries("w", moments_of(1.002, 1.5), 5.0)
    for biased in (moments_of(1.002, 1.0), moments_of(1.1, 1.5)):
        with pytest.raises(AssertionError, match=r"biased: entry \(0,\)"):
            bs.testing._check_entries("w", biased, 5.0)


# Mutations ----------------------------------------------------------------------------------------


def unweighted(sample):
    return sample._replace(weights=torch.where(sample.weights > 0, 1.0, 0.0).to(sample.weights))


def shifted(sample):
    return sample._replace(indices=(sample.indices - 1).clamp(min=0))


MUTABLE = [
    (bs.Rows(keep=0.5), "backsketch.estimators.rows.draw"),
    (bs.Columns(keep=0.5), "backsketch.estimators.columns.draw"),
    (bs.LowRank(keep=0.5, method="svd"), "backsketch.estimators.low_rank.draw"),
    (bs.LowRank(keep=0.5, method="subspace"), "backsketch.estimators.columns.draw"),
    (bs.StoredRows(keep=0.5), "backsketch.estimators.stored_rows.draw"),
]


@pytest.mark.parametrize("mutation", [unweighted, shifted])
@pytest.mark.parametrize(("estimator", "where"), MUTABLE, ids=str)
def test_a_wrong_weight_or_a_wrong_row_is_found(estimator, where, mutation, monkeypatch):
    from backsketch import sampling

    monkeypatch.setattr(where, lambda *a, **k: mutation(sampling.draw(*a, **k)))
    layer = linear(seed=7)
    if mutation is shifted and isinstance(estimator, bs.LowRank) and estimator.method == "svd":
        pytest.skip(
            "the weights and the triples move together: a shift is another valid-looking draw"
        )
    with pytest.raises(AssertionError, match="biased"):
        check(moments(estimator, layer))


def test_an_elements_mask_without_its_scale_is_found(monkeypatch):
    layer = linear(seed=7)
    biased = lambda gradients: [g * 0.5 for g in gradients]  # noqa: E731
    with pytest.raises(AssertionError, match="biased"):
        check(moments(bs.Elements(keep=0.5), layer, mutate=biased))


@pytest.mark.parametrize("kind", ["rademacher", "srht"])
def test_a_projection_drawn_anew_in_the_backward_is_found(kind):
    estimator, layer = bs.Projection(keep=0.5, kind=kind), linear(seed=7)

    def redrawn(gradients):
        projected, _ = estimator.store(layer.op, layer.x, next_seed(layer.x))
        wrong = (projected, next_seed(layer.x))
        return gradients[0], estimator.estimate_weight(layer.op, layer.g, wrong, next_seed(layer.g))

    with pytest.raises(AssertionError, match="biased"):
        check(moments(estimator, layer, mutate=redrawn))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_rounding_to_nearest_instead_of_stochastically_is_found(bits, monkeypatch):
    round_to_nearest(monkeypatch)
    with pytest.raises(AssertionError, match="biased"):
        check(moments(bs.Quantized(bits=bits), linear(seed=7)))


def test_a_split_that_swaps_its_parts_is_found():
    layer = linear((6,), 6, 6, seed=7)
    with pytest.raises(AssertionError, match="biased"):
        check(moments(bs.Split(grad_weight=bs.Rows(keep=0.5)), layer, mutate=lambda g: g[::-1]))


# Optimality ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [bs.Rows, bs.Columns])
def test_optimal_scores_have_the_least_variance(kind):
    layer = linear((20,), 10, 12, seed=11)
    total = {}
    for scores in ("uniform", "l1", "l2", "optimal"):
        estimator = kind(keep=0.3, scores=scores, design="independent")
        total[scores] = closed_form(estimator, layer)
    for name in ("grad_input", "grad_weight"):
        best = float(total["optimal"][name])
        for scores in ("uniform", "l1", "l2"):
            assert best <= float(total[scores][name]) * 1.01, (name, scores)


def test_svd_is_below_every_other_estimator_of_the_same_rank():
    layer = linear((16,), 16, 16, seed=12)
    keep = 0.25
    floor = closed_form(bs.LowRank(keep=keep, method="svd"), layer)
    for other in (bs.Rows(keep=keep), bs.Columns(keep=keep)):
        for name, value in closed_form(other, layer).items():
            assert float(floor[name]) < float(value), (other, name)


def test_the_subspace_finds_a_low_rank_that_columns_cannot_see():
    g = torch.Generator().manual_seed(13)
    base = linear((40,), 20, 24, seed=13)
    low = torch.randn(40, 3, generator=g) @ torch.randn(3, 24, generator=g)
    layer = Layer("low rank", base.op, base.x, base.weight, low + 0.05 * base.cotangent)
    subspace = moments(bs.LowRank(keep=0.5, method="subspace"), layer, draws=200)
    columns = moments(bs.Columns(keep=0.5), layer, draws=200)
    for name in subspace:
        assert float(subspace[name].variance) < 0.1 * float(columns[name].variance)


# Refusals and edges -------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_keeping_everything_is_exact(estimator):
    if not hasattr(estimator, "keep"):
        pytest.skip("has no keep")
    from dataclasses import replace

    for layer in (LAYERS[0], LAYERS[2]):
        full = vjp(replace(estimator, keep=1.0), layer)
        for a, b in zip(full, exact_vjp(layer)):
            torch.testing.assert_close(a, b)


def test_columns_refuse_a_layer_with_one_column():
    reason = bs.Columns(keep=0.5).refusal(Bilinear(), torch.ones(1, 4))
    assert reason is not None
    assert "single output column" in reason


def test_grouped_convolutions_choose_whole_groups():
    layer = conv(groups=4, c_in=8, c_out=8, padding=1, seed=6)
    _, grad_weight = vjp(bs.Columns(keep=0.5), layer)
    per_group = grad_weight.unflatten(0, (4, 2)).abs().sum((1, 2, 3, 4))
    assert int((per_group > 0).sum()) == 2
