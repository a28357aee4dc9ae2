"""How far sketches reach: shares of the backward arithmetic, frozen weights, filters, strictness, dictionaries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import backsketch as bs

ROWS = bs.Rows(keep=0.5)


class OtherRMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(32))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt()


class OwnAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1)))


class Model(nn.Module):
    """Takes arguments by name and returns its loss by name, as models of trainers do."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 32)
        self.norm, self.attention = OtherRMSNorm(), OwnAttention()
        self.head = nn.Linear(32, 10)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.attention(self.norm(self.words(input_ids))))
        out = {"logits": logits}
        if labels is not None:
            out["loss"] = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return out


def batch() -> dict[str, Tensor]:
    ids = torch.randint(10, (4, 16))
    return {"input_ids": ids, "labels": ids}


# Shares ----------------------------------------------------------------------------------------------


def test_the_share_is_estimated_from_weights_and_then_counted():
    model = Model()
    report = bs.sketch_(model, {"head": None, "": ROWS})
    layers, head = 32 * 96 + 32 * 32, 32 * 10
    assert report.arithmetic_share == pytest.approx(layers / (layers + head))
    report.measure(model, **batch())
    # Two products a layer and row; attention has twice two products of 16 rows and 32 channels a row.
    attention = 4 * 16 * 32
    counted = 2 * layers / (2 * (layers + head) + attention)
    assert report.arithmetic_share == pytest.approx(counted)
    assert str(report).splitlines()[-1] == (
        f"{100 * counted:.0f} % of the backward arithmetic is sketched; "
        f"{100 * attention / (2 * (layers + head) + attention):.0f} % lies outside the sites, in functions"
    )


def test_a_region_counts_with_all_that_is_inside():
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(16, 8)
    report = bs.sketch_(model, {"1": bs.Region(keep=0.5)})
    report.measure(model, x)
    assert report.arithmetic.total == 3 * 2 * 16 * 64  # the first layer's input needs no gradient
    assert report.arithmetic_share == pytest.approx(2 / 3)


def test_a_grouped_convolution_counts_its_own_weights_alone():
    model = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, groups=8, padding=1))
    report = bs.sketch_(model, ROWS)
    report.measure(model, torch.randn(2, 8, 5, 5))
    one, grouped = 2 * 2 * 25 * 64, 2 * 2 * 25 * 72
    assert report.arithmetic.total == one + 2 * grouped  # the first layer's input needs no gradient
    assert report.arithmetic_share == 1


def test_a_memory_saver_sketches_no_arithmetic():
    assert bs.sketch_(Model(), bs.Quantized(bits=4)).arithmetic_share == 0


def test_unknown_layers_count_in_the_whole():
    model = nn.ModuleDict({"known": nn.Linear(8, 8), "unknown": nn.Bilinear(8, 8, 3)})
    report = bs.sketch_(model, ROWS)
    assert report.arithmetic_share == pytest.approx(64 / (64 + 192))
    assert "Bilinear: its product is trilinear" in str(report)


def test_what_no_module_stands_for_is_counted():
    text = str(bs.sketch_(Model(), ROWS))
    assert "attention as a function in 1 OwnAttention, 1 OtherRMSNorm" in text


def test_frozen_weights_are_marked_and_have_one_product():
    model = Model()
    model.attention.requires_grad_(False)
    report = bs.sketch_(model, ROWS)
    assert [site.name for site in report if site.frozen] == ["attention.qkv", "attention.out"]
    line = next(row for row in str(report).splitlines() if row.startswith("attention.qkv"))
    assert line.split()[3:5] == ["×0.50", "frozen"]
    assert "frozen: the weights of 2 sites" in str(report)
    report.measure(model, batch())
    assert report.arithmetic.modules["attention.out"] == 2 * 64 * 32 * 32
    assert report.arithmetic.modules["head"] == 2 * 2 * 64 * 32 * 10


def test_a_plan_is_not_measured_on_a_model_without_it():
    nothing: Any = None
    with pytest.raises(ValueError, match=r"not sketched; call bs.sketch_\(model, plan\) first"):
        bs.Plan({"head": "rows:keep=0.5"}, nothing).measure(Model(), [batch()], nothing)


# Rules -----------------------------------------------------------------------------------------------


def test_a_filter_chooses_by_name_and_module():
    model = Model()
    wide = lambda name, module: getattr(module, "out_features", 0) > 32  # noqa: E731
    report = bs.sketch_(model, {wide: ROWS})
    assert [site.name for site in report.sketched] == ["attention.qkv"]
    report = bs.sketch_(model, {lambda name, module: name.endswith("out"): None, "": ROWS})
    assert [site.name for site in report.exact] == ["attention.out"]
    with pytest.raises(ValueError, match="is true of no module"):
        bs.sketch_(model, {lambda name, module: False: ROWS})


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def test_strict_makes_an_error_of_every_layer_that_would_stay_exact():
    model = nn.Sequential(nn.Linear(4, 4), Doubled(4, 4))
    assert len(bs.sketch_(model, ROWS).sketched) == 1
    bs.restore_(model)
    with pytest.raises(ValueError, match=r"1 would stay exact \(strict=True\): Doubled overrides"):
        bs.sketch_(model, ROWS, strict=True)
    assert type(model[0]) is nn.Linear
    assert len(bs.sketch_(model, {"1": None, "": ROWS}, strict=True).sketched) == 1
    assert len(bs.sketch_(Model(), ROWS, strict=True).sketched) == 3


# Arguments by name -----------------------------------------------------------------------------------


def test_measurements_take_keywords_and_dictionaries():
    model, b = Model(), batch()
    by_name = bs.saved_bytes(model, **b).total
    assert by_name == bs.saved_bytes(model, b).total
    assert by_name == bs.saved_bytes(model, b["input_ids"], labels=b["labels"]).total > 0
    assert bs.peak_bytes(model, b) is None or bs.peak_bytes(model, b) >= 0
    bs.sketch_(model, ROWS)
    for report in (
        bs.testing.check_unbiased(model, b, draws=60),
        bs.testing.check_unbiased(model, draws=60, **b),
    ):
        assert report.relative_variance["head.weight"] > 1e-3


class TakesOne(nn.Linear):
    def forward(self, input: dict[str, Tensor]) -> Tensor:
        return super().forward(input["x"])


def test_a_model_that_takes_a_dictionary_is_given_it():
    assert bs.saved_bytes(TakesOne(4, 4), {"x": torch.randn(2, 4)}).modules == {}


def test_gradients_of_float_keywords_are_checked_too():
    layer = nn.Linear(4, 4)
    bs.sketch_(layer, ROWS)
    report = bs.testing.check_unbiased(layer, input=torch.randn(6, 4), draws=60)
    assert "input['input']" in report.largest_z
    with pytest.raises(TypeError, match="an estimator is tried on x, weight and bias"):
        bs.testing.check_unbiased(ROWS, labels=1, draws=60)
