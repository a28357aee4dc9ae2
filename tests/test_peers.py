"""The script that measures the published code of others: it runs without any, and tells biased from unbiased."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from helpers import script


@pytest.fixture
def peers():
    return script("benchmarks/peers.py")


def test_without_a_checkout_each_peer_is_a_row_with_its_reason(peers, tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "PARTS", {
        "layer": (lambda: peers.layer(4, 2, 6, 8), peers.timed, "repeats"),
        "layer_statistics": (lambda: peers.layer(4, 2, 6, 8), peers.drawn, "draws"),
    })  # fmt: skip
    out = tmp_path / "peers.json"
    threads = torch.get_num_threads()
    try:
        for part in ("layer", "layer_statistics"):
            few = ["--repeats", "2", "--draws", "3", "--keeps", "0.5", "--skip", "region"]
            peers.main([part, *few, "--out", str(out), "--vcas", str(tmp_path / "nowhere")])
    finally:
        torch.set_num_threads(threads)
    found = json.loads(out.read_text())
    assert set(found["peers"]) == {"VCAS", "RAD", "fewbit", "approx", "WTA-CRS"}
    assert "FileNotFoundError" in found["peers"]["VCAS"]["reason"]
    assert found["peers"]["RAD"]["reason"] == "no checkout was given"
    rows = {row["what"]: row for row in found["parts"]["layer"]["rows"]}
    assert rows["exact"]["time"] == 1.0
    assert rows["stored_rows"]["saved"] < rows["rows"]["saved"] == 1.0
    drawn = {row["what"]: row for row in found["parts"]["layer_statistics"]["rows"]}
    assert "exact" not in drawn
    assert drawn["rows"]["grad_weight"]["variance"] > 0 == drawn["rows"]["grad_bias"]["variance"]


class Scaled(torch.autograd.Function):
    """A gradient of noise around ``scale`` times the exact one."""

    @staticmethod
    def forward(ctx, weight, scale):
        ctx.scale = scale
        return weight.clone()

    @staticmethod
    def backward(ctx, gradient):
        return ctx.scale * gradient * (1 + 0.5 * torch.randn_like(gradient)), None


class Fake(nn.Linear):
    """A peer's layer."""

    scale = 1.0

    def forward(self, x):
        return nn.functional.linear(x, Scaled.apply(self.weight, self.scale), self.bias)


@pytest.mark.parametrize(("scale", "is_biased"), [(1.0, False), (1.2, True)])
def test_a_biased_peer_is_told_from_an_unbiased_one(peers, scale, is_biased):
    def make(linear):
        layer = peers.like(linear, Fake(linear.in_features, linear.out_features))
        layer.scale = scale
        return layer

    torch.manual_seed(0)
    arm = peers.Arm("fake", "scaled", 0.5, lambda model: peers.swapped(model, make))
    (row,) = peers.drawn(peers.layer(4, 4, 6, 8), [arm], draws=200)
    assert row["grad_weight"]["biased"] is is_biased
    assert not row["grad_input"]["biased"]
    assert row["grad_weight"]["along"] == pytest.approx(scale - 1, abs=0.05)


def test_rows_that_are_hardly_ever_drawn_are_no_bias_and_a_gradient_that_is_always_zero_is(peers):
    torch.manual_seed(0)
    exact = torch.tensor([1.0, 0.01, 0.5])
    rare, zero = peers.Moments(exact), peers.Moments(exact)
    for _ in range(400):
        drawn = torch.rand(3) < torch.tensor([0.5, 0.001, 0.5])
        estimate = exact * drawn / torch.tensor([0.5, 0.001, 0.5])
        rare.add(estimate)
        zero.add(estimate * torch.tensor([0.0, 1.0, 1.0]))
    assert not peers.bias_of(rare)["biased"]
    assert peers.bias_of(zero) | {"entry": [0]} == peers.bias_of(zero)
    assert peers.bias_of(zero)["biased"]


def test_what_a_function_keeps_in_its_context_is_counted(peers):
    """Hooks on saved tensors do not see it."""

    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.kept = (x.clone(), 3)
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    case = peers.layer(4, 4, 6, 8)
    assert peers.kept_bytes(case, copy.deepcopy(case.model)) == case.x.nbytes

    class Model(nn.Module):
        def forward(self, x):
            return Hidden.apply(x)

    assert peers.kept_bytes(case, Model()) == case.x.nbytes


def test_a_peer_that_fails_is_a_row_with_its_reason(peers):
    def fails(model):
        raise RuntimeError("no such kernel\nand more")

    rows = peers.timed(peers.layer(2, 2, 3, 4), [peers.Arm("fake", "fails", None, fails)], 1)
    assert rows[1]["reason"] == "RuntimeError: no such kernel"
