"""Inputs at the edge: nothing, one row, odd strides, frozen parts, zeros, NaN, low precision, bad text."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import backsketch as bs
from backsketch import sampling
from cases import ESTIMATORS, FAMILIES
from mutations import mutation_of

LAYERS = {
    "linear": (lambda **o: nn.Linear(6, 8, **o), (6,)),
    "conv": (lambda **o: nn.Conv2d(6, 8, 3, padding=1, **o), (6, 4, 3)),
    "grouped conv": (lambda **o: nn.Conv2d(6, 8, 3, groups=2, **o), (6, 5, 4)),
    "pointwise conv": (lambda **o: nn.Conv2d(6, 8, 1, **o), (6, 4, 3)),
}
every_layer = pytest.mark.parametrize("kind", LAYERS)
every_estimator = pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
every_family = pytest.mark.parametrize("estimator", FAMILIES, ids=str)


def build(kind: str, estimator: bs.Estimator | None, rows: int, **options):
    make, shape = LAYERS[kind]
    layer = make(**options)
    x = torch.randn(rows, *shape, dtype=options.get("dtype"), requires_grad=True)
    if estimator is not None:
        bs.sketch_(layer, estimator)
    return layer, x


def backward(layer: nn.Module, x: Tensor, cotangent: Tensor | None = None) -> dict[str, Tensor]:
    y = layer(x)
    leaves = {"x": x, **dict(layer.named_parameters())}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    cotangent = torch.ones_like(y) if cotangent is None else cotangent.to(y)
    return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), cotangent)))


def exactly(layer: nn.Module, x: Tensor, cotangent: Tensor | None = None) -> dict[str, Tensor]:
    with bs.exact(layer):
        return backward(layer, x, cotangent)


def assert_close(ours: dict[str, Tensor], exact: dict[str, Tensor], **tolerance: float) -> None:
    assert list(ours) == list(exact)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, exact[name], msg=lambda m: f"{name}: {m}", **tolerance)  # noqa: B023


# --------------------------------------------------------------------------------------------------
# Sizes
# --------------------------------------------------------------------------------------------------


@every_layer
@every_estimator
def test_an_empty_batch_has_the_exact_gradients_which_are_zero(kind, estimator):
    layer, x = build(kind, estimator, rows=0)
    ours = backward(layer, x)
    assert_close(ours, exactly(layer, x))
    assert ours["x"].shape == x.shape
    assert not ours["weight"].any()


@every_estimator
@pytest.mark.parametrize("shape", [(0, 6), (0, 3, 6), (3, 0, 6)])
def test_an_empty_batch_of_any_shape(shape, estimator):
    layer = nn.Linear(6, 8)
    bs.sketch_(layer, estimator)
    x = torch.randn(shape, requires_grad=True)
    assert_close(backward(layer, x), exactly(layer, x))


@pytest.mark.parametrize("save", [bs.Int8, bs.Float8])
def test_an_empty_batch_kept_in_8_bits_of_which_rows_are_drawn(save):
    layer, x = build("linear", save(bs.Rows(keep=0.5), save=True), rows=0)
    assert_close(backward(layer, x), exactly(layer, x))


@every_estimator
def test_an_empty_batch_through_attention(estimator):
    module = nn.MultiheadAttention(8, 2, batch_first=True)
    bs.sketch_(module, estimator)
    x = torch.randn(0, 5, 8, requires_grad=True)
    module(x, x, x, need_weights=False)[0].sum().backward()
    assert x.grad.shape == x.shape
    assert not module.in_proj_weight.grad.any()


SAMPLES_ROWS = (bs.Rows, bs.StoredRows, bs.Projection)


@pytest.mark.parametrize("kind", ["linear", "conv", "grouped conv"])
@every_estimator
def test_a_single_row_is_kept_whole(kind, estimator):
    layer, x = build(kind, estimator, rows=1)
    ours, exact = backward(layer, x), exactly(layer, x)
    assert all(bool(g.isfinite().all()) for g in ours.values())
    if isinstance(estimator, SAMPLES_ROWS):
        assert_close(ours, exact)


@every_family
def test_a_vector_is_a_single_row(estimator):
    layer = nn.Linear(6, 8)
    bs.sketch_(layer, estimator)
    x = torch.randn(6, requires_grad=True)
    ours = backward(layer, x)
    assert ours["x"].shape == (6,)
    if isinstance(estimator, SAMPLES_ROWS):
        assert_close(ours, exactly(layer, x))


K_REACHES_N = [
    bs.Rows(keep=0.9),
    bs.Columns(keep=0.95),
    bs.LowRank(keep=0.95),
    bs.LowRank(keep=0.95, method="subspace"),
    bs.StoredRows(keep=0.9),
    bs.Projection(keep=0.9),
    bs.Projection(keep=0.9, kind="srht"),
]


@every_layer
@pytest.mark.parametrize("estimator", K_REACHES_N, ids=str)
def test_where_k_reaches_n_the_products_are_exact_and_nothing_is_left_to_chance(kind, estimator):
    layer, x = build(kind, estimator, rows=1 if kind == "pointwise conv" else 3)
    if kind == "pointwise conv":
        x = x[:, :, :2, :1].detach().requires_grad_()
    if kind == "grouped conv" and isinstance(estimator, bs.LowRank):
        return  # the rank of a grouped weight's rows is below its number of columns
    cotangent = torch.randn_like(layer(x))
    assert_close(backward(layer, x, cotangent), exactly(layer, x, cotangent))


@every_estimator
@pytest.mark.parametrize(("d_in", "d_out"), [(1, 4), (5, 2), (2, 64)])
def test_thin_layers(d_in, d_out, estimator):
    layer = nn.Linear(d_in, d_out)
    bs.sketch_(layer, estimator)
    x = torch.randn(9, d_in, requires_grad=True)
    ours, exact = backward(layer, x), exactly(layer, x)
    assert {n: g.shape for n, g in ours.items()} == {n: g.shape for n, g in exact.items()}
    assert all(bool(g.isfinite().all()) for g in ours.values())


@every_estimator
def test_a_layer_of_one_output_is_refused_or_works(estimator):
    layer = nn.Linear(5, 1)
    x = torch.randn(9, 5, requires_grad=True)
    by_columns = getattr(estimator, "grad_input", estimator) or estimator
    if isinstance(by_columns, bs.Columns):
        with pytest.raises(ValueError, match="single output column"):
            bs.sketch_(layer, estimator)
        return
    bs.sketch_(layer, estimator)
    assert all(bool(g.isfinite().all()) for g in backward(layer, x).values())


# --------------------------------------------------------------------------------------------------
# Strides
# --------------------------------------------------------------------------------------------------

STRIDES = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every other": lambda x: torch.stack([x, x * 7], 1)[:, 0],
    "expanded": lambda x: x[:1].expand_as(x),
    "reversed columns": lambda x: x.flip(-1),
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "offset": lambda x: torch.cat([x.flatten()[:3], x.flatten()])[3:].view_as(x),
}


@every_layer
@every_family
@pytest.mark.parametrize("strides", STRIDES)
def test_gradients_do_not_depend_on_the_strides_of_input_and_cotangent(kind, estimator, strides):
    eight_bits = isinstance(estimator, bs.Int8 | bs.Float8)
    if eight_bits and (kind, strides) == ("pointwise conv", "channels last"):
        pytest.skip(
            "positions are rows in that layout, with scales of their own: see test_eight_bits"
        )
    layer, x = build(kind, estimator, rows=6, dtype=torch.float64)
    odd = STRIDES[strides](x.detach())
    plain = odd.clone(memory_format=torch.contiguous_format)
    cotangent = torch.randn_like(layer(x))
    if strides == "expanded":
        cotangent = cotangent[:1].expand_as(cotangent)
    results = []
    for value, g in ((plain, cotangent.contiguous()), (odd, STRIDES[strides](cotangent))):
        if strides == "reversed columns":
            g = cotangent
        bs.seed(3)
        results.append(backward(layer, value.detach().requires_grad_(), g))
    assert_close(*results, rtol=1e-8, atol=1e-8)


@every_family
def test_a_scalar_sum_gives_an_expanded_cotangent(estimator):
    layer, x = build("linear", estimator, rows=6)
    results = []
    for expand in (True, False):
        bs.seed(0)
        y = layer(x)
        y.sum().backward() if expand else y.backward(torch.ones_like(y))
        results.append(dict(x=x.grad, weight=layer.weight.grad))  # noqa: C408
        x.grad = layer.weight.grad = None
    assert_close(*results)


# --------------------------------------------------------------------------------------------------
# What needs no gradient gets none, and the rest is unbiased
# --------------------------------------------------------------------------------------------------


@every_layer
@every_family
@pytest.mark.parametrize("frozen", ["weight", "bias", "x", "weight and bias", "x and weight"])
def test_frozen_parts_get_no_gradient_and_leave_the_others_right(kind, estimator, frozen):
    layer, x = build(kind, estimator, rows=6)
    for name in frozen.split(" and "):
        (x if name == "x" else getattr(layer, name)).requires_grad_(False)
    cotangent = torch.randn_like(layer(x))
    exact, ours = exactly(layer, x, cotangent), backward(layer, x, cotangent)
    assert {n: g.shape for n, g in ours.items()} == {n: g.shape for n, g in exact.items()}
    if "bias" in ours:
        torch.testing.assert_close(ours["bias"], exact["bias"])
    if estimator.saves_memory and "x" in ours:
        torch.testing.assert_close(ours["x"], exact["x"])


@every_layer
@every_family
def test_a_layer_without_bias(kind, estimator):
    layer, x = build(kind, estimator, rows=6, bias=False)
    assert set(backward(layer, x)) == {"x", "weight"}


@pytest.mark.parametrize("estimator", [e for e in FAMILIES if e.saves_memory], ids=str)
def test_a_frozen_weight_saves_nothing_of_the_input(estimator):
    layer, x = build("linear", estimator, rows=64)
    layer.weight.requires_grad_(False)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):  # fmt: skip
        layer(x)
    assert saved == [layer.weight.shape]


def test_the_gradient_of_the_bias_is_exact():
    for kind in LAYERS:
        for estimator in ESTIMATORS:
            layer, x = build(kind, estimator, rows=6)
            cotangent = torch.randn_like(layer(x))
            ours, exact = backward(layer, x, cotangent), exactly(layer, x, cotangent)
            torch.testing.assert_close(ours["bias"], exact["bias"])


# --------------------------------------------------------------------------------------------------
# Zeros, NaN, Inf
# --------------------------------------------------------------------------------------------------


@every_layer
@every_estimator
def test_an_all_zero_cotangent_gives_gradients_that_are_exactly_zero(kind, estimator):
    layer, x = build(kind, estimator, rows=6)
    for gradient in backward(layer, x, torch.zeros_like(layer(x))).values():
        assert bool((gradient == 0).all())


@every_layer
@every_estimator
@pytest.mark.parametrize("part", ["x", "weight"])
def test_an_all_zero_operand_gives_finite_gradients(kind, estimator, part):
    layer, x = build(kind, estimator, rows=6)
    with torch.no_grad():
        (x if part == "x" else layer.weight).zero_()
    cotangent = torch.randn_like(layer(x))
    ours = backward(layer, x, cotangent)
    assert all(bool(g.isfinite().all()) for g in ours.values())
    assert bool((ours["weight" if part == "x" else "x"] == 0).all())


@every_layer
@every_estimator
def test_a_cotangent_with_a_single_row_that_is_not_zero(kind, estimator):
    layer, x = build(kind, estimator, rows=6)
    cotangent = torch.zeros_like(layer(x))
    cotangent[2] = 1.0
    ours = backward(layer, x, cotangent)
    assert all(bool(g.isfinite().all()) for g in ours.values())
    assert not ours["x"][[0, 1, 3, 4, 5]].abs().max() > 1e-6
    if isinstance(estimator, bs.Rows) and estimator.scores != "uniform" and kind != "pointwise conv":  # fmt: skip
        assert_close(ours, exactly(layer, x, cotangent))


POISONS = [math.nan, math.inf, -math.inf]


@every_layer
@every_estimator
def test_a_poisoned_entry_of_the_cotangent_reaches_every_gradient(kind, estimator):
    layer, x = build(kind, estimator, rows=6)
    cotangent = torch.randn_like(layer(x))
    for poison, draw in itertools.product(POISONS, range(4)):
        cotangent[(3, 2, *[1] * (cotangent.ndim - 2))] = poison
        bs.seed(draw)
        ours = backward(layer, x, cotangent)
        for name, gradient in ours.items():
            assert not bool(gradient.isfinite().all()), (name, poison)


@every_family
@pytest.mark.parametrize("poison", POISONS)
def test_a_cotangent_poisoned_all_over_crashes_nothing(estimator, poison):
    for kind in LAYERS:
        layer, x = build(kind, estimator, rows=6)
        ours = backward(layer, x, torch.full_like(layer(x), poison))
        assert not any(bool(g.isfinite().any()) for n, g in ours.items() if n == "bias")
        assert not any(bool(g.isfinite().all()) for g in ours.values())


@every_layer
@every_estimator
def test_a_poisoned_input_reaches_the_gradient_of_the_weight_through_the_loss(kind, estimator):
    layer, x = build(kind, estimator, rows=6)
    for poison in POISONS:
        with torch.no_grad():
            x[(3, 2, *[1] * (x.ndim - 2))] = poison
        y = layer(x)
        layer.weight.grad = None
        y.square().sum().backward()
        assert not bool(y.isfinite().all()), poison
        assert not bool(layer.weight.grad.isfinite().all()), poison


@every_family
def test_training_goes_on_after_a_poisoned_step(estimator):
    layer, x = build("linear", estimator, rows=6)
    backward(layer, x, torch.full((6, 8), math.nan))
    assert all(bool(g.isfinite().all()) for g in backward(layer, x).values())


@every_family
@pytest.mark.parametrize("scale", [2.0**-50, 2.0**50])  # powers of two: no digit changes
def test_extreme_scales_neither_overflow_nor_vanish(estimator, scale):
    layer, x = build("linear", estimator, rows=6)
    cotangent = torch.randn(6, 8)
    bs.seed(0)
    plain = backward(layer, x, cotangent)
    bs.seed(0)
    scaled = backward(layer, x, cotangent * scale)
    assert_close({n: g / scale for n, g in scaled.items()}, plain, rtol=1e-3, atol=1e-4)


def test_grad_scaler_sees_an_overflow_and_skips_the_step():
    layer, x = build("linear", bs.Rows(keep=0.25), rows=16)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
    for poisoned in (False, True, False):
        before = layer.weight.detach().clone()
        loss = layer(x).square().mean() * (math.inf if poisoned else 1.0)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, layer.weight) == poisoned
    assert scaler.get_scale() == 2.0


def test_grad_scaler_with_autocast_trains_in_float16():
    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3))
    bs.sketch_(model, bs.Rows(keep=0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    x = torch.randn(32, 6)
    target, losses = x[:, :3].sin(), []
    for _ in range(60):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = (model(x).float() - target).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2
    assert model[0].weight.grad.dtype == torch.float32


# --------------------------------------------------------------------------------------------------
# Precision
# --------------------------------------------------------------------------------------------------

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@every_layer
@every_family
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_have_the_dtype_of_their_tensors(kind, estimator, dtype):
    layer, x = build(kind, estimator, rows=6, dtype=dtype)
    ours = backward(layer, x)
    assert {g.dtype for g in ours.values()} == {dtype}
    assert all(bool(g.isfinite().all()) for g in ours.values())


@pytest.mark.fast_cases(
    "rows:keep=0.5", "torch.bfloat16-projection:keep=0.5", "torch.bfloat16-quantized:bits=2"
)
@every_family
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_mean_is_the_exact_gradient_to_the_precision_of_the_dtype(estimator, dtype):
    layer, x = build("linear", estimator, rows=8, dtype=dtype)
    cotangent = torch.randn(8, 8)
    wide = nn.Linear(6, 8, dtype=torch.float64)
    wide.load_state_dict({n: p.double() for n, p in layer.state_dict().items()})
    exact = backward(wide, x.detach().double().requires_grad_(), cotangent.to(dtype))
    draws = [backward(layer, x, cotangent) for _ in range(200)]
    for name, target in exact.items():
        stacked = torch.stack([d[name].double() for d in draws])
        error = stacked.std(0) / math.sqrt(len(draws))
        rounding = 4 * torch.finfo(dtype).eps * float(target.abs().max()) + 1e-7
        assert bool(((stacked.mean(0) - target).abs() < 5.5 * error + rounding).all()), name


def test_the_mean_is_off_where_the_weights_of_the_drawn_rows_are_dropped(monkeypatch):
    """The mutation of the test above: it must fail in every precision."""
    original = sampling.operators._draw
    monkeypatch.setattr(
        sampling.operators, "_draw", lambda *a: (original(*a)[0], original(*a)[1] * 0 + 1)
    )
    for dtype in DTYPES:
        with pytest.raises(AssertionError):
            test_the_mean_is_the_exact_gradient_to_the_precision_of_the_dtype(
                bs.Rows(keep=0.5), dtype
            )


# --------------------------------------------------------------------------------------------------
# Several uses, several models
# --------------------------------------------------------------------------------------------------


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x))) + self.layer(x)


@pytest.mark.fast_cases("rows:keep=0.5", "quantized:bits=2")
@every_family
def test_a_module_used_three_times_in_one_forward_is_unbiased(estimator):
    model = Twice()
    bs.sketch_(model, estimator)
    bs.testing.check_unbiased(model, torch.randn(7, 5), draws=200)


@pytest.mark.fast_cases("rows:keep=0.5", "quantized:bits=2")
@every_family
def test_a_mutation_is_noticed_in_a_module_used_three_times(estimator, monkeypatch):
    model = Twice()
    bs.sketch_(model, estimator)
    mutation_of(estimator)(monkeypatch)
    with pytest.raises(AssertionError, match="is biased"):
        bs.testing.check_unbiased(model, torch.randn(7, 5), draws=200)


def test_uses_of_one_module_draw_apart():
    layer, x = nn.Linear(5, 5), torch.randn(40, 5)
    bs.sketch_(layer, bs.Rows(keep=0.5))
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    # Unequal rows: of equal ones there are but two systematic samples.
    ((layer(a) + layer(b)) * torch.rand(40, 1)).sum().backward()
    assert not torch.equal(a.grad, b.grad)


@pytest.mark.fast_cases("rows:keep=0.5", "quantized:bits=2")
@every_family
def test_two_models_in_one_process_are_each_unbiased_and_keep_to_themselves(estimator):
    first, second = nn.Linear(5, 4), nn.Linear(5, 4)
    bs.sketch_(first, estimator)
    bs.sketch_(second, bs.Columns(keep=0.25))
    x = torch.randn(7, 5)
    bs.testing.check_unbiased(first, x, draws=150)
    bs.restore_(first)
    assert type(first) is nn.Linear
    bs.testing.check_unbiased(second, x, draws=150)
    with bs.exact(first):
        assert second._backsketch_exact is False


def test_interleaved_models_give_what_they_give_alone_in_law():
    first, second = nn.Linear(5, 4), nn.Linear(5, 4)
    for model in (first, second):
        bs.sketch_(model, bs.StoredRows(keep=0.5))
    x = torch.randn(40, 5)  # so many that two draws are hardly ever the same
    y, z = first(x), second(x)  # forward, forward, backward, backward
    z.sum().backward()
    y.sum().backward()
    assert first.weight.grad is not None
    assert not torch.equal(first.weight.grad, second.weight.grad)  # drawn apart


# --------------------------------------------------------------------------------------------------
# The private random stream
# --------------------------------------------------------------------------------------------------


@every_layer
@every_estimator
def test_a_saved_stream_makes_gradients_bit_identical(kind, estimator):
    layer, x = build(kind, estimator, rows=6)
    backward(layer, x)
    state = bs.get_rng_state()
    first = [backward(layer, x) for _ in range(3)]
    bs.set_rng_state(state)
    again = [backward(layer, x) for _ in range(3)]
    for a, b in zip(first, again):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_state_is_a_plain_dict_that_a_checkpoint_can_hold(tmp_path):
    torch.save({"rng": bs.get_rng_state()}, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)["rng"]
    assert state == bs.get_rng_state()
    bs.set_rng_state(state)


@pytest.mark.parametrize("state", [None, {}, {"seed": 1}, [1, 2], {"seed": 1, "counter": 2, "x": 3}])  # fmt: skip
def test_a_wrong_state_is_an_error_and_changes_nothing(state):
    before = bs.get_rng_state()
    with pytest.raises(ValueError, match="get_rng_state"):
        bs.set_rng_state(state)
    assert bs.get_rng_state() == before


@pytest.mark.parametrize("n", [None, 1.0, "1", True])
def test_a_wrong_seed_is_an_error(n):
    with pytest.raises(TypeError, match="needs an int"):
        bs.seed(n)


def one_step(rank: str, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    monkeypatch.setenv("RANK", rank)
    torch.manual_seed(0)
    bs.seed(0)
    layer, x = build("linear", bs.Rows(keep=0.5, scores="uniform", design="permuted"), rows=64)
    return (backward(layer, x)["x"] != 0).any(1).double()


def test_ranks_draw_different_rows_from_the_same_seed(monkeypatch):
    check_ranks(monkeypatch)


def test_ranks_that_share_their_noise_are_noticed(monkeypatch):
    monkeypatch.setattr(sampling.stream, "_rank", lambda: 0)
    with pytest.raises(AssertionError):
        check_ranks(monkeypatch)


def check_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = torch.stack([one_step(str(rank), monkeypatch) for rank in range(16)])
    assert torch.equal(kept[3], one_step("3", monkeypatch))
    correlation = torch.corrcoef(kept) - torch.eye(16)
    # 120 pairs of standard error 1/8: what shared noise would give is 1.
    assert float(correlation.abs().max()) < 0.6
    assert abs(float(correlation.sum()) / 240) < 5 / 8 / math.sqrt(120) + 1 / 63


def test_neighbouring_seeds_and_ranks_do_not_overlap(monkeypatch):
    seen = set()
    for rank in range(4):
        monkeypatch.setenv("RANK", str(rank))
        for seed in range(4):
            bs.seed(seed)
            seen |= {int(sampling.next_seed(torch.zeros(1))) for _ in range(50)}
    assert len(seen) == 4 * 4 * 50


# --------------------------------------------------------------------------------------------------
# Bad settings, bad text
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 0.0, -0.1, 1.1, 2, math.nan, math.inf, True, None, "0.5"])
@pytest.mark.parametrize(
    "kind", [bs.Elements, bs.Rows, bs.Columns, bs.LowRank, bs.StoredRows, bs.Projection]
)
def test_keep_outside_its_range_is_an_error_that_names_it(kind, keep):
    with pytest.raises(ValueError, match=rf"{kind.__name__}: keep .*\(0, 1\]"):
        kind(keep=keep)


def test_a_keep_that_old_compilers_made_a_symbol_is_an_error_that_names_the_setting():
    symbol = fx.Graph().placeholder("keep")
    with pytest.raises(ValueError, match=r"specialize_float = True"):
        bs.Rows(keep=fx.Proxy(symbol))


BAD_SETTINGS = {
    "scores": (lambda: bs.Rows(keep=0.5, scores="l3"), "scores must be one of"),
    "scores of columns": (lambda: bs.Columns(keep=0.5, scores="best"), "scores must be one of"),
    "design": (lambda: bs.Rows(keep=0.5, design="sistematic"), "did you mean 'systematic'"),
    "optimal stored rows": (
        lambda: bs.StoredRows(keep=0.5, scores="optimal"),
        "need the cotangent, which the forward",
    ),
    "method": (lambda: bs.LowRank(keep=0.5, method="qr"), "method must be one of 'svd'"),
    "kind": (lambda: bs.Projection(keep=0.5, kind="gauss"), "kind must be one of 'rademacher'"),
    "bits": (lambda: bs.Quantized(bits=3), "bits must be one of 1, 2, 4, 8"),
    "no bits": (lambda: bs.Quantized(bits=0), "bits must be one of"),
    "bits that are no number": (lambda: bs.Quantized(bits=True), "bits must be 1, 2, 4 or 8"),
    "bits that are no integer": (lambda: bs.Quantized(bits=4.0), "bits must be 1, 2, 4 or 8"),
    "group size": (lambda: bs.Quantized(bits=4, group_size=12), "multiple of 8"),
    "no group": (lambda: bs.Quantized(bits=4, group_size=0), "multiple of 8"),
    "group that is no integer": (lambda: bs.Quantized(bits=4, group_size=64.0), "multiple of 8"),
    "split of a number": (lambda: bs.Split(grad_weight=0.5), "must be an estimator or None"),
    "split of a class": (lambda: bs.Split(grad_input=bs.Rows), "must be an estimator or None"),
    "memory saver as grad_input": (
        lambda: bs.Split(grad_input=bs.StoredRows(keep=0.5)),
        "leaves grad_input exact",
    ),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_a_setting_outside_its_range_is_an_error_that_says_what_is_allowed(case):
    make, message = BAD_SETTINGS[case]
    with pytest.raises(ValueError, match=message):
        make()


BAD_TEXT = {
    "rwos:keep=0.5": "unknown sketch 'rwos'.*did you mean rows",
    "": "unknown sketch ''",
    "Rows(keep=0.5)": "unknown sketch.*known:",
    "rows": "lacks keep",
    "rows:": "lacks keep",
    "rows:0.5": "should read field=value",
    "rows:keep=0.5,": "should read field=value",
    "rows:keep:0.5": "should read field=value",
    "rows:keap=0.5": "no field 'keap'; did you mean keep",
    "rows:keep=0.5,keep=0.6": "given twice",
    "rows:keep=2": r"must lie in \(0, 1\]",
    "rows:keep=half": r"must lie in \(0, 1\]",
    "rows:keep=nan": r"must lie in \(0, 1\]",
    "rows:keep=none": r"must lie in \(0, 1\]",
    "rows:keep=true": r"must lie in \(0, 1\]",
    "rows:keep=0.5,scores=none": "scores must be one of",
    "quantized:bits=4.0": "bits must be 1, 2, 4 or 8",
    "split:grad_weight=(rows:keep=0.5": "unbalanced parentheses",
    "split:grad_weight=rows:keep=0.5)": "unbalanced parentheses",
    "split:grad_weight=(rows:keep=2)": r"must lie in \(0, 1\]",
    "split:grad_weight=rows": "must be an estimator or None",
    "exact:keep=1": "no field 'keep'",
}


@pytest.mark.parametrize("text", BAD_TEXT)
def test_text_that_is_no_sketch_is_an_error_that_says_why(text):
    with pytest.raises(ValueError, match=BAD_TEXT[text]):
        bs.parse(text)


@pytest.mark.parametrize("value", [None, 0.5, b"rows", bs.Rows(keep=0.5)])
def test_only_text_is_parsed(value):
    with pytest.raises(ValueError, match="described by a text"):
        bs.parse(value)


def test_blanks_around_words_do_not_matter():
    assert bs.parse(" rows : keep = 0.25 , scores = l2 ") == bs.Rows(keep=0.25, scores="l2")
    split = bs.Split(grad_weight=bs.Rows(keep=0.5))
    assert bs.parse("split: grad_weight = ( rows:keep=0.5 )") == split


KEEP = st.floats(0, 1, exclude_min=True) | st.just(1)
DESIGN = st.sampled_from(sampling.DESIGNS)
LEAVES = [
    st.just(bs.Exact()),
    st.builds(bs.Elements, KEEP),
    st.builds(bs.Rows, KEEP, st.sampled_from(["uniform", "l1", "l2", "optimal"]), DESIGN),
    st.builds(bs.Columns, KEEP, st.sampled_from(["uniform", "l1", "l2", "optimal"]), DESIGN),
    st.builds(bs.LowRank, KEEP, st.sampled_from(["svd", "subspace"])),
]
SAVERS = [
    st.builds(bs.StoredRows, KEEP, st.sampled_from(["uniform", "l1", "l2"]), DESIGN),
    st.builds(bs.Projection, KEEP, st.sampled_from(["rademacher", "srht"])),
    st.builds(bs.Quantized, st.sampled_from([1, 2, 4, 8]), st.integers(1, 64).map(lambda g: 8 * g)),
]
SPLITS = st.recursive(
    st.one_of(*LEAVES, *SAVERS),
    lambda inner: st.builds(bs.Split, st.none() | st.one_of(*LEAVES), st.none() | inner),
    max_leaves=4,
)


@given(SPLITS)
@settings(max_examples=300, deadline=None)
def test_text_and_back_for_every_estimator(estimator):
    assert bs.parse(str(estimator)) == estimator
    assert hash(bs.parse(str(estimator))) == hash(estimator)


@every_estimator
def test_estimators_are_frozen_and_compare_by_value(estimator):
    with pytest.raises(AttributeError):
        estimator.keep = 0.1
    assert estimator == bs.parse(str(estimator))
    assert estimator != bs.Elements(keep=0.123)


def test_the_text_leaves_out_defaults():
    assert str(bs.Rows(keep=0.25)) == "rows:keep=0.25"
    assert str(bs.Exact()) == "exact"
    assert str(bs.Split()) == "split"
