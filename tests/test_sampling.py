"""Inclusion probabilities, designs and the private random stream."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import backsketch as bs
from backsketch import sampling
from backsketch.sampling import (
    ROW_DESIGNS,
    design,
    draw,
    inclusion_probabilities,
    native,
    next_seed,
    num_kept,
    operators,
)
from backsketch.sampling.stream import mix

DRAWS = 3_000


@st.composite
def scores_and_k(draw_):
    n = draw_(st.integers(1, 40))
    values = st.one_of(st.just(0.0), st.floats(1e-6, 1e6), st.sampled_from([1.0, 2.0]))
    scores = torch.tensor(draw_(st.lists(values, min_size=n, max_size=n)))
    return scores, draw_(st.integers(1, n))


@given(scores_and_k())
@settings(max_examples=200, deadline=None)
def test_water_filling_is_feasible_and_satisfies_the_optimality_conditions(case):
    scores, k = case
    pi = inclusion_probabilities(scores, k)
    assert float(pi.sum()) == pytest.approx(k, rel=1e-9)
    assert bool(((pi >= 0) & (pi <= 1)).all())
    positive = scores > 0
    if int(positive.sum()) <= k:
        assert bool((pi[positive] == 1).all())
        return
    # KKT: below the cap the ratio score / pi is one constant, at the cap it is at least that.
    ratio = scores.double() / pi
    free = positive & (pi < 1)
    lam = ratio[free].mean() if bool(free.any()) else ratio[positive].min()
    assert torch.allclose(ratio[free], lam.expand_as(ratio[free]), rtol=1e-6)
    assert bool((ratio[positive & ~free] >= lam * (1 - 1e-6)).all())
    assert bool((pi[~positive] == 0).all())


@given(scores_and_k())
@settings(max_examples=200, deadline=None)
def test_the_level_found_by_passes_is_the_one_found_by_sorting(case):
    scores, k = case
    passes = design._level_by_passes(scores.double(), k)
    assert float(passes) == pytest.approx(
        float(design._level_by_sorting(scores.double(), k)), rel=1e-9
    )


def test_the_probabilities_do_not_depend_on_the_scale_or_the_spread_of_scores():
    scores = torch.tensor([1e-30, 1e-30, 3e-30, 1e30])
    assert inclusion_probabilities(scores, 2).tolist() == pytest.approx([0.2, 0.2, 0.6, 1.0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_is_drawn_surely(bad):
    pi = inclusion_probabilities(torch.tensor([1.0, bad, 5.0, 0.0]), 2)
    assert pi[1] == 1
    assert float(pi.sum()) == pytest.approx(2)
    all_bad = inclusion_probabilities(torch.full((4,), bad), 2)
    assert all_bad.tolist() == pytest.approx([0.5] * 4)


def test_the_floor_leaves_no_row_without_a_chance():
    pi = inclusion_probabilities(torch.tensor([1.0, 0.0, 0.0, 9.0]), 2, floor=0.1)
    assert float(pi.min()) == pytest.approx(0.1 * 2 / 4)
    assert float(pi.sum()) == pytest.approx(2)


@pytest.mark.parametrize(
    ("n", "keep", "k"),
    [(10, 0.1, 1), (10, 0.25, 3), (3, 1.0, 3), (1, 0.01, 1), (0, 0.5, 1), (7, 0.3, 3)],
)
def test_num_kept_rounds_up_and_keeps_at_least_one(n, keep, k):
    assert num_kept(n, keep) == k


def inclusion_frequencies(design, scores, k, block):
    count = torch.zeros(len(scores))
    weights = torch.zeros(len(scores))
    for _ in range(DRAWS):
        sample = draw(scores, k, next_seed(scores), design=design, block=block)
        count[sample.indices] += (sample.weights > 0).float()
        weights[sample.indices] += sample.weights
    return count / DRAWS, weights / DRAWS


@pytest.mark.parametrize(
    ("design", "block"), [*((name, 1) for name in ROW_DESIGNS), ("shuffled", 2), ("shuffled", 5)]
)
def test_designs_have_exactly_these_inclusion_probabilities(design, block):
    bs.seed(1)
    scores = torch.tensor([0.1, 3.0, 0.5, 0.5, 20.0, 0.0, 1.0, 2.0, 0.7, 0.02])
    pi = inclusion_probabilities(scores, 4).float()
    frequency, weight = inclusion_frequencies(design, scores, 4, block)
    error = (pi * (1 - pi) / DRAWS).sqrt()
    assert bool(((frequency - pi).abs() <= 4.5 * error + 1e-9).all())
    # Horvitz-Thompson: E[z / pi] = 1 for every row that can be drawn.
    drawable = pi > 0
    assert torch.allclose(weight[drawable], torch.ones(int(drawable.sum())), atol=0.4)
    # The mutation: frequencies against the probabilities of the neighbouring row are far out.
    assert bool(((frequency - pi.roll(1)).abs() > 4.5 * error + 1e-9).any())


@pytest.mark.parametrize("design", ["systematic", "permuted", "shuffled"])
def test_fixed_size_designs_draw_exactly_k_distinct_rows_in_order(design):
    bs.seed(2)
    for trial in range(300):
        g = torch.Generator().manual_seed(trial)
        n = int(torch.randint(1, 60, (1,), generator=g))
        k = int(torch.randint(1, n + 1, (1,), generator=g))
        scores = torch.rand(n, generator=g) ** 4
        indices = draw(scores, k, next_seed(scores), design=design).indices
        assert len(indices) == k
        assert indices.tolist() == sorted(set(indices.tolist()))


def kept_rows(design, n, block, trials=40):
    """``(trials, n)``: which of ``n`` rows with equal scores each draw of half of them keeps."""
    scores, kept = torch.ones(n), torch.zeros(trials, n)
    for row in kept:
        row[draw(scores, n // 2, next_seed(scores), design=design, block=block).indices] = 1
    return kept


def test_shuffled_samples_do_not_fall_in_step_with_rows_that_alternate():
    rows = kept_rows("shuffled", 16, 1)
    assert bool(((rows[:, ::2].sum(1) - 4).abs() <= 3).float().mean() > 0.9)
    assert bool((rows[:, ::2].std(1) > 0).any())
    # The mutation: the natural order keeps all even or all odd rows and nothing else.
    natural = kept_rows("systematic", 16, 1)
    assert set(natural[:, ::2].sum(1).tolist()) == {0.0, 8.0}


def test_shuffled_samples_are_stratified_over_their_tokens():
    rows = kept_rows("shuffled", 32, 8).view(-1, 4, 4, 2)
    assert bool((rows.sum(-1) == 1).all())  # one of every two neighbours
    assert not bool((kept_rows("permuted", 32, 8).view(-1, 4, 4, 2).sum(-1) == 1).all())


def test_rows_with_zero_score_are_never_drawn_while_others_remain():
    bs.seed(3)
    scores = torch.tensor([0.0, 1.0, 0.0, 2.0, 1.0, 0.0])
    for _ in range(500):
        assert set(draw(scores, 2, next_seed(scores)).indices.tolist()) <= {1, 3, 4}


WAYS = {"compiled": {}, "few": {"native": None}, "operators": {"native": None, "_IN_PYTHON": 0}}


def drawn_each_way(scores, k, seed, floor=0.0, design="systematic", block=1):
    """The same draw by the compiled function, in plain numbers and by operators."""
    found = {}
    for name, changes in WAYS.items():
        with pytest.MonkeyPatch.context() as patch:
            if "native" in changes:
                patch.setattr(native, "draw", lambda *_: None)
            if "_IN_PYTHON" in changes:
                patch.setattr(operators, "_IN_PYTHON", 0)
            found[name] = draw(scores, k, seed, 3, design, floor, block)
    return found


def assert_same(samples):
    for sample in samples.values():
        assert torch.equal(sample.indices, samples["operators"].indices)
        torch.testing.assert_close(sample.weights, samples["operators"].weights)


DESIGNS_AND_BLOCKS = [("systematic", 1), ("permuted", 1), ("shuffled", 1), ("shuffled", 2)]


@given(
    scores_and_k(),
    st.sampled_from([0.0, 0.1]),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from(DESIGNS_AND_BLOCKS),
)
@settings(max_examples=300, deadline=None)
def test_every_way_to_draw_gives_the_same_rows(case, floor, dtype, how):
    scores, k = case
    scores = scores[: max(len(scores) // how[1] * how[1], how[1])]
    if len(scores) % how[1]:
        return
    k = min(k, len(scores))
    if float(scores.max()) == 0:
        scores = scores + 1
    assert_same(drawn_each_way(scores.to(dtype), k, sampling.next_seed(scores), floor, *how))


@pytest.mark.parametrize("n", [65, 1000, 5000])
def test_every_way_to_draw_many_rows_gives_the_same(n):
    scores = torch.rand(n, dtype=torch.float64) ** 4
    scores[::7] = 0
    for k, name in itertools.product((1, n // 10, n // 2, n - 1), ("systematic", "permuted")):
        samples = drawn_each_way(scores, k, torch.tensor(n + k), design=name)
        assert samples["few"].indices.shape == (k,)
        assert bool((samples["few"].indices.diff() >= 0).all())
        assert_same(samples)


@pytest.mark.parametrize("n", [20, 2000])
@pytest.mark.parametrize("tiny", [0.0, 1e-30])
def test_every_way_to_draw_takes_k_equal_scores_among_tiny_ones_surely(n, tiny):
    """Their mean, the first level, may be rounded to below them."""
    for k in range(2, 13):
        for score in torch.linspace(0.1, 1, 8, dtype=torch.float64):
            scores = torch.full((n,), tiny, dtype=torch.float64)
            scores[:k] = score
            for sample in drawn_each_way(scores, k, torch.tensor(k)).values():
                assert sample.indices.tolist() == list(range(k))
                torch.testing.assert_close(sample.weights, torch.ones(k, dtype=torch.float64))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_every_way_to_draw_takes_what_is_not_finite(bad):
    scores = torch.tensor([1.0, bad, 2.0, float("inf"), 0.0])
    samples = drawn_each_way(scores, 3, torch.tensor(5))
    assert_same(samples)
    assert {1, 3} <= set(samples["compiled"].indices.tolist())


@pytest.mark.skipif(native.SOURCE.library() is None, reason=native.SOURCE.why_not())
def test_the_compiled_draw_is_used(monkeypatch):
    monkeypatch.setattr(operators, "few", None)
    monkeypatch.setattr(operators, "inclusion_probabilities", None)
    assert draw(torch.rand(20), 5, torch.tensor(1)).indices.shape == (5,)


def test_a_draw_is_a_pure_function_of_its_seed():
    scores = torch.rand(50)
    seed = next_seed(scores)
    first, second = draw(scores, 10, seed), draw(scores, 10, seed)
    assert torch.equal(first.indices, second.indices)
    other = draw(scores, 10, seed, stream=1)
    assert not torch.equal(first.indices, other.indices)


def test_the_seed_restarts_the_stream_and_the_state_continues_it():
    x = torch.zeros(1)
    bs.seed(5)
    first = [int(next_seed(x)) for _ in range(4)]
    bs.seed(5)
    assert [int(next_seed(x)) for _ in range(2)] == first[:2]
    state = bs.get_rng_state()
    rest = [int(next_seed(x)) for _ in range(2)]
    assert rest == first[2:]
    bs.set_rng_state(state)
    assert [int(next_seed(x)) for _ in range(2)] == rest
    bs.seed(6)
    assert int(next_seed(x)) != first[0]


def test_bad_states_and_seeds_are_refused_and_change_nothing():
    bs.seed(7)
    before = bs.get_rng_state()
    with pytest.raises(ValueError, match="get_rng_state"):
        bs.set_rng_state({"seed": 1})
    with pytest.raises(TypeError, match="int"):
        bs.seed(1.5)
    assert bs.get_rng_state() == before


def test_ranks_draw_different_numbers(monkeypatch):
    x = torch.zeros(1)
    seeds = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        bs.seed(8)
        seeds.append(int(next_seed(x)))
    assert seeds[0] != seeds[1]


def test_seeds_and_streams_do_not_collide():
    x = torch.zeros(1)
    bs.seed(0)
    seeds = {mix(int(next_seed(x)), stream) for _ in range(2000) for stream in range(3)}
    assert len(seeds) == 6000


def test_the_global_random_stream_is_not_touched():
    scores = torch.rand(20)
    before = torch.get_rng_state()
    seed = next_seed(scores)
    for name in ROW_DESIGNS:
        draw(scores, 5, seed, design=name)
    sampling.uniform_like(scores, seed)
    sampling.signs(scores, 3, 4, seed)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_draw_inside_a_cuda_graph_is_refused(monkeypatch):
    """The graph would hold one seed and repeat its draw for ever."""
    layer, x = torch.nn.Linear(4, 3), torch.randn(8, 4)
    bs.sketch_(layer, bs.Rows(keep=0.5))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="CUDA graph, which would repeat one draw"):
        layer(x).sum().backward()
    with bs.exact(layer):
        layer(x).sum().backward()
