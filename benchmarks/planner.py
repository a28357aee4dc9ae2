"""Plans for a ViT in the middle and at the end of its training: predicted beside measured.

    python benchmarks/planner.py --data uoft-cs/cifar10 --checkpoints /tmp/vit

trains the reference ViT exactly (unless its checkpoints are there), profiles it after some of the epochs, applies
plans, the hand-made combination and uniform keeps, measures each on batches that the profile has not seen, and
writes ``results/planner.json``.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import backsketch as bs
from backsketch.models import build
from backsketch.planning import CostEstimate, Plan, Profile
from backsketch.planning.profiling.records import Option
from backsketch.train import load_data
from backsketch.train.config import TrainConfig, resolve
from backsketch.train.images import Batch, Batches, ImageData
from backsketch.train.setup import make_optimizer, make_schedule

THREADS = 1
PROFILED, CHECKED, DRAWS = 8, 16, 2
SAVE = {"blocks.*.mlp": "region:keep={},row_dims=2", "blocks.*.attn": "region:keep={}"}
HAND_MADE = {
    "mask 0.75, MLP tokens 0.5": {
        "": "mask:keep=0.75",
        "blocks.*.mlp": SAVE["blocks.*.mlp"].format(0.5),
    },
    **{
        f"all branches {keep}": {pattern: text.format(keep) for pattern, text in SAVE.items()}
        for keep in (0.7, 0.5)
    },
}


def plans(profile: Profile) -> Iterator[tuple[str, Plan]]:
    yield "time", profile.plan()
    for limit in (0.05, 0.1, 0.2):
        yield f"time, extra variance up to {limit}", profile.plan(max_extra_variance=limit)
    for limit in (0.9, 0.8, 0.7):
        try:
            yield f"variance, time up to {limit}", profile.plan("variance", max_time=limit)
        except ValueError:  # nothing is that fast
            continue
    yield "memory", profile.plan("memory")
    yield "memory, time up to 1", profile.plan("memory", max_time=1.0)
    half = 0.5 * profile.saved_bytes
    yield "variance, half of the bytes", profile.plan("variance", max_saved_bytes=half)


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch.images), batch.labels)


def train(data: ImageData, config: TrainConfig, folder: Path, at: list[int]) -> None:
    """Exact training; writes EPOCH.pt with the weights and the test accuracy."""
    torch.manual_seed(config.seed)
    model = build("vit", data.image_shape, data.num_classes)
    batches = Batches(data, config, torch.device("cpu"), 0, 1)
    optimizer = make_optimizer(model, config)
    schedule = make_schedule(optimizer, config, batches.steps_per_epoch * config.epochs)
    for epoch in range(1, max(at) + 1):
        losses = []
        for (batch,) in batches.train(epoch - 1):
            loss = loss_fn(model, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        print(f"epoch {epoch}: loss {statistics.fmean(losses):.4f}", flush=True)
        if epoch in at:
            accuracy = _accuracy(model, batches)
            torch.save({"model": model.state_dict(), "accuracy": accuracy}, folder / f"{epoch}.pt")


@torch.no_grad()
def _accuracy(model: nn.Module, batches: Batches) -> float:
    model.eval()
    right = [(model(b.images).argmax(1) == b.labels).float() for b in batches.test()]
    model.train()
    return float(torch.cat(right).mean())


def step_seconds(model: nn.Module, batch: Batch, rounds: int = 9) -> float:
    """CPU time of an exact step without the optimizer."""
    times = []
    for _ in range(rounds):
        start = time.process_time()
        torch.autograd.grad(loss_fn(model, batch), list(model.parameters()))
        times.append(time.process_time() - start)
    return statistics.median(times)


def numbers(bill: CostEstimate) -> dict[str, float]:
    return {
        "time_ratio": bill.time_ratio,
        "extra_variance": bill.extra_variance,
        "saved_bytes": bill.saved_bytes,
        "cv": bill.time_ratio * (1 + bill.extra_variance),
        "rho": bill.rho,
        "standard_error": bill.standard_error,
    }


def measured(model: nn.Module, plan: Plan, batches: list[Batch]) -> dict[str, Any]:
    bs.sketch_(model, plan)
    try:
        return numbers(plan.measure(model, batches, loss_fn, draws=DRAWS))
    finally:
        bs.restore_(model)


def study(model: nn.Module, batches: list[Batch]) -> dict[str, Any]:
    step = step_seconds(model, batches[0])
    start = time.process_time()
    profile = bs.profile(model, batches[:PROFILED], loss_fn)
    cost = (time.process_time() - start) / step
    rows = []
    exact = CostEstimate(1.0, 0.0, profile.saved_bytes, 1.0)
    candidates = [(name, plan, True) for name, plan in plans(profile)]
    candidates += [(name, Plan(texts, exact), False) for name, texts in HAND_MADE.items()]
    for name, plan, predicted in candidates:
        row: dict[str, Any] = {"plan": name, "rules": dict(plan.texts), "reason": plan.reason}
        row["predicted"] = numbers(plan.predicted) if predicted else None
        twin = next((r for r in rows if r["rules"] == row["rules"]), None)
        row["measured"] = twin["measured"] if twin else measured(model, plan, batches[PROFILED:])
        rows.append(row)
        print(line(row), flush=True)
    return {
        "noise_scale": profile.noise_scale,
        "step_seconds": step,
        "profile_steps": cost,  # the first also loads torch.compile and captures the regions
        "ideal": numbers(ideal(profile).plan().predicted),
        "rows": rows,
    }


def ideal(profile: Profile) -> Profile:
    """The same variances with the times that arithmetic promises: the backward pass of branches as their keep."""
    share = profile.step_seconds * 2 / 3 / sum(s.row_dims is not None for s in profile.sites)

    def promised(option: Option) -> Option:
        seconds = share if option.family == "save" else 0.0
        return replace(option, fixed_seconds=-seconds, live_seconds=seconds * option.keep)

    sites = [replace(s, options=tuple(map(promised, s.options))) for s in profile.sites]
    return replace(profile, sites=tuple(sites))


def line(row: dict[str, Any]) -> str:
    cells = [f"{row['plan']:<32}"]
    for key in ("time_ratio", "extra_variance", "saved_bytes", "cv"):
        scale, digits = (2**-20, 1) if key == "saved_bytes" else (1, 3)
        pair = [row[side][key] * scale for side in ("predicted", "measured") if row[side]]
        cells.append(f"{key} " + " / ".join(f"{v:.{digits}f}" for v in pair))
    return "  ".join(cells) + f"  (se {row['measured']['standard_error']:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--images", type=int, default=40_000)
    parser.add_argument("--at", type=int, nargs="+", default=[8, 15], help="epochs of 16")
    parser.add_argument("--checkpoints", type=Path, default=Path("runs/planner"))
    parser.add_argument("--out", type=Path, default=Path("results/planner.json"))
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    data = load_data(options.data).limited(options.images)
    asked = {"model": "vit", "data": options.data, "sketch": "none"}
    config = resolve(asked, num_train=data.num_train, image_shape=data.image_shape)
    options.checkpoints.mkdir(parents=True, exist_ok=True)
    missing = [e for e in options.at if not (options.checkpoints / f"{e}.pt").exists()]
    if missing:
        train(data, config, options.checkpoints, options.at)
    result: dict[str, Any] = {
        "machine": {
            "processor": platform.processor(),
            "threads": THREADS,
            "torch": torch.__version__,
        },
        "config": config.as_dict() | {"data": "cifar10", "images": options.images},
        "batches": {"profiled": PROFILED, "checked": CHECKED, "draws": DRAWS},
        "checkpoints": {},
    }
    source = Batches(data, config, torch.device("cpu"), 0, 1).train(1000)
    batches = [next(source)[0] for _ in range(PROFILED + CHECKED)]
    for epoch in options.at:
        saved = torch.load(options.checkpoints / f"{epoch}.pt")
        model = build("vit", data.image_shape, data.num_classes)
        model.load_state_dict(saved["model"])
        print(f"after {epoch} epochs, test accuracy {saved['accuracy']:.2%}", flush=True)
        result["checkpoints"][str(epoch)] = {"accuracy": saved["accuracy"], **study(model, batches)}
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
