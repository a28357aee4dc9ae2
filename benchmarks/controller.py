"""The controller over whole trainings: its estimate beside an independent Monte Carlo of the extra variance.

    python benchmarks/controller.py mlp --data path/to/mnist
    python benchmarks/controller.py vit --data path/to/cifar10

Writes ``results/controller_<model>.json``. At checks spread over the training, the next 32 batches give SGD's
variance and, with several draws each, the extra variance at the keeps in force. One thread, process time; the
checks and what they take do not count.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import backsketch as bs
from backsketch.models import build
from backsketch.theory.noise import GradientSums
from backsketch.train import load_data

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
CHECKS, BATCHES, DRAWS = 16, 32, 3


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


def monte_carlo(
    model: nn.Module, batches: list[tuple[Tensor, Tensor]], draws: int
) -> dict[str, float]:
    """Extra variance and noise scale from exact and sketched gradients; the training's random stream stays."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    stream, sums, errors = bs.get_rng_state(), GradientSums(), []
    for batch in batches:
        with bs.exact(model):
            exact = torch.autograd.grad(loss_fn(model, batch), parameters)
        sums.add(exact)
        for _ in range(draws):
            noisy = torch.autograd.grad(loss_fn(model, batch), parameters)
            pairs = zip(noisy, exact)
            errors.append(sum(float((a - b).double().square().sum()) for a, b in pairs))
    bs.set_rng_state(stream)
    return {
        "extra_variance": sum(errors) / len(errors) / sums.sgd_variance,
        "noise_scale": sums.noise_scale,
    }


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
    controller = bs.Controller(model, target)
    checks, total, controlled = [], 0.0, 0.0
    at = {round(steps * (i / CHECKS) ** 1.5) for i in range(1, CHECKS + 1)}
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
        if step in at:
            fresh = [batches.at(rows) for rows in order[step : step + BATCHES]]
            row = {"step": step, "estimate": controller.extra_variance}
            row |= {f"measured_{k}": v for k, v in monte_carlo(model, fresh, DRAWS).items()}
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=SETTINGS)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--target", type=float, default=0.1)
    parser.add_argument("--out", type=Path, default=Path("results"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = held(arguments.model, arguments.data, arguments.target)
    path = arguments.out / f"controller_{arguments.model}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print({k: v for k, v in result.items() if k not in ("checks", "log")})


if __name__ == "__main__":
    main()
