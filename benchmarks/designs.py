"""Variance of token regions under each design, on the tensors of a trained model.

    python benchmarks/designs.py --data uoft-cs/cifar10

trains a small ViT for some minutes and takes, of every MLP branch, the contribution of each token to the gradients
of the branch's weights. ``E‖error‖² / ‖gradient‖²`` follows from their Gram matrix and the weights of many draws;
the table is the geometric mean over the branches.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from real_variance import capture, train_vit
from torch import Tensor

import backsketch as bs
from backsketch.sampling import ROW_DESIGNS, draw, next_seed, num_kept
from backsketch.train import load_data

KEEPS = (0.5, 0.25, 0.1)


def branches(layers: dict[str, tuple[Tensor, Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """``(scores, gram)`` of the tokens of each branch of two linear layers, the second one last."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name, (x, _, g) in layers.items():
        if ".mlp." in name:
            found.setdefault(name.split(".mlp.")[0], []).append((x.double(), g.double()))
    result = []
    for pairs in found.values():
        gram = torch.stack([(x @ x.T) * (g @ g.T) for x, g in pairs]).sum(0)
        result.append((pairs[-1][1].norm(dim=1), gram))
    return result


def relative_variance(
    scores: Tensor, gram: Tensor, keep: float, design: str, tokens: int, draws: int
) -> float:
    """``E‖Σ (z_i/π_i − 1) c_i‖² / ‖Σ c_i‖²`` over draws, where ``gram`` holds the inner products of the c."""
    n, total = len(scores), 0.0
    for _ in range(draws):
        k = num_kept(n, keep)
        sample = draw(scores, k, next_seed(scores), design=design, block=tokens)
        error = torch.full_like(scores, -1.0).index_add(0, sample.indices, sample.weights)
        total += float(error @ gram @ error)
    return total / draws / float(gram.sum())


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="uoft-cs/cifar10", help="hub id or local folder")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--draws", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("results/designs.json"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    bs.seed(0)
    model, x, y = train_vit(load_data(arguments.data), arguments.steps, arguments.batch_size)
    found = branches(capture(model, x, y))
    tokens = len(found[0][0]) // arguments.batch_size
    rows = []
    for design in ROW_DESIGNS:
        for keep in KEEPS:
            logs = [
                math.log(relative_variance(*b, keep, design, tokens, arguments.draws))
                for b in found
            ]
            value = round(math.exp(sum(logs) / len(logs)), 4)
            rows.append({"design": design, "keep": keep, "variance": value})
            print(rows[-1], flush=True)
    result = {
        "command": f"python benchmarks/designs.py --steps {arguments.steps}",
        "model": f"vit d 96, 4 blocks, {tokens} tokens, {arguments.steps} steps of {arguments.batch_size}",
        "branches": len(found),
        "draws": arguments.draws,
        "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
