"""Compiled convolutions against eager ones, at equal seeds: every estimator, layout, dtype and thread count.

The grid runs in a process of its own under ``MALLOC_CHECK_=3``, where glibc ends a process that has written
beyond a block of memory.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

import backsketch as bs
from backsketch.sampling import operators
from cases import FAMILIES

ESTIMATORS = [
    *FAMILIES,
    bs.Rows(keep=0.5, scores="l1"),
    bs.Columns(keep=0.5, design="permuted"),
    bs.Columns(keep=0.5, design="independent"),
    bs.Split(grad_input=bs.Columns(keep=0.5)),
]
CONVOLUTIONS = [
    {"kernel_size": 3},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 3, "dilation": 2, "padding": 2},
    {"kernel_size": 1},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": 2, "bias": False},
    {"kernel_size": 3, "groups": 2, "padding": 1},
    {"kernel_size": 3, "groups": 4, "stride": 2},
    {"kernel_size": 1, "groups": 2},
    {"kernel_size": 3, "groups": 4, "dilation": 2, "padding": "same"},
    {"kernel_size": 2, "groups": 4, "stride": 2, "bias": False},
]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


class Branches(nn.Module):
    """Several convolutions of one input; the sum of their squares."""

    def __init__(self, convolutions: list[dict]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(4, 8, **c) for c in convolutions)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([b(x).float().square().sum() for b in self.branches]).sum()


def gradients(call, model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    return list(torch.autograd.grad(call(x), [x, *model.parameters()]))


def worst(
    convolutions: list[dict], estimator: bs.Estimator, layout: str, dtype: torch.dtype
) -> float:
    """The largest difference between compiled and eager, relative to the largest entry of its gradient."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = Branches(convolutions).to(dtype, memory_format=LAYOUTS[layout])
    x = torch.randn(8, 4, 7, 7).to(dtype, memory_format=LAYOUTS[layout])
    bs.sketch_(model, estimator)
    eager = gradients(model, model, x)
    compiled = gradients(torch.compile(model, fullgraph=True), model, x)
    errors = [(a - b).abs().max() / b.abs().max() for a, b in zip(compiled, eager)]
    return float(torch.stack(errors).max())


@pytest.fixture
def one_seed(monkeypatch):
    """Every draw has the same seed, in whatever order a compiler makes them."""
    monkeypatch.setattr(operators, "fresh", lambda: 7)


GROUPED = [CONVOLUTIONS[9]], bs.Columns(keep=0.5), "channels last", torch.float32


@torch._inductor.config.patch({"cpp.threads": 2})
def test_a_compiled_grouped_convolution_has_the_gradients_of_the_eager_one(one_seed):
    assert worst(*GROUPED) < 1e-4


@pytest.mark.slow
@torch._inductor.config.patch({"cpp.threads": 2})
def test_the_comparison_notices_an_accumulating_scatter(one_seed, monkeypatch):
    """What PyTorch's compiler makes of an index_add, see docs/upstream/inductor-index-add.md."""
    from backsketch.estimators import bilinear

    def scatter(part: Tensor, dim: int, indices: Tensor, n: int) -> Tensor:
        return bilinear._zeros(part, dim, n).index_add(dim, indices, part)

    monkeypatch.setattr(bilinear, "_scatter", scatter)
    if worst(*GROUPED) < 1e-4:
        pytest.skip("this version of PyTorch compiles it rightly")


def run_grid() -> None:
    """Print the cases of the grid that differ, and exit with their number."""
    operators.fresh = lambda: 7
    torch.set_num_threads(1)
    grid = itertools.product(ESTIMATORS, LAYOUTS, TOLERANCE, (1, 2))
    failures = 0
    for estimator, layout, dtype, threads in grid:
        with torch._inductor.config.patch({"cpp.threads": threads}):
            error = worst(CONVOLUTIONS, estimator, layout, dtype)
        if not error < TOLERANCE[dtype]:
            failures += 1
            print(f"{estimator}, {layout}, {dtype}, {threads} threads: {error:.3g}", flush=True)
    sys.exit(failures)


@pytest.mark.slow
def test_the_whole_grid_under_a_checked_heap():
    command = [sys.executable, "-c", "import test_compile_grid; test_compile_grid.run_grid()"]
    environment = {**os.environ, "MALLOC_CHECK_": "3", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
