from __future__ import annotations

import gc
import os
import sys
import zlib
from pathlib import Path

import pytest

# PyTorch's compiler is not to try each vector instruction with a program of its own, for ten seconds.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
import torch

import backsketch as bs
from backsketch.torch_private import CONSTANTS_OF_OBJECTS
from backsketch.untouched import seed_torch
from helpers import sweep_config

torch.set_num_threads(1)  # the suite runs in parallel processes
if not CONSTANTS_OF_OBJECTS:  # PyTorch 2.10 and 2.11: see "Limits" in the README
    torch._dynamo.config.specialize_float = True


LONG = (
    "test_killed.py",
    "test_cluster.py",
    "test_train.py",
    "test_compile.py",
    "test_fuzz.py",
    "test_regions.py",
    "test_docs.py",
)
"""Files that run first. Each file runs in one process: a long one at the end would leave the others idle."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow-part", metavar="K/N", help="run part K of N of the slow cases")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    _mark_slow_cases(config, items)
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
    if part := config.getoption("--slow-part"):
        number, count = map(int, part.split("/"))
        left_out = [
            item
            for item in items
            if item.get_closest_marker("slow")
            and zlib.crc32(item.nodeid.encode()) % count != number - 1
        ]
        config.hook.pytest_deselected(items=left_out)
        dropped = set(left_out)
        items[:] = [item for item in items if item not in dropped]


def _mark_slow_cases(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark as slow the cases of a test that its ``fast_cases`` does not name."""
    named: dict[str, set[str]] = {}
    for item in items:
        mark = item.get_closest_marker("fast_cases")
        if mark is None:
            continue
        case = f"-{item.callspec.id}-"  # type: ignore[attr-defined]
        found = {name for name in mark.args if f"-{name}-" in case}
        named.setdefault(item.nodeid.split("[")[0], set(mark.args)).difference_update(found)
        if not found:
            item.add_marker("slow")
    missing = {test: names for test, names in named.items() if names}
    if missing and not any("::" in argument for argument in config.args):
        raise pytest.UsageError(f"fast_cases names cases that do not exist: {missing}")


@pytest.fixture(scope="module", autouse=True)
def _quick_collections():
    """Exempt what is imported from garbage collection: every training asks for one, which took longer than it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _fixed_streams():
    torch.set_num_threads(1)  # some tests ask for more
    seed_torch(0)
    bs.seed(0)


@pytest.fixture(autouse=True)
def _without_pictures(request, monkeypatch):
    """Leave out the picture of each run, which takes longer than a tiny run, unless a test has ``pictures``."""
    run = sys.modules.get("backsketch.train.run")
    if run is not None and "pictures" not in request.keywords:
        monkeypatch.setattr(run, "plot_result", lambda result, path: None)


@pytest.fixture
def config(tmp_path, request):
    """The sweep that a test file describes as ``TINY``."""
    return sweep_config(tmp_path, request.module.TINY)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Run in an empty folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """Keep what ``datasets`` prepares in the folder of the test, and ask no server."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """A folder with datasets in hub layout, beside the checkout; skips where there is none."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs ../shared/data (MNIST and CIFAR-10), which users do not have")
    return folder
