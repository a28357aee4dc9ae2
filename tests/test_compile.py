"""``torch.compile``, activation checkpointing, autocast, accumulation: the gradient stays unbiased.

Compilers move and repeat work. A draw that is repeated in the backward pass pairs row i of one operand
with row j of another: no error, right shapes, wrong gradients. So everything here is statistical.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import backsketch as bs
from cases import FAMILIES
from helpers import Called, Net, gradients, images
from mutations import drop_the_weights, mutation_of, redraw_the_signs

# Warnings of PyTorch's compiler about PyTorch.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]

INDUCTOR = "inductor"
# Everything of the default backend but the generation of C++: graph capture, decompositions, the
# min-cut partitioner. It is where randomness can go wrong, and compiles in a second.
PARTITIONED = "aot_eager_decomp_partition"

DRAWN_IN_THE_FORWARD = [e for e in FAMILIES if e.needs_forward_seed]
# One for each way in which a draw can go wrong: a mask, rows chosen in the backward pass, rows chosen
# in the forward pass, a seed that the backward pass needs again.
KINDS = [
    bs.Elements(keep=0.5), bs.Rows(keep=0.5), bs.StoredRows(keep=0.5), bs.Projection(keep=0.5)
]  # fmt: skip
every_family = pytest.mark.parametrize("estimator", FAMILIES, ids=str)
every_kind = pytest.mark.parametrize("estimator", KINDS, ids=str)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    """Three layers that share one input, and a fourth: what attention does to its projections."""

    def __init__(self, dim: int = 6) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(torch.tanh(self.q(x)) * self.k(x) + self.v(x))


def small() -> nn.Module:
    """A convolution and a layer, which compile in a third of the time that ``Net`` takes."""
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Tanh(), nn.Linear(64, 3))


class Blocks(nn.Module):
    """Two blocks, each under a checkpoint, or both under one, or none."""

    def __init__(self, kind: str = "plain") -> None:
        super().__init__()
        self.kind = kind
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "plain":
            return self.blocks(x)
        if self.kind == "around both":
            return checkpoint(self.blocks, x, use_reentrant=False)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.kind == "reentrant")
        return x


def compiled(model: nn.Module, backend: str = PARTITIONED, **options: Any) -> Callable[..., Any]:
    return torch.compile(model, fullgraph=True, backend=backend, **options)


def check(model: nn.Module, call: Callable[..., Any] | None, x: Tensor, draws: int) -> None:
    """Unbiased against the plain model in eager; after the first step nothing recompiles."""
    plain = copy.deepcopy(model)
    bs.restore_(plain)
    if isinstance(plain, Blocks):
        plain.kind = "plain"
    tested = Called(model, call)
    if call is not None:
        tested(x.clone().requires_grad_()).sum().backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        bs.testing.check_unbiased(tested, x, draws=draws, reference=Called(plain))


# --------------------------------------------------------------------------------------------------
# Compiled, every estimator at every kind of layer
# --------------------------------------------------------------------------------------------------


def check_compiled(model: nn.Module, sketch: Any, backend: str) -> None:
    """Unbiased, in one graph, and without a second compilation."""
    bs.sketch_(model, sketch)
    check(model, compiled(model, backend), images(), draws=100)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.fast_cases("projection:keep=0.5,kind=srht")
@every_family
def test_compiled_gradients_are_unbiased_in_one_graph_without_recompiling(estimator):
    check_compiled(Net(4, 6), estimator, PARTITIONED)


# The default backend takes two seconds for each of its kernels: several estimators in one model.
MIXED = {
    "small": (small, {"0": bs.Projection(keep=0.5), "3": bs.Int8()}),
    "one": (lambda: Net(4, 6), {
        "stem": bs.Columns(keep=0.5), "pointwise": bs.Rows(keep=0.5),
        "attention*": bs.Projection(keep=0.5, kind="srht"), "head.0": bs.Elements(keep=0.5),
        "head.2": bs.Quantized(bits=2),
    }),
    "other": (lambda: Net(4, 6), {
        "stem": bs.StoredRows(keep=0.5), "pointwise": bs.Quantized(bits=2),
        "attention*": bs.LowRank(keep=0.5, method="subspace"), "head.0": bs.Float8(),
        "head.2": bs.LowRank(keep=0.5, method="svd"),
    }),
}  # fmt: skip


@pytest.mark.fast_cases("small")
@pytest.mark.parametrize("name", MIXED)
def test_the_default_backend_leaves_gradients_unbiased_in_one_graph(name):
    build, rules = MIXED[name]
    check_compiled(build(), rules, INDUCTOR)


@pytest.mark.fast_cases("rows:keep=0.5", "projection:keep=0.5")
@every_kind
def test_a_mutation_of_each_kind_is_noticed_through_the_compiler(estimator, monkeypatch):
    model = small()
    bs.sketch_(model, estimator)
    mutation_of(estimator)(monkeypatch)
    with pytest.raises(AssertionError, match="is biased"):
        check(model, compiled(model), images(), draws=100)


@pytest.mark.fast_cases("projection:keep=0.5")
@pytest.mark.parametrize("estimator", DRAWN_IN_THE_FORWARD, ids=str)
def test_layers_that_share_an_input_are_unbiased_compiled(estimator):
    model = Block()
    bs.sketch_(model, estimator)
    check(model, compiled(model), torch.randn(10, 6), draws=100)


def test_a_draw_that_is_redone_in_the_compiled_backward_is_noticed(monkeypatch):
    model = Block()
    bs.sketch_(model, bs.Projection(keep=0.5))
    redraw_the_signs(monkeypatch)
    with pytest.raises(AssertionError, match="is biased"):
        check(model, compiled(model), torch.randn(10, 6), draws=100)


def test_compiled_forward_values_are_those_of_the_unconverted_model():
    model, x = Net(4, 6), images()
    call = compiled(model)
    expected = call(x)
    bs.sketch_(model, {"head.*": bs.Projection(keep=0.5), "": bs.Rows(keep=0.5)})
    assert torch.equal(call(x), expected)


@pytest.mark.fast_cases("stored_rows:keep=0.5")
@pytest.mark.parametrize("estimator", [bs.Rows(keep=0.5), bs.StoredRows(keep=0.5)], ids=str)
def test_a_compiled_step_draws_anew_and_a_saved_stream_repeats_it(estimator):
    model, x = small(), images()
    bs.sketch_(model, estimator)
    call = compiled(model)

    def gradient() -> Tensor:
        return torch.autograd.grad(call(x).square().sum(), model[0].weight)[0]

    gradient()
    state = bs.get_rng_state()
    several = [gradient() for _ in range(8)]  # of six rows there are few samples
    assert not all(torch.equal(several[0], other) for other in several[1:])
    bs.set_rng_state(state)
    for earlier in several:
        assert torch.equal(gradient(), earlier)


def test_the_global_stream_is_untouched_by_a_compiled_step():
    model, x = small(), images()
    bs.sketch_(model, bs.Projection(keep=0.5))
    call = compiled(model)
    state = torch.get_rng_state()
    call(x).sum().backward()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.fast_cases("None-rows:keep=0.5")
@pytest.mark.parametrize(
    ("dynamic", "estimator"), [*zip(itertools.cycle([True, None]), FAMILIES)], ids=str
)
def test_batch_sizes_may_change_without_a_new_graph_for_each(dynamic, estimator):
    """Between 9 and 15 neither PyTorch's convolutions nor powers of two (srht) cross a boundary."""
    model = nn.Sequential(
        nn.Conv2d(2, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 4), nn.ReLU(), nn.Linear(4, 3)
    )  # fmt: skip
    bs.sketch_(model, estimator)
    call = compiled(model, dynamic=dynamic)
    for n in (9, 12):
        call(images(n, (2, 3, 4)).requires_grad_()).sum().backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (10, 14, 15):
            x = images(n, (2, 3, 4)).requires_grad_()
            call(x).sum().backward()
            assert x.grad.shape == x.shape
            assert bool(x.grad.isfinite().all())


KEEPS = [0.5, 0.25, 0.7, 0.4]
LADDERS = [
    [bs.Elements(keep=k) for k in KEEPS],
    [bs.Rows(keep=k) for k in KEEPS],
    [bs.Columns(keep=k) for k in KEEPS],
    [bs.LowRank(keep=k, method="subspace") for k in KEEPS],
    [bs.StoredRows(keep=k) for k in KEEPS],
    [bs.Projection(keep=k, kind="srht") for k in KEEPS],
    [bs.Quantized(bits=b) for b in (1, 2, 4, 8)],
]


@pytest.mark.fast_cases("Rows")
@pytest.mark.parametrize("ladder", LADDERS, ids=lambda ladder: type(ladder[0]).__name__)
def test_a_compiled_model_may_be_sketched_anew_with_one_graph_for_each_setting(ladder):
    """A float attribute that changes becomes a symbol in the compiler: ``keep`` must stay a constant."""
    model, x = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)), torch.randn(12, 6)
    call = compiled(model)
    for estimator in ladder:
        bs.sketch_(model, estimator)
        call(x).sum().backward()
    assert counters["stats"]["unique_graphs"] == len(ladder)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for estimator in reversed(ladder):
            bs.sketch_(model, estimator)
            call(x).sum().backward()


def test_two_models_of_one_class_compile_with_different_settings():
    x = torch.randn(12, 6)
    for keep in (0.5, 0.3):
        model = Block()
        rules = {"q": bs.Rows(keep=keep), "k": bs.Rows(keep=keep / 2)}
        bs.sketch_(model, {**rules, "": bs.StoredRows(keep=keep)})
        check(model, compiled(model), x, draws=60)


@pytest.mark.slow
@pytest.mark.parametrize("estimator", [
    bs.Rows(keep=0.4), bs.StoredRows(keep=0.4)
], ids=str)  # fmt: skip
def test_gradients_are_unbiased_at_a_batch_size_that_was_never_compiled(estimator):
    model = Blocks()
    bs.sketch_(model, estimator)
    call = compiled(model, dynamic=True)
    for n in (12, 20):
        call(torch.randn(n, 6).requires_grad_()).sum().backward()
    check(model, call, torch.randn(9, 6), draws=300)


def test_batch_sizes_may_change_with_the_default_backend():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    bs.sketch_(model, {"0": bs.StoredRows(keep=0.4), "2": bs.Rows(keep=0.4)})
    call = compiled(model, INDUCTOR, dynamic=True)
    call(torch.randn(12, 6).requires_grad_()).sum().backward()
    check(model, call, torch.randn(9, 6), draws=200)


@pytest.mark.fast_cases(PARTITIONED)
@pytest.mark.parametrize("backend", [INDUCTOR, PARTITIONED])
def test_exact_works_on_a_compiled_model_and_both_ways_stay_compiled(backend):
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(12, 6)
    call = compiled(model, backend)

    def ours() -> list[Tensor]:
        return gradients(model, x, call=call)

    plain = ours()
    bs.sketch_(model, bs.Rows(keep=0.5))
    sketched = ours()
    with bs.exact(call):
        exact = ours()
    for a, b, c in zip(plain, exact, sketched):
        torch.testing.assert_close(a, b)
        assert a.ndim == 1 or not torch.allclose(a, c)  # biases are exact, weights are not
    with torch._dynamo.config.patch(error_on_recompile=True):
        ours()
        with bs.exact(model):
            ours()
        ours()


def test_eval_and_no_grad_bypass_the_sketch_in_a_compiled_model():
    model, x = small(), images()
    bs.sketch_(model, bs.StoredRows(keep=0.5))
    call = compiled(model)
    expected = call(x)
    state = bs.get_rng_state()
    with torch.no_grad():
        assert torch.equal(call(x), expected)
    model.eval()
    assert torch.equal(call(x), expected)
    assert bs.get_rng_state() == state


def test_double_backward_of_a_compiled_model_is_an_error():
    model, x = nn.Sequential(nn.Linear(6, 8), nn.Tanh()), torch.randn(12, 6, requires_grad=True)
    bs.sketch_(model, bs.Rows(keep=0.5))
    (g,) = torch.autograd.grad(compiled(model)(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        g.square().sum().backward()


def test_a_whole_training_step_with_its_optimizer_runs_compiled():
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    bs.sketch_(model, bs.Rows(keep=0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    call = compiled(lambda x, y: (model(x) - y).square().mean())
    x = torch.randn(64, 6)
    target, losses = x[:, :3].sin(), []
    for _ in range(150):
        optimizer.zero_grad()
        loss = call(x, target)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2
    assert counters["stats"]["unique_graphs"] == 1


# --------------------------------------------------------------------------------------------------
# Activation checkpointing
# --------------------------------------------------------------------------------------------------

CHECKPOINTS = ["around both", "reentrant", "not reentrant"]
PROJECTION = bs.Projection(keep=0.5)
OTHERS = [e for e in FAMILIES if e != PROJECTION]


@pytest.mark.fast_cases("projection:keep=0.5", "rows:keep=0.5", "quantized:bits=2")
@pytest.mark.parametrize(
    ("kind", "estimator"),
    [*((kind, PROJECTION) for kind in CHECKPOINTS), *zip(itertools.cycle(CHECKPOINTS), OTHERS)],
    ids=str,
)
def test_checkpointed_gradients_are_unbiased_in_eager(kind, estimator):
    model = Blocks(kind)
    bs.sketch_(model, estimator)
    check(model, None, torch.randn(10, 6), draws=100)


@pytest.mark.fast_cases("around both-projection:keep=0.5")
@pytest.mark.parametrize("estimator", KINDS[2:], ids=str)
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpointed_gradients_are_unbiased_compiled(kind, estimator):
    model = Blocks(kind)
    bs.sketch_(model, estimator)
    check(model, compiled(model), torch.randn(10, 6), draws=100)
    assert not counters["graph_break"]


@pytest.mark.slow
def test_checkpointed_gradients_are_unbiased_with_the_default_backend():
    model = Blocks("not reentrant")
    bs.sketch_(model, {"*.q": bs.Projection(keep=0.5), "": bs.StoredRows(keep=0.5)})
    check(model, compiled(model, INDUCTOR), torch.randn(10, 6), draws=100)


@pytest.mark.fast_cases("around both")
@pytest.mark.parametrize("call", [lambda m: None, compiled], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_under_a_checkpoint_too_a_mutation_is_noticed(kind, call, monkeypatch):
    model = Blocks(kind)
    bs.sketch_(model, {"*.q": bs.Projection(keep=0.5), "": bs.StoredRows(keep=0.5)})
    drop_the_weights(monkeypatch)
    redraw_the_signs(monkeypatch)
    with pytest.raises(AssertionError, match="is biased"):
        check(model, call(model), torch.randn(10, 6), draws=100)


@pytest.mark.fast_cases("0.4-projection:keep=0.5")
@pytest.mark.parametrize("estimator", KINDS[2:], ids=str)
@pytest.mark.parametrize("budget", [0.4, 0.9])
def test_a_budget_that_makes_the_compiler_recompute_leaves_gradients_unbiased(budget, estimator):
    model = Blocks()
    bs.sketch_(model, estimator)
    with torch._functorch.config.patch(activation_memory_budget=budget):
        check(model, compiled(model), torch.randn(10, 6), draws=100)


# --------------------------------------------------------------------------------------------------
# Autocast
# --------------------------------------------------------------------------------------------------


def autocast(model: nn.Module) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x)

    return call


def mean_gradients(model: nn.Module, call: Callable[..., Any], x: Tensor, draws: int):
    """Mean and standard error of the gradients of a fixed linear function of the output."""
    parameters = list(model.parameters())
    cotangent = torch.randn(call(x).shape, generator=torch.Generator().manual_seed(0))
    total = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
    squares = [torch.zeros_like(t) for t in total]
    for _ in range(draws):
        y = call(x).float()
        for t, s, g in zip(total, squares, torch.autograd.grad(y, parameters, cotangent)):
            t += g
            s += g.double().square()
    means = [t / draws for t in total]
    errors = [((s / draws - m * m).clamp(min=0) / draws).sqrt() for s, m in zip(squares, means)]
    return means, errors


def check_low_precision(model: nn.Module, call: Callable[..., Any], x: Tensor, draws: int) -> None:
    """The mean against the exact gradient of the same program, up to the rounding of bfloat16.

    The same program: a compiler that rounds elsewhere flips a ReLU, and moves the exact gradient.
    """
    with bs.exact(model):
        exact, _ = mean_gradients(model, call, x, 1)
    call(x).float().sum().backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        means, errors = mean_gradients(model, call, x, draws)
    for (name, _), m, e, target in zip(model.named_parameters(), means, errors, exact):
        rounding = 4 * 2**-8 * float(target.abs().max()) + 1e-6
        assert bool(((m - target).abs() < 5.5 * e + rounding).all()), f"{name} is biased"


@pytest.mark.fast_cases("rows:keep=0.5", "projection:keep=0.5")
@every_family
def test_autocast_gradients_are_unbiased_in_eager(estimator):
    model = Net(4, 6)
    bs.sketch_(model, estimator)
    check_low_precision(model, autocast(model), images(), draws=125)


@pytest.mark.fast_cases("projection:keep=0.5")
@pytest.mark.parametrize("estimator", KINDS[1::2], ids=str)
def test_autocast_gradients_are_unbiased_compiled(estimator):
    model = small()
    bs.sketch_(model, estimator)
    call = torch.compile(autocast(model), fullgraph=True, backend=PARTITIONED)
    check_low_precision(model, call, images(), draws=125)


@pytest.mark.slow
def test_autocast_gradients_are_unbiased_with_the_default_backend():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    bs.sketch_(model, {"0": bs.StoredRows(keep=0.5), "3": bs.Rows(keep=0.5)})
    call = torch.compile(autocast(model), fullgraph=True)
    check_low_precision(model, call, images(), draws=300)


@pytest.mark.fast_cases("rows:keep=0.5", "projection:keep=0.5")
@every_kind
def test_in_autocast_a_mutation_is_noticed(estimator, monkeypatch):
    model = Net(4, 6)
    bs.sketch_(model, estimator)
    mutation_of(estimator)(monkeypatch)
    with pytest.raises(AssertionError, match="is biased"):
        check_low_precision(model, autocast(model), images(), draws=125)


@every_family
def test_autocast_forward_values_are_those_of_the_unconverted_model(estimator):
    model, x = Net(4, 6), images()
    expected = autocast(model)(x)
    bs.sketch_(model, estimator)
    y = autocast(model)(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)


@every_family
def test_a_backward_pass_inside_the_autocast_block_works_too(estimator):
    model, x = Net(4, 6), images()
    bs.sketch_(model, estimator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(x).float().square().mean()
        loss.backward()
    for p in model.parameters():
        assert p.grad.dtype == torch.float32
        assert bool(p.grad.isfinite().all())


def test_autocast_leaves_float64_alone():
    layer = nn.Linear(6, 4).double()
    bs.sketch_(layer, bs.Rows(keep=0.5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(8, 6, dtype=torch.float64)).dtype == torch.float64


# --------------------------------------------------------------------------------------------------
# Accumulation, saved-tensor hooks
# --------------------------------------------------------------------------------------------------


def accumulated(model: nn.Module, parts: list[Tensor]) -> Tensor:
    model.zero_grad(set_to_none=True)
    for part in parts:
        model(part).square().mean().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()]).double()


def check_accumulation(model: nn.Module, draws: int = 150) -> None:
    parts = [torch.randn(6, 5), torch.randn(9, 5), torch.randn(4, 5)]
    with bs.exact(model):
        exact = accumulated(model, parts)
    moments = bs.testing.Moments(exact)
    for _ in range(draws):
        moments.add(accumulated(model, parts))
    deviation = (moments.first / draws).abs()
    error = (moments.second / draws**2).sqrt()
    assert bool((deviation < 5.5 * error + 1e-5).all()), "the sum is biased"


@pytest.mark.fast_cases("rows:keep=0.5", "projection:keep=0.5")
@every_family
def test_the_sum_over_micro_batches_is_unbiased(estimator):
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    bs.sketch_(model, estimator)
    check_accumulation(model)


@pytest.mark.fast_cases("rows:keep=0.5", "projection:keep=0.5")
@every_kind
def test_a_mutation_is_noticed_in_the_sum_over_micro_batches(estimator, monkeypatch):
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    bs.sketch_(model, estimator)
    mutation_of(estimator)(monkeypatch)
    with pytest.raises(AssertionError, match="is biased"):
        check_accumulation(model)


def test_micro_batches_draw_independently():
    layer, x = nn.Linear(6, 6), torch.randn(32, 6)
    bs.sketch_(layer, bs.Rows(keep=0.25, design="permuted"))
    grads = [torch.autograd.grad(layer(x).sum(), layer.weight)[0] for _ in range(20)]
    assert len({g.numpy().tobytes() for g in grads}) == 20


@every_family
def test_saved_tensors_may_be_moved_by_hooks(estimator):
    model, x = Net(4, 6), images()
    bs.sketch_(model, estimator)
    results = []
    for hooked in (False, True):
        bs.seed(1)
        if hooked:
            with torch.autograd.graph.save_on_cpu():
                y = model(x).square().sum()
        else:
            y = model(x).square().sum()
        results.append(torch.autograd.grad(y, list(model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*results))


@every_family
def test_all_that_is_saved_goes_through_the_hooks(estimator):
    """Nothing hides on the context: what the hooks replace is what the backward uses."""
    layer, x = nn.Linear(6, 4), torch.randn(8, 6)
    bs.sketch_(layer, estimator)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, torch.zeros_like):
        y = layer(x)
    (gradient,) = torch.autograd.grad(y.sum(), layer.weight)
    assert not gradient.any()


def test_seeds_of_one_step_are_all_different():
    """No two sites share noise, in eager or compiled, though they share inputs and cotangents."""
    model, x = Blocks(), torch.randn(10, 6)
    bs.sketch_(model, bs.StoredRows(keep=0.5))
    call = compiled(model)
    call(x).sum().backward()
    before = bs.get_rng_state()["counter"]
    call(x).sum().backward()
    compiled_seeds = bs.get_rng_state()["counter"] - before
    model(x).sum().backward()
    eager_seeds = bs.get_rng_state()["counter"] - before - compiled_seeds
    assert eager_seeds == 16  # eight layers, forward and backward
    assert compiled_seeds >= 8  # those of the backward pass that nothing uses may go
