"""Rows that interact: refused with a reason, or run exactly and reported; never silently biased."""

from __future__ import annotations

import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import backsketch as bs
from backsketch.planning.measure.step import backward_flops
from backsketch.regions import Mask, Region, RunsExactly, attach, capture, refusal, runner, state_of
from backsketch.regions.state import RegionState, runtime_of
from region_models import (
    CNN,
    Attention,
    Block,
    TwoTowers,
    WindowAttention,
    Windows,
    make_region,
    mlp,
)

R = Region(keep=0.5)


def run(model: nn.Module, *inputs: Tensor, sketch: Region | None = None) -> RegionState:
    """Three training steps under a region; checks that every gradient was exact."""
    twin = [p.detach().clone() for p in model.parameters()]
    state = attach(model, sketch or Region(0.5), "net")
    assert state is not None
    for _ in range(3):
        sketched = _gradients(model, inputs)
        with bs.exact(model):
            exact = _gradients(model, inputs)
        for a, b in zip(sketched, exact, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin))
    return state


def _gradients(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    torch.manual_seed(3)
    y = model(*inputs)
    loss = sum((t * torch.randn(t.shape)).sum() for t in (y if isinstance(y, tuple) else (y,)))
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [g for g in found if g is not None]


class Lambda(nn.Module):
    def __init__(self, function, *shape: int) -> None:
        super().__init__()
        self.function = function
        self.w = nn.Parameter(torch.randn(shape or (4,)))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.w)


# --- known without running --------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.BatchNorm2d(4, track_running_stats=False)])
def test_batch_norm_is_refused_by_name(norm: nn.Module) -> None:
    model = CNN(norm)
    reason = refusal(model, Region(0.5))
    assert reason is not None
    assert "'norm' (BatchNorm2d)" in reason
    assert "GroupNorm" in reason
    with pytest.raises(ValueError, match=r"backbone: 'norm' \(BatchNorm2d\)"):
        attach(model, Region(0.5), "backbone")


def test_batch_norm_in_eval_mode_is_a_region() -> None:
    model = CNN(nn.BatchNorm2d(4))
    model.norm.eval()
    make_region(model, {"": Region(0.5)})
    report = bs.testing.check_unbiased(model, torch.randn(6, 2, 8, 8), draws=100)
    assert max(report.relative_variance.values()) > 0.05


def test_batch_norm_put_in_training_mode_later_runs_exactly() -> None:
    model = CNN(nn.BatchNorm2d(4).eval())
    state = attach(model, Region(0.5))
    x = torch.randn(6, 2, 8, 8)
    for _ in range(2):
        model(x).square().sum().backward()
    assert state is not None
    assert state.status == "active"
    model.norm.train()
    expected = model.norm.running_mean.clone()
    model(x).square().sum().backward()
    assert state.status == "exact"
    assert "rows" in str(state.reason)
    assert not torch.equal(model.norm.running_mean, expected)


def test_a_loss_module_is_refused() -> None:
    reason = refusal(nn.Sequential(nn.Linear(2, 2), nn.MSELoss()), Region(0.5))
    assert reason is not None
    assert "'1' (MSELoss)" in reason
    assert refusal(nn.MSELoss(reduction="none"), Region(0.5)) is None
    assert refusal(nn.MSELoss(), Mask(0.5)) is None


# --- seen in the captured graph ---------------------------------------------------------------------

COUPLED = {
    "centred over the batch": (lambda x, w: x * w - x.mean(0), "reduces over the rows"),
    "softmax over the batch": (lambda x, w: (x * w).softmax(0), "acts along the rows"),
    "cumulative over the batch": (lambda x, w: (x * w).cumsum(0), "acts along the rows"),
    "rolled rows": (lambda x, w: (x * w).roll(1, 0), "acts along the rows"),
    "frequencies of the batch": (
        lambda x, w: torch.fft.rfft(x * w, dim=0).real,
        "acts along the rows",
    ),
    "gram matrix": (lambda x, w: (x * w) @ x.t(), "multiplies rows with other rows"),
    "attention across samples": (
        lambda x, w: (x @ (x * w).t()).softmax(1) @ x,
        "multiplies rows with other rows",
    ),
    "reshape that mixes rows": (
        lambda x, w: ((x * w).t().reshape(x.shape[0], 4) * w).sin(),
        "mixes rows",
    ),
    "loss inside": (lambda x, w: (x * w).square().mean(), "reduces over the rows"),
    "cross entropy inside": (
        lambda x, w: F.cross_entropy(x * w, x.argmax(1)),
        "reduced over the rows",
    ),
    "divided by the batch size": (lambda x, w: x * w / x.shape[0], "number of rows as a value"),
    "indexed by row number": (
        lambda x, w: x * w * torch.arange(x.shape[0])[:, None],
        "'arange'",
    ),
    "a table by row number": (
        lambda x, w: x * w + w[torch.arange(x.shape[0]) % 4, None],
        "'arange'",
    ),
    "entries of a table by row number": (
        lambda x, w: x * w.expand(9, 4)[torch.arange(x.shape[0])],
        "uses the rows' numbers as values",
    ),
    "rows in reverse": (lambda x, w: (x * w)[torch.arange(x.shape[0] - 1, -1, -1)], "'arange'"),
    "picked by row number": (
        lambda x, w: (x * w)[torch.arange(x.shape[0]), torch.arange(x.shape[0]) % 4],
        "'arange'",
    ),
    "repeated rows": (lambda x, w: (x * w).repeat(2, 1), "acts along the rows"),
    "first row as reference": (lambda x, w: x * w - x[0], "acts along the rows"),
    "neighbouring rows": (
        lambda x, w: (x * w)[:, None].view(-1, 2, 4).mean(1).repeat_interleave(2, 0),
        "rows",
    ),
    "sorted rows": (lambda x, w: (x * w)[x[:, 0].argsort()], "acts along the rows"),
    "row count times": (
        lambda x, w: x * w * torch.full((4,), float(x.shape[0])),
        "number of rows",
    ),
    "statistic as an output": (
        lambda x, w: (x * w, (x * w).square().mean()),
        "reduces over the rows",
    ),
    "the number of rows in an output without them": (
        lambda x, w: (x * w, w.square().sum() * x.detach()[:, 0].numel()),
        "number of rows",
    ),
    "no output with rows": (
        lambda x, w: w.square() + x.detach()[:, 0].numel() * 0,
        "no output has rows",
    ),
}


@pytest.mark.parametrize("case", COUPLED)
def test_coupled_rows_run_exactly_with_the_reason(case: str) -> None:
    function, reason = COUPLED[case]
    state = run(Lambda(function), torch.randn(6, 4))
    assert state.status == "exact"
    assert reason in str(state.reason), state.reason


def test_the_reason_names_the_line() -> None:
    state = run(Lambda(lambda x, w: x * w - x.mean(0)), torch.randn(6, 4))
    assert "x * w - x.mean(0)" in str(state.reason)


TOKEN_COUPLED = {
    "attention over tokens": (lambda: Attention(4, 2), "rows"),
    "position table": (
        lambda: Lambda(lambda x, w: x + w[: x.shape[1]], 7, 4),
        "depend on the row's number",
    ),
    "mean over tokens": (lambda: Lambda(lambda x, w: x * w - x.mean(1, keepdim=True)), "rows"),
    "transposed": (lambda: Lambda(lambda x, w: (x * w).transpose(0, 1).sin()), "rows"),
}


@pytest.mark.parametrize("case", TOKEN_COUPLED)
def test_tokens_that_interact_run_exactly(case: str) -> None:
    build, reason = TOKEN_COUPLED[case]
    state = run(build(), torch.randn(6, 5, 4), sketch=Region(0.5, row_dims=2))
    assert state.status == "exact"
    assert reason in str(state.reason)


def test_window_partitions_inside_a_region_of_samples_are_fine() -> None:
    model = Windows()
    make_region(model, {"": Region(0.5)})
    report = bs.testing.check_unbiased(model, torch.randn(6, 16, 8), draws=100)
    assert max(report.relative_variance.values()) > 0.05


def test_windows_as_rows_run_exactly() -> None:
    """Rows are windows here, and a window's bias depends on its number: VCAS is 35 % off."""
    state = run(WindowAttention(8), torch.randn(24, 4, 8))
    assert state.status == "exact"
    assert "row" in str(state.reason)


def test_two_towers_with_a_contrast_inside_run_exactly() -> None:
    state = run(TwoTowers(True), torch.randn(6, 6), torch.randn(6, 5))
    assert state.status == "exact"
    assert "multiplies rows with other rows" in str(state.reason)


def test_batch_first_false_attention_runs_exactly() -> None:
    """Rows of the first dimension are positions here, and attention relates them."""

    class TimeFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.attn(x, x, x, need_weights=False)[0]

    state = run(TimeFirst(), torch.randn(5, 6, 8))
    assert state.status == "exact"


@pytest.mark.parametrize("sketch", [Region(keep=0.5), Mask(keep=0.5)], ids=["region", "mask"])
def test_a_forward_on_the_instance_would_bypass_the_sketch_and_is_refused(sketch) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model.forward = types.MethodType(nn.Sequential.forward, model)
    with pytest.raises(ValueError, match="replaced on the instance"):
        bs.sketch_(model, sketch)
    assert type(model) is nn.Sequential


# --- what the user adds inside ----------------------------------------------------------------------


def blocks() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(3)))


def test_hooks_inside_a_region_are_called_whenever_they_came() -> None:
    """One module has a hook from the start, another of the same class gets one after the capture."""
    model, x, calls = blocks(), torch.randn(16, 8), []
    model[1][0].register_forward_hook(lambda module, args, output: 2 * output)
    bs.sketch_(model, {"0": R, "1": R, "2": R})
    for step in range(4):
        if step == 2:
            model[2][0].register_forward_hook(lambda module, args, output: output + 1)
            model[2][0].register_full_backward_hook(lambda *given: calls.append(1))
        y = model(x)
        with bs.exact(model):
            assert torch.equal(y, model(x))
        y.sum().backward()
    assert calls == [1, 1]
    assert state_of(model[1]).status == "active"


def test_saved_bytes_does_not_capture_a_region_anew() -> None:
    model, x = blocks(), torch.randn(16, 8)
    bs.sketch_(model, {"0": R})
    model(x).sum().backward()
    programs = runtime_of(model[0]).runner.capture.programs
    for _ in range(3):
        bs.saved_bytes(model, x)
    assert runtime_of(model[0]).runner.capture.programs == programs


def test_a_region_captured_under_one_kernel_of_attention_takes_the_other_later() -> None:
    """Its graph holds one kernel: what counts, or tries, in the mathematical form must not leave it behind."""
    model, x = Attention(16, 2), torch.randn(4, 8, 16)
    bs.sketch_(model, bs.Region(keep=0.5))
    expected = bs.saved_bytes(model, x).total
    bs.restore_(model)
    bs.sketch_(model, bs.Region(keep=0.5))
    with sdpa_kernel(SDPBackend.MATH):
        model(x).sum().backward()
        mathematical = bs.saved_bytes(model, x).total
    assert bs.saved_bytes(model, x).total == expected < mathematical


def test_counting_arithmetic_leaves_no_kernel_of_attention_behind() -> None:
    model, x = Attention(16, 2), torch.randn(4, 8, 16)
    bs.sketch_(model, bs.Region(keep=0.5))
    expected = bs.saved_bytes(model, x).total
    for kernels in ([SDPBackend.MATH], [SDPBackend.FLASH_ATTENTION]):
        with sdpa_kernel(kernels):
            counted = backward_flops(model, x, lambda model, x: model(x).sum())
        products = 4 * 2 * 2 * 4 * 8 * 8 * 8 // 2  # of half of the samples
        assert counted == products + 2 * 2 * 2 * 8 * 16 * 64
    assert bs.saved_bytes(model, x).total == expected


def test_a_flop_counter_is_no_obstacle_and_leaves_no_trace() -> None:
    model, x = blocks(), torch.randn(16, 8)
    bs.sketch_(model, {"0": R})
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    assert counter.get_total_flops() == 16 * 8 * 8 * 2 * (3 * 3 - 1)
    assert "TorchDispatchMode" in state_of(model[0]).reason
    for _ in range(2):
        model(x).sum().backward()
    assert state_of(model[0]).status == "active"
    loss = model(x).sum()
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    assert counter.get_total_flops() == 8 * 8 * 8 * 2 + 16 * 8 * 8 * 2 * 4
    assert state_of(model[0]).status == "active"
    with FlopCounterMode(display=False):  # what was captured before is not recognised in there
        model(x)
    assert state_of(model[0]).status == "exact"
    model(x).sum().backward()
    assert state_of(model[0]).status == "active"


def test_a_region_tells_that_compilation_is_switched_off(monkeypatch) -> None:
    monkeypatch.setattr(runner, "_RUNNERS", {})
    model, x = blocks(), torch.randn(16, 8)
    bs.sketch_(model, {"0": R})
    with torch.compiler.set_stance("force_eager"):
        model(x).sum().backward()
    assert state_of(model[0]).status == "exact"
    assert "switched off" in state_of(model[0]).reason


class Returns(nn.Module):
    """A layer, and what a function makes of its output."""

    def __init__(self, function) -> None:
        super().__init__()
        self.layer, self.router, self.function = nn.Linear(4, 4), nn.Linear(4, 4), function

    def forward(self, x: Tensor):
        return self.function(self.layer(x), self.router(x))


def test_a_mask_leaves_an_auxiliary_loss_exact() -> None:
    model, x = Returns(lambda h, r: {"hidden": h, "aux": r.square().mean()}), torch.randn(8, 4)
    attach(model, Mask(0.25))
    out = model(x)
    params = (out["hidden"].sum() + out["aux"], [model.layer.weight, model.router.weight])
    _, router = torch.autograd.grad(*params, retain_graph=True)
    expected = torch.autograd.grad(model.router(x).square().mean(), model.router.weight)[0]
    torch.testing.assert_close(router, expected)
    seen: list[Tensor] = []
    model.layer.register_full_backward_hook(lambda m, gi, go: seen.append(go[0]))
    model(x.requires_grad_())["hidden"].sum().backward()
    assert int((seen[0].norm(dim=1) > 0).sum()) == 2


@pytest.mark.parametrize(
    "function",
    [
        lambda h, r: (h.square().mean(), h),
        lambda h, r: {"loss": h.tanh().sum(), "logits": h, "hidden": r, "unused": r.exp()},
    ],
)
def test_a_mask_that_a_loss_inside_passes_by_is_an_error(function) -> None:
    model = nn.Sequential(Returns(function))
    bs.sketch_(model, {"0": Mask(0.5)})
    with pytest.raises(ValueError, match=r"mask .* on Returns does nothing.*before the loss"):
        model(torch.randn(8, 4))
    with bs.exact(model):
        model(torch.randn(8, 4))


def test_a_mask_on_a_bare_loss_is_an_error_with_the_way_out() -> None:
    model = Returns(lambda h, r: h.mean())
    attach(model, Mask(0.5))
    with pytest.raises(ValueError, match=r"on Returns finds no rows .*\(\); put the mask on the"):
        model(torch.randn(8, 4))


def test_compiled_a_mask_beside_a_scalar_warns() -> None:
    model = Returns(lambda h, r: (h, r.mean()))
    attach(model, Mask(0.5))
    with pytest.warns(UserWarning, match="on Returns: an output without rows is left exact"):
        hidden, _ = torch.compile(model, backend="eager", fullgraph=True)(torch.randn(8, 4))
    assert hidden.requires_grad


def test_a_mask_that_cannot_look_into_the_output_is_an_error() -> None:
    model = Returns(lambda h, r: types.SimpleNamespace(hidden=h))
    attach(model, Mask(0.5))
    with pytest.raises(TypeError, match=r"on Returns finds no tensor .*SimpleNamespace.*register"):
        model(torch.randn(8, 4))
    model.eval()
    assert model(torch.randn(8, 4)).hidden.requires_grad
    model.train()
    with torch.no_grad():
        model(torch.randn(8, 4))


# --- what cannot be captured ------------------------------------------------------------------------


def test_data_dependent_python_runs_exactly() -> None:
    state = run(Lambda(lambda x, w: x * w if x.sum().item() > 0 else x + w), torch.randn(6, 4))
    assert state.status == "exact"
    assert "cannot be captured" in str(state.reason)


def test_updated_buffers_run_exactly() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.register_buffer("total", torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.total += x.sum(0)
            return self.a(x)

    model, x = Counts(), torch.randn(6, 4)
    state = run(model, x)
    assert state.status == "exact"
    torch.testing.assert_close(model.total, 6 * x.sum(0))


def test_a_scalar_argument_runs_exactly() -> None:
    state = run(Lambda(lambda x, w: x * w), torch.tensor(2.0))
    assert state.status == "exact"
    assert "dimensions of rows" in str(state.reason)


def test_a_saved_value_may_be_called_index() -> None:
    """The captured graph names values after operators; names of our own must not be among them."""

    class Pick(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.table = nn.Linear(4, 4), nn.Parameter(torch.randn(9, 4))

        def forward(self, x: Tensor, i: Tensor) -> Tensor:
            return self.linear(x) * self.table[i]

    model = Pick()
    state = attach(model, Region(0.5))
    model(torch.randn(8, 4), torch.randint(9, (8,))).square().sum().backward()
    bs.testing.check_unbiased(model, torch.randn(8, 4), torch.randint(9, (8,)), draws=150)
    assert state is not None
    assert state.status == "active", state.reason


@pytest.mark.parametrize("kind", [AssertionError, RuntimeError, KeyError])
def test_any_exception_of_the_compiler_ends_in_exact_execution(kind, monkeypatch) -> None:
    class Own(nn.Sequential):
        """No other test has captured it."""

    model, x = Own(nn.Linear(4, 4), nn.Tanh()), torch.randn(6, 4)
    state = attach(model, Region(0.5))

    def fail(*args: object) -> object:
        raise kind("a counter is past its limit")

    runtime_of(model).runner = made = runner.runner_for(model, Own.forward, Region(0.5), "plain")
    monkeypatch.setattr(made, "call", fail)
    y = model(x)
    assert torch.equal(y, Own.forward(model, x))
    assert state is not None
    assert state.status == "exact"
    assert f"{kind.__name__}: " in str(state.reason)
    assert "past its limit" in str(state.reason)


def test_the_reason_keeps_what_a_backend_raised(monkeypatch) -> None:
    class Own(nn.Sequential):
        """No other test has captured it."""

    def fail(*args: object, **options: object) -> object:
        raise ArithmeticError("no such graph")

    monkeypatch.setattr(capture, "aot_autograd", fail)
    state = run(Own(nn.Linear(4, 4), nn.Tanh()), torch.randn(6, 4))
    assert state.reason == "it cannot be captured: ArithmeticError: no such graph"


def test_an_error_of_the_users_own_is_raised_and_forgotten() -> None:
    model = mlp(4, 4)
    state = attach(model, Region(0.5))
    with pytest.raises(RuntimeError, match="shape"):
        model(torch.randn(6, 5))
    for _ in range(2):
        model(torch.randn(6, 4)).square().sum().backward()
    assert state is not None
    assert state.status == "active", state.reason


# --- seen by the numbers ----------------------------------------------------------------------------


def test_the_first_batch_catches_what_the_proof_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a proof that lets everything pass, parts of the batch do not add up."""
    from backsketch.regions import oprules
    from backsketch.regions.rows import Layout

    def believe(proof, node):
        return Layout(0)

    monkeypatch.setitem(oprules.RULES, "flip", believe)
    state = run(Lambda(lambda x, w: (x * w).sin() + (x * w).flip(0)), torch.randn(6, 4))
    assert state.status == "exact"
    assert "do not add up" in str(state.reason)


def test_exact_execution_is_warned_of_once_for_each_reason() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Lambda(lambda x, w: (x - x.mean(0)) * w))
    bs.sketch_(model, {"1": bs.Region(keep=0.5)})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            model(torch.randn(8, 4)).square().sum().backward()
    told = [w for w in caught if issubclass(w.category, RunsExactly)]
    assert len(told) == 1
    assert str(told[0].message).startswith("the region 1 runs exactly: ")
    assert "keep=1.0 and arithmetic='int8' or save='int8'" in str(told[0].message)
    whole = Lambda(lambda x, w: (x - x.mean(0)) * w)
    bs.sketch_(whole, bs.Region(keep=0.5))
    with pytest.warns(RunsExactly, match="the model runs exactly"):
        whole(torch.randn(8, 4, requires_grad=True)).square().sum().backward()


def test_reports_are_by_region() -> None:
    model = nn.Sequential(mlp(4, 4), Lambda(lambda x, w: x * w - x.mean(0)), Block(4, 2))
    rules = {"0": Region(0.5), "1": Region(0.5), "2": Region(0.5)}
    states = make_region(model, rules)
    for _ in range(2):
        h = model[1](model[0](torch.randn(6, 4)))
        model[2](h[:, None]).square().sum().backward()
    assert [s.status for s in states.values()] == ["active", "exact", "active"]
    assert states["1"].name == "1"


class Flat(nn.Module):
    """Images of one channel to one row each: the second leading size is no row."""

    def __init__(self, fold: int = 1) -> None:
        super().__init__()
        self.linear, self.fold = nn.Linear(16, 8), fold

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1)).view(-1, 8 // self.fold)


@pytest.mark.parametrize(("fold", "row_dims"), [(1, 2), (4, 1)])
def test_outputs_with_other_leading_sizes_run_exactly(fold: int, row_dims: int) -> None:
    model, x = Flat(fold), torch.randn(6, 1, 4, 4)
    (state,) = make_region(model, {"": Region(0.5, row_dims)}).values()
    for _ in range(2):
        model.zero_grad()
        model(x).square().sum().backward()
        exact = torch.autograd.grad(Flat.forward(model, x).square().sum(), model.linear.weight)
        torch.testing.assert_close(model.linear.weight.grad, exact[0])
    assert state.status == "exact"
    assert "leading" in state.reason


def test_outputs_that_share_memory_are_no_cause_for_a_warning() -> None:
    """The first call finds it out, and the next ones copy."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.linear(x)
            return y, y.view(-1, 2, 4)

    state = attach(model := Twice(), Region(keep=0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RunsExactly)
        for _ in range(3):
            plain, seen = model(torch.randn(16, 8))
            (plain.sum() + seen.square().sum()).backward()
    assert state is not None
    assert state.status == "active"
