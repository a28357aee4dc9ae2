"""The controller over whole trainings: its estimate beside an independent Monte Carlo of the extra variance.

    python benchmarks/controller.py mlp --data path/to/mnist
    python benchmarks/controller.py vit --data path/to/cifar10
    python benchmarks/controller.py auto --data path/to/mnist

Writes ``results/controller_<model>.json``. At checks spread over the training, each of four looks in a stretch
of 16 steps, the next 24 batches give SGD's variance and, with two draws each, the extra variance at the keeps in
force; variances are summed over the stretch, as weights of neighbouring steps differ in it by a third. One thread,
process time; the checks and what they take do not count.

``auto`` trains the MLP by ``backsketch train`` with the sketch auto and exactly, five seeds each in turn.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

import backsketch as bs
from backsketch.models import build
from backsketch.planning.auto.auto import INTERVAL, TARGET
from backsketch.theory.noise import GradientSums
from backsketch.train import load_data
from backsketch.train.config import TrainConfig, resolve
from backsketch.train.errors import StopRequest
from backsketch.train.images import ImageData
from backsketch.train.loop import Trainer
from backsketch.train.result import result_of
from backsketch.train.setup import make_accelerator
from backsketch.train.show import TrainProgress

SETTINGS = {
    "mlp": {
        "options": {},
        "rules": {"": bs.Region(keep=0.5)},
        "images": 60_000,
        "epochs": 3,
        "batch": 128,
        "lr": 1e-3,
    },
    "vit": {
        "options": {"dim": 96, "depth": 4, "patch": 8},
        "rules": {
            "": bs.Mask(keep=0.8),
            "blocks.*.mlp": bs.Region(keep=0.5, row_dims=2),
            "blocks.*.attn": bs.Region(keep=0.7),
        },
        "images": 10_000,
        "epochs": 8,
        "batch": 64,
        "lr": 1e-3,
    },
}
CHECKS, LOOKS, EVERY, BATCHES, DRAWS = 16, 4, 5, 24, 2


class Batches:
    """Normalised batches of the first images of a train split."""

    def __init__(self, data: Path, images: int, size: int) -> None:
        found = load_data(str(data)).limited(images)
        mean, std = (t.view(-1, 1, 1) for t in found.statistics())
        self.images, self.labels = (found.train_images.float() - mean) / std, found.train_labels
        self.test = (found.test_images.float() - mean) / std, found.test_labels
        self.shape, self.classes = found.image_shape, found.num_classes
        self.size = size

    def rows(self, seed: int) -> list[Tensor]:
        """The rows of all batches of an epoch, in an order of this seed."""
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(seed))
        return list(order[: len(order) // self.size * self.size].view(-1, self.size))

    def at(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """One batch."""
        return self.images[rows], self.labels[rows]


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


class MonteCarlo:
    """Sums of squared errors and SGD variances, over several weights of one stretch of a training."""

    def __init__(self) -> None:
        self.errors = self.sgd = self.square = 0.0

    def add(self, model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
        """Exact and sketched gradients of the batches; the training's random stream stays."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        stream, sums, error = bs.get_rng_state(), GradientSums(), 0.0
        for batch in batches:
            with bs.exact(model):
                exact = torch.autograd.grad(loss_fn(model, batch), parameters)
            sums.add(exact)
            for _ in range(DRAWS):
                noisy = torch.autograd.grad(loss_fn(model, batch), parameters)
                error += sum(float((a - b).double().square().sum()) for a, b in zip(noisy, exact))
        bs.set_rng_state(stream)
        self.errors += error / len(batches) / DRAWS
        self.sgd += sums.sgd_variance
        self.square += sums.sgd_variance / sums.noise_scale

    def row(self) -> dict[str, float]:
        """The extra variance and the noise scale, of the sums."""
        beta = self.sgd / self.square if self.square > 0 else float("inf")
        return {"measured_extra_variance": self.errors / self.sgd, "measured_noise_scale": beta}


def held(name: str, data: Path, target: float) -> dict:
    """One training under the controller, with checks on the way."""
    setting = SETTINGS[name]
    batches = Batches(data, setting["images"], setting["batch"])
    torch.manual_seed(0)
    bs.seed(0)
    model = build(name, batches.shape, batches.classes, **setting["options"])
    bs.sketch_(model, setting["rules"])
    steps = setting["epochs"] * (len(batches.labels) // setting["batch"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting["lr"])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, setting["lr"], total_steps=steps)
    controller = bs.Controller(model, target, interval=INTERVAL)
    checks, total, controlled = [], 0.0, 0.0
    ends = [round(steps * (i / CHECKS) ** 1.5) for i in range(1, CHECKS + 1)]
    looks = {end - EVERY * i: end for end in ends for i in range(LOOKS)}
    found, estimates = {end: MonteCarlo() for end in ends}, {end: [] for end in ends}
    order = [batch for epoch in range(setting["epochs"] + 1) for batch in batches.rows(epoch)]
    for step, rows in enumerate(order[:steps], start=1):
        batch = batches.at(rows)
        start = time.process_time()
        loss = loss_fn(model, batch)
        loss.backward()
        middle = time.process_time()
        controller.step()
        controlled += time.process_time() - middle
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        total += time.process_time() - start
        if step in looks:
            end = looks[step]
            estimates[end].append(controller.extra_variance)
            found[end].add(model, [batches.at(r) for r in order[step : step + BATCHES]])
            controller.state_dict()  # forgets what its hooks saw of these passes
            if step == end:
                row = {"step": step, "estimate": sum(estimates[end]) / len(estimates[end])}
                row |= found[end].row()
                row |= {"noise_scale": controller.noise_scale, "keeps": dict(controller.keeps)}
                checks.append(row)
                print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
    return {
        "command": f"python benchmarks/controller.py {name}",
        "torch": torch.__version__,
        "target": target,
        "steps": steps,
        "test_accuracy": accuracy(model, batches),
        "seconds": round(total, 2),
        "controller_share": round(controlled / total, 4),
        "within": sum(0.5 <= c["measured_extra_variance"] / target <= 1.5 for c in checks),
        "checks": checks,
        "log": [str(change) for change in controller.log],
    }


def accuracy(model: nn.Module, batches: Batches) -> float:
    images, labels = batches.test
    model.eval()
    with torch.no_grad():
        right = sum(
            int((model(x).argmax(1) == y).sum())
            for x, y in zip(images.split(500), labels.split(500))
        )
    return right / len(labels)


def automatic(data: Path, seeds: int, target: float) -> dict:
    """Accuracy and process seconds of the training steps, profile included, of ``--sketch auto`` and exact."""
    found = load_data(str(data))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        # The first pair only makes everything warm: what a process does once is not of one arm alone.
        for seed, sketch in itertools.product(range(-1, seeds), ("none", "auto")):
            options = {"model": "mlp", "data": "mnist", "sketch": sketch, "seed": max(seed, 0)}
            options |= {"epochs": 3 if seed >= 0 else 1, "threads": 1, "device": "cpu"}
            config = resolve(options, num_train=found.num_train, image_shape=found.image_shape)
            row = trained(config, found, Path(folder), target)
            rows.append({"seed": seed, "sketch": sketch, **row})
            print({k: v for k, v in rows[-1].items() if k != "auto"})
    first, rows = rows[:2], rows[2:]
    return {
        "command": f"python benchmarks/controller.py auto --target {target:g}",
        "torch": torch.__version__,
        "target": target,
        "first_profile_seconds": first[1]["auto"]["profile_seconds"],
        **compared(rows),
        "rows": rows,
    }


def trained(config: TrainConfig, data: ImageData, folder: Path, target: float) -> dict:
    """One run of ``backsketch train``, with the process seconds of its parts."""
    checkpoint = folder / f"{config.sketch}-{config.seed}.pt"
    accelerator = make_accelerator("cpu", "fp32")
    trainer = Trainer(config, data, accelerator, checkpoint, now=time.process_time)
    parts = {"backward": 0.0, "controller": 0.0, "optimizer": 0.0}

    def timed(name: str, owner: object, method: str) -> None:
        call = getattr(owner, method)

        def wrapped(*arguments: object) -> object:
            start = time.process_time()
            result = call(*arguments)
            parts[name] += time.process_time() - start
            return result

        setattr(owner, method, wrapped)

    timed("backward", trainer.accelerator, "backward")
    timed("optimizer", trainer.optimizer, "step")
    if trainer.auto is not None:
        trainer.auto.target = target
        timed("controller", trainer.auto, "control")
    with StopRequest() as stop, TrainProgress(Console(quiet=True), False) as progress:
        trainer.fit(progress, stop)
    result = result_of(trainer, 0.0)
    row = {k: result[k] for k in ("test_accuracy", "train_seconds", "train_loss", "extra_variance")}
    parts |= {"profile": result["auto"]["profile_seconds"] if trainer.auto else 0.0}
    parts |= {"forward and the rest": row["train_seconds"] - sum(parts.values())}
    return {**row, "parts": parts, "auto": result.get("auto")}


def compared(rows: list[dict]) -> dict:
    """Means of both arms, their standard errors over seeds, and the ratio of their times."""
    found: dict = {}
    for name in ("none", "auto"):
        arm = [row for row in rows if row["sketch"] == name]
        accuracies = [row["test_accuracy"] for row in arm]
        found[name] = {
            "test_accuracy": statistics.fmean(accuracies),
            "standard_error": statistics.stdev(accuracies) / len(arm) ** 0.5,
            "train_seconds": statistics.fmean(row["train_seconds"] for row in arm),
            "parts": {
                part: statistics.fmean(row["parts"][part] for row in arm)
                for part in arm[0]["parts"]
            },
        }
    exact, auto = found["none"], found["auto"]
    return found | {
        "time_ratio": auto["train_seconds"] / exact["train_seconds"],
        "accuracy_difference": auto["test_accuracy"] - exact["test_accuracy"],
        "standard_error": math.hypot(exact["standard_error"], auto["standard_error"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=[*SETTINGS, "auto"])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--target", type=float, help="by default 0.1, of auto what it has itself")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("results"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.model == "auto":
        target = arguments.target or TARGET
        result = automatic(arguments.data, arguments.seeds, target)
        name = "auto" if target == TARGET else f"auto_{target:g}"
    else:
        result = held(arguments.model, arguments.data, arguments.target or 0.1)
        name = arguments.model
    path = arguments.out / f"controller_{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print({k: v for k, v in result.items() if k not in ("checks", "log", "rows")})


if __name__ == "__main__":
    main()
