"""Extra variance of 8-bit products in a whole ViT (d 192, 64 tokens), over that of SGD at the same batch size.

    python benchmarks/int8_variance.py --data <cifar10> --out results/int8

The gradient of a batch is taken exactly and with each sketch. ω is the mean of ``‖ĝ − g‖²`` over batches and
draws, divided by the variance of the exact gradient between batches: at initialization, and again after some steps
of AdamW with ``Int8`` on the same data.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import torch
from torch import Tensor, nn

import backsketch as bs
from backsketch.models import build
from backsketch.train import load_data


class Data:
    """Random batches of normalised training images."""

    def __init__(self, name: str, batch: int, seed: int = 0) -> None:
        self.data, self.batch = load_data(name), batch
        self.mean, self.std = (t.view(-1, 1, 1) for t in self.data.statistics())
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(self.data.train_images), (self.batch,), generator=self.generator)
        images = (self.data.train_images[rows].float() - self.mean) / self.std
        return images, self.data.train_labels[rows]


def gradient(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    model.zero_grad(set_to_none=True)
    nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()]).double()


def omega(
    model: nn.Module, batches: list, sketches: list[str], sketched_batches: int, draws: int
) -> list[dict]:
    """One row for each sketch, on the same batches."""
    exact = torch.stack([gradient(model, b).float() for b in batches]).double()
    mean = exact.mean(0)
    sgd = float((exact - mean).square().sum()) / (len(batches) - 1)
    squared = float(mean.square().sum()) - sgd / len(batches)
    rows = []
    for text in sketches:
        bs.sketch_(model, bs.parse(text))
        errors = torch.tensor(
            [
                float((gradient(model, b) - g).square().sum())
                for b, g in zip(batches[:sketched_batches], exact)
                for _ in range(draws)
            ]
        )
        bs.restore_(model)
        rows.append(
            {
                "sketch": text,
                "omega": float(f"{float(errors.mean()) / sgd:.3g}"),
                "standard_error": float(f"{float(errors.std()) / len(errors) ** 0.5 / sgd:.2g}"),
                "relative_variance": float(
                    f"{float(errors.mean()) / float(mean.square().sum()):.3g}"
                ),
                "noise_scale_beta": float(f"{sgd / squared:.3g}") if squared > 0 else None,
            }
        )
        print(rows[-1], flush=True)
    return rows


def train(model: nn.Module, data: Data, steps: int) -> float:
    """Some steps of AdamW with 8-bit products; the mean loss of the last ten."""
    bs.sketch_(model, bs.Int8())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    losses = []
    for step in range(steps):
        images, labels = data.draw()
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 20 == 0:
            print(f"step {step}: loss {losses[-1]:.3f}", flush=True)
    bs.restore_(model)
    return sum(losses[-10:]) / len(losses[-10:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="uoft-cs/cifar10")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batches", type=int, default=16, help="for the variance of SGD")
    parser.add_argument("--sketched-batches", type=int, default=5)
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--sketches", nargs="+", default=["int8"])
    parser.add_argument("--out", type=Path, default=Path("results/int8"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    bs.seed(0)
    data = Data(arguments.data, batch=64)
    model = build("vit", data.data.image_shape, data.data.num_classes, dim=192, depth=6, patch=4)
    batches = [data.draw() for _ in range(arguments.batches)]
    stages = []
    for steps in (0, arguments.steps):
        loss = train(model, data, steps) if steps else None
        rows = omega(
            model, batches, arguments.sketches, arguments.sketched_batches, arguments.draws
        )
        stages.append({"steps": steps, "train_loss": loss and round(loss, 3), "rows": rows})
        result = {
            "model": "vit d 192, 6 blocks, patch 4, 64 tokens, batch 64",
            "command": (
                f"python benchmarks/int8_variance.py --data <cifar10> --steps {arguments.steps}"
                f" --batches {arguments.batches} --sketched-batches {arguments.sketched_batches}"
                f" --draws {arguments.draws} --sketches {' '.join(arguments.sketches)}"
            ),
            "torch": torch.__version__,
            "machine": platform.machine(),
            "stages": stages,
        }
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "vit_variance.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
