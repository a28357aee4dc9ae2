"""8-bit products everywhere: each kind of layer, hard cotangents, the ledger, the controller, the report."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import backsketch as bs
from cases import SelfAttention
from mutations import halve_the_dither_of_products

SKETCHES = [bs.Int8(), bs.Int8(save=True), bs.Float8(), bs.Float8(save=True)]
every_sketch = pytest.mark.parametrize("sketch", SKETCHES, ids=str)


class Scaled(nn.Module):
    """A module whose output is scaled row by row, so that its cotangent is."""

    def __init__(self, module: nn.Module, rows: Tensor) -> None:
        super().__init__()
        self.module = module
        self.register_buffer("rows", rows)

    def forward(self, x: Tensor) -> Tensor:
        y = self.module(x)
        return y * self.rows.view(-1, *[1] * (y.ndim - 1))


def images() -> Tensor:
    return torch.randn(3, 4, 5, 5)


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(6, 5), lambda: torch.randn(12, 6)),
    "1x1": (lambda: nn.Conv2d(4, 6, 1), images),
    "1x1, channels last": (
        lambda: nn.Conv2d(4, 6, 1),
        lambda: images().to(memory_format=torch.channels_last),
    ),
    "3x3": (lambda: nn.Conv2d(4, 6, 3, padding=1), images),
    "strided": (lambda: nn.Conv2d(4, 6, 3, 2), images),
    "grouped": (lambda: nn.Conv2d(4, 4, 3, groups=2), images),
    "attention": (SelfAttention, lambda: torch.randn(3, 4, 8)),
    "six decades": (
        lambda: Scaled(nn.Linear(6, 5), torch.logspace(-6, 0, 12)),
        lambda: torch.randn(12, 6),
    ),
    "zero rows": (
        lambda: Scaled(nn.Linear(6, 5), (torch.arange(12) % 3 > 0).float()),
        lambda: torch.randn(12, 6),
    ),
    "one row": (lambda: nn.Linear(6, 5), lambda: torch.randn(1, 6)),
    "float64": (lambda: nn.Linear(6, 5).double(), lambda: torch.randn(12, 6).double()),
    "bfloat16": (lambda: nn.Linear(6, 5).bfloat16(), lambda: torch.randn(12, 6).bfloat16()),
}


@pytest.mark.fast_cases(
    "grouped-float8", "1x1, channels last-int8", "six decades-int8", "bfloat16-float8"
)
@every_sketch
@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_unbiased(name, sketch):
    build, inputs = LAYERS[name]
    module = build()
    bs.sketch_(module, {"re:.*": sketch})
    bs.testing.check_unbiased(module, inputs(), draws=250)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sketch"), [*zip(LAYERS, itertools.cycle([bs.Int8(), bs.Float8()]))], ids=str
)
def test_layers_are_unbiased_over_1_000_draws(name, sketch):
    build, inputs = LAYERS[name]
    module = build()
    bs.sketch_(module, {"re:.*": sketch})
    bs.testing.check_unbiased(module, inputs(), draws=1000)


def test_a_wrong_dither_is_noticed_in_heavy_tails(monkeypatch):
    module = LAYERS["six decades"][0]()
    bs.sketch_(module, {"re:.*": bs.Int8()})
    halve_the_dither_of_products(monkeypatch)
    with pytest.raises(AssertionError, match="biased"):
        bs.testing.check_unbiased(module, torch.randn(12, 6), draws=250)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 8))


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


@pytest.mark.parametrize("sketch", [bs.Int8(), bs.Float8()], ids=str)
def test_the_ledger_knows_the_closed_form_of_each_site(sketch):
    model = network()
    bs.sketch_(model, sketch)
    ledger = bs.variance(model, [torch.randn(48, 24) for _ in range(2)], loss, draws=30)
    assert [site.name for site in ledger.sites] == ["2", "0"]
    for site in ledger.sites:
        assert site.injected == pytest.approx(site.predicted, rel=0.25)
    assert 1 < ledger.multiplier < 1.02


def test_the_controller_has_nothing_to_move_and_says_so():
    for sketch in SKETCHES:
        model = network()
        bs.sketch_(model, sketch)
        assert sketch.movable_keep() is None
        assert sketch.with_keep(0.5) == sketch
        with pytest.raises(ValueError, match="no sketch with a keep to move"):
            bs.Controller(model, 0.1)


def test_the_controller_moves_the_rows_inside():
    sketch = bs.Float8(sketch=bs.Rows(keep=0.5))
    assert sketch.movable_keep() == 0.5
    assert sketch.with_keep(0.25) == bs.Float8(sketch=bs.Rows(keep=0.25))


@every_sketch
def test_a_frozen_layer_passes_its_gradient_on_and_gets_none(sketch):
    model = network()
    for parameter in model[2].parameters():
        parameter.requires_grad_(False)
    x = torch.randn(48, 24)
    loss(model, x).backward()
    exact = model[0].weight.grad
    model.zero_grad()
    bs.sketch_(model, sketch)
    loss(model, x).backward()
    assert model[2].weight.grad is None
    assert 0 < float((model[0].weight.grad - exact).norm() / exact.norm()) < 0.1


@every_sketch
def test_float64_models_have_gradients_of_float64(sketch):
    layer = nn.Linear(6, 5).double()
    bs.sketch_(layer, sketch)
    layer(torch.randn(12, 6).double()).sum().backward()
    assert layer.weight.grad.dtype == torch.float64


@every_sketch
def test_the_report_names_the_sketch_and_the_bytes(sketch):
    report = bs.sketch_(nn.Linear(128, 128), sketch)
    assert str(sketch) in str(report)
    assert (sketch.saved() < 0.3) == sketch.save
    assert sketch.work() == (0.25, 0.25)
