"""A head with a large vocabulary and its loss: time and saved bytes of forward and backward over exact ones.

    python benchmarks/head.py --threads 1 --out results/head

Exact: ``F.cross_entropy(F.linear(x, weight), targets)``. Interleaved, medians of the ratios. Targets follow the
model as those of a half-trained one do: most are likely under it, some are not.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from functools import partial
from pathlib import Path

import torch
from int8 import interleaved, rows_of
from torch import Tensor, nn
from torch.nn import functional as F

import backsketch as bs

VOCABULARY, ROWS, WIDTH = 32_000, 4096, 512
ARMS = {
    "keep 1": {},
    "keep 1, int8": {"arithmetic": "int8"},
    "keep 0.25": {"keep": 0.25},
    "keep 0.25, int8": {"keep": 0.25, "arithmetic": "int8"},
    "keep 0.1, int8": {"keep": 0.1, "arithmetic": "int8"},
}


class Head(nn.Module):
    """The head of a language model under one of the arms."""

    def __init__(self, weight: nn.Parameter, options: dict | None):
        super().__init__()
        self.weight, self.options = weight, options

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        if self.options is None:
            return F.cross_entropy(F.linear(x, self.weight), targets)
        return bs.ops.linear_cross_entropy(x, self.weight, targets, **self.options)


def problem(vocabulary: int, rows: int, width: int) -> tuple[nn.Parameter, Tensor, Tensor]:
    """Weight, input and targets drawn from the head's own probabilities."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(vocabulary, width) / width**0.5)
    x = (3 * torch.randn(rows, width)).requires_grad_()
    with torch.no_grad():
        parts = [torch.multinomial((p @ weight.T).softmax(1), 1)[:, 0] for p in x.split(256)]
    return weight, x, torch.cat(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--only", default="", help="arms whose name holds this, besides exact")
    parser.add_argument("--out", type=Path, default=Path("results/head"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    weight, x, targets = problem(arguments.vocabulary, arguments.rows, arguments.width)
    arms, more = {}, {}
    options = {name: option for name, option in ARMS.items() if arguments.only in name}
    for name, option in {"exact": None, **options}.items():
        head = Head(weight, option)
        more[name] = {"saved_mib": round(bs.saved_bytes(head, x, targets).total / 2**20, 2)}

        def step(head=head):
            torch.autograd.grad(head(x, targets), (x, weight))

        arms[name] = partial(step)
    what = f"{arguments.rows} rows, {arguments.width} -> {arguments.vocabulary}"
    rows = rows_of(what, interleaved(arms, arguments.repeats, time.perf_counter), more)
    for row in rows:
        row["saved_ratio"] = round(row["saved_mib"] / rows[0]["saved_mib"], 4)
    result = {
        "command": f"python benchmarks/head.py --threads {arguments.threads} --repeats {arguments.repeats}"
        + (f" --only {arguments.only}" if arguments.only else ""),
        "clock": "perf_counter",
        "device": f"{platform.machine()}, AVX-512 VNNI: {not bs.products.why_slow()}",
        "torch": torch.__version__,
        "repeats": arguments.repeats,
        "rows": rows,
    }
    path = arguments.out / f"head_{arguments.threads}threads.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
