"""How the second moment of the cotangent grows with depth, measured and predicted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import backsketch as bs
from backsketch import theory
from backsketch.experiments.problems.data import images
from backsketch.planning.ledger.closed_forms import predicted
from backsketch.planning.measure.passes import Passes, passes

__all__ = ["ARMS", "Depth", "run"]

ARMS = {
    "independent: columns": lambda keep: bs.Columns(keep=keep),
    "independent: elements": lambda keep: bs.Elements(keep),
    "optimal rows, which nest": lambda keep: bs.Rows(keep),
    "shared: one mask": lambda keep: {"": bs.Mask(keep)},
    "grad_weight only": lambda keep: bs.Split(grad_weight=bs.Rows(keep)),
}
_SHARED = ("optimal rows, which nest", "shared: one mask")


@dataclass(frozen=True)
class Depth:
    """An MLP of ``depth`` layers of one width on digits, at initialisation.

    Attributes:
        depth: hidden layers.
        residual: ``x + tanh(W x)`` in place of ``tanh(W x)``.
        arm: a key of :data:`ARMS`.
        keep: of every sketch.
        draws: backward passes.
    """

    depth: int
    residual: bool
    arm: str
    keep: float = 0.75
    width: int = 64
    batch_size: int = 64
    draws: int = 200


class _Layer(nn.Module):
    def __init__(self, width: int, residual: bool) -> None:
        super().__init__()
        self.linear, self.residual = nn.Linear(width, width), residual
        if not residual:  # keeps the exact signal's size; a residual stream keeps it by itself
            nn.init.xavier_normal_(self.linear.weight, nn.init.calculate_gain("tanh"))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.linear(x))  # no dead units, which columns would leave out for free
        return x + y if self.residual else y


def build(options: Depth) -> nn.Sequential:
    """Input layer, ``depth`` layers, head."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [_Layer(options.width, options.residual) for _ in range(options.depth)]
        return nn.Sequential(nn.Linear(64, options.width), *layers, nn.Linear(options.width, 10))


def run(options: Depth) -> dict[str, Any]:
    """``measured`` (with ``error``) and ``predicted`` growth of E‖G‖² at the bottom of the chain."""
    model = build(options)
    rules = ARMS[options.arm](options.keep)
    rows = "" in rules if isinstance(rules, dict) else False
    bs.sketch_(model, rules if rows else {"0": None, "*": rules})
    x, y = images("digits", None)
    batch = x[: options.batch_size].flatten(1), y[: options.batch_size]

    def loss(m: nn.Module, b: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(m(b[0]), b[1])

    with passes(model, loss) as prepared:
        return _measured(prepared, model, batch, options)


def _measured(run: Passes, model: nn.Module, batch: Any, options: Depth) -> dict[str, Any]:
    everything = [site.index for site in run.sites]
    bottom: list[Tensor] = []  # the cotangent that arrives at the input layer's output
    handle = model[0].register_forward_hook(  # type: ignore[index]
        lambda m, args, out: out.register_hook(lambda g: bottom.append(g)) and None
    )
    _, seen = run.observed(batch, 0)
    order = [p for i in dict.fromkeys(run.order) for p in run.sites if p.index == i]
    exact = float(bottom.pop().double().square().sum())
    squares = []
    for draw in range(options.draws):
        run.gradient(batch, 0, everything, draw)
        squares.append(float(bottom.pop().double().square().sum()) / exact)
    handle.remove()
    omegas = []
    for site in order:
        caught, form = seen[site.index], predicted(site, seen[site.index]).travelling
        arrives = caught.cotangents if options.arm == "shared: one mask" else caught.grad_inputs
        energy = sum(float(g.double().square().sum()) for g in arrives)
        omegas.append((form or 0.0) / energy)
    growth = torch.tensor(squares)
    shared = options.arm in _SHARED
    product = theory.second_moment_growth(omegas)[-1]
    return {
        "measured": float(growth.mean()),
        "error": float(growth.std() / len(squares) ** 0.5),
        "predicted": theory.shared_growth(omegas[0], 1)[0] if shared else product,
        "omegas": omegas,
    }
