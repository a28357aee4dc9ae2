"""A training loop as a user would write it: a loader with a worker, a controller, a checkpoint an epoch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import backsketch as bs

__all__ = ["run"]

STATE = Path("state.pt")
EPOCHS = 5


class Noise(Dataset[tuple[Tensor, Tensor]]):
    """Vectors whose class is where they are largest, each made when it is asked for."""

    def __len__(self) -> int:
        return 640

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(32, generator=torch.Generator().manual_seed(index))
        return x, x[:4].argmax()


def run(resume: bool) -> None:
    """Train, or go on where the checkpoint was written."""
    torch.manual_seed(0)
    bs.seed(0)
    model = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 4))
    bs.sketch_(model, {"0": bs.Rows(keep=0.5), "3": bs.Int8()})
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    controller = bs.Controller(model, 0.1, interval=5)
    first, losses = 0, []
    if resume:
        first, losses = _load(model, optimizer, controller)
    for epoch in range(first, EPOCHS):
        shuffled = torch.Generator().manual_seed(epoch)
        loader = DataLoader(
            Noise(), 32, shuffle=True, num_workers=1, generator=shuffled, timeout=60
        )
        for x, y in loader:
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            controller.step()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        _save(model, optimizer, controller, epoch + 1, losses)


def _save(model: nn.Module, optimizer: Any, controller: Any, epoch: int, losses: Any) -> None:
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "controller": controller.state_dict(),
        "random": (torch.get_rng_state(), bs.get_rng_state()),
        "epoch": epoch,
        "losses": losses,
    }
    torch.save(state, partial := STATE.with_suffix(".partial"))
    os.replace(partial, STATE)


def _load(model: nn.Module, optimizer: Any, controller: Any) -> tuple[int, list[float]]:
    state = torch.load(STATE, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    controller.load_state_dict(state["controller"])
    torch.set_rng_state(state["random"][0])
    bs.set_rng_state(state["random"][1])
    return state["epoch"], state["losses"]
