"""The objectives of the trade-off experiment: a regularised logistic regression and an MLP."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backsketch.experiments.problems.data import images
from backsketch.models import mlp

__all__ = ["Objective", "objective"]


@dataclass(frozen=True)
class Objective:
    r"""``F(w) = mean cross-entropy + l2/2 ‖w‖²`` over ``x (n, d)``, ``y (n,)``.

    ``lowest`` is the minimum and ``smoothness``, ``strong_convexity`` the constants L and μ where they are
    known (logistic regression); else 0, None, None. ``gap`` is :math:`F - F^*`.
    """

    x: Tensor
    y: Tensor
    l2: float
    widths: tuple[int, ...]
    lowest: float
    smoothness: float | None
    strong_convexity: float | None

    def build(self, seed: int) -> nn.Module:
        """A fresh model: zero weights for the logistic regression, PyTorch's own for the MLP."""
        if not self.widths:
            return linear(self.x.shape[1], self.x.dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return mlp(self.x.shape[1], 10, self.widths)

    def loss(self, model: nn.Module, rows: Tensor) -> Tensor:
        """Mean cross-entropy of some rows, without the regulariser."""
        return F.cross_entropy(model(self.x[rows]), self.y[rows])

    @torch.no_grad()
    def gap(self, model: nn.Module) -> float:
        """``F(w) − F*`` on all rows."""
        return float(_value(model, self.x, self.y, self.l2)) - self.lowest

    def gradient(self, model: nn.Module) -> list[Tensor]:
        """The exact gradient of F."""
        loss = _value(model, self.x, self.y, self.l2)
        return list(torch.autograd.grad(loss, list(model.parameters())))


def linear(features: int, dtype: torch.dtype) -> nn.Module:
    """Logistic regression at zero."""
    layer = nn.Linear(features, 10, dtype=dtype)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()
    return nn.Sequential(layer)


def _value(model: nn.Module, x: Tensor, y: Tensor, l2: float) -> Tensor:
    square = torch.stack([p.square().sum() for p in model.parameters()]).sum()
    return F.cross_entropy(model(x), y) + l2 / 2 * square


@lru_cache(maxsize=4)
def objective(data: str, limit: int | None, l2: float, widths: tuple[int, ...]) -> Objective:
    """The objective, its minimum and its constants."""
    x, y = images(data, limit)
    x = x.flatten(1)
    if widths:
        return Objective(x, y, l2, widths, 0.0, None, None)
    # Softmax cross-entropy has Hessian at most half the identity in the logits (Böhning 1992).
    with_bias = torch.cat([x, torch.ones(len(x), 1)], 1).double()
    largest = float(torch.linalg.eigvalsh(with_bias.T @ with_bias / len(x))[-1])
    return Objective(x, y, l2, (), _minimum(x.double(), y, l2), largest / 2 + l2, l2)


def _minimum(x: Tensor, y: Tensor, l2: float) -> float:
    """``F*`` by L-BFGS in float64, to a gradient norm that bounds the error by strong convexity."""
    model = linear(x.shape[1], torch.float64)
    parameters = list(model.parameters())
    solver = torch.optim.LBFGS(
        parameters, max_iter=2000, tolerance_grad=1e-7, tolerance_change=0, history_size=30,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        solver.zero_grad()
        loss = _value(model, x, y, l2)
        loss.backward()
        return loss

    solver.step(closure)
    with torch.no_grad():
        return float(_value(model, x, y, l2))
