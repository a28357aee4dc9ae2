"""Regions whose backward products run in 8 bits: unbiased for any module that can be captured."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import backsketch as bs
from backsketch.regions import arithmetic, capture, low_precision, runner, share, state_of
from backsketch.regions.linearity import check_linear
from backsketch.regions.state import RunsExactly, runtime_of
from backsketch.regions.structure import Coupled
from helpers import named_gradients
from mutations import halve_the_dither_of_products
from region_models import CNN, GPT, Block, Fourier, GroupedExperts, ViT, mlp

EVERY = bs.Region(keep=1.0, arithmetic="int8")


@pytest.fixture(autouse=True)
def products_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small products are rounded too, in graphs that no other test has captured or will run."""
    monkeypatch.setattr(share, "_LEAST_WORK", 0)
    monkeypatch.setattr(share, "_LEAST_WIDTH", 0)
    monkeypatch.setattr(runner, "_RUNNERS", {})


def batch_norm_net() -> nn.Module:
    """Convolutions of both kinds, and statistics that couple the rows."""
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip


class Kernels(nn.Module):
    """Convolutions with strides, groups, dilation and kernels of one position, and a transposed one."""

    def __init__(self) -> None:
        super().__init__()
        self.strided = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(6, 8, 3, padding=2, dilation=2, groups=2)
        self.one = nn.Conv2d(8, 6, 1)
        self.back = nn.ConvTranspose2d(6, 3, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.back(self.one(self.grouped(self.strided(x).relu()).relu()).relu())


class Transposed(nn.Module):
    """The layout of GPT-2: ``x @ w`` with a weight that is stored the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(8, 5)), nn.Parameter(torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.b, x.tanh(), self.w).sin()


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], bs.Region]] = {
    "batch norm": (batch_norm_net, lambda: torch.randn(6, 2, 6, 6), EVERY),
    "vit": (ViT, lambda: torch.randn(6, 1, 8, 8), EVERY),
    "gpt": (GPT, lambda: torch.randint(11, (6, 5)), EVERY),
    "kernels": (Kernels, lambda: torch.randn(4, 4, 6, 6), EVERY),
    "kernels, channels last": (
        lambda: Kernels().to(memory_format=torch.channels_last),
        lambda: torch.randn(4, 4, 6, 6).to(memory_format=torch.channels_last),
        EVERY,
    ),
    "transposed": (Transposed, lambda: torch.randn(10, 8), EVERY),
    "experts": (GroupedExperts, lambda: torch.randn(12, 8), EVERY),
    "convolutions": (CNN, lambda: torch.randn(6, 2, 8, 8), EVERY),
    "fourier": (
        lambda: Fourier(16),
        lambda: torch.randn(6, 8, 16),
        bs.Region(keep=0.5, arithmetic="int8"),
    ),
    "recomputed": (
        lambda: Block(8, 2, 0.2),
        lambda: torch.randn(5, 4, 8),
        bs.Region(keep=1.0, mode="recompute", arithmetic="int8"),
    ),
    "kept rows": (
        lambda: Block(8, 2),
        lambda: torch.randn(6, 4, 8),
        bs.Region(keep=0.5, arithmetic="int8"),
    ),
    "kept rows, recomputed": (
        lambda: Block(8, 2),
        lambda: torch.randn(6, 4, 8),
        bs.Region(keep=0.5, mode="recompute", arithmetic="int8"),
    ),
}


SLOW = {"vit", "kernels", "transposed", "convolutions", "recomputed", "kept rows, recomputed"}


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.slow] if c in SLOW else []) for c in CASES]
)
def test_unbiased(case: str) -> None:
    build, inputs, region = CASES[case]
    model, x = build(), inputs()
    expected = model(x)
    bs.sketch_(model, region)
    if case != "recomputed":  # whose dropout differs from one pass to the next
        assert torch.equal(model(x), expected)
    for _ in range(2):
        model(x).square().mean().backward()
    assert state_of(model).status == "active", state_of(model).reason
    report = bs.testing.check_unbiased(model, x, draws=80)
    assert max(report.relative_variance.values()) > (1e-6 if region.keep == 1 else 0.05)


def test_the_variance_is_that_of_8_bits() -> None:
    model = ViT(16)
    bs.sketch_(model, EVERY)
    report = bs.testing.check_unbiased(model, torch.randn(16, 1, 8, 8), draws=60)
    assert max(report.relative_variance.values()) < 0.01


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types(dtype: torch.dtype) -> None:
    """The mean is at most twice as far from float64 as PyTorch's own gradient in that type."""
    model, x = mlp(8, 16, 4).to(dtype), torch.randn(12, 8, dtype=dtype)
    exact = named_gradients(model, model(x).square().sum())
    wide = copy.deepcopy(model).double()
    truth = named_gradients(wide, wide(x.double()).square().sum())
    bs.sketch_(model, EVERY)
    draws = [named_gradients(model, model(x).square().sum()) for _ in range(200)]
    for name, g in truth.items():
        found = torch.stack([d[name].double() for d in draws])
        noise = found.std(0).norm() / len(draws) ** 0.5
        own = (exact[name].double() - g).norm()
        assert (found.mean(0) - g).norm() <= 2 * own + 3 * noise + 1e-12, name


def assert_mean(
    exact: dict[str, Tensor], draw: Callable[[], dict[str, Tensor]], rounding: float
) -> None:
    """The mean of a hundred draws is the exact gradient, within its noise; no two draws are alike."""
    draws = [draw() for _ in range(101)][1:]
    for name, g in exact.items():
        found = torch.stack([d[name] for d in draws])
        noise = found.std(0).norm() / len(draws) ** 0.5
        assert found.dtype == g.dtype
        assert (found.mean(0) - g).norm() <= rounding * g.norm() + 2 * noise, name
    assert not torch.equal(draws[0][next(iter(exact))], draws[1][next(iter(exact))])


@pytest.mark.parametrize("build", [lambda: mlp(8, 16, 4), GroupedExperts])
def test_half_a_dither_is_caught(
    build: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = build(), torch.randn(12, 8)
    bs.sketch_(model, EVERY)
    halve_the_dither_of_products(monkeypatch)
    with pytest.raises(AssertionError, match="biased"):
        bs.testing.check_unbiased(model, x, draws=150)


def test_statistics_of_the_batch_move_once_a_step() -> None:
    model, x = batch_norm_net(), torch.randn(6, 2, 6, 6)
    bs.sketch_(model, EVERY)
    for _ in range(3):
        model(x).square().mean().backward()
    assert int(model[1].num_batches_tracked) == 3


def rewritten(monkeypatch: pytest.MonkeyPatch) -> list[fx.GraphModule]:
    """The graphs that are put in 8 bits from now on."""
    graphs: list[fx.GraphModule] = []
    rewrite = arithmetic.in_8_bits

    def watched(module: fx.GraphModule) -> arithmetic.Rounded:
        result = rewrite(module)
        graphs.append(result.module)
        return result

    monkeypatch.setattr("backsketch.regions.capture.in_8_bits", watched)
    return graphs


def test_one_call_for_both_products_and_the_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = rewritten(monkeypatch)
    model = mlp(8, 8, 8)
    bs.sketch_(model, EVERY)
    model(torch.randn(6, 8, requires_grad=True)).sum().backward()
    calls = [n for n in graphs[0].graph.nodes if n.target is low_precision.vjps_operator]
    assert len(calls) == 2
    assert all(c.args[1] is not None and c.args[2] is not None and c.args[7] for c in calls)
    assert len({c.args[6] for c in calls}) == 2
    left = {n.target for n in graphs[0].graph.nodes} & {torch.ops.aten.mm.default}
    assert not left


class Experts(nn.Module):
    """Two experts whose weights are one tensor, each with half of the rows' features."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(2, 4, 6)), nn.Parameter(torch.randn(2, 6, 3))

    def forward(self, x: Tensor) -> Tensor:
        parts = x.unflatten(1, (2, 4)).transpose(0, 1)
        return torch.bmm(torch.bmm(parts, self.up).tanh(), self.down).transpose(0, 1)


def test_batched_products(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = rewritten(monkeypatch)
    model, x = Experts(), torch.randn(6, 8)
    bs.sketch_(model, EVERY)
    bs.testing.check_unbiased(model, x, draws=80)
    assert not graphs[0].graph.find_nodes(op="call_function", target=torch.ops.aten.bmm.default)
    calls = graphs[0].graph.find_nodes(op="call_function", target=low_precision.bmm_operator)
    assert len(calls) == 4
    assert len({c.args[4] for c in calls}) == 4


def test_slices_have_roundings_of_their_own() -> None:
    a, b = torch.rand(1, 8, 8).expand(2, -1, -1), torch.rand(1, 8, 8).expand(2, -1, -1)
    for by_row in (True, False):
        first, second = low_precision.bmm_operator(a, b, by_row, torch.tensor(1), 0)
        assert not torch.equal(first, second)
        assert torch.allclose(first, second, atol=0.1)


def test_products_of_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = rewritten(monkeypatch)
    model, x = GroupedExperts(), torch.randn(12, 8)
    bs.sketch_(model, EVERY)
    model(x).sum().backward()
    assert "100% of its backward products in 8 bits" in state_of(model).note
    assert not [n for n in graphs[0].graph.nodes if "fallback" in n.name]
    calls = graphs[0].graph.find_nodes(op="call_function", target=low_precision.grouped_operator)
    assert len({c.args[5] for c in calls}) == 2
    assert not model.up.grad[1].any()  # of the expert that got no row


class Clipped(torch.autograd.Function):
    """A backward pass that is not linear: rounding above it would be biased."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        return g.clamp(-0.01, 0.01)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Dynamo's own, at custom functions
def test_a_backward_pass_that_is_not_linear_runs_exactly() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.head = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(Clipped.apply(self.linear(x)))

    model, x = Own(), torch.randn(6, 4)
    exact = named_gradients(model, model(x).square().sum())
    bs.sketch_(model, EVERY)
    with pytest.warns(RunsExactly, match="'clamp'"):
        sketched = named_gradients(model, model(x).square().sum())
    assert state_of(model).status == "exact"
    assert "'clamp'" in str(state_of(model).reason)
    assert "linear in the cotangent" in str(state_of(model).reason)
    assert all(torch.equal(sketched[n], g) for n, g in exact.items())


NOT_LINEAR = {
    "square": lambda g, w: (g * g,),
    "gram": lambda g, w: (g @ g.t(),),
    "sign": lambda g, w: (g.sign(),),
    "divisor": lambda g, w: (w / g,),
    "scale": lambda g, w: (w / g.abs().max() * g,),
    "chosen by it": lambda g, w: (torch.where(g > 0, w, -w),),
    "indexed by it": lambda g, w: (w[g.argmax(1)],),
    "whole": lambda g, w: (g.to(torch.int32) * w,),
    "floor": lambda g, w: (torch.div(g, 0.1, rounding_mode="floor"),),
}
LINEAR = {
    "product": lambda g, w: (g @ w, (g.t() @ w) * w.sum()),
    "views": lambda g, w: (g.t().reshape(-1).view(4, 4).flip(0)[1:],),
    "sums": lambda g, w: (g.sum(0) + 2 * g.mean(0) - w[0],),
    "masked": lambda g, w: (torch.where(w > 0, g, 0.0).masked_fill(w > 1, 0.0),),
}


def traced(function: Callable[..., tuple[Tensor, ...]]) -> fx.GraphModule:
    def graph(saved: Tensor, tangents: Tensor) -> tuple[Tensor, ...]:
        return function(tangents, saved)

    module = torch.fx.experimental.proxy_tensor.make_fx(graph)(torch.randn(4, 4), torch.randn(4, 4))
    for node in module.graph.find_nodes(op="placeholder"):
        node.target = node.target.replace("_1", "")
    return module


@pytest.mark.parametrize("case", NOT_LINEAR)
def test_what_is_not_linear_is_refused(case: str) -> None:
    with pytest.raises(Coupled, match="linear in the cotangent"):
        check_linear(traced(NOT_LINEAR[case]).graph)


@pytest.mark.parametrize("case", LINEAR)
def test_what_is_linear_is_allowed(case: str) -> None:
    check_linear(traced(LINEAR[case]).graph)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.fast_cases("0.5")
@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_inside_a_compiled_model(keep: float) -> None:
    model, x = nn.Sequential(mlp(8, 16, 4)), torch.randn(64, 8)
    exact = named_gradients(model, model(x).square().sum())
    bs.sketch_(model, {"0": bs.Region(keep=keep, arithmetic="int8")})
    compiled = torch.compile(model)
    assert_mean(exact, lambda: named_gradients(model, compiled(x).square().sum()), 1e-5)
    assert state_of(model[0]).status == "active", state_of(model[0]).reason


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_under_checkpointing(use_reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp(8, 16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=use_reentrant)

    model, x = Checkpointed(), torch.randn(12, 8, requires_grad=True)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(x).square().sum().backward()  # all that reentrant checkpointing allows
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    exact = gradients()
    bs.sketch_(model, {"inner": EVERY})
    assert_mean(exact, gradients, 1e-6)
    assert state_of(model.inner).status == "active", state_of(model.inner).reason


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_under_autocast(keep: float) -> None:
    """Weights in float32, products in bfloat16: the mean is that of exact autocast within its rounding."""
    model, x = mlp(8, 16, 4), torch.randn(32, 8)

    def gradients() -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x).float().square().sum()
        return named_gradients(model, loss)

    exact = gradients()
    bs.sketch_(model, bs.Region(keep=keep, arithmetic="int8"))
    assert_mean(exact, gradients, 2**-7)
    assert state_of(model).status == "active", state_of(model).reason


def test_one_capture_serves_both_arithmetics(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a graph that cannot be computed in 8 bits stays one on kept rows for the regions that do not ask."""
    x = torch.randn(8, 6)

    def trained(arithmetic: str) -> nn.Module:
        model = mlp(6, 8, 5)
        bs.sketch_(model, bs.Region(keep=0.5, arithmetic=arithmetic))
        for _ in range(2):
            model(x).square().sum().backward()
        return model

    plain, rounded = trained("exact"), trained("int8")
    assert runtime_of(plain).runner is runtime_of(rounded).runner
    assert runtime_of(plain).runner.capture.programs == 1
    assert "8 bits" not in state_of(plain).note
    assert "8 bits" in state_of(rounded).note

    def refused(graph: object) -> None:
        raise Coupled("nothing for bytes")

    monkeypatch.setattr(runner, "_RUNNERS", {})
    monkeypatch.setattr(capture, "in_8_bits", refused)
    plain, rounded = trained("exact"), trained("int8")
    assert (state_of(plain).status, state_of(rounded).status) == ("active", "exact")
    assert state_of(rounded).reason == "nothing for bytes"


def test_text_and_report() -> None:
    assert bs.parse(str(EVERY)) == EVERY
    assert str(EVERY) == "region:keep=1.0,arithmetic=int8"
    with pytest.raises(ValueError, match="arithmetic"):
        bs.Region(0.5, arithmetic="int4")  # type: ignore[arg-type]
    model, x = batch_norm_net(), torch.randn(6, 2, 6, 6)
    report = bs.sketch_(model, EVERY)
    assert report[""].backward == 0.25
    assert ("expect no gain in time" in str(report)) == bool(bs.products.why_slow())
    model(x).sum().backward()
    assert "100% of its backward products in 8 bits" in str(report)
    bs.restore_(model)
    assert type(model) is nn.Sequential
    model, x = Kernels(), torch.randn(4, 4, 6, 6)
    report = bs.sketch_(model, EVERY)
    model(x).sum().backward()
    assert "(exact: " in str(report)
    assert "convolutions that are narrow or transposed" in str(report)
    bs.restore_(model)
    model, x = batch_norm_net(), torch.randn(6, 2, 6, 6)
    report = bs.sketch_(model, bs.Region(keep=1.0))
    assert "left exact" in str(report)


def test_what_would_be_slower_stays_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    small, x = mlp(8, 16, 4), torch.randn(12, 8)
    exact = named_gradients(small, small(x).sum())
    report = bs.sketch_(small, EVERY)
    with pytest.warns(RunsExactly, match="too small or narrow"):
        found = named_gradients(small, small(x).sum())
    assert all(torch.equal(found[n], g) for n, g in exact.items())
    assert "runs exactly: 0% of its backward products in 8 bits" in str(report)
    assert "100% too small or narrow" in str(report)
    assert share.is_worth_it(4096, 192, 768)
    assert not share.is_worth_it(512, 1024, 10)  # narrow
    assert not share.is_worth_it(8, 192, 768)  # few rows
    ours = share.Share(75, {"bmm": 5, "attention": 20})
    assert str(ours) == "75% of its backward products in 8 bits (exact: 20% attention, 5% bmm)"
