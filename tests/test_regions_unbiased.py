"""Regions and masks are unbiased, mode by mode and architecture by architecture."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import backsketch as bs
from backsketch import sampling
from backsketch.regions import Mask, Region, program
from backsketch.regions import rows as row_ops
from helpers import images
from region_models import (
    CNN,
    GPT,
    Attention,
    Block,
    Feedforward,
    Fourier,
    Picked,
    TwoTowers,
    ViT,
    Windows,
    make_region,
    mlp,
)

DRAWS = 150
IMAGE = (1, 8, 8)


def tokens(n: int = 6) -> torch.Tensor:
    return torch.randn(n, 4, 8)


CASES = {
    "mlp": (lambda: mlp(5, 8, 3), lambda: [torch.randn(10, 5)], {"": Region(0.4)}),
    "attention branch": (lambda: Attention(8, 2), lambda: [tokens()], {"": Region(0.5)}),
    "token branch": (
        lambda: Feedforward(8),
        lambda: [tokens()],
        {"": Region(0.3, row_dims=2)},
    ),
    "branches": (
        lambda: Block(8, 2),
        lambda: [tokens()],
        {"attn": Region(0.5), "mlp": Region(0.5, row_dims=2)},
    ),
    "vit": (ViT, lambda: [images(shape=IMAGE)], {"": Region(0.5)}),
    "dropout": (
        lambda: ViT(depth=1, dropout=0.3),
        lambda: [images(shape=IMAGE)],
        {"": Region(0.5)},
    ),
    "token dropout": (
        lambda: Feedforward(8, 0.3),
        lambda: [tokens()],
        {"": Region(0.4, row_dims=2)},
    ),
    "gpt": (GPT, lambda: [torch.randint(11, (6, 5))], {"": Region(0.5)}),
    "gpt block": (GPT, lambda: [torch.randint(11, (6, 5))], {"block": Region(0.5)}),
    "picked tokens": (Picked, lambda: [tokens()], {"": Region(0.5)}),
    "group norm": (CNN, lambda: [torch.randn(6, 2, 8, 8)], {"": Region(0.5)}),
    "windows inside": (Windows, lambda: [torch.randn(6, 16, 8)], {"": Region(0.5)}),
    "fourier": (Fourier, lambda: [torch.randn(6, 8, 8)], {"": Region(0.5)}),
    "two towers": (
        lambda: TwoTowers(False),
        lambda: [torch.randn(6, 6), torch.randn(6, 5)],
        {"": Region(0.5)},
    ),
    "nested": (
        lambda: Block(8, 2),
        lambda: [tokens()],
        {"mlp": Region(0.5, row_dims=2), "": Region(0.5)},
    ),
    "mask above": (ViT, lambda: [images(shape=IMAGE)], {"": Mask(0.5), "blocks.0": Region(0.5)}),
}

SLOW = "branches", "vit", "dropout", "gpt block", "nested", "token dropout", "gpt", "fourier"
FAST = [c for c in CASES if c not in SLOW]


def with_mode(rules: dict[str, Region | Mask], mode: str) -> dict[str, Region | Mask]:
    return {
        n: s if isinstance(s, Mask) else Region(s.keep, s.row_dims, mode)  # type: ignore[arg-type]
        for n, s in rules.items()
    }


@pytest.mark.fast_cases(*[f"{case}-save" for case in FAST])
@pytest.mark.parametrize("mode", ["save", "recompute"])
@pytest.mark.parametrize("case", CASES)
def test_every_region_is_active_and_unbiased(case: str, mode: str) -> None:
    build, inputs, rules = CASES[case]
    model = build()
    states = make_region(model, with_mode(rules, mode))
    x = inputs()
    y = model(*x)
    sum(t.square().sum() for t in (y if isinstance(y, tuple) else (y,))).backward()
    expected = {n: "active" for n, s in states.items() if s is not None}
    if case == "nested":
        expected["mlp"] = "pending"  # exact inside the outer region
    assert {n: s.status for n, s in states.items() if s is not None} == expected
    model.zero_grad()
    report = bs.testing.check_unbiased(model, *x, draws=DRAWS)
    # Were the region run exactly, there would be no variance to speak of.
    assert max(report.relative_variance.values()) > 0.05


@pytest.mark.parametrize("row_dims", [1, 2])
def test_mask_is_unbiased(row_dims: int) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
    make_region(model, {"1": Mask(0.4, row_dims)})
    bs.testing.check_unbiased(model, tokens(), draws=DRAWS)


class Cast(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.block(x).float()


@pytest.mark.fast_cases("recompute")
@pytest.mark.parametrize("mode", ["save", "recompute"])
def test_bfloat16_autocast_is_unbiased(mode: str) -> None:
    """Within rounding: some gradients (a key bias) are zero, and in bfloat16 all rounding."""
    model = Cast(Block(8, 2))
    rules = {"block.attn": Region(0.5), "block.mlp": Region(0.5, row_dims=2)}
    make_region(model, with_mode(rules, mode))
    moments = bs.testing.gradient_moments(model, tokens(), draws=DRAWS)
    scale = max(float(m.exact.abs().max()) for m in moments.values())
    for name, m in moments.items():
        error = (m.second / m.draws).sqrt() / m.draws**0.5
        bound = 6 * error + 2**-8 * (m.exact.abs() + 0.05 * scale)
        assert ((m.mean - m.exact).abs() <= bound).all(), name


DRAW = sampling.draw_live


def drop_weights(*arguments: Any) -> sampling.Sample | None:
    sample = DRAW(*arguments)
    return sample and sampling.Sample(sample.indices, torch.ones_like(sample.weights))


@pytest.mark.parametrize("mode", ["save", "recompute"])
def test_dropping_the_weights_is_caught(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Feedforward(8)
    make_region(model, with_mode({"": Region(0.4, row_dims=2)}, mode))
    monkeypatch.setattr(sampling, "draw_live", drop_weights)
    with pytest.raises(AssertionError, match="biased"):
        bs.testing.check_unbiased(model, tokens(), draws=DRAWS)


def shifted_take(x: torch.Tensor, dim: int, axes: int, lead, axis: int, index: torch.Tensor):
    n = math.prod(lead)
    return TAKE(x, dim, axes, lead, axis, (index + 1) % n)


TAKE = row_ops.take


@pytest.fixture
def shifted_saved_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[nn.Module, torch.Tensor], None]:
    """Run one forward pass whose captured backward graph gathers the next row's saved tensors."""

    def capture(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        monkeypatch.setattr(row_ops, "take", shifted_take)
        y = model(x)
        monkeypatch.setattr(row_ops, "take", TAKE)
        return y

    return capture


class Fresh(Feedforward):
    """A class of its own, so that no graph of another test is shared."""


class Fresh2(Feedforward):
    pass


def test_the_first_batch_catches_a_wrong_gather(shifted_saved_rows) -> None:
    model = Fresh(8)
    states = make_region(model, {"": Region(0.5)})
    shifted_saved_rows(model, tokens()).square().sum().backward()
    assert states[""].status == "exact"
    assert "do not add up" in states[""].reason


def test_a_wrong_gather_would_be_biased(
    shifted_saved_rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the check of the first batch, the statistical test sees it."""
    monkeypatch.setattr(program, "splits_add_up", lambda part, exact, scores, low: (exact(), True))
    model = Fresh2(8)
    make_region(model, {"": Region(0.5)})
    shifted_saved_rows(model, tokens().requires_grad_())
    with pytest.raises(AssertionError, match="biased"):
        bs.testing.check_unbiased(model, tokens(), draws=DRAWS)
