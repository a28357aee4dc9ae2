"""Every kind of layer that the registry knows: the same forward values, unbiased gradients, an error noticed."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import backsketch as bs
from backsketch.nn.registry import with_products
from backsketch.nn.swap import is_swapped
from cases import ADAPTED, FAMILIES, WITHOUT_8_BITS
from mutations import drop_the_weights

Case = tuple[nn.Module, tuple[Tensor, ...]]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def gpt2_linear() -> Case:
    utils = pytest.importorskip("transformers.pytorch_utils")
    return utils.Conv1D(6, 5), (torch.randn(3, 4, 5),)


class Routed(nn.Module):
    """Fused experts with a fixed choice of two of four for each token."""

    def __init__(self, implementation: str, family: str = "Mixtral") -> None:
        super().__init__()
        transformers = pytest.importorskip("transformers")
        config = getattr(transformers, f"{family}Config")(
            vocab_size=8, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, num_local_experts=4, head_dim=4,
        )  # fmt: skip
        model = getattr(transformers, f"{family}ForCausalLM")(config)
        model.set_experts_implementation(implementation)
        self.experts = model.model.layers[0].mlp.experts
        for parameter in self.experts.parameters():
            nn.init.normal_(parameter, std=0.5)
        self.choice = torch.stack([torch.randperm(4)[:2] for _ in range(12)])

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        return self.experts(x, self.choice, weights)


def routed(implementation: str, family: str = "Mixtral") -> Callable[[], Case]:
    return lambda: (Routed(implementation, family), (torch.randn(12, 8), torch.rand(12, 2)))


def adapted(kind: type[nn.Module]) -> Callable[[], Case]:
    build, inputs = ADAPTED[kind]
    return lambda: (build(), inputs())


CASES: dict[str, Callable[[], Case]] = {
    **{kind.__name__: adapted(kind) for kind in ADAPTED if kind is not bs.nn.LinearCrossEntropy},
    "transformers.pytorch_utils.Conv1D": gpt2_linear,
    "fused experts": routed("grouped_mm"),
}
VARIANTS = {
    **CASES,
    "fused experts, one by one": routed("eager"),
    "fused experts, transposed": routed("grouped_mm", "GptOss"),
    "fused experts, transposed, one by one": routed("eager", "GptOss"),
}
every_variant = pytest.mark.parametrize("case", VARIANTS)


def outputs(module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    y = module(*inputs)
    return y[0] if isinstance(y, tuple) else y


def test_every_registered_kind_has_a_case():
    assert {*with_products()} == {*CASES, "LinearCrossEntropy"}


@every_variant
def test_the_forward_values_and_shapes_are_those_of_the_exact_layer(case):
    module, inputs = VARIANTS[case]()
    twin = copy.deepcopy(module)
    report = bs.sketch_(twin, bs.Rows(keep=0.9999))
    assert len(report.sketched) == 1
    results = []
    for layer in (module, twin):
        leaves = [x.clone().requires_grad_() for x in inputs]
        y = outputs(layer, tuple(leaves))
        wanted = [*leaves, *layer.parameters()]
        grads = torch.autograd.grad(y.square().sum(), wanted, allow_unused=True)
        results.append((y, grads))
    assert torch.equal(results[0][0], results[1][0])
    for expected, ours in zip(results[0][1], results[1][1]):
        assert (expected is None) == (ours is None)
        if expected is not None:
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


# Experts are linear layers, one by one: what all families do there is tested at the linear layer.
FEW = [bs.Rows(keep=0.5), bs.Quantized(bits=2)]
PAIRS = [(case, e) for case in VARIANTS for e in (FEW if "experts" in case else FAMILIES)]
NO_8_BITS = {kind.__name__ for kind in WITHOUT_8_BITS}


@pytest.mark.fast_cases(
    "rows:keep=0.5", "Conv1d-quantized:bits=2", "MultiheadAttention-quantized:bits=2",
    "Conv3d-int8", "MultiheadAttention-int8", "ConvTranspose3d-int8",
)  # fmt: skip
@pytest.mark.parametrize(("case", "estimator"), PAIRS, ids=str)
def test_gradients_are_unbiased(case, estimator):
    module, inputs = VARIANTS[case]()
    if isinstance(estimator, bs.Int8 | bs.Float8) and case in NO_8_BITS:
        with pytest.raises(ValueError, match="no 8-bit form"):
            bs.sketch_(module, estimator)
        return
    bs.sketch_(module, estimator)
    report = bs.testing.check_unbiased(module, *inputs, draws=150)
    assert max(report.relative_variance.values()) > 1e-6  # something was sketched


@every_variant
def test_a_wrong_weight_is_noticed(case, monkeypatch):
    module, inputs = VARIANTS[case]()
    bs.sketch_(module, bs.Rows(keep=0.5))
    drop_the_weights(monkeypatch)
    with pytest.raises(AssertionError, match="is biased"):
        bs.testing.check_unbiased(module, *inputs, draws=150)


@pytest.mark.parametrize("case", ["Conv1d", "Conv3d", "ConvTranspose2d"])
def test_convolutions_take_a_single_sample(case):
    module, (x,) = CASES[case]()
    y = module(x[0])
    bs.sketch_(module, bs.Columns(keep=0.5))
    assert torch.equal(module(x[0]), y)
    module(x[0]).sum().backward()


def test_a_transposed_convolution_takes_the_size_of_its_output():
    module, (x,) = nn.ConvTranspose2d(4, 6, 3, stride=2), (torch.randn(2, 4, 3, 3),)
    y = module(x, output_size=[8, 8])
    bs.sketch_(module, bs.Rows(keep=0.5))
    assert torch.equal(module(x, output_size=[8, 8]), y)


# Autocast and frozen weights -------------------------------------------------------------------------


@every_variant
def test_under_autocast_values_and_types_are_those_of_the_exact_layer(case):
    module, inputs = VARIANTS[case]()
    with torch.autocast("cpu", torch.bfloat16):
        y = outputs(module, inputs)
        bs.sketch_(module, bs.Rows(keep=0.5))
        z = outputs(module, inputs)
    assert z.dtype == y.dtype
    assert torch.equal(y, z)
    z.sum().backward()


@every_variant
def test_a_frozen_weight_gets_no_gradient_and_the_report_says_so(case, monkeypatch):
    module, inputs = VARIANTS[case]()
    module.requires_grad_(False)
    report = bs.sketch_(module, bs.Rows(keep=0.5))
    assert report.sites[0].frozen
    assert "frozen" in str(report)
    monkeypatch.setattr(bs.Rows, "estimate_weight", None)  # would fail if it were called
    leaves = [x.clone().requires_grad_() for x in inputs]
    outputs(module, tuple(leaves)).sum().backward()
    assert all(p.grad is None for p in module.parameters())
    assert any(bool(x.grad.abs().sum()) for x in leaves if x.grad is not None)


# What cannot be sketched -----------------------------------------------------------------------------


def test_experts_that_run_in_one_batched_product_are_left_exact_with_the_way_out():
    module = Routed("batched_mm")
    with pytest.raises(ValueError, match=r"run as 'batched_mm'.*set experts_implementation"):
        bs.sketch_(module, bs.Rows(keep=0.5))
    assert not is_swapped(module.experts)


@pytest.mark.parametrize("layer", [nn.Bilinear(3, 3, 2), nn.LSTM(3, 3)], ids=str)
def test_a_layer_that_cannot_be_sketched_says_why(layer):
    with pytest.raises(ValueError, match="region"):
        bs.sketch_(nn.ModuleDict({"it": layer}), {"it": bs.Rows(keep=0.5)})
