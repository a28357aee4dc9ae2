"""What memory savers cost and save in a training step, beside checkpointing, bf16 and a smaller batch.

    python benchmarks/memory.py --data uoft-cs/cifar10          # all models; or name some: vit bagnet

writes ``results/memory.json``. Times are medians of interleaved rounds of one process; the peak of each
arm is measured in a process of its own, twice: as it is, and with large blocks mapped one by one
(``MALLOC_MMAP_THRESHOLD_=65536``), because the heap of glibc before 2.38 does not give aligned blocks back.
The extra variance is relative to that of SGD at the same batch size, on real batches after some steps of
training; for bf16 the squared error of the gradient stands in its place.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import backsketch as bs
from backsketch.memory import kept_by, peak_of
from backsketch.models import build
from backsketch.planning.measure.step import extra_variance
from backsketch.train import load_data

THREADS = 1


@dataclass(frozen=True)
class Config:
    """A model, its batch, and where regions and checkpoints go."""

    model: str
    batch: int
    options: dict = field(default_factory=dict)
    regions: dict[str, str] = field(default_factory=dict)
    checkpoints: tuple[str, ...] = ()


CONFIGS = {
    "vit": Config(
        "vit",
        64,
        {"dim": 192, "depth": 6, "patch": 4},
        {
            "blocks.*.attn": "region:keep=0.25,mode=recompute",
            "blocks.*.mlp": "region:keep=0.25,row_dims=2,mode=recompute",
        },
        ("blocks.?",),
    ),
    "bagnet": Config("bagnet", 128, {}, {}, ("stages.?.?",)),
    "bagnet, group norm": Config(
        "bagnet",
        128,
        {"norm": "group"},
        {"": "region:keep=0.25,mode=recompute"},
        ("stages.?.?",),
    ),
}
SKETCHES = ("quantized:bits=8", "quantized:bits=4", "quantized:bits=2", "stored_rows:keep=0.25",
            "projection:keep=0.25,kind=srht")  # fmt: skip


class Checkpointed(nn.Module):
    """A module under activation checkpointing."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


@dataclass
class Arm:
    """A way of making a step: a model, its share of the batch, and whether it runs in bf16."""

    name: str
    model: nn.Module
    share: float = 1.0
    low: bool = False
    seconds: list[float] = field(default_factory=list)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        n = round(self.share * len(y))
        with torch.autocast("cpu", torch.bfloat16, enabled=self.low):
            return F.cross_entropy(self.model(x[:n]), y[:n])

    def step(self, batch: tuple[Tensor, Tensor]) -> float:
        self.model.zero_grad()
        start = time.process_time()
        self.loss(batch).backward()
        return time.process_time() - start


def arms(config: Config, model: nn.Module) -> dict[str, Callable[[], Arm]]:
    """Name to maker: the peaks are measured one arm a process."""

    def sketched(name: str, rules: object) -> Arm:
        other = copy.deepcopy(model)
        bs.sketch_(other, rules)
        return Arm(name, other)

    def checkpointed() -> Arm:
        other = copy.deepcopy(model)
        for name, module in list(other.named_modules()):
            if any(fnmatch.fnmatchcase(name, p) for p in config.checkpoints):
                parent, _, leaf = name.rpartition(".")
                setattr(other.get_submodule(parent), leaf, Checkpointed(module))
        return Arm("checkpoint", other)

    made: dict[str, Callable[[], Arm]] = {"exact": lambda: Arm("exact", copy.deepcopy(model))}
    for text in SKETCHES:
        made[text] = lambda text=text: sketched(text, bs.parse(text))
    if config.regions:
        rules = {pattern: bs.parse(text) for pattern, text in config.regions.items()}
        made["regions, recompute, keep 0.25"] = lambda: sketched("regions", rules)
    made["checkpoint"] = checkpointed
    made["bf16 autocast"] = lambda: Arm("bf16", copy.deepcopy(model), low=True)
    made["batch ×0.25"] = lambda: Arm("batch", copy.deepcopy(model), share=0.25)
    return made


def batches(data_name: str, size: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """Normalised batches of 32×32 colour images."""
    data = load_data(data_name)
    mean, std = (t.view(-1, 1, 1) for t in data.statistics())
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        rows = torch.randint(data.num_train, (size,), generator=generator)
        x = (data.train_images[rows].float() - mean) / std
        x = F.interpolate(x, size=(32, 32)).expand(-1, 3, -1, -1).contiguous()
        found.append((x, data.train_labels[rows]))
    return found


def trained(config: Config, data: list[tuple[Tensor, Tensor]]) -> nn.Module:
    """The model after one step on each batch: gradients at initialisation are unlike any other."""
    torch.manual_seed(0)
    bs.seed(0)
    model = build(config.model, (3, 32, 32), 10, **config.options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for x, y in data:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def peak(name: str, arm: str, mapped: bool) -> int | None:
    """Peak memory of the second step of one arm, in MiB, in a process of its own."""
    environment = {**os.environ, **({"MALLOC_MMAP_THRESHOLD_": "65536"} if mapped else {})}
    command = [sys.executable, __file__, name, "--peak", arm]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def print_peak(name: str, arm_name: str) -> None:
    config = CONFIGS[name]
    torch.manual_seed(0)
    model = build(config.model, (3, 32, 32), 10, **config.options)
    batch = torch.randn(config.batch, 3, 32, 32), torch.randint(10, (config.batch,))
    arm = arms(config, model)[arm_name]()
    small = batch[0][:8], batch[1][:8]
    for _ in range(3):
        arm.step(small)  # libraries and guards take what they need
    arm.model.zero_grad()
    found = max((peak_of(lambda: arm.step(batch)) or 0) for _ in range(3))
    print(json.dumps(round(found / 2**20, 1)))


def measure(name: str, data_name: str, repeats: int, steps: int, only: list[str]) -> dict:
    config = CONFIGS[name]
    data = batches(data_name, config.batch, steps + 4)
    model = trained(config, data[4:])
    makers = arms(config, model)
    running = {key: make() for key, make in makers.items() if not only or key in only}
    for repeat in range(repeats + 2):
        for arm in running.values():
            elapsed = arm.step(data[0])
            if repeat > 1:  # guards run and caches fill
                arm.seconds.append(elapsed)
    rows = []
    for key, arm in running.items():
        saved = kept_by(arm.model, lambda arm=arm: arm.loss(data[0])).total
        rows.append({"arm": key, "step": _ratio(arm, running["exact"]), "saved_mib": saved / 2**20})
        rows[-1]["omega"] = omega(arm, running["exact"], data[:4])
        print(rows[-1], flush=True)
    return {
        "model": f"{config.model} {config.options}, batch {config.batch} of 32×32×3",
        "exact_ms": round(1e3 * statistics.median(running["exact"].seconds), 1),
        "rows": _relative(rows, "saved"),
    }


def add_peaks(name: str, rows: list[dict]) -> None:
    """Measure the peak of each arm; kept apart because each starts a process."""
    for row in rows:
        row["peak_mib"], row["peak_mapped_mib"] = (peak(name, row["arm"], m) for m in (False, True))
        print({key: row[key] for key in ("arm", "peak_mib", "peak_mapped_mib")}, flush=True)
    for key in ("peak", "peak_mapped"):
        _relative(rows, key)


def _relative(rows: list[dict], key: str) -> list[dict]:
    exact = rows[0][f"{key}_mib"]
    for row in rows:
        row[key] = round(row[f"{key}_mib"] / exact, 4)
        row[f"{key}_mib"] = round(row[f"{key}_mib"], 1)
    return rows


def _ratio(arm: Arm, exact: Arm) -> float:
    return round(statistics.median(a / b for a, b in zip(arm.seconds, exact.seconds)), 4)


def omega(arm: Arm, exact: Arm, data: list[tuple[Tensor, Tensor]]) -> float | None:
    """Extra variance of a sketch; squared error of bf16; None for what is exact or another batch size."""
    if arm.low:
        return _error_of_bf16(arm, exact, data)
    if not any("_backsketch" in m.__dict__ for m in arm.model.modules()):
        return None
    found = extra_variance(arm.model, data, lambda m, b: F.cross_entropy(m(b[0]), b[1]), draws=1)
    return None if found is None else round(found, 6)


def _error_of_bf16(arm: Arm, exact: Arm, data: list[tuple[Tensor, Tensor]]) -> float:
    def gradient(which: Arm, batch: tuple[Tensor, Tensor]) -> Tensor:
        which.model.zero_grad()
        which.loss(batch).backward()
        return torch.cat([p.grad.flatten().double() for p in which.model.parameters()])

    full = torch.stack([gradient(exact, b) for b in data])
    error = sum(float((gradient(arm, b) - g).square().sum()) for b, g in zip(data, full))
    return round(error / len(data) / float(full.var(0).sum()), 6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="*", default=list(CONFIGS), help=", ".join(CONFIGS))
    parser.add_argument("--data", default="digits", help="digits, a hub id or a local folder")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20, help="of training before measuring")
    parser.add_argument("--out", type=Path, default=Path("results/memory.json"))
    parser.add_argument("--arms", nargs="*", default=[], help="some only, exact among them")
    parser.add_argument("--part", choices=("times", "peaks"), help="one of the two; default: both")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    if arguments.peak:
        print_peak(arguments.models[0], arguments.peak)
        return
    result = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"models": {}}
    result["command"] = "python benchmarks/memory.py --data uoft-cs/cifar10"
    result["data"] = Path(arguments.data).name
    result["device"] = (
        f"{platform.processor() or platform.machine()}, {THREADS} thread, process time"
    )
    result["torch"] = torch.__version__
    for name in arguments.models:
        if arguments.part != "peaks":
            repeats, steps = arguments.repeats, arguments.steps
            result["models"][name] = measure(name, arguments.data, repeats, steps, arguments.arms)
        if arguments.part != "times":
            add_peaks(name, result["models"][name]["rows"])
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
