from __future__ import annotations

from pathlib import Path

import pytest
import torch

import backsketch as bs

torch.set_num_threads(1)  # the suite runs in parallel processes


@pytest.fixture(autouse=True)
def _fixed_streams():
    torch.manual_seed(0)
    bs.seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """A folder with datasets in hub layout, beside the checkout; skips where there is none."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs ../shared/data (MNIST and CIFAR-10), which users do not have")
    return folder
