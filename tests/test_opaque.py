"""The backward pass of a layer as one operator: what compiled code consists of, and what it computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

import backsketch as bs
from backsketch.ops.linear import Linear
from backsketch.ops.opaque import OPAQUE
from cases import FAMILIES

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


@dataclass(frozen=True)
class Mine(bs.Rows):
    """An estimator that no text describes: its class is not registered."""


def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))


def gradients(call: Any, model: nn.Module, x: Tensor) -> list[Tensor]:
    bs.seed(5)
    x = x.clone().requires_grad_()
    return list(torch.autograd.grad(call(x).square().sum(), [x, *model.parameters()]))


def compiled(model: nn.Module, x: Tensor) -> tuple[list[Tensor], list[str]]:
    """Gradients by the graphs that AOTAutograd makes, and the operators of the backward graph."""
    names: list[str] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        names.extend(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return make_boxed_func(graph)

    torch._dynamo.reset()
    plain = lambda graph, inputs: make_boxed_func(graph)  # noqa: E731
    backend = aot_autograd(fw_compiler=plain, bw_compiler=keep)
    call = torch.compile(model, fullgraph=True, backend=backend)
    return gradients(call, model, x), names


@pytest.mark.fast_cases(
    "rows:keep=0.5", "stored_rows:keep=0.5", "projection:keep=0.5", "quantized:bits=2", "int8"
)
@pytest.mark.parametrize("estimator", FAMILIES, ids=str)
def test_each_layer_is_one_operator_with_the_gradients_of_eager_code(estimator):
    model, x = layers(), torch.randn(3, 5, 6)
    bs.sketch_(model, estimator)
    found, operators = compiled(model, x)
    assert sum("linear_vjps" in name for name in operators) == 3
    assert not any("backsketch.draw" in name for name in operators)
    if not estimator.needs_forward_seed:  # seeds are drawn in the order of eager code
        for a, b in zip(found, gradients(model, model, x)):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
            assert a.is_contiguous()


def test_an_estimator_without_a_text_is_compiled_as_its_own_operations():
    model, x = layers(), torch.randn(7, 6)
    bs.sketch_(model, Mine(keep=0.5))
    found, operators = compiled(model, x)
    assert not any("linear_vjps" in name for name in operators)
    assert sum("backsketch.draw" in name for name in operators) == 6
    assert all(bool(g.isfinite().all()) for g in found)


def test_a_frozen_weight_and_half_precision():
    model, x = layers().bfloat16(), torch.randn(7, 6).bfloat16()
    model[2].weight.requires_grad_(False)
    bs.sketch_(model, bs.Rows(keep=0.5))
    bs.seed(5)
    torch._dynamo.reset()
    call = torch.compile(model, fullgraph=True, backend="aot_eager")
    call(x).sum().backward()
    assert model[2].weight.grad is None
    assert model[0].weight.grad.dtype == torch.bfloat16
    assert bool(model[0].weight.grad.float().abs().sum() > 0)


def test_the_operator_over_samples_is_a_loop():
    opaque = OPAQUE[Linear]
    cotangent, weight, x = torch.randn(3, 5, 4), torch.randn(4, 6), torch.randn(3, 5, 6)
    seed = torch.tensor(3)

    def both(g: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        below, at_weight, at_bias = opaque(
            bs.Rows(keep=0.5), (5, 6), (True, True, False), g, weight, [rows], seed
        )
        assert below is not None
        assert at_weight is not None
        assert at_bias is None
        return below, at_weight

    found = torch.func.vmap(both)(cotangent, x)
    for i in range(3):
        for a, b in zip(found, both(cotangent[i], x[i])):
            torch.testing.assert_close(a[i], b)
