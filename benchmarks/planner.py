"""Plans for ViTs in the middle of their training: predicted beside measured.

    python benchmarks/planner.py --data uoft-cs/cifar10 --model narrow --checkpoints /tmp/narrow
    python benchmarks/planner.py --data uoft-cs/cifar10 --model wide --checkpoints /tmp/wide

train the ViT exactly (unless its checkpoint is there), profile it, apply plans, the hand-made combinations and
uniform keeps, measure each on batches that the profile has not seen, and write ``results/planner.json``. What is
there already is kept, so that a run on a machine that is only idle for a while can be continued, ``--most`` plans
at a time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
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
PROFILED, CHECKED, DRAWS = 4, 8, 1


@dataclass(frozen=True)
class Case:
    """A ViT, the images that it learns, and after which of its epochs it is profiled."""

    shape: dict[str, int]
    images: int
    epochs: int
    at: int
    batch_size: int


CASES = {
    "narrow": Case({}, 40_000, 16, 8, 128),  # the reference ViT: d 96, 4 blocks, patch 8
    "wide": Case({"dim": 192, "depth": 6, "patch": 4}, 3_000, 4, 2, 64),
}
SAVE = {"blocks.*.mlp": "region:keep={},row_dims=2", "blocks.*.attn": "region:keep={}"}
HAND_MADE = {
    "int8 at every layer": {"blocks.*": "int8"},
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
    for limit in (0.05, 0.2):
        yield f"time, extra variance up to {limit}", profile.plan(max_extra_variance=limit)
    for limit in (0.9, 0.8, 0.7):
        try:
            yield f"variance, time up to {limit}", profile.plan("variance", max_time=limit)
        except ValueError:  # nothing is that fast
            continue
    yield "memory", profile.plan("memory")
    half = 0.5 * profile.saved_bytes
    yield "variance, half of the bytes", profile.plan("variance", max_saved_bytes=half)


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch.images), batch.labels)


def train(case: Case, data: ImageData, config: TrainConfig, path: Path) -> None:
    """Exact training; writes the weights and the test accuracy."""
    torch.manual_seed(config.seed)
    model = build("vit", data.image_shape, data.num_classes, **case.shape)
    batches = Batches(data, config, torch.device("cpu"), 0, 1)
    optimizer = make_optimizer(model, config)
    schedule = make_schedule(optimizer, config, batches.steps_per_epoch * config.epochs)
    for epoch in range(case.at):
        losses = []
        for (batch,) in batches.train(epoch):
            loss = loss_fn(model, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        print(f"epoch {epoch + 1}: loss {statistics.fmean(losses):.4f}", flush=True)
    torch.save({"model": model.state_dict(), "accuracy": _accuracy(model, batches)}, path)


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


def profiled(model: nn.Module, batches: list[Batch], path: Path) -> dict[str, Any]:
    """Profile twice, for the cost in a new process and in one that has profiled before; writes the second."""
    step, costs = step_seconds(model, batches[0]), []
    for _ in range(2):
        start = time.process_time()
        profile = bs.profile(model, batches[:PROFILED], loss_fn)
        costs.append((time.process_time() - start) / step)
    profile.save(path)
    best = ideal(profile).plan().predicted
    return {
        "noise_scale": profile.noise_scale,
        "forward": profile.least_ratio,
        "step_seconds": step,
        "profile_steps": costs,  # the first also loads torch.compile and captures the regions
        "ideal": numbers(best),
        "rows": [],
    }


def study(
    model: nn.Module, batches: list[Batch], path: Path, rows: list[dict[str, Any]], most: int
) -> None:
    profile = Profile.load(path)
    exact = CostEstimate(1.0, 0.0, profile.saved_bytes, 1.0)
    candidates = [(name, plan, True) for name, plan in plans(profile)]
    candidates += [(name, Plan(texts, exact), False) for name, texts in HAND_MADE.items()]
    done = {row["plan"] for row in rows}
    for name, plan, predicted in [c for c in candidates if c[0] not in done][:most]:
        row: dict[str, Any] = {"plan": name, "rules": dict(plan.texts), "reason": plan.reason}
        row["predicted"] = numbers(plan.predicted) if predicted else None
        twin = next((r for r in rows if r["rules"] == row["rules"]), None)
        row["measured"] = twin["measured"] if twin else measured(model, plan, batches[PROFILED:])
        rows.append(row)
        print(line(row), flush=True)


def ideal(profile: Profile) -> Profile:
    """The same variances with the times that arithmetic promises: the backward pass of branches as their keep."""
    share = profile.step_seconds * 2 / 3 / sum(s.row_dims is not None for s in profile.sites)

    def promised(option: Option) -> Option:
        seconds = share if option.family == "save" else 0.0
        return replace(option, fixed_seconds=-seconds, live_seconds=seconds * option.keep)

    sites = [replace(s, options=tuple(map(promised, s.options))) for s in profile.sites]
    return replace(profile, sites=tuple(sites), trials=())


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
    parser.add_argument("--model", choices=CASES, default="narrow")
    parser.add_argument("--checkpoints", type=Path, required=True)
    parser.add_argument("--most", type=int, default=99, help="plans measured in this run")
    parser.add_argument("--out", type=Path, default=Path("results/planner.json"))
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    case = CASES[options.model]
    data = load_data(options.data).limited(case.images)
    asked = {"model": "vit", "data": options.data, "sketch": "none", "epochs": case.epochs}
    asked |= {"batch_size": case.batch_size}
    config = resolve(asked, num_train=data.num_train, image_shape=data.image_shape)
    options.checkpoints.mkdir(parents=True, exist_ok=True)
    weights, path = (options.checkpoints / f"{case.at}{end}" for end in (".pt", ".json"))
    if not weights.exists():
        train(case, data, config, weights)
    saved = torch.load(weights)
    model = build("vit", data.image_shape, data.num_classes, **case.shape)
    model.load_state_dict(saved["model"])
    source = Batches(data, config, torch.device("cpu"), 0, 1).train(1000)
    batches = [next(source)[0] for _ in range(PROFILED + CHECKED)]
    result = json.loads(options.out.read_text()) if options.out.exists() else {}
    result |= {
        "machine": {"threads": THREADS, "torch": torch.__version__},
        "batches": {"profiled": PROFILED, "checked": CHECKED, "draws": DRAWS},
    }
    found = result.setdefault("models", {})
    if options.model not in found or not path.exists():
        found[options.model] = asdict(case) | {"accuracy": saved["accuracy"]}
        found[options.model] |= profiled(model, batches, path)
    study(model, batches, path, found[options.model]["rows"], options.most)
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
