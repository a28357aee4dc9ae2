"""Regions of some rows that keep saved tensors in a few bits: the codes of the drawn rows are taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import backsketch as bs
from backsketch.regions import RunsExactly, program, rows, runner, saver, state_of
from helpers import named_gradients
from mutations import halve_the_dither
from region_models import Feedforward, ViT
from test_regions_save import PATTERNS, Functional

HALF = bs.Region(keep=0.5, save="int4")
CASES = ["product", "swiglu", "norm", "fused attention", "convolutions", "group norm"]
SLOW = {"product", "norm", "fused attention", "convolutions"}
every_case = pytest.mark.parametrize(
    "name", [pytest.param(c, marks=[pytest.mark.slow] if c in SLOW else []) for c in CASES]
)


def prepared(name: str, sketch: bs.Region = HALF) -> tuple[nn.Module, Tensor]:
    """A sketched module whose region has seen its first batch, and its input."""
    build, shape = PATTERNS[name]
    model, x = build(), torch.randn(shape)
    bs.sketch_(model, sketch)
    for _ in range(2):
        model(x).square().mean().backward()
    assert state_of(model).status == "active", state_of(model).reason
    note = state_of(model).note
    assert "rows proven independent" in note
    assert "of the bytes it keeps rounded" in note
    assert "; 0% of the bytes" not in note
    return model, x


@every_case
def test_unbiased(name: str) -> None:
    model, x = prepared(name)
    report = bs.testing.check_unbiased(model, x, draws=300)
    assert max(report.relative_variance.values()) > 0.05


@pytest.mark.fast_cases("swiglu")
@pytest.mark.parametrize("name", ["product", "swiglu", "norm", "fused attention"])
def test_half_a_dither_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = prepared(name)
    halve_the_dither(monkeypatch)
    with pytest.raises(AssertionError, match="biased"):
        bs.testing.check_unbiased(model, x, draws=300)


@pytest.mark.parametrize("name", CASES)
def test_codes_of_other_rows_are_noticed_in_the_first_batch(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = rows.take

    def others(x: Tensor, dim: int, axes: int, lead: Any, axis: int, index: Tensor) -> Tensor:
        return take(x, dim, axes, lead, axis, index.flip(0) if x.dtype == torch.uint8 else index)

    monkeypatch.setattr(rows, "take", others)
    monkeypatch.setattr(program, "_is_plain", lambda *_: False)  # which would be taken otherwise
    monkeypatch.setattr(runner, "_RUNNERS", {})
    build, shape = PATTERNS[name]
    model, x = build(), torch.randn(shape)
    bs.sketch_(model, HALF)
    with pytest.warns(RunsExactly, match="parts of the first batch do not add up"):
        model(x).square().mean().backward()


def test_forgotten_weights_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = prepared("swiglu")
    monkeypatch.setattr(program, "_weigh", lambda kept, at, weights: kept)
    with pytest.raises(AssertionError, match="biased"):
        bs.testing.check_unbiased(model, x, draws=300)


def test_dropout_and_tokens_as_rows() -> None:
    model, x = Feedforward(64, dropout=0.25), torch.randn(8, 6, 64)
    before = bs.saved_bytes(model, x).total
    bs.sketch_(model, bs.Region(keep=0.5, row_dims=2, save="int8"))
    for _ in range(2):
        model(x).square().mean().backward()
    assert state_of(model).status == "active", state_of(model).reason
    assert bs.saved_bytes(model, x).total < 0.45 * before

    def draw() -> Tensor:
        torch.manual_seed(3)  # the same dropout
        return named_gradients(model, model(x).square().mean())["up.weight"]

    with bs.exact(model):
        exact = draw()
    found = torch.stack([draw() for _ in range(100)])
    noise = found.std(0).norm() / 10
    assert (found.mean(0) - exact).norm() < 2 * noise
    assert noise < 0.3 * exact.norm()


def test_a_transformer_with_products_in_8_bits() -> None:
    model, x = ViT(64, depth=1), torch.randn(16, 1, 8, 8)
    before = bs.saved_bytes(model, x).total
    bs.sketch_(model, bs.Region(keep=0.5, save="int8", arithmetic="int8"))
    for _ in range(2):
        model(x).square().mean().backward()
    assert state_of(model).status == "active", state_of(model).reason
    assert bs.saved_bytes(model, x).total < 0.45 * before


def test_rows_that_share_a_group_are_kept_as_they_are() -> None:
    """Rows of 40 entries: no group of 64 is within one."""
    model, x = Functional(lambda x, a, b: torch.tanh(x @ a) @ b, 2, d=40), torch.randn(48, 40)
    bs.sketch_(model, HALF)
    for _ in range(2):
        model(x).square().mean().backward()
    assert state_of(model).status == "active", state_of(model).reason
    assert "0% of the bytes it keeps rounded" in state_of(model).note


def test_groups_over_several_rows_are_refused_by_the_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if they were made: the rows of the forward graph are followed after it was edited."""
    monkeypatch.setattr(saver.Saver, "_fits", lambda *_: True)
    model, x = Functional(lambda x, a, b: torch.tanh(x @ a) @ b, 2, d=40), torch.randn(48, 40)
    exact = named_gradients(model, model(x).sum())
    bs.sketch_(model, HALF)
    with pytest.warns(RunsExactly, match="rounds entries of several rows together"):
        found = named_gradients(model, model(x).sum())
    assert all(torch.equal(found[n], g) for n, g in exact.items())


def test_what_couples_rows_runs_exactly_and_in_full() -> None:
    model, x = Functional(lambda x, a: F.softmax(x @ a, 0)), torch.randn(48, 64)
    exact = named_gradients(model, (model(x) * x).sum())
    bs.sketch_(model, HALF)
    with pytest.warns(RunsExactly, match="acts along the rows"):
        found = named_gradients(model, (model(x) * x).sum())
    assert all(torch.equal(found[n], g) for n, g in exact.items())
