"""Gradients of the pieces of a tensor: joined in a region's graph, as eager PyTorch does."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

import backsketch as bs
from backsketch.regions import capture, copies, joining, state_of
from backsketch.regions.partition import name_of
from region_models import Attention, Feedforward


def unbound(x: Tensor) -> Tensor:
    q, k, v = x.view(-1, 3, 4).unbind(1)
    return q * k + v


def halves(x: Tensor) -> Tensor:
    """A rotary embedding reads the halves and the whole."""
    return x.sin() + torch.cat([-x[..., 6:].cos(), x[..., :6].exp()], -1)


def overlapping(x: Tensor) -> Tensor:
    return x[:, :8] * x[:, 4:]


def a_hole(x: Tensor) -> Tensor:
    return x[:, :4] * x[:, 8:]


CASES = {unbound: 0, halves: 0, overlapping: 2, a_hole: 2}
LOGGER = logging.getLogger("backsketch.tests")
PADDED = ("select_backward", "slice_backward")


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.linear = function, nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.linear(x))


@pytest.mark.parametrize("function", CASES)
def test_pieces_are_joined_where_they_fill_a_tensor(
    function: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[int] = []

    def joined(graph: fx.Graph) -> None:
        joining.join_pieces(graph)
        left.append(sum(name_of(n) in PADDED for n in graph.nodes))

    monkeypatch.setattr(capture, "join_pieces", joined)
    model, x = Function(function), torch.randn(6, 12, requires_grad=True)
    expected = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    bs.sketch_(model, bs.Region(keep=0.5))
    found = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    assert all(map(torch.allclose, found, expected))
    assert left == [CASES[function]]
    assert state_of(model).status == "active", state_of(model).reason


class Stacked(nn.Module):
    """Its gradient is a stack that is permuted and copied; `dims` say how."""

    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.linear, self.dims = nn.Linear(12, 12), dims

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.linear(x).view(-1, 3, 2, 2).permute(self.dims).unbind(self.dims.index(1))
        return (a * b.sin() + c.exp()).sum(dim=(-1, -2))


class Dropped(nn.Module):
    """Dropout with probability zero: of its argument, between two layers, and last."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.drop = nn.Linear(12, 12), nn.Linear(12, 12), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.drop(self.first(self.drop(x)))
        return self.drop(self.second(h.tanh())), self.drop(h)


class Expanded(nn.Module):
    """What is copied has strides of zero, which the view after it cannot have."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)[:, None].expand(-1, 3, -1).clone().view(x.shape[0], 36).sin()


@pytest.mark.parametrize(
    ("model", "left"),
    [
        *((Stacked(*dims), 0) for dims in [(0, 2, 1, 3), (0, 3, 2, 1), (0, 1, 2, 3)]),
        (Attention(12, 3), 0),
        (Feedforward(12), 1),  # an output that is only a view of a product is not touched
        (Dropped(), 3),
        (Expanded(), 1),
    ],
    ids=lambda case: type(case).__name__,
)
def test_copies_that_eager_code_does_not_make_are_taken_out(
    model: nn.Module, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []

    def dropped(graph: fx.Graph) -> None:
        copies.drop_copies(graph)
        counted.append(sum(name_of(n) == "clone" for n in graph.nodes))

    def gradients() -> tuple[Tensor, ...]:
        outputs = model(x)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        loss = sum((y.cos() * n).sum() for n, y in enumerate(outputs, 1))
        return torch.autograd.grad(loss, [x, *model.parameters()])

    monkeypatch.setattr(capture, "drop_copies", dropped)
    x = torch.randn((4, 5, 12) if isinstance(model, Attention) else (4, 12), requires_grad=True)
    expected = gradients()
    bs.sketch_(model, bs.Region(keep=0.5))
    assert all(map(torch.allclose, gradients(), expected)), "the first backward pass is on all rows"
    assert state_of(model).status == "active", state_of(model).reason
    assert counted == [left]
    bs.restore_(model)


class Talkative(nn.Module):
    """As models of transformers whose configuration they do not know."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        LOGGER.warning("a loss of another type")
        return self.linear(x)


def test_a_module_that_writes_to_a_log_is_captured() -> None:
    model = Talkative()
    bs.sketch_(model, bs.Region(keep=0.5))
    model(torch.randn(6, 12)).sum().backward()
    assert state_of(model).status == "active", state_of(model).reason


class Cache(nn.Module):
    """Keys join those of earlier calls, of which there are none, and stay behind in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12)

    def forward(self, x: Tensor, cache: list[Tensor]) -> Tensor:
        cache[0] = torch.cat([cache[0], self.linear(x)], dim=-2)
        return cache[0].square()


def test_an_empty_cache_has_no_rows_to_mix() -> None:
    model, x = Cache(), torch.randn(6, 3, 12)
    expected = torch.autograd.grad(model(x, [torch.tensor([])]).sum(), list(model.parameters()))
    bs.sketch_(model, bs.Region(keep=0.5))
    cache = [torch.tensor([])]
    found = torch.autograd.grad(model(x, cache).sum(), list(model.parameters()))
    assert all(map(torch.allclose, found, expected))
    assert state_of(model).status == "active", state_of(model).reason
    assert cache[0].shape == x.shape
