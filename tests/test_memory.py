"""What is saved for the backward really shrinks: unique storages, bytes, and the input set free."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

import backsketch as bs
from cases import FAMILIES

SAVERS = [
    bs.StoredRows(keep=0.25),
    bs.Projection(keep=0.25),
    bs.Projection(keep=0.25, kind="srht"),
    bs.Quantized(bits=1),
    bs.Quantized(bits=4),
    bs.Split(grad_weight=bs.StoredRows(keep=0.25)),
]
# What a layer may save beside its input's sketch: indices, seeds, empty tensors that carry shapes.
SMALL = 1024

LAYERS = {
    "linear": (lambda: nn.Linear(64, 8), (128, 64)),
    "linear of tokens": (lambda: nn.Linear(64, 8), (8, 16, 64)),
    "conv": (lambda: nn.Conv2d(8, 4, 3), (32, 8, 8, 8)),
    "strided conv": (lambda: nn.Conv2d(8, 8, 3, stride=2, groups=2), (32, 8, 8, 8)),
    "pointwise conv": (lambda: nn.Conv2d(8, 4, 1), (16, 8, 8, 8)),
}


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """With the input, if it is kept: here it is an activation like any other."""
    saved = bs.saved_bytes(model, x)
    return saved.total + saved.inputs


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("estimator", SAVERS, ids=str)
def test_what_a_layer_saves_is_what_the_report_predicts(estimator, kind):
    build, shape = LAYERS[kind]
    layer, x = build(), torch.randn(shape)
    exact = saved_bytes(layer, x)
    assert exact == x.nbytes
    report = bs.sketch_(layer, estimator)
    predicted = report[""].saved * x.nbytes
    assert predicted < x.nbytes / 3
    assert predicted <= saved_bytes(layer, x) <= predicted + SMALL + 8 * len(x.flatten(0, -2))


@pytest.mark.parametrize("estimator", SAVERS, ids=str)
def test_the_input_itself_is_set_free(estimator):
    """A view of it, however small, would keep all of it."""
    layer = nn.Linear(64, 8)
    bs.sketch_(layer, estimator)
    x = torch.randn(128, 64)
    alive = weakref.ref(x.untyped_storage())
    y = layer(x)
    del x
    gc.collect()
    assert alive() is None
    y.sum().backward()


def test_the_exact_layer_does_keep_its_input_alive():
    """The control of the test above."""
    layer, x = nn.Linear(64, 8), torch.randn(128, 64)
    kept = weakref.ref(x)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    assert any(t.data_ptr() == kept().data_ptr() for t in saved)


@pytest.mark.parametrize("estimator", SAVERS, ids=str)
def test_a_deep_net_saves_less_with_activations_that_keep_their_own_output(estimator):
    """A ReLU saves its output, which is the next layer's input: it must keep a bit instead."""

    def net(activation: type[nn.Module]) -> nn.Module:
        layers = [m for _ in range(4) for m in (nn.Linear(64, 64), activation())]
        return nn.Sequential(*layers)

    x = torch.randn(256, 64)
    for activation in (nn.Identity, nn.ReLU):
        model = net(activation)
        exact = saved_bytes(model, x)
        bs.sketch_(model, estimator)
        assert saved_bytes(model, x) < 0.5 * exact


@pytest.mark.parametrize("estimator", FAMILIES, ids=str)
def test_no_estimator_saves_more_than_the_exact_layer(estimator):
    layer, x = nn.Linear(64, 8), torch.randn(128, 64)
    bs.sketch_(layer, estimator)
    assert saved_bytes(layer, x) <= x.nbytes + SMALL


@pytest.mark.parametrize("estimator", SAVERS, ids=str)
def test_attention_saves_less_of_its_input_alone(estimator):
    """The mixed values, input of the last projection, are kept by the attention itself, if it is exact."""
    module = nn.MultiheadAttention(64, 1, batch_first=True)

    class SelfAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x, x, x, need_weights=False)[0]

    model, x = SelfAttention(), torch.randn(32, 16, 64)
    exact = saved_bytes(model, x)
    bs.sketch_(model, estimator)
    assert saved_bytes(model, x) < exact - x.nbytes / 3


@pytest.mark.parametrize("estimator", SAVERS, ids=str)
def test_low_precision_inputs_are_saved_in_low_precision(estimator):
    layer, x = nn.Linear(64, 8), torch.randn(128, 64)
    bs.sketch_(layer, estimator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = saved_bytes(layer, x)
    weight = layer.weight.nbytes / 2  # autocast's copy of the weight is saved, too
    assert low - weight <= saved_bytes(layer, x) + SMALL


def test_nothing_is_saved_where_no_gradient_is_wanted():
    layer, x = nn.Linear(64, 8), torch.randn(128, 64)
    bs.sketch_(layer, bs.StoredRows(keep=0.25))
    with torch.no_grad():
        assert saved_bytes(layer, x) == 0
    layer.requires_grad_(False)
    assert saved_bytes(layer, x) == 0
