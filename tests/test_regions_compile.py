"""Regions under ``torch.compile`` of the surrounding model, and in a data-parallel job."""

from __future__ import annotations

import copy
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import backsketch as bs
from backsketch import sampling
from backsketch.regions import Mask, Region
from region_models import Block, ViT, make_region

# Warnings of PyTorch's own making: deprecations inside inductor and Dynamo, and a look at .grad of every
# tensor that crosses a graph break.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]


def train(model: nn.Module, call, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    call(x).square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}


RULES = {
    "one": {"": Mask(0.6), "mlp": Region(0.5, 2)},
    "two": {"": Mask(0.6), "attn": Region(0.5), "mlp": Region(0.5, 2)},
    "recompute": {"mlp": Region(0.5, 2, "recompute")},
}


@pytest.mark.fast_cases("one")
@pytest.mark.parametrize("rules", RULES)
def test_compiled_regions_draw_what_plain_ones_draw(rules: str) -> None:
    """Inductor runs the graphs of regions in a compiled model: same rows, same gradients."""
    plain, x = Block(8, 2), torch.randn(12, 3, 8)
    make_region(plain, RULES[rules])
    model = copy.deepcopy(plain)
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):  # the first backward pass of a graph is exact
        train(plain, plain, x)
        train(model, compiled, x)
    for n in (12, 7):
        state = sampling.get_rng_state()
        expected = train(plain, plain, x[:n])
        sampling.set_rng_state(state)
        actual = train(model, compiled, x[:n])
        for name, g in expected.items():
            torch.testing.assert_close(actual[name], g, rtol=1e-3, atol=1e-4, msg=name)


def test_compiled_dropout_is_unbiased() -> None:
    model = Block(8, 2, dropout=0.3)
    make_region(model, {"": Region(0.5)})
    compiled = Compiled(model)
    bs.testing.check_unbiased(compiled, torch.randn(6, 3, 8), draws=60)


class Compiled(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.compile(self.model, backend="eager")(x)


def test_an_eager_region_stays_out_of_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import compile_fx

    monkeypatch.setattr(compile_fx, "compile_fx_inner", None)
    model, x = Block(8, 2), torch.randn(6, 3, 8)
    states = make_region(model, {"": Region(0.5)})
    train(model, model, x)
    assert states[""].status == "active"


# --- two processes ----------------------------------------------------------------------------------


def worker(rank: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=120),
    )
    torch.manual_seed(0)
    bs.seed(0)
    model = ViT()
    make_region(
        model, {"": Mask(0.8), "blocks.0": Region(0.5), "blocks.1": Region(0.5, 1, "recompute")}
    )
    drawn = []
    original = sampling.draw_live

    def draw(*arguments):
        sample = original(*arguments)
        drawn.append(sample.indices)
        return sample

    sampling.draw_live = draw
    parallel = nn.parallel.DistributedDataParallel(model)
    x = torch.randn(2, 8, 1, 8, 8)[rank]
    for _ in range(3):
        model.zero_grad()
        parallel(x).square().sum().backward()
    grads = torch.cat([p.grad.flatten() for p in model.parameters()])
    with bs.exact(model):
        model.zero_grad()
        parallel(x).square().sum().backward()
    exact = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.save((grads, exact, drawn), f"{out}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow  # tests/test_distributed.py has a region in two processes in `make test`
def test_data_parallel(tmp_path: Path) -> None:
    """Hooks fire, ranks agree on the averaged gradient, and draw rows of their own."""
    mp.spawn(worker, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    (g0, e0, d0), (g1, e1, d1) = (torch.load(tmp_path / f"{r}.pt") for r in range(2))
    assert torch.equal(g0, g1)
    torch.testing.assert_close(e0, e1)
    assert not torch.allclose(g0, e0, rtol=1e-2)
    assert len(d0) == len(d1) == 4  # two regions, two steps after the checked one
    assert any(not torch.equal(a, b) for a, b in zip(d0, d1))
