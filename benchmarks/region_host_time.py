"""Host time that a region adds to a call, on tensors so small that nothing else counts.

    python benchmarks/region_host_time.py --out results/host_time.json

Exact, save and recompute in turn, in one process on one thread; medians of the differences in microseconds.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import backsketch as bs

MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Linear(8, 8)),
    "norm-linear-gelu-linear": lambda: nn.Sequential(
        nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)
    ),
}
MODES = ("save", "recompute")


def microseconds(module: nn.Module, x: torch.Tensor, g: torch.Tensor) -> tuple[float, float]:
    """Forward and backward."""
    start = time.perf_counter()
    y = module(x)
    middle = time.perf_counter()
    y.backward(g)
    return 1e6 * (middle - start), 1e6 * (time.perf_counter() - middle)


def measure(name: str, repeats: int) -> list[dict]:
    x, g = torch.randn(8, 8, requires_grad=True), torch.randn(8, 8)
    arms = {"exact": MODULES[name]()}
    for mode in MODES:
        arms[mode] = MODULES[name]()
        bs.sketch_(arms[mode], bs.Region(keep=0.5, mode=mode))
    times: dict[str, list[tuple[float, float]]] = {arm: [] for arm in arms}
    for repeat in range(repeats + 20):
        for arm, module in arms.items():
            taken = microseconds(module, x, g)
            if repeat >= 20:  # captured and warm
                times[arm].append(taken)

    def median(arm: str, part: int) -> float:
        return statistics.median(t[part] for t in times[arm])

    return [
        {
            "module": name,
            "mode": mode,
            "exact_us": round(median("exact", 0) + median("exact", 1), 1),
            "forward_us": round(median(mode, 0) - median("exact", 0), 1),
            "backward_us": round(median(mode, 1) - median("exact", 1), 1),
        }
        for mode in MODES
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/host_time.json"))
    parser.add_argument("--repeats", type=int, default=1500)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for name in MODULES for row in measure(name, arguments.repeats)]
    for row in rows:
        print(row)
    result = {
        "command": "python benchmarks/region_host_time.py",
        "device": f"{platform.processor() or platform.machine()}, 1 thread",
        "torch": torch.__version__,
        "repeats": arguments.repeats,
        "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
