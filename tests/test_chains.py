"""Activations and norms under memory savers: bit-identical forward, unbiased or exact backward, few bytes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import backsketch as bs
from backsketch.rounding import units
from backsketch.testing import gradient_moments
from backsketch.theory import variance
from chain_cases import BITS, CHAIN, NORMS, ROUNDED, SMOOTH, made
from mutations import halve_the_dither, one_rounding_for_both

TWO_BITS = bs.Quantized(bits=2, group_size=8)


def gradients(module: nn.Module, x: Tensor, cotangent: Tensor | None = None) -> list[Tensor]:
    """Of the input and the parameters, for a fixed cotangent."""
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
    for exact, cheap in zip(gradients(module, x), gradients(other, x)):
        assert torch.equal(exact, cheap)


@pytest.mark.parametrize("name", ROUNDED)
def test_the_gradient_is_unbiased(name):
    _, other, x = sketched(name)
    bs.testing.check_unbiased(other, x, draws=500)


@pytest.mark.parametrize("name", ["gelu", "layer norm", "batch norm"])
def test_rounding_that_goes_down_too_often_is_noticed(name, monkeypatch):
    _, other, x = sketched(name)
    halve_the_dither(monkeypatch)
    with pytest.raises(AssertionError, match="is biased"):
        bs.testing.check_unbiased(other, x, draws=800)


@pytest.mark.parametrize("name", ["layer norm", "rms norm", "batch norm"])
def test_one_rounding_instead_of_two_is_noticed(name, monkeypatch):
    """The backward of a norm is quadratic in what it saves: the diagonal would be biased."""
    _, other, x = sketched(name, bs.Quantized(bits=1, group_size=8))
    one_rounding_for_both(monkeypatch)
    with pytest.raises(AssertionError, match="is biased"):
        bs.testing.check_unbiased(other, x, draws=1200)


@pytest.mark.parametrize("name", ["gelu", "softplus"])
def test_the_variance_of_an_activation_is_the_closed_form(name):
    module, other, x = sketched(name)
    ones = torch.ones_like(x)
    slope = gradients(module, x, ones)[0]
    generator = torch.Generator().manual_seed(0)  # the cotangent of gradient_moments
    g = torch.randn(x.shape, generator=generator)
    step, levels = units(slope, TWO_BITS.rounding())
    spread = variance.quantized(step, levels - levels.floor()).view(x.shape)
    expected = float((g.double().square() * spread).sum())
    measured = float(gradient_moments(other, x, draws=2500)["input[0]"].variance)
    assert measured == pytest.approx(expected, rel=0.1)


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
        pairs = zip(gradients(module, x), gradients(other, x))
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
    assert not bool(gradients(other, x)[0].isfinite().all())


@pytest.mark.parametrize("name", ROUNDED)
def test_a_nonfinite_cotangent_reaches_the_gradient(name):
    module, other, x = sketched(name)
    g = torch.ones_like(module(x))
    g.view(-1)[3] = float("nan")
    assert bool(gradients(other, x, g)[0].isnan().any())


@pytest.mark.parametrize("name", ROUNDED)
def test_constant_groups_are_exact(name):
    if name.startswith("batch norm") or "attention" in name:
        pytest.skip("a constant channel is divided by the square root of eps; a causal mask varies")
    module, other, x = sketched(name)
    x = torch.full_like(x, 0.4)
    for exact, cheap in zip(gradients(module, x), gradients(other, x)):
        torch.testing.assert_close(exact, cheap, atol=1e-3, rtol=1e-3)  # 316 times the rounding


@pytest.mark.parametrize("name", [n for n in CHAIN if not n.startswith(("batch", "layer norm of"))])
@pytest.mark.parametrize("rows", [0, 1])
def test_empty_batches_and_single_rows(name, rows):
    module, other, x = sketched(name)
    for exact, cheap in zip(gradients(module, x[:rows]), gradients(other, x[:rows])):
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
    for exact, cheap in zip(gradients(module, x), gradients(other, x)):
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
            exact, cheap = gradients(module, given), gradients(other, given)
        for a, b in zip(exact, cheap):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=0.1, atol=0.1)


def test_double_precision_is_kept():
    module, other, x = sketched("layer norm", bs.Quantized(bits=8, group_size=8))
    module.double(), other.double()
    for a, b in zip(gradients(module, x.double()), gradients(other, x.double())):
        assert b.dtype == torch.float64
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.1)


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
