"""What a region promises besides unbiasedness: hazards of real training loops, one by one."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from itertools import cycle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import backsketch as bs
from backsketch import sampling
from backsketch.nn.swap import unswap_
from backsketch.regions import (
    Mask,
    Region,
    compilers,
    ignore_scores,
    program,
    record_scores,
    rows,
    state_of,
)
from backsketch.regions.context import Call, current, inside, run_as
from backsketch.regions.rows import Layout
from backsketch.regions.state import runtime_of
from helpers import named_gradients
from region_models import Attention, Block, Feedforward, ViT, make_region, mlp

MODES = ["save", "recompute"]


def warm(model: nn.Module, *inputs: Tensor) -> None:
    """Let the guards pass: the first backward pass is exact."""
    model(*inputs).square().sum().backward()
    model.zero_grad()


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, sampling.Sample]]:
    """Every (scores, sample) that regions draw."""
    seen: list[tuple[Tensor, sampling.Sample]] = []
    original = sampling.draw_live

    def draw(scores: Tensor, *rest: Any) -> sampling.Sample | None:
        sample = original(scores, *rest)
        if sample is not None:
            seen.append((scores, sample))
        return sample

    monkeypatch.setattr(sampling, "draw_live", draw)
    return seen


# --- configuration ----------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, -1, 1.5, float("nan"), True, "half"])
@pytest.mark.parametrize("kind", [Region, Mask])
def test_keep_is_checked(kind: type, keep: object) -> None:
    with pytest.raises(ValueError, match="keep"):
        kind(keep)


def test_other_fields_are_checked() -> None:
    with pytest.raises(ValueError, match="row_dims"):
        Region(0.5, row_dims=3)
    with pytest.raises(ValueError, match="mode"):
        Region(0.5, mode="save it")  # type: ignore[arg-type]
    for kind in (Region, Mask):
        with pytest.raises(ValueError, match="did you mean 'permuted'"):
            kind(0.5, design="permute")


@pytest.mark.parametrize(
    "sketch",
    [
        Region(0.5, 2, "recompute"),
        Region(0.25, design="permuted"),
        Mask(0.5, 2),
        Mask(0.5, design="systematic"),
    ],
)
def test_text_round_trip(sketch: bs.Estimator) -> None:
    assert bs.parse(str(sketch)) == sketch


# --- the forward pass -------------------------------------------------------------------------------


@pytest.mark.fast_cases("0.3")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_forward_is_bit_identical(mode: str, dropout: float) -> None:
    model, x = ViT(8, depth=1, dropout=dropout), torch.randn(6, 1, 8, 8)
    torch.manual_seed(1)
    expected = model(x)
    make_region(model, {"": Region(0.5, mode=mode)})
    torch.manual_seed(1)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("how", ["eval", "no_grad", "exact", "keep 1"])
def test_inactive_is_the_module_itself(how: str) -> None:
    model, x = Block(8, 2), torch.randn(4, 3, 8)
    expected = named_gradients(model, model(x).square().sum())
    make_region(model, {"": Region(1.0 if how == "keep 1" else 0.5)})
    model.train(how != "eval")
    if how == "no_grad":
        with torch.no_grad():
            model(x)
    elif how == "exact":
        with bs.exact(model):
            actual = named_gradients(model, model(x).square().sum())
    else:
        actual = named_gradients(model, model(x).square().sum())
    assert state_of(model).status == "pending"
    if how != "no_grad":
        assert all(torch.equal(actual[n], g) for n, g in expected.items())


def test_restored_bit_for_bit() -> None:
    model, x = Block(8, 2), torch.randn(4, 3, 8)
    expected, kind = named_gradients(model, model(x).square().sum()), type(model)
    make_region(model, {"": Region(0.5)})
    warm(model, x)
    unswap_(model)
    assert type(model) is kind
    actual = named_gradients(model, model(x).square().sum())
    assert all(torch.equal(actual[n], g) for n, g in expected.items())


# --- the backward pass ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_kept_rows_are_what_a_smaller_batch_would_give(
    mode: str, drawn: list[tuple[Tensor, sampling.Sample]]
) -> None:
    """The slow twin: run the drawn rows alone, with their cotangents divided by pi."""
    model, x = Block(8, 2), torch.randn(10, 3, 8, requires_grad=True)
    twin = copy.deepcopy(model)
    make_region(model, {"": Region(0.4, mode=mode)})
    warm(model, x)
    x.grad = None
    cotangent = torch.randn(10, 3, 8)
    model(x).backward(cotangent)
    (_, sample) = drawn[-1]
    assert sample.indices.numel() == 4
    z = x.detach()[sample.indices].requires_grad_()
    twin(z).backward(cotangent[sample.indices] * sample.weights.view(-1, 1, 1))
    for p, q in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)
    expected = torch.zeros(10, 3, 8).index_copy(0, sample.indices, z.grad)
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_dropout_masks_replay_for_the_kept_rows(
    mode: str, drawn: list[tuple[Tensor, sampling.Sample]]
) -> None:
    model, x = Feedforward(8, 0.5), torch.randn(4, 5, 8, requires_grad=True)
    twin = copy.deepcopy(model)
    make_region(model, {"": Region(0.3, 2, mode)})
    warm(model, x)
    cotangent = torch.randn(4, 5, 8)
    torch.manual_seed(7)
    (g,) = torch.autograd.grad(model(x), x, cotangent)
    torch.manual_seed(7)
    (full,) = torch.autograd.grad(twin(x), x, cotangent)
    _, sample = drawn[-1]
    kept = full.view(20, 8)[sample.indices] * sample.weights[:, None]
    torch.testing.assert_close(g.view(20, 8)[sample.indices], kept, rtol=1e-4, atol=1e-5)


@pytest.mark.fast_cases("p0")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [(0.1, 0.2, 0.3, 0.9), (0.1,), (0.2,), (0.3,), (0.9,)])
def test_recomputed_values_are_those_of_the_forward_pass(
    p: tuple[float, ...], dtype: torch.dtype
) -> None:
    """The first backward pass of a region recomputes all rows: its gradients are exact, bit for bit."""

    class Own(nn.Sequential):
        """No other test has captured it."""

    kinds = [nn.GELU, nn.LeakyReLU, nn.SiLU, nn.Tanh, nn.ReLU, nn.Softplus]
    layers = [
        m for kind, q in zip(kinds, cycle(p)) for m in (nn.Linear(32, 32), nn.Dropout(q), kind())
    ]
    model, x = Own(*layers, nn.Linear(32, 8)), torch.randn(64, 32)

    def found() -> dict[str, Tensor]:
        torch.manual_seed(3)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            y = model(x)
        return named_gradients(model, y.float().square().sum())

    expected = found()
    make_region(model, {"": Region(0.5, mode="recompute")})
    actual = found()
    assert state_of(model).status == "active", state_of(model).reason
    assert all(torch.equal(actual[n], g) for n, g in expected.items())


@pytest.mark.parametrize("mode", MODES)
def test_a_seed_repeats_a_run_whatever_was_captured_before(mode: str) -> None:
    """A model of the same classes shares the captured graphs; it checks its rows for itself."""

    def run() -> tuple[list[dict[str, Tensor]], dict[str, int]]:
        torch.manual_seed(0)
        bs.seed(0)
        model, x = nn.Sequential(mlp(8, 8), nn.Tanh(), mlp(8, 8)), torch.randn(12, 8)
        make_region(model, {"0": Region(0.5, mode=mode), "2": Region(0.5, mode=mode)})
        steps = []
        for _ in range(3):
            model.zero_grad()
            steps.append(named_gradients(model, model(x).square().sum()))
        return steps, bs.get_rng_state()

    first, again = run(), run()
    assert first[1] == again[1]
    for a, b in zip(first[0], again[0]):
        assert all(torch.equal(g, b[name]) for name, g in a.items())


def test_the_users_random_stream_is_untouched() -> None:
    model, x = Block(8, 2, 0.2), torch.randn(4, 3, 8)
    model(x).sum().backward()
    after = torch.get_rng_state()
    torch.manual_seed(0)
    model, x = Block(8, 2, 0.2), torch.randn(4, 3, 8)
    make_region(model, {"": Region(0.5, mode="recompute")})
    model(x).sum().backward()
    assert torch.equal(torch.get_rng_state(), after)


def test_zero_rows_are_never_drawn(drawn: list[tuple[Tensor, sampling.Sample]]) -> None:
    model, x = Block(8, 2), torch.randn(12, 3, 8)
    make_region(model, {"": Region(0.5)})
    warm(model, x)
    cotangent = torch.randn(12, 3, 8)
    cotangent[::3] = 0
    model(x).backward(cotangent)
    scores, sample = drawn[-1]
    assert sample.indices.numel() == 4  # half of the eight live rows
    assert (scores[sample.indices] > 0).all()


def test_masks_shrink_the_row_sketches_below(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    draw = sampling.operators._draw

    def counting(scores: Tensor, k: int, *rest: object) -> object:
        sizes.append(k)
        return draw(scores, k, *rest)

    monkeypatch.setattr(sampling.operators, "_draw", counting)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    bs.sketch_(model, {"": Mask(0.25), "0": bs.Rows(keep=0.125), "2": bs.Rows(keep=0.5)})
    model(torch.randn(16, 4, requires_grad=True)).square().sum().backward()
    assert sizes == [4, 4, 4, 2, 2]  # the mask's, then two products of each layer


def test_masks_shrink_the_regions_below(drawn: list[tuple[Tensor, sampling.Sample]]) -> None:
    model, x = ViT(), torch.randn(16, 1, 8, 8)
    rules = {"": Mask(0.5), "blocks.0": Region(0.5), "blocks.1.mlp": Region(0.999)}
    make_region(model, rules)
    for _ in range(3):
        model(x).square().sum().backward()
    sizes = [sample.indices.numel() for _, sample in drawn[-2:]]
    assert sizes == [8, 4]
    assert all((scores > 0).sum() == 8 for scores, _ in drawn[-2:])


def test_masked_rows() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Identity()), torch.randn(10, 3, requires_grad=True)
    make_region(model, {"1": Mask(0.3)})
    seen: list[Tensor] = []
    model[0].register_full_backward_hook(lambda m, gi, go: seen.append(go[0]))
    y = model(x)
    assert torch.equal(y, model[0](x))
    cotangent = torch.randn(10, 4)
    y.backward(cotangent)
    alive = seen[0].norm(dim=1) > 0
    assert int(alive.sum()) == 3
    ratio = seen[0][alive] / cotangent[alive]
    assert (ratio >= 1).all()
    assert torch.allclose(ratio.amin(1), ratio.amax(1))


def kept_by(sketch: Region | Mask, cotangent: Tensor) -> set[int]:
    """Rows whose cotangent passes ``sketch`` in one backward pass."""
    model, x = mlp(4, 4, cotangent.shape[-1]), torch.randn(*cotangent.shape[:-1], 4)
    x.requires_grad_()
    make_region(model, {"": sketch})
    warm(model, x)
    (g,) = torch.autograd.grad(model(x), x, cotangent)
    return set(g.flatten(1).abs().amax(1).nonzero().flatten().tolist())


@pytest.mark.parametrize("kind", [Region, Mask])
def test_rows_that_alternate_are_not_kept_in_step(kind: type) -> None:
    alternating = {frozenset(range(0, 16, 2)), frozenset(range(1, 16, 2))}
    cotangent = torch.ones(16, 3)
    kept = {frozenset(kept_by(kind(0.5), cotangent)) for _ in range(12)}
    assert all(len(rows) == 8 for rows in kept)
    assert not kept & alternating
    natural = kind(0.5, design="systematic")
    assert frozenset(kept_by(natural, cotangent)) in alternating


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("cotangents", [1, 2])
def test_scores_are_norms_at_every_exponent(dtype: torch.dtype, cotangents: int) -> None:
    g = [torch.randn(9, 4, 3).to(dtype) for _ in range(cotangents)]
    wide = torch.stack([x.double() for x in g]).square().sum((0, 2, 3)).sqrt()
    smallest = -300 if dtype == torch.float64 else -36
    for exponent in (smallest, -30, -23, -20, -8, 0, 8, 19, 25, -smallest):
        found = rows.scores([x * 10.0**exponent for x in g], 1).double()
        rtol = 2e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(found / 10.0**exponent, wide, rtol=rtol, atol=0)


@pytest.mark.parametrize("exponent", [-30, 20])
@pytest.mark.parametrize("kind", [Region, Mask])
def test_draws_do_not_depend_on_the_exponent(kind: type, exponent: int) -> None:
    cotangent = torch.randn(16, 3) * torch.arange(16.0)[:, None]
    kept = []
    for factor in (1.0, 10.0**exponent):
        bs.seed(3)
        torch.manual_seed(3)
        kept.append(kept_by(kind(0.4), cotangent * factor))
    assert kept[0] == kept[1]
    assert 0 not in kept[0]  # a zero row is never drawn


@pytest.mark.parametrize("mode", MODES)
def test_all_zero_cotangent(mode: str) -> None:
    model, x = Block(8, 2), torch.randn(6, 3, 8)
    make_region(model, {"": Region(0.5, mode=mode)})
    for _ in range(2):  # before and after the first informative batch
        (model(x) * 0).sum().backward()
        assert all(p.grad is not None and (p.grad == 0).all() for p in model.parameters())
        model.zero_grad()
        warm(model, x)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_cotangents_reach_the_gradients(value: float) -> None:
    model, x = Block(8, 2), torch.randn(10, 3, 8)
    make_region(model, {"": Region(0.2)})
    for _ in range(2):
        cotangent = torch.randn(10, 3, 8)
        cotangent[6, 1, 2] = value
        model(x).backward(cotangent)
        assert not torch.isfinite(model.mlp.up.weight.grad).all()
        model.zero_grad()
        warm(model, x)


# --- loops ------------------------------------------------------------------------------------------


def test_retain_graph_draws_again() -> None:
    model, x = Block(8, 2), torch.randn(10, 3, 8)
    make_region(model, {"": Region(0.3)})
    warm(model, x)
    loss = model(x).square().sum()
    params = list(model.parameters())
    first = torch.autograd.grad(loss, params, retain_graph=True)
    second = torch.autograd.grad(loss, params)
    assert not torch.equal(first[2], second[2])


def test_double_backward_is_a_clear_error() -> None:
    model, x = Block(8, 2), torch.randn(10, 3, 8, requires_grad=True)
    make_region(model, {"": Region(0.3)})
    warm(model, x)
    (g,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        g.square().sum().backward()


def test_mask_double_backward_is_a_clear_error() -> None:
    model, x = mlp(4, 4, 4), torch.randn(6, 4, requires_grad=True)
    make_region(model, {"": Mask(0.5)})
    (g,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        g.square().sum().backward()


def test_gradients_accumulate() -> None:
    model, x = Block(8, 2), torch.randn(10, 3, 8)
    make_region(model, {"": Region(0.3)})
    warm(model, x)
    before = sampling.get_rng_state()
    parts = [named_gradients(model, model(x).square().sum()) for _ in range(2)]
    sampling.set_rng_state(before)
    for _ in range(2):
        model(x).square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, parts[0][name] + parts[1][name])


@pytest.mark.parametrize("row_dims", [1, 2])
def test_batch_size_may_vary_without_recompiling(row_dims: int) -> None:
    model = Feedforward(8)
    states = make_region(model, {"": Region(0.5, row_dims)})
    warm(model, torch.randn(8, 5, 8))
    with torch.compiler.set_stance("fail_on_recompile"):
        for n in (8, 5, 2, 11):
            model(torch.randn(n, 5, 8)).square().sum().backward()
        if row_dims == 2:
            model(torch.randn(3, 7, 8)).square().sum().backward()
    assert states[""].status == "active"


@pytest.mark.fast_cases("1-shape0", "1-shape1", "2-shape1", "2-shape2")
@pytest.mark.parametrize("shape", [(1, 5, 8), (0, 5, 8), (5, 1, 8), (1, 1, 8)])
@pytest.mark.parametrize("row_dims", [1, 2])
def test_extreme_batches(row_dims: int, shape: tuple[int, ...]) -> None:
    model = Feedforward(8)
    make_region(model, {"": Region(0.5, row_dims)})
    for _ in range(3):
        x = torch.randn(shape, requires_grad=True)
        model(x).square().sum().backward()
        assert x.grad.shape == shape
        assert model.up.weight.grad.shape == (16, 8)
    warm(model, torch.randn(4, 5, 8))
    model(torch.randn(shape)).square().sum().backward()


def test_frozen_parameters() -> None:
    model, x = Block(8, 2), torch.randn(6, 3, 8)
    model.attn.requires_grad_(False)
    states = make_region(model, {"": Region(0.5)})
    for _ in range(2):
        model(x).square().sum().backward()
    assert states[""].status == "active"
    assert model.attn.qkv.weight.grad is None
    assert model.mlp.up.weight.grad is not None


def test_parameter_hooks_see_the_gradients() -> None:
    model, x = mlp(4, 8, 2), torch.randn(10, 4)
    make_region(model, {"": Region(0.5)})
    warm(model, x)
    seen: list[Tensor] = []
    model[0].weight.register_hook(seen.append)
    model[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad))
    model(x).square().sum().backward()
    assert len(seen) == 2
    assert torch.equal(*seen)


def test_regions_of_one_class_share_a_graph_and_keep_their_own_budget(
    drawn: list[tuple[Tensor, sampling.Sample]],
) -> None:
    class Own(Feedforward):
        """No other test has captured it."""

    model, x = nn.Sequential(Own(8), Own(8), Own(8)), torch.randn(10, 4, 8)
    keeps = [0.2, 0.5, 0.8]
    make_region(model, {str(i): Region(k) for i, k in enumerate(keeps)})
    warm(model, x)
    assert len({id(runtime_of(block).runner) for block in model}) == 1
    model(x).square().sum().backward()
    # Without a residual path the dropped rows stay zero: each region shrinks those before it.
    assert [s.indices.numel() for _, s in drawn[-3:]] == [8, 4, 1]


def test_budget_may_change_without_recompiling(
    drawn: list[tuple[Tensor, sampling.Sample]],
) -> None:
    model, x = Block(8, 2), torch.randn(10, 3, 8)
    make_region(model, {"": Region(0.5)})
    warm(model, x)
    model._backsketch = Region(0.2)
    with torch.compiler.set_stance("fail_on_recompile"):
        model(x).square().sum().backward()
    assert drawn[-1][1].indices.numel() == 2


def test_a_region_used_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.block(x))

    model = Twice()
    make_region(model, {"block": Region(0.5)})
    bs.testing.check_unbiased(model, torch.randn(6, 3, 8), draws=150)


def test_copies_and_pickles() -> None:
    model, x = Block(8, 2), torch.randn(8, 3, 8)
    make_region(model, {"": Region(0.5)})
    warm(model, x)
    keys = list(model.state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(other, Block)
        assert list(other.state_dict()) == keys
        warm(other, x)
        assert state_of(other).status == "active"
        assert state_of(other) is not state_of(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)


def test_nested_arguments_and_outputs() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(
            self, inputs: dict[str, Tensor], scale: float, *, extra: tuple[Tensor, Tensor]
        ) -> dict[str, object]:
            h = self.a(inputs["x"]) * scale + inputs["table"]
            return {"h": h, "more": [h * extra[0], extra[1].sum() * self.a.bias.exp()], "n": 3}

    model = Nested()
    x, table, extra = torch.randn(8, 4), torch.randn(4), (torch.randn(8, 1), torch.randn(3))

    def gradients(with_rows: float) -> dict[str, Tensor]:
        """Of a loss in which the output without rows counts once."""
        out = model({"x": x, "table": table}, 2.0, extra=extra)
        assert out["n"] == 3
        ours = out["h"].sum() + out["more"][0].square().sum()
        return named_gradients(model, with_rows * ours + out["more"][1].sum())

    exact, shared = gradients(1.0), gradients(0.0)
    states = make_region(model, {"": Region(0.5)})
    assert torch.allclose(gradients(1.0)["a.bias"], exact["a.bias"], rtol=1e-4)
    assert states[""].status == "active", states[""].reason
    draws = torch.stack([gradients(1.0)["a.bias"] for _ in range(200)])
    assert draws.std(0).min() > 0
    assert (draws.mean(0) - exact["a.bias"]).norm() < 3 * draws.std(0).norm() / 200**0.5
    # What has no rows is neither drawn nor weighted.
    assert torch.allclose(gradients(1e-6)["a.bias"], shared["a.bias"], rtol=1e-3)


def test_a_shared_table_with_as_many_rows_as_the_batch() -> None:
    """A position table of length t = b looks like rows, until the graph shows that it is not."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block(8, 2)

        def forward(self, x: Tensor, table: Tensor) -> Tensor:
            return self.block(x + table)

    model = Table()
    states = make_region(model, {"": Region(0.5)})
    bs.testing.check_unbiased(model, torch.randn(5, 5, 8), torch.randn(5, 8), draws=150)
    model(torch.randn(5, 5, 8), torch.randn(5, 8)).square().sum().backward()
    assert states[""].status == "active"


def test_rows_of_zero_weight_cost_no_gradient_buffers() -> None:
    """Gradients of inputs keep the input's shape, with zeros in the rows that were dropped."""
    model, x = Attention(8, 2), torch.randn(10, 3, 8, requires_grad=True)
    make_region(model, {"": Region(0.3)})
    warm(model, x)
    x.grad = None
    model(x).square().sum().backward()
    assert int((x.grad.flatten(1).norm(dim=1) > 0).sum()) == 3


@pytest.mark.parametrize("mode", MODES)
def test_saved_bytes(mode: str) -> None:
    """Recompute mode saves the input only; save mode no more than the exact module."""
    model, x = Feedforward(64), torch.randn(32, 16, 64, requires_grad=True)

    def saved() -> int:
        storages: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = model(x)
        params = {p.untyped_storage().data_ptr() for p in model.parameters()}
        del y
        return sum(n for p, n in storages.items() if p not in params)

    exact = saved()
    make_region(model, {"": Region(0.5, mode=mode)})
    warm(model, x)
    x.grad = None
    sketched = saved()
    if mode == "recompute":
        assert sketched <= x.numel() * 4 + 64
    else:
        assert sketched <= exact + 64


class Halves(nn.Module):
    """Outputs that are views of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.linear(x).chunk(2, 1)


class Through(nn.Module):
    """An output that is the input itself."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(x).tanh(), x


@pytest.mark.parametrize("kind", [Halves, Through])
def test_outputs_that_share_memory_are_copied_and_unbiased(kind: type[nn.Module]) -> None:
    model, x = kind(), torch.randn(12, 4, requires_grad=True)
    expected = model(x)
    states = make_region(model, {"": Region(0.5)})
    for _ in range(2):
        outputs = model(x)
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected))
        sum(y.square().sum() for y in outputs).backward()
    assert [s.status for s in states.values()] == ["active"]
    bs.testing.check_unbiased(model, torch.randn(12, 4), draws=150)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_images_keep_their_layout(
    layout: torch.memory_format, drawn: list[tuple[Tensor, sampling.Sample]]
) -> None:
    """Convolutions answer in the layout of their input, cotangents included."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    state = make_region(model, {"": Region(keep=0.5)})[""]
    x = torch.randn(12, 3, 6, 6).contiguous(memory_format=layout)
    warm(model, x)
    assert state is not None
    assert state.status == "active", state.reason
    drawn.clear()
    y = model(x)
    cotangent = torch.randn_like(y)
    found = torch.autograd.grad(y, list(model.parameters()), cotangent)
    ((_, sample),) = drawn
    with bs.exact(model):
        kept = cotangent[sample.indices] * sample.weights.view(-1, 1, 1, 1)
        expected = torch.autograd.grad(model(x[sample.indices]), list(model.parameters()), kept)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_known_call_does_not_enter_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = mlp(4, 4), torch.randn(6, 4)
    make_region(model, {"": Region(0.5)})
    warm(model, x)
    monkeypatch.setattr(runtime_of(model).runner, "call", None)
    for n in (6, 9, 5):
        assert model(torch.randn(n, 4)).shape == (n, 4)


class Switch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.factor, self.nonlinear = nn.Linear(4, 4), 1.0, torch.tanh

    def forward(self, x: Tensor) -> Tensor:
        return self.nonlinear(self.linear(x)) * self.factor


def test_a_changed_attribute_is_noticed() -> None:
    model, x = Switch(), torch.randn(6, 4)
    make_region(model, {"": Region(0.5)})
    for change in ({}, {"factor": 2.0}, {"nonlinear": torch.relu}, {"linear": nn.Linear(4, 4)}):
        for name, value in change.items():
            setattr(model, name, value)
        for _ in range(2):
            assert torch.equal(model(x), Switch.forward(model, x))


def test_states_do_not_leak_out_of_a_failing_forward() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("the user's own error")

    model = Fails()
    make_region(model, {"": Region(0.5)})
    with pytest.raises(KeyError, match="own error"):
        model(torch.randn(4, 3))
    assert current() is None
    assert not inside()


def test_no_mark_stays_on_the_users_tensors() -> None:
    model, x = mlp(4, 4), torch.randn(6, 4)
    make_region(model, {"": Region(0.5)})
    warm(model, x)
    assert not x.__dict__


def _steps(model: nn.Module, x: Tensor, num: int, found: list[Tensor]) -> None:
    for _ in range(num):
        model.zero_grad()
        model(x).square().sum().backward()
    found += [p.grad.clone() for p in model.parameters()]


def test_two_threads_train_two_regions_at_once() -> None:
    """Both regions are of one class and share a graph; one sketches, the other keeps nearly all."""

    class Shared(Feedforward):
        """No other test has captured it."""

    blocks, x = [Shared(8), Shared(8)], torch.randn(64, 6, 8)
    exact = [[*torch.autograd.grad(b(x).square().sum(), list(b.parameters()))] for b in blocks]
    for block, keep in zip(blocks, (0.25, 1 - 1e-9)):
        make_region(block, {"": Region(keep)})
    scores = [record_scores(block, 200) for block in blocks]
    found: list[list[Tensor]] = [[], []]
    threads = [threading.Thread(target=_steps, args=(b, x, 60, f)) for b, f in zip(blocks, found)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [state_of(block).status for block in blocks] == ["active", "active"]
    # Each one's scores are those of its own cotangents: nothing was written to the other's state.
    for block, recorded in zip(blocks, scores):
        with torch.no_grad():
            expected = 2 * Shared.forward(block, x).flatten(1).norm(dim=1)
        assert len(recorded) >= 58
        assert all(torch.allclose(s.float(), expected, rtol=1e-4) for s in recorded)
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in zip(found[1], exact[1]))
    assert not all(torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in zip(found[0], exact[0]))


def test_a_call_belongs_to_its_thread() -> None:
    seen: list[bool] = []
    thread = threading.Thread(target=lambda: seen.append(inside()))

    def enter() -> bool:
        thread.start()
        thread.join()
        return inside()

    assert run_as(Call(runtime_of(nn.Identity())), enter)
    assert seen == [False]


def test_scores_are_recorded_on_request() -> None:
    model, x = mlp(4, 4), torch.randn(6, 4)
    make_region(model, {"": Region(0.5)})
    warm(model, x)
    recorded = record_scores(model, 2)
    for _ in range(3):
        model(x).backward(torch.ones(6, 4))
    assert [s.tolist() for s in recorded] == [[2.0] * 6] * 2
    ignore_scores(model)
    model(x).backward(torch.ones(6, 4))
    assert len(recorded) == 2


def test_a_captured_batch_norm_is_computed_by_what_eager_code_calls(monkeypatch):
    """On a GPU that is a kernel of cuDNN, where the captured operator is another one."""
    called = []
    eager = compilers.batch_norm_with_statistics

    def watched(*arguments):
        called.append(arguments)
        return eager(*arguments)

    monkeypatch.setattr(compilers, "batch_norm_with_statistics", watched)
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU())
    twin, x = copy.deepcopy(model), torch.randn(8, 6)
    bs.sketch_(model, bs.Region(keep=1.0, save="int8"))
    for _ in range(3):
        y = model(x)
        y.sum().backward()
        assert torch.equal(y, twin(x))
    assert called
    assert torch.equal(model[1].running_var, twin[1].running_var)


def test_rows_of_a_region_in_16_bits_keep_the_precision_of_their_weights():
    kept = torch.ones(3, 4, dtype=torch.bfloat16) * 1.0078125
    weights = torch.tensor([1.0, 1.4160156, 3.0039062])  # between two numbers of bfloat16
    expected = (kept.float() * weights[:, None]).bfloat16()
    assert torch.equal(program._weigh(kept.clone(), Layout(0), weights), expected)
    assert not torch.equal(kept * weights.bfloat16()[:, None], expected)
