"""Time of one Linear, forward and backward, sketched against exact: interleaved, medians, ratios.

    python benchmarks/layer_time.py --out results/layer_time.json

The floor is what the arithmetic allows: with forward 1 and both products 2, ``(1 + 2 keep) / 3``. Small shapes,
whose times scatter more, have eight times as many repeats.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch

import backsketch as bs

SHAPES = [(512, 784, 512), (1024, 96, 384), (4096, 384, 1536), (8192, 768, 3072)]
SMALL = 1e9  # multiply-adds of a product
SKETCHES = [
    *(f"rows:keep={k}" for k in (0.5, 0.25, 0.1)),
    *(f"rows:keep={k},scores=uniform" for k in (0.25,)),
    *(f"columns:keep={k}" for k in (0.5, 0.25, 0.1)),
    *(f"split:grad_weight=(rows:keep={k})" for k in (0.5, 0.25)),
    "low_rank:keep=0.1,method=subspace",
    "stored_rows:keep=0.25",
    "projection:keep=0.1",
    "quantized:bits=4",
    "quantized:bits=8",
]


def step_seconds(x: torch.Tensor, weight: torch.Tensor, cotangent: torch.Tensor, sketch) -> float:
    """One forward and backward, gradients dropped."""
    start = time.perf_counter()
    y = bs.ops.linear(x, weight, None, sketch) if sketch else torch.nn.functional.linear(x, weight)
    torch.autograd.grad(y, (x, weight), cotangent)
    return time.perf_counter() - start


def measure(shape: tuple[int, int, int], repeats: int) -> list[dict]:
    n, d_in, d_out = shape
    x = torch.randn(n, d_in, requires_grad=True)
    weight = torch.randn(d_out, d_in, requires_grad=True)
    cotangent = torch.randn(n, d_out) * torch.rand(n, 1)
    arms = {"exact": None, **{text: bs.parse(text) for text in SKETCHES}}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    rounds = 8 * repeats if n * d_in * d_out < SMALL else repeats
    for repeat in range(rounds + 1):
        for name, sketch in arms.items():
            elapsed = step_seconds(x, weight, cotangent, sketch)
            if repeat:  # the first is a warm-up
                seconds[name].append(elapsed)
    exact = statistics.median(seconds["exact"])
    rows = []
    for name, sketch in arms.items():
        if sketch is None:
            continue
        ratios = [s / e for s, e in zip(seconds[name], seconds["exact"])]
        rows.append(
            {
                "shape": f"{n}x{d_in}->{d_out}",
                "sketch": name,
                "exact_ms": round(1e3 * exact, 3),
                "ratio": round(statistics.median(ratios), 3),
                "floor": round((1 + sum(sketch.work())) / 3, 3),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/layer_time.json"))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    rows = []
    for shape in SHAPES:
        rows += measure(shape, arguments.repeats)
        for row in rows[-len(SKETCHES) :]:
            print(
                "{shape:18} {sketch:38} exact {exact_ms:8.2f} ms  ×{ratio:.2f} (floor {floor:.2f})".format(
                    **row
                )
            )
    result = {
        "command": "python benchmarks/layer_time.py",
        "device": f"{platform.processor() or platform.machine()}, {arguments.threads} threads",
        "torch": torch.__version__,
        "repeats": arguments.repeats,
        "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
