"""Steps with 8-bit backward products against exact ones: interleaved, medians of the ratios.

    python benchmarks/int8.py layers --threads 1 --out results/int8
    python benchmarks/int8.py models --threads 2 --out results/int8
    python benchmarks/int8.py regions --threads 1 --out results/int8

``regions`` are the same models, each as one region. A layer's step is forward and backward; a model's step is
forward, backward and AdamW. ``bf16 autocast`` is the exact alternative with a rounded forward pass.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn

import backsketch as bs
from backsketch.models import build, mlp
from backsketch.regions import state_of

SHAPES = [
    (4096, 384, 1536),
    (8192, 768, 3072),
    (2048, 1024, 1024),
    (512, 784, 512),
    (4096, 192, 768),
    (1024, 96, 384),
]
LAYER_ARMS = ["int8", "int8:save=true", "int8:sketch=(rows:keep=0.5)", "rows:keep=0.5"]
MODEL_ARMS = [
    "int8",
    "int8:save=true",
    "quantized:bits=4",
    "int8:sketch=(quantized:bits=4)",
    "rows:keep=0.5",
    "bf16 autocast",
    "int8, bf16 autocast",
]
LOW = "bf16 autocast"
REGION_ARMS = [
    "int8",
    "region:keep=1.0,arithmetic=int8",
    "region:keep=0.5",
    "region:keep=0.5,arithmetic=int8",
    "region:keep=0.25",
    "region:keep=0.25,arithmetic=int8",
]


def interleaved(arms: dict, repeats: int, clock) -> dict[str, list[float]]:
    """Seconds of each arm's step, round by round; the first round is a warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(repeats + 1):
        for name, step in arms.items():
            start = clock()
            step()
            if repeat:
                seconds[name].append(clock() - start)
    return seconds


def rows_of(what: str, seconds: dict[str, list[float]], more: dict | None = None) -> list[dict]:
    exact = seconds["exact"]
    rows = []
    for name, values in seconds.items():
        ratio = statistics.median(v / e for v, e in zip(values, exact))
        row = {
            "what": what,
            "sketch": name,
            "ms": round(1e3 * statistics.median(values), 2),
            "ratio": round(ratio, 3),
        }
        rows.append(row | (more or {}).get(name, {}))
        print(" ".join(f"{v}" for v in rows[-1].values()), flush=True)
    return rows


def layers(repeats: int, clock) -> list[dict]:
    rows = []
    for n, d_in, d_out in SHAPES:
        x = torch.randn(n, d_in, requires_grad=True)
        weight = torch.randn(d_out, d_in, requires_grad=True)
        cotangent = torch.randn(n, d_out) * torch.rand(n, 1)

        def step(sketch=None, x=x, weight=weight, cotangent=cotangent):
            y = bs.ops.linear(x, weight, None, sketch) if sketch else x @ weight.T
            torch.autograd.grad(y, (x, weight), cotangent)

        arms = {"exact": step}
        arms |= {text: partial(step, bs.parse(text)) for text in LAYER_ARMS}
        many = repeats if n * d_in * d_out > 1e9 else 8 * repeats
        rows += rows_of(f"linear {n}x{d_in}->{d_out}", interleaved(arms, many, clock))
    return rows


IMAGES = (3, 32, 32)


class Block(nn.Module):
    """Two 3x3 convolutions with batch norms and a way around them."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.path = nn.Sequential(
            nn.Conv2d(inner, outer, 3, stride, 1, bias=False), nn.BatchNorm2d(outer), nn.ReLU(),
            nn.Conv2d(outer, outer, 3, 1, 1, bias=False), nn.BatchNorm2d(outer),
        )  # fmt: skip
        self.around = nn.Conv2d(inner, outer, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.relu(self.path(x) + self.around(x))


def residual_net() -> nn.Module:
    """A residual network of the usual kind, on which no kernel was tuned."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        Block(64, 64, 1), Block(64, 128, 2), Block(128, 256, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip


MODELS = {
    "vit d 192, 64 tokens, batch 64": (
        lambda: build("vit", IMAGES, 10, dim=192, depth=6, patch=4),
        (64, *IMAGES),
    ),
    "vit d 384, 64 tokens, batch 64": (
        lambda: build("vit", IMAGES, 10, dim=384, depth=6, patch=4),
        (64, *IMAGES),
    ),
    "mlp 784-3x1024-10, batch 512": (lambda: mlp(784, 10, (1024, 1024, 1024)), (512, 784)),
    "residual net, 64 to 256 channels, batch 32": (residual_net, (32, *IMAGES)),
    "bagnet, batch norm, batch 64": (lambda: build("bagnet", IMAGES, 10), (64, *IMAGES)),
}
LAST = (
    ", channels last"  # the layout in which ``backsketch train`` and many others hand images over
)
MODELS |= {f"{what}{LAST}": MODELS[what] for what in list(MODELS) if "net" in what}


def sketched(model: nn.Module, text: str) -> bool:
    """Sketch a model; whether that is possible (a region that drops rows needs them to be independent)."""
    try:
        bs.sketch_(model, bs.parse(text))
    except ValueError as reason:
        print(f"{text}: {str(reason).splitlines()[-1].strip()}")
        return False
    return True


def models(repeats: int, clock, only: str, texts: list[str]) -> list[dict]:
    rows = []
    for what, (make, shape) in MODELS.items():
        if only not in what:
            continue
        images, labels = torch.randn(shape), torch.randint(10, (shape[0],))
        if what.endswith(LAST):
            images = images.contiguous(memory_format=torch.channels_last)
        arms, more = {}, {}
        for name in ["exact", *texts]:
            torch.manual_seed(0)
            model = make()
            low = name.endswith(LOW)
            text = name.removesuffix(LOW).rstrip(", ") or "exact"
            if text != "exact" and not sketched(model, text):
                continue
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

            def step(model=model, optimizer=optimizer, images=images, labels=labels, low=low):
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.bfloat16, enabled=low):
                    loss = nn.functional.cross_entropy(model(images).float(), labels)
                loss.backward()
                optimizer.step()

            step()  # a region captures
            arms[name] = step
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                more[name] = {"saved_mib": round(bs.saved_bytes(model, images).total / 2**20, 1)}
            note = state_of(model).note if name.startswith("region") else ""
            more[name] |= {"note": note} if note else {}
        rows += rows_of(what, interleaved(arms, repeats, clock), more)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["layers", "models", "regions"])
    parser.add_argument("--only", default="", help="models whose name holds this")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("results/int8"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    if arguments.part == "layers":
        rows = layers(arguments.repeats, clock)
    else:
        texts = MODEL_ARMS if arguments.part == "models" else REGION_ARMS
        rows = models(arguments.repeats, clock, arguments.only, texts)
    path = arguments.out / f"{arguments.part}_{arguments.threads}threads.json"
    earlier = json.loads(path.read_text())["rows"] if path.exists() else []
    measured = {row["what"] for row in rows}
    tiles = getattr(bs.products.native.library(), "with_tiles", False)
    result = {
        "command": f"python benchmarks/int8.py {arguments.part} --threads {arguments.threads}",
        "clock": clock.__name__,
        "device": f"{platform.machine()}, AVX-512 VNNI: {not bs.products.why_slow()}, AMX: {tiles}",
        "torch": torch.__version__,
        "repeats": arguments.repeats,
        "rows": [row for row in earlier if row["what"] not in measured] + rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
