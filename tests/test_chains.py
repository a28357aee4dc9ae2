"""Activations and norms under memory savers: bit-identical forward, unbiased or exact backward, few bytes."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import backsketch as bs
from backsketch.ops.attention import pays
from backsketch.rounding import units
from backsketch.testing import gradient_moments
from backsketch.theory import variance
from chain_cases import BITS, CHAIN, NORMS, ROUNDED, SMOOTH, Attend, made, with_weights
from helpers import Called
from mutations import halve_the_dither, one_rounding_for_both

ignore_compiler_warnings = pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script_method:DeprecationWarning",
    "ignore:.*should not be instantiated:DeprecationWarning",
)
TWO_BITS = bs.Quantized(bits=2, group_size=8)
DRAWS = 100  # through a whole block; a wrong rounding is noticed at that number, below


def vjp(module: nn.Module, x: Tensor, cotangent: Tensor | None = None) -> list[Tensor]:
    """Gradients of the input and of the parameters, for a fixed cotangent."""
    x = x.clone().requires_grad_()
    y = module(x)
    generator = torch.Generator().manual_seed(5)
    g = torch.randn(y.shape, generator=generator).to(y) if cotangent is None else cotangent
    return list(torch.autograd.grad(y, (x, *module.parameters()), g))


def sketched(name: str, sketch: bs.Estimator = TWO_BITS) -> tuple[nn.Module, nn.Module, Tensor]:
    """The module, its sketched copy, and an input."""
    module, x = made(name)
    other = copy.deepcopy(module)
    report = bs.sketch_(other, sketch)
    assert len(report.sketched) == 1
    return module, other, x


@pytest.mark.parametrize("name", CHAIN)
def test_forward_values_and_running_statistics_are_bit_identical(name):
    module, other, x = sketched(name)
    for _ in range(2):
        assert torch.equal(module(x.requires_grad_()), other(x))
    for before, after in zip(module.buffers(), other.buffers()):
        assert torch.equal(before, after)


@pytest.mark.parametrize("name", BITS)
@pytest.mark.parametrize(
    "sketch", [TWO_BITS, bs.StoredRows(keep=0.5), bs.Projection(keep=0.5)], ids=str
)
def test_piecewise_linear_functions_are_exact_in_one_bit(name, sketch):
    module, other, x = sketched(name, sketch)
    for exact, cheap in zip(vjp(module, x), vjp(other, x)):
        assert torch.equal(exact, cheap)


@pytest.mark.fast_cases("gelu", "layer norm", "rms norm", "batch norm of images", "attention")
@pytest.mark.parametrize("name", ROUNDED)
def test_the_gradient_is_unbiased(name):
    _, other, x = sketched(name)
    bs.testing.check_unbiased(
        other, x, draws=500
    )  # of 250, one in 1,000 misses what 3 % of draws do


@pytest.mark.fast_cases("gelu")
@pytest.mark.parametrize("name", ["gelu", "layer norm", "batch norm"])
def test_rounding_that_goes_down_too_often_is_noticed(name, monkeypatch):
    _, other, x = sketched(name)
    halve_the_dither(monkeypatch)
    with pytest.raises(AssertionError, match="is biased"):
        bs.testing.check_unbiased(other, x, draws=500)


@pytest.mark.fast_cases("rms norm")
@pytest.mark.parametrize("name", ["layer norm", "rms norm", "batch norm"])
def test_one_rounding_instead_of_two_is_noticed(name, monkeypatch):
    """The backward of a norm is quadratic in what it saves: the diagonal would be biased."""
    _, other, x = sketched(name, bs.Quantized(bits=1, group_size=8))
    one_rounding_for_both(monkeypatch)
    with pytest.raises(AssertionError, match="is biased"):
        bs.testing.check_unbiased(other, x, draws=600)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gelu", "softplus"])
def test_the_variance_of_an_activation_is_the_closed_form(name):
    module, other, x = sketched(name)
    ones = torch.ones_like(x)
    slope = vjp(module, x, ones)[0]
    generator = torch.Generator().manual_seed(0)  # the cotangent of gradient_moments
    g = torch.randn(x.shape, generator=generator)
    step, levels = units(slope, TWO_BITS.rounding())
    spread = variance.quantized(step, levels - levels.floor()).view(x.shape)
    expected = float((g.double().square() * spread).sum())
    measured = float(gradient_moments(other, x, draws=1500)["input[0]"].variance)
    assert measured == pytest.approx(expected, rel=0.1)


@pytest.mark.slow
def test_the_variance_of_a_norm_is_the_closed_form():
    module, other, x = sketched("layer norm")
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(x.shape, generator=generator)
    step, levels = units(x, TWO_BITS.rounding(), twice=True)
    spread = variance.quantized(step, levels - levels.floor()).view(x.shape)
    rstd = (x.var(-1, correction=0, keepdim=True) + module.eps).rsqrt()
    normalised = (x - x.mean(-1, keepdim=True)) * rstd
    of_x, of_weight = variance.norm_in_two_roundings(
        *(t.flatten(0, -2) for t in (g, normalised, spread * rstd.square())),
        rstd.flatten(),
        module.weight,
    )
    measured = gradient_moments(other, x, draws=3000)
    assert float(measured["input[0]"].variance) == pytest.approx(float(of_x), rel=0.1)
    assert float(measured["weight"].variance) == pytest.approx(float(of_weight), rel=0.1)


@pytest.mark.parametrize("name", ROUNDED)
def test_more_bits_come_closer(name):
    def error(bits: int) -> float:
        module, other, x = sketched(name, bs.Quantized(bits=bits, group_size=8))
        pairs = zip(vjp(module, x), vjp(other, x))
        return float(sum((a - b).square().sum() for a, b in pairs))

    assert error(8) < 1e-2 * max(error(1), 1e-9)


# Hazards ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [nn.ReLU, nn.ReLU6, nn.SiLU, nn.ELU])
def test_an_inplace_activation_still_writes_over_its_input(build):
    layer, act = nn.Linear(6, 8), build(inplace=True)
    model = nn.Sequential(layer, act)
    x = torch.randn(5, 6)
    expected = model(x)
    bs.sketch_(model, {"1": bs.Quantized(bits=8)})
    hidden = layer(x)
    y = act(hidden)
    assert y is hidden
    assert torch.equal(y, expected)
    weight = torch.autograd.grad(y.square().sum(), layer.weight)[0]
    bs.restore_(model)
    exact = torch.autograd.grad(model(x).square().sum(), layer.weight)[0]
    torch.testing.assert_close(weight, exact, rtol=0.1, atol=0.05 * float(exact.abs().max()))


@pytest.mark.parametrize("name", CHAIN)
def test_what_is_added_in_place_to_the_output_does_no_harm(name):
    """ResNets do that; the output is not what the backward pass needs."""
    _, other, x = sketched(name)
    y = other(x.clone().requires_grad_())
    y += 1
    y.sum().backward()


@pytest.mark.parametrize("name", ROUNDED)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_nonfinite_input_reaches_the_gradient(name, bad):
    _, other, x = sketched(name)
    if name in SMOOTH and bad == float("inf"):
        pytest.skip("the slope at infinity is finite")
    x.view(-1)[3] = bad
    assert not bool(vjp(other, x)[0].isfinite().all())


@pytest.mark.parametrize("name", ROUNDED)
def test_a_nonfinite_cotangent_reaches_the_gradient(name):
    module, other, x = sketched(name)
    g = torch.ones_like(module(x))
    g.view(-1)[3] = float("nan")
    assert bool(vjp(other, x, g)[0].isnan().any())


@pytest.mark.parametrize("name", ROUNDED)
def test_constant_groups_are_exact(name):
    if name.startswith("batch norm") or "attention" in name:
        pytest.skip("a constant channel is divided by the square root of eps; a causal mask varies")
    module, other, x = sketched(name)
    x = torch.full_like(x, 0.4)
    for exact, cheap in zip(vjp(module, x), vjp(other, x)):
        torch.testing.assert_close(exact, cheap, atol=1e-3, rtol=1e-3)  # 316 times the rounding


@pytest.mark.parametrize("name", [n for n in CHAIN if not n.startswith(("batch", "layer norm of"))])
@pytest.mark.parametrize("rows", [0, 1])
def test_empty_batches_and_single_rows(name, rows):
    module, other, x = sketched(name)
    for exact, cheap in zip(vjp(module, x[:rows]), vjp(other, x[:rows])):
        assert exact.shape == cheap.shape
        assert bool(cheap.isfinite().all())


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("frozen", ["weights", "input"])
def test_frozen_weights_and_inputs(name, frozen):
    module, other, x = sketched(name)
    if not list(module.parameters()):
        pytest.skip("has no weights")
    if frozen == "weights":
        other.requires_grad_(False)
        (grad,) = torch.autograd.grad(other(x.requires_grad_()).sum(), x)
        assert grad.shape == x.shape
    else:
        grads = torch.autograd.grad(other(x).sum(), list(other.parameters()))
        exact = torch.autograd.grad(module(x).sum(), list(module.parameters()))
        torch.testing.assert_close(grads[-1], exact[-1], rtol=1.0, atol=1.0)


@pytest.mark.parametrize("name", CHAIN)
def test_double_backward_is_refused(name):
    _, other, x = sketched(name)
    x = x.requires_grad_()
    (grad,) = torch.autograd.grad(other(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not support double backward"):
        grad.sum().backward()


@pytest.mark.parametrize("name", CHAIN)
def test_eval_mode_and_no_grad_are_out_of_the_way(name):
    module, other, x = sketched(name)
    module.eval(), other.eval()
    for exact, cheap in zip(vjp(module, x), vjp(other, x)):
        assert torch.equal(exact, cheap)
    other.train()
    with torch.no_grad():
        assert other(x).grad_fn is None


@pytest.mark.parametrize("name", ["relu", "gelu", "layer norm", "group norm"])
def test_low_precision_under_autocast(name):
    module, other, x = sketched(name, bs.Quantized(bits=8, group_size=8))
    for given in (x, x.bfloat16()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert module(given).dtype == other(given.requires_grad_()).dtype
            exact, cheap = vjp(module, given), vjp(other, given)
        for a, b in zip(exact, cheap):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=0.1, atol=0.1)


def test_double_precision_is_kept():
    module, other, x = sketched("layer norm", bs.Quantized(bits=8, group_size=8))
    module.double(), other.double()
    for a, b in zip(vjp(module, x.double()), vjp(other, x.double())):
        assert b.dtype == torch.float64
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("norm", "exact", "arguments", "shape"),
    [
        (bs.ops.layer_norm, F.layer_norm, ((3, 4),), (3, 4)),
        (bs.ops.group_norm, F.group_norm, (3,), (3,)),
        (bs.ops.batch_norm, partial(F.batch_norm, training=True), (None, None), (3,)),
    ],
    ids=["layer", "group", "batch"],
)
def test_a_bias_without_a_weight_has_its_gradient(norm, exact, arguments, shape):
    x, bias = torch.randn(5, 3, 4, requires_grad=True), torch.randn(shape, requires_grad=True)
    # Weights of one: PyTorch's own group norm raises without a weight.
    expected = exact(x, *arguments, torch.ones(shape), bias)
    cheap = norm(x, *arguments, None, bias, sketch=TWO_BITS)
    torch.testing.assert_close(
        *(torch.autograd.grad(y.square().sum(), (x, bias))[1] for y in (cheap, expected))
    )


EIGHT_BITS = bs.Quantized(bits=8)


def attended(attend: Callable[..., Tensor], *operands: Tensor, **options: object) -> list[Tensor]:
    """The gradients of queries, keys and values for a fixed cotangent."""
    operands = tuple(t.detach().requires_grad_() for t in operands)
    y = attend(*operands, **options)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
    return list(torch.autograd.grad(y, operands, g.to(y)))


@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_a_query_without_any_key_has_no_gradient_and_spoils_no_other(kind):
    """Padding on the left and a causal mask leave such queries."""
    mask = torch.ones(2, 16, 16, dtype=torch.bool).tril()
    mask[0, :, :3] = False
    if kind == "additive":
        mask = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
    operands = [torch.randn(2, 16, 16) for _ in range(3)]
    exact = attended(F.scaled_dot_product_attention, *operands, attn_mask=mask)
    cheap = attended(bs.ops.attention, *operands, mask=mask, sketch=EIGHT_BITS)
    for a, b in zip(exact, cheap):
        torch.testing.assert_close(a, b, rtol=0, atol=0.1)
    operands[0][0, 0, 0] = math.nan
    assert attended(bs.ops.attention, *operands, mask=mask, sketch=EIGHT_BITS)[0].isnan().any()


@pytest.mark.parametrize("autocast", [False, True])
def test_attention_in_bfloat16_is_off_by_at_most_twice_what_pytorchs_is(autocast):
    q, k, v = (torch.randn(2, 2, 16, 16).mul(s).bfloat16() for s in (3, 3, 1))
    exact = attended(F.scaled_dot_product_attention, *(t.double() for t in (q, k, v)))
    theirs = attended(F.scaled_dot_product_attention, q, k, v)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        forward = partial(bs.ops.attention, sketch=EIGHT_BITS)
        draws = [attended(forward, q, k, v) for _ in range(200)]
    for truth, reference, *ours in zip(exact, theirs, *draws):
        error = torch.stack(ours).double().mean(0) - truth
        assert error.norm() <= 2 * (reference - truth).norm()


# The report -------------------------------------------------------------------------------------------


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 6), nn.ReLU())


def test_only_memory_savers_take_activations_and_norms_for_sites():
    assert [s.name for s in bs.sketch_(net(), bs.Rows(keep=0.5))] == ["0", "3"]
    assert [s.name for s in bs.sketch_(net(), bs.StoredRows(keep=0.5))] == ["0", "3", "4"]
    report = bs.sketch_(net(), bs.Quantized(bits=4))
    assert [s.name for s in report.sketched] == ["0", "1", "2", "3", "4"]
    assert report["4"].saved == 1 / 32
    assert report["2"].saved == bs.Quantized(bits=4).saved()
    assert report["1"].saved == bs.Quantized(bits=4).saved() + 2 / 32


def test_rules_may_leave_them_out_or_name_them_alone():
    report = bs.sketch_(net(), {nn.LayerNorm: None, "": bs.Quantized(bits=4)})
    assert [s.name for s in report.sketched] == ["0", "2", "3", "4"]
    report = bs.sketch_(net(), {nn.GELU: bs.Split(grad_weight=bs.Quantized(bits=4))})
    assert [s.name for s in report.sketched] == ["2"]


@pytest.mark.parametrize(
    ("sketch", "reason"),
    [
        (bs.Rows(keep=0.5), "only memory savers"),
        (bs.StoredRows(keep=0.5), "but not by stored_rows"),
    ],
)
def test_naming_one_for_an_estimator_that_cannot_act_there_is_an_error(sketch, reason):
    with pytest.raises(ValueError, match=reason):
        bs.sketch_(net(), {nn.GELU: sketch})


# Whole nets: compiled, checkpointed, offloaded -------------------------------------------------------------


class Chain(nn.Module):
    """A norm, attention and an MLP; the parts are separate so that each can be checkpointed."""

    def __init__(self, kind: str = "plain") -> None:
        super().__init__()
        self.kind = kind
        self.attend = nn.Sequential(nn.LayerNorm(4), Attend())
        self.mlp = nn.Sequential(
            nn.RMSNorm(4), nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)
        )

    def forward(self, x: Tensor) -> Tensor:
        for part in (self.attend, self.mlp):
            if self.kind == "plain":
                x = x + part(x)
            else:
                x = x + checkpoint(part, x, use_reentrant=self.kind == "reentrant")
        return x


def chain(kind: str = "plain") -> tuple[Chain, Called, Tensor]:
    """A sketched chain, the exact one of the same weights, and an input."""
    model = with_weights(Chain(kind))
    exact = copy.deepcopy(model)
    exact.kind = "plain"
    bs.sketch_(model, TWO_BITS)
    return model, Called(exact), torch.randn(2, 5, 4)


@pytest.mark.fast_cases("aot_eager_decomp_partition")
@pytest.mark.parametrize("backend", ["aot_eager_decomp_partition", "inductor"])
@ignore_compiler_warnings
def test_compiled_in_one_graph_it_is_unbiased_and_keeps_as_little(backend):
    torch._dynamo.reset()
    model, exact, x = chain()
    call = torch.compile(model, fullgraph=True, backend=backend)
    call(x.clone().requires_grad_()).sum().backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        bs.testing.check_unbiased(Called(model, call), x, draws=DRAWS, reference=exact)
    assert bs.saved_bytes(call, x).total <= 1.1 * bs.saved_bytes(model, x).total + 64
    torch._dynamo.reset()


@pytest.mark.fast_cases("leaky", "softplus", "batch norm of images")
@ignore_compiler_warnings
@pytest.mark.parametrize(
    "name", ["leaky", "silu", "softplus", "group norm", "batch norm of images"]
)
def test_the_other_kinds_compile_in_one_graph(name):
    torch._dynamo.reset()
    module, other, x = sketched(name)
    call = torch.compile(other, fullgraph=True, backend="aot_eager_decomp_partition")
    for _ in range(2):
        torch.testing.assert_close(call(x.clone().requires_grad_()), module(x))
    for before, after in zip(module.buffers(), other.buffers()):
        torch.testing.assert_close(before, after)
    reference = Called(copy.deepcopy(module))
    bs.testing.check_unbiased(Called(other, call), x, draws=100, reference=reference)
    torch._dynamo.reset()


@ignore_compiler_warnings
def test_rounding_in_the_compiled_step_that_goes_down_too_often_is_noticed(monkeypatch):
    torch._dynamo.reset()
    model, exact, x = chain()
    halve_the_dither(monkeypatch)
    call = torch.compile(model, fullgraph=True, backend="aot_eager_decomp_partition")
    with pytest.raises(AssertionError, match="is biased"):
        bs.testing.check_unbiased(Called(model, call), x, draws=DRAWS, reference=exact)
    torch._dynamo.reset()


@pytest.mark.fast_cases("reentrant")
@pytest.mark.parametrize("kind", ["reentrant", "not reentrant"])
def test_both_kinds_of_checkpoints_stay_unbiased(kind):
    model, exact, x = chain(kind)
    bs.testing.check_unbiased(Called(model), x, draws=DRAWS, reference=exact)


def test_saved_tensors_may_be_offloaded():
    model, exact, x = chain()

    def offloaded(x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return model(x)

    bs.testing.check_unbiased(Called(model, offloaded), x, draws=DRAWS, reference=exact)


def test_a_retained_graph_gives_the_same_gradient_again():
    model, _, x = chain()
    y = model(x.requires_grad_()).square().sum()
    first, again = (torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again)


def test_a_module_used_twice_in_one_pass_is_unbiased():
    model, exact, x = chain()
    twice = [Called(m, lambda x, m=m: m(m(x) / 4)) for m in (model, exact.model)]
    bs.testing.check_unbiased(twice[0], x, draws=DRAWS, reference=twice[1])


def test_deepcopy_pickle_and_restore():
    model, _, x = chain()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other.mlp[2]).__name__ == "SketchedGELU"
        assert torch.equal(other(x), model(x))
        assert other.state_dict().keys() == model.state_dict().keys()
    bs.restore_(model)
    assert type(model.mlp[2]) is nn.GELU
    assert not hasattr(model.mlp[2], "_backsketch")


def test_multihead_attention_keeps_its_operands_in_bits_too():
    module = nn.MultiheadAttention(32, 2, batch_first=True)

    class Itself(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x, x, x, need_weights=False)[0]

    model, x = Itself(), torch.randn(8, 12, 32)
    before, y = bs.saved_bytes(model, x).total, model(x)
    bs.sketch_(model, bs.Quantized(bits=4))
    assert torch.equal(model(x), y)
    assert bs.saved_bytes(model, x).total < 0.4 * before


def test_long_sequences_keep_the_attention_exact():
    rounding = bs.Quantized(bits=4).rounding()
    assert pays(rounding, 64, 32)
    assert not pays(rounding, 1024, 32)
    _, other, _ = sketched("attention")
    x = torch.randn(1, 200, 4)
    exact, cheap = (vjp(m, x)[0] for m in (Attend(), other))
    assert exact.shape == cheap.shape
    torch.testing.assert_close(vjp(with_weights(Attend()), x), vjp(other, x))
