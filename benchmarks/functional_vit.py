"""A ViT written with functional attention as one region that keeps saved tensors in a few bits.

    python benchmarks/functional_vit.py region:keep=1.0,save=int8,arithmetic=int8 --threads 1

adds its rows to ``results/functional_vit.json``: medians of the ratios of interleaved steps (forward and backward,
process time at one thread, wall time at more), and the saved bytes as a share of the exact model's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import backsketch as bs
from backsketch.regions import state_of

OUT = Path(__file__).resolve().parents[1] / "results" / "functional_vit.json"
DIM, DEPTH, HEADS, PATCH, BATCH = 192, 6, 3, 4, 64


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = (
            nn.LayerNorm(DIM),
            nn.Linear(DIM, 3 * DIM),
            nn.Linear(DIM, DIM),
        )

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, t, 3, HEADS, d // HEADS).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm = Attention(), nn.LayerNorm(DIM)
        self.up, self.down = nn.Linear(DIM, 4 * DIM), nn.Linear(4 * DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.down(F.gelu(self.up(self.norm(x))))


class FunctionalViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, DIM, PATCH, PATCH)
        self.positions = nn.Parameter(torch.randn(1, (32 // PATCH) ** 2, DIM) * 0.02)
        self.blocks = nn.Sequential(*[Block() for _ in range(DEPTH)])
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(x)).mean(1))


def measure(texts: list[str], seconds: float, threads: int) -> list[dict]:
    images, labels = torch.randn(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))
    clock = time.process_time if threads == 1 else time.perf_counter
    models = {}
    for text in ["exact", *texts]:
        torch.manual_seed(0)
        models[text] = FunctionalViT()
        if text != "exact":
            bs.sketch_(models[text], bs.parse(text))

    def step(model: nn.Module) -> tuple[float, float]:
        model.zero_grad()
        start = clock()
        loss = F.cross_entropy(model(images), labels)
        middle = clock()
        loss.backward()
        return middle - start, clock() - middle

    saved = {}
    for text, model in models.items():
        step(model)
        step(model)
        saved[text] = bs.saved_bytes(model, images).total
    times: dict[str, list[tuple[float, float]]] = {text: [] for text in models}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for text, model in models.items():
            times[text].append(step(model))
    exact = times["exact"]

    def ratio(text: str, part: slice) -> float:
        pairs = zip(times[text], exact)
        return round(statistics.median(sum(a[part]) / sum(b[part]) for a, b in pairs), 3)

    return [
        {
            "sketch": text,
            "threads": threads,
            "waiting": os.environ.get("OMP_WAIT_POLICY", "default").lower(),
            "step": ratio(text, slice(0, 2)),
            "forward": ratio(text, slice(0, 1)),
            "backward": ratio(text, slice(1, 2)),
            "saved": round(saved[text] / saved["exact"], 3),
            "rounds": len(exact),
            "note": state_of(models[text]).note,
        }
        for text in texts
    ]


def _key(row: dict) -> tuple[int, str, str]:
    return row["threads"], row["waiting"], row["sketch"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sketches", nargs="+")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=25)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = measure(options.sketches, options.seconds, options.threads)
    before = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    new = set(map(_key, rows))
    rows = sorted([*(row for row in before if _key(row) not in new), *rows], key=_key)
    content = {
        "command": "python benchmarks/functional_vit.py SKETCH ... --threads THREADS",
        "model": f"ViT d {DIM}, {DEPTH} blocks, {(32 // PATCH) ** 2} tokens, batch {BATCH}",
        "machine": platform.machine(),
        "torch": torch.__version__,
        "rows": rows,
    }
    options.out.write_text(json.dumps(content, indent=1) + "\n")
    for row in rows:
        print(*(f"{value}" for value in row.values()))


if __name__ == "__main__":
    main()
