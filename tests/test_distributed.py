"""Two processes, data parallel: gradients agree after the sum, noise does not, the mean is right."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import backsketch as bs
from backsketch import regions
from helpers import warm_forkserver

DRAWS = 120
EIGHT_BIT = {"0": bs.Int8(), "2": bs.Float8()}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


def batch(rank: int) -> torch.Tensor:
    return torch.randn(8, 5, generator=torch.Generator().manual_seed(10 + rank))


def gradients(called: nn.Module, owner: nn.Module, x: torch.Tensor) -> torch.Tensor:
    owner.zero_grad(set_to_none=True)
    called(x).square().mean().backward()
    found = [p.grad for p in owner.parameters()]
    whole = [g.full_tensor() if isinstance(g, DTensor) else g for g in found]
    return torch.cat([g.flatten() for g in whole]).clone()


def controlled(rank: int) -> dict[str, object]:
    """A controller after some steps, each rank on its own data, of which one cannot measure the first."""
    torch.manual_seed(0)
    own = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh())
    wrapped = nn.parallel.DistributedDataParallel(own)
    bs.sketch_(wrapped, {"0": bs.Rows(keep=0.5), "2": bs.Region(keep=0.5)})
    control = bs.Controller(wrapped, 0.1)
    generator = torch.Generator().manual_seed(rank)
    for step in range(16):
        size = 1 if rank == 1 and step == 0 else 64
        wrapped(torch.randn(size, 64, generator=generator)).square().mean().backward()
        control.step()
        wrapped.zero_grad()
    wrapped(
        torch.randn(64, 64, generator=generator)
    ).square().mean().backward()  # scores that no look has taken yet
    state = control.state_dict()
    control.load_state_dict(state)
    assert control.state_dict() == state
    return state


def in_eight_bits(rank: int) -> dict[str, torch.Tensor]:
    """Gradients of 8-bit products, with replicas and with sharded parameters."""
    replica, shards = model(), model()
    wrapped = nn.parallel.DistributedDataParallel(replica)
    for part in (shards[0], shards[2], shards):
        fully_shard(part)
    found = {}
    for name, called, owner in (("replicas", wrapped, replica), ("shards", shards, shards)):
        bs.sketch_(called, EIGHT_BIT)
        draws = [gradients(called, owner, batch(rank)) for _ in range(DRAWS)]
        found[name] = torch.stack(draws)
        with bs.exact(called):
            found[f"{name}, exact"] = gradients(called, owner, batch(rank))
    return found


def sharded(rank: int) -> dict[str, object]:
    """Gradients of the same model with its parameters sharded over the ranks (FSDP2)."""
    own = model()
    bs.sketch_(own, {"0": bs.Rows(keep=0.5), "2": bs.Region(keep=0.5)})
    for part in (own[0], own[2], own):
        fully_shard(part)
    gradients(own, own, batch(rank))
    found = {"draws": torch.stack([gradients(own, own, batch(rank)) for _ in range(DRAWS)])}
    with bs.exact(own):
        found["exact"] = gradients(own, own, batch(rank))
    found["status"] = regions.state_of(own[2]).status
    return found


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    try:
        own = model()
        wrapped = nn.parallel.DistributedDataParallel(own)
        report = bs.sketch_(wrapped, {"0": bs.Rows(keep=0.5), "2": bs.StoredRows(keep=0.5)})
        bs.seed(0)
        result = {
            "sites": [site.name for site in report.sketched],
            "seeds": [int(bs.sampling.next_seed(torch.zeros(1))) for _ in range(20)],
            "same data": torch.stack([gradients(own, own, batch(0)) for _ in range(5)]),
            "synchronised": torch.stack(
                [gradients(wrapped, own, batch(rank)) for _ in range(DRAWS)]
            ),
        }
        with bs.exact(wrapped):
            result["exact"] = gradients(wrapped, own, batch(rank))
        with wrapped.no_sync():
            result["not synchronised"] = gradients(wrapped, own, batch(rank))
        bs.restore_(wrapped)
        result["types"] = [type(m).__name__ for m in own]
        result["restored"] = gradients(wrapped, own, batch(rank))
        bs.sketch_(wrapped, {"": bs.Region(keep=0.5)})
        gradients(wrapped, own, batch(rank))  # the first pass proves the region, and is exact
        result["status"] = regions.state_of(own).status
        result["in a region"] = torch.stack(
            [gradients(wrapped, own, batch(rank)) for _ in range(DRAWS)]
        )
        bs.restore_(wrapped)
        result["controlled"] = controlled(rank)
        result["sharded"] = sharded(rank)
        result["8 bits"] = in_eight_bits(rank)
        torch.save(result, os.path.join(folder, f"{rank}.pt"))
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, object]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    warm_forkserver()
    torch.multiprocessing.start_processes(
        work, args=(str(folder),), nprocs=2, start_method="forkserver"
    )
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_the_wrapped_model_is_sketched_under_its_own_names_and_restored(ranks):
    for rank in ranks:
        assert rank["sites"] == ["0", "2"]
        assert rank["types"] == ["Linear", "Tanh", "Linear"]


def test_after_the_sum_all_ranks_have_the_same_gradients(ranks):
    assert torch.equal(ranks[0]["synchronised"], ranks[1]["synchronised"])
    assert torch.equal(ranks[0]["restored"], ranks[1]["restored"])
    assert not torch.equal(ranks[0]["not synchronised"], ranks[1]["not synchronised"])


def test_ranks_do_not_share_noise(ranks):
    assert not set(ranks[0]["seeds"]) & set(ranks[1]["seeds"])
    a, b = ranks[0]["same data"], ranks[1]["same data"]  # one model, one batch, one base seed
    assert not any(torch.equal(x, y) for x, y in zip(a, b))


def test_all_ranks_hold_the_same_plan(ranks):
    mine, other = (rank["controlled"] for rank in ranks)
    assert mine == other
    assert mine["log"]
    assert mine["estimate"]["replicas"] == 2
    assert mine["traces"][0] != mine["traces"][1]


def check_mean(draws: torch.Tensor, exact: torch.Tensor) -> None:
    error = draws.double().std(0) / len(draws) ** 0.5
    deviation = (draws.double().mean(0) - exact).abs()
    assert bool((deviation < 5 * error + 1e-6).all()), "the mean is biased"


def test_the_synchronised_gradient_is_finite_and_unbiased(ranks):
    draws = ranks[0]["synchronised"]
    assert bool(draws.isfinite().all())
    assert torch.equal(ranks[0]["exact"], ranks[1]["exact"])
    check_mean(draws, ranks[0]["exact"])
    torch.testing.assert_close(ranks[0]["restored"], ranks[0]["exact"])


def test_a_region_is_unbiased_in_two_processes(ranks):
    assert [rank["status"] for rank in ranks] == ["active", "active"]
    draws = ranks[0]["in a region"]
    assert torch.equal(draws, ranks[1]["in a region"])
    assert float(draws.double().var(0).sum()) > 0.05 * float(ranks[0]["exact"].square().sum())
    check_mean(draws, ranks[0]["exact"])


def test_sketches_are_unbiased_where_parameters_are_sharded(ranks):
    found = [rank["sharded"] for rank in ranks]
    assert [f["status"] for f in found] == ["active", "active"]
    torch.testing.assert_close(found[0]["exact"], ranks[0]["exact"])
    assert torch.equal(found[0]["draws"], found[1]["draws"])
    assert float(found[0]["draws"].double().var(0).sum()) > 0.05 * float(
        found[0]["exact"].square().sum()
    )
    check_mean(found[0]["draws"], found[0]["exact"])


@pytest.mark.parametrize("how", ["replicas", "shards"])
def test_8_bit_products_are_unbiased_in_two_processes(ranks, how):
    mine, other = (rank["8 bits"] for rank in ranks)
    draws, exact = mine[how], mine[f"{how}, exact"]
    torch.testing.assert_close(exact, ranks[0]["exact"])
    assert torch.equal(draws, other[how])
    relative = draws.double().var(0).sum() / exact.double().square().sum()
    assert 1e-6 < float(relative) < 0.01
    check_mean(draws, exact)
    with pytest.raises(AssertionError, match="is biased"):
        check_mean(draws * 1.01, exact)


def test_the_exact_gradient_agrees_with_one_process_on_the_whole_batch(ranks):
    whole = torch.cat([batch(0), batch(1)])
    own = model()
    torch.testing.assert_close(gradients(own, own, whole), ranks[0]["exact"])


def test_a_mean_that_is_off_by_a_fifth_is_noticed(ranks):
    with pytest.raises(AssertionError, match="is biased"):
        check_mean(ranks[0]["synchronised"] * 1.2, ranks[0]["exact"])
