"""A capture that takes long says so on a terminal, in one line, and nowhere else."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

import backsketch as bs
from backsketch.regions import patience


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch):
    """What a stream in the place of stderr is told while a region is captured and called again."""

    def run(stream: io.StringIO, seconds: float) -> str:
        monkeypatch.setattr(patience, "_SECONDS", seconds)
        monkeypatch.setattr("sys.stderr", stream)
        model = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        bs.sketch_(model, {"": bs.Region(keep=0.5)})
        for _ in range(2):
            model(torch.randn(6, 8)).sum().backward()
        return stream.getvalue()

    return run


def test_a_slow_capture_is_one_line_on_a_terminal(capture):
    told = capture(Terminal(), 0.001)
    assert told.count("\n") == 1
    assert "capturing the model as a region" in told
    assert told.endswith(" s\n")


def test_a_fast_one_says_nothing(capture):
    assert capture(Terminal(), 600.0) == ""


def test_what_is_no_terminal_stays_empty(capture):
    assert capture(io.StringIO(), 0.001) == ""
