"""Compiled convolutions against eager ones, at equal seeds: every estimator, layout, dtype and thread count.

The grid runs in a process of its own under ``MALLOC_CHECK_=3``, where glibc ends a process that has written
beyond a block of memory.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

import backsketch as bs
from backsketch.sampling import operators
from backsketch.torch_private import CONSTANTS_OF_OBJECTS
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
    return list(torch.autograd.grad(call(x).sum(), [x, *model.parameters()]))


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


@pytest.mark.slow
@pytest.mark.skipif(
    not CONSTANTS_OF_OBJECTS, reason="the C++ that PyTorch 2.10 generates here does not compile"
)
@torch._inductor.config.patch({"cpp.threads": 2})
def test_a_compiled_grouped_convolution_has_the_gradients_of_the_eager_one(one_seed):
    assert worst(*GROUPED) < 1e-4


class SideBySide(nn.Module):
    """Each estimator at two convolutions and a linear layer of its own, of one input."""

    def __init__(self, estimators: list[bs.Estimator]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(0, 2), nn.Linear(3, 4)
            )
            for _ in estimators
        )
        bs.sketch_(self, {f"parts.{i}.*": e for i, e in enumerate(estimators)})

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([part(x).sum() for part in self.parts])


THAT_GATHER = (bs.Rows, bs.Columns, bs.StoredRows, bs.LowRank)
GROUPS = {
    "gathers": [e for e in FAMILIES if isinstance(e, THAT_GATHER)],
    "others": [e for e in ESTIMATORS if e not in FAMILIES or not isinstance(e, THAT_GATHER)],
}


@pytest.mark.fast_cases("gathers")
@pytest.mark.parametrize("group", GROUPS)
def test_no_code_that_a_compiler_sees_accumulates_by_index(group):
    """Inductor does it wrongly for some strides, see docs/upstream/inductor-index-add.md."""
    called = set()

    def record(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        called.update(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    model = SideBySide(GROUPS[group])
    backend = aot_autograd(fw_compiler=record, bw_compiler=record)
    gradients(torch.compile(model, backend=backend), model, torch.randn(8, 4, 7, 7))
    assert any("convolution_backward" in name or "int8_vjps" in name for name in called)
    assert not {n for n in called if re.search("index_add|scatter_(add|reduce)|index_put", n)}


def run_grid(estimators: list[bs.Estimator], dtypes: list[torch.dtype], threads: list[int]) -> None:
    """Print the cases of the grid that differ, and exit with their number."""
    operators.fresh = lambda: 7
    torch.set_num_threads(1)
    failures = 0
    for estimator, layout, dtype, count in itertools.product(estimators, LAYOUTS, dtypes, threads):
        with torch._inductor.config.patch({"cpp.threads": count}):
            error = worst(CONVOLUTIONS, estimator, layout, dtype)
        if not error < TOLERANCE[dtype]:
            failures += 1
            print(f"{estimator}, {layout}, {dtype}, {count} threads: {error:.3g}", flush=True)
    sys.exit(failures)


@pytest.mark.slow
def test_what_wrote_beyond_its_memory_under_a_checked_heap():
    """The part of the grid that failed; `python tests/test_compile_grid.py` runs all of it, for an hour or so."""
    code = (
        "import backsketch as bs, torch, test_compile_grid as t;"
        "t.run_grid([bs.Columns(keep=0.5)], [torch.float32], [2])"
    )
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "MALLOC_CHECK_": "3", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


if __name__ == "__main__":
    run_grid(ESTIMATORS, list(TOLERANCE), [1, 2])
