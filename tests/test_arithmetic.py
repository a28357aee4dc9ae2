"""How much of a backward pass lies in which module."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import backsketch as bs
from backsketch import arithmetic, untouched
from backsketch.arithmetic import backward_arithmetic


class Stack(nn.Module):
    """Three blocks, each checkpointed in one of two ways or not at all."""

    def __init__(self, checkpointing: str) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.first = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            if self.checkpointing:
                x = checkpoint(block, x, use_reentrant=self.checkpointing == "reentrant")
            else:
                x = block(x)
        return x


NAMES = [f"blocks.{block}.{layer}" for block in range(3) for layer in (0, 2)]


def counted(checkpointing: str) -> arithmetic.Arithmetic:
    torch.manual_seed(0)
    model, x = Stack(checkpointing), torch.randn(4, 8)
    return backward_arithmetic(model, lambda: model(x), NAMES)


@pytest.mark.parametrize("checkpointing", ["reentrant", "not reentrant"])
def test_what_checkpointing_computes_again_is_of_no_module(checkpointing: str) -> None:
    plain, again = counted(""), counted(checkpointing)
    product = 2 * 4 * 8 * 16
    assert plain.modules == again.modules == dict.fromkeys(NAMES, 2 * product)
    assert plain.total == 12 * product + 2 * 4 * 8 * 8
    assert again.total == plain.total + 3 * product  # the last layer of a block need not run again


def test_counting_in_the_backward_pass_as_well_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "in_backward", lambda: False)
    assert counted("not reentrant").modules != counted("").modules


def test_without_the_other_checkpoints_reentrant_ones_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(untouched, "checkpoints_allow_grad", nullcontext)
    with pytest.raises(RuntimeError, match="use_reentrant"):
        counted("reentrant")


def test_reentrant_checkpoints_train_as_before_under_a_sketch() -> None:
    model, x = Stack("reentrant"), torch.randn(4, 8)
    bs.sketch_(model, bs.Rows(keep=0.5))
    assert bs.saved_bytes(model, x).total > 0
    assert bs.variance(model, [x[:2], x[2:]], lambda model, x: model(x).sum()) is not None
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
