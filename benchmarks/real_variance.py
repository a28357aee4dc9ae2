"""Relative variance of each estimator on the tensors of a trained model, per layer.

    python benchmarks/real_variance.py --data uoft-cs/cifar10

trains a small ViT for some minutes, takes the input, the weight and the
cotangent of every linear layer on one batch, and measures ``E‖error‖² / ‖gradient‖²`` by Monte Carlo.
The table is the geometric mean over the layers.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from torch import Tensor, nn

import backsketch as bs
from backsketch.models import build
from backsketch.ops.linear import Linear
from backsketch.sampling import next_seed
from backsketch.train import load_data

FAMILIES = {
    "rows, uniform": "rows:keep={},scores=uniform",
    "rows, uniform, random order": "rows:keep={},scores=uniform,design=permuted",
    "rows, l2": "rows:keep={},scores=l2",
    "rows, optimal": "rows:keep={}",
    "rows, optimal, random order": "rows:keep={},design=permuted",
    "columns, optimal": "columns:keep={}",
    "low rank, svd": "low_rank:keep={},method=svd",
    "low rank, subspace": "low_rank:keep={},method=subspace",
    "stored rows": "stored_rows:keep={}",
    "projection": "projection:keep={}",
    "projection, srht": "projection:keep={},kind=srht",
}
KEEPS = (0.5, 0.25, 0.1)


def train_vit(data, steps: int, batch: int) -> tuple[nn.Module, Tensor, Tensor]:
    mean, std = data.statistics()
    images = (data.train_images.float() - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    model = build("vit", data.image_shape, data.num_classes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        rows = torch.randint(len(images), (batch,), generator=generator)
        loss = nn.functional.cross_entropy(model(images[rows]), data.train_labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 200 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    rows = torch.randint(len(images), (batch,), generator=generator)
    return model, images[rows], data.train_labels[rows]


def capture(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """``name -> (input rows, weight, cotangent rows)`` of every linear layer on one batch."""
    found: dict[str, list[Tensor]] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):

            def forward(m, args, out, name=name):
                found[name] = [args[0].detach().flatten(0, -2), m.weight.detach()]
                out.register_hook(lambda g: found[name].append(g.detach().flatten(0, -2)))

            handles.append(module.register_forward_hook(forward))
    nn.functional.cross_entropy(model(x), y).backward()
    for handle in handles:
        handle.remove()
    return {name: (x, w, g) for name, (x, w, g) in found.items()}


def relative_variance(estimator, x: Tensor, w: Tensor, g: Tensor, draws: int) -> list[float]:
    op = Linear()
    exact = op.input_vjp(g, w), op.weight_vjp(g, x)
    total = [0.0, 0.0]
    for _ in range(draws):
        seed = next_seed(g)
        stored = estimator.store(op, x, next_seed(x))
        estimates = (
            estimator.estimate_input(op, g, w, seed),
            estimator.estimate_weight(op, g, stored, seed),
        )
        for i in range(2):
            total[i] += float((estimates[i] - exact[i]).square().sum() / exact[i].square().sum())
    return [t / draws for t in total]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="uoft-cs/cifar10", help="hub id or local folder")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--draws", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path("results/real_variance.json"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    bs.seed(0)
    data = load_data(arguments.data)
    model, x, y = train_vit(data, arguments.steps, arguments.batch_size)
    layers = capture(model, x, y)
    rows = []
    for family, text in FAMILIES.items():
        for keep in KEEPS:
            estimator = bs.parse(text.format(keep))
            logs = [[], []]
            for tensors in layers.values():
                for i, value in enumerate(relative_variance(estimator, *tensors, arguments.draws)):
                    logs[i].append(math.log(max(value, 1e-12)))
            means = [math.exp(sum(v) / len(v)) for v in logs]
            rows.append(
                {
                    "estimator": family,
                    "keep": keep,
                    "grad_input": round(means[0], 4) if means[0] > 1e-9 else 0.0,
                    "grad_weight": round(means[1], 4),
                }
            )
            print(rows[-1], flush=True)
    result = {
        "command": f"python benchmarks/real_variance.py --steps {arguments.steps}",
        "model": f"vit d 96, 4 blocks, 16 tokens, {arguments.steps} steps of {arguments.batch_size}",
        "layers": len(layers),
        "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
