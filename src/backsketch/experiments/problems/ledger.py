"""The variance ledger of a reference model some way into training: predicted against measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import backsketch as bs
from backsketch.experiments.problems.data import images
from backsketch.models import build

__all__ = ["LedgerOf", "run"]


@dataclass(frozen=True)
class LedgerOf:
    """Train exactly for some steps, sketch, and open the ledger.

    Attributes:
        model, model_options: of :func:`backsketch.models.build`.
        rules: pattern to sketch text.
        steps, lr: of AdamW before.
        batches, draws: of the ledger.
    """

    model: str
    data: str
    rules: Mapping[str, str]
    steps: int
    name: str = ""
    model_options: Mapping[str, Any] = field(default_factory=dict)
    lr: float = 1e-3
    batch_size: int = 64
    batches: int = 6
    draws: int = 4
    limit: int | None = None


def run(options: LedgerOf) -> dict[str, Any]:
    """The ledger as a dict, and the training loss where it was opened."""
    x, y = images(options.data, options.limit)
    shape: Any = tuple(x.shape[1:])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(options.model, shape, 10, **options.model_options)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), options.lr, weight_decay=0.05)

    def batch() -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(y), (options.batch_size,), generator=generator)
        return x[rows], y[rows]

    def loss(m: nn.Module, b: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(m(b[0]), b[1])

    for _ in range(options.steps):
        optimizer.zero_grad()
        loss(model, batch()).backward()
        optimizer.step()
    bs.sketch_(model, {pattern: bs.parse(text) for pattern, text in options.rules.items()})
    held = [batch() for _ in range(options.batches)]
    with torch.no_grad():
        level = sum(float(loss(model, b)) for b in held) / len(held)
    return {"loss": level, "ledger": bs.variance(model, held, loss, draws=options.draws).to_dict()}
