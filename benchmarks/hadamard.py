"""Would random signs and a Hadamard transform lower the variance of 8-bit products?

    python benchmarks/hadamard.py --data <cifar10> --out results/int8

With H orthogonal, in blocks of 64 along the contraction, ``G W = (G H) (Hᵀ W)``: both operands are
transformed, then rounded. It spreads outliers, and takes a pass over both operands; G, which is rounded once
for both products without it, has to be rounded twice. The variances are the closed forms of
``products.variance``, for each linear layer of a ViT (d 192, 64 tokens, batch 64) after some steps of
training, and for rows of which a few are heavy or one entry is an outlier.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
from int8_variance import Data, train
from torch import Tensor, nn

from backsketch.models import build
from backsketch.products.variance import Variances

BLOCK = 64


def rotated(dim: int, *operands: Tensor) -> list[Tensor]:
    """The operands with the same signs and transform in blocks along ``dim``, padded with zeros."""
    size = operands[0].shape[dim]
    block = min(BLOCK, 1 << (size - 1).bit_length())
    padded = -(-size // block) * block
    signs = torch.randint(2, (padded,)) * 2.0 - 1
    matrix = torch.ones(1, 1)
    while len(matrix) < block:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    results = []
    for x in operands:
        lines = x.movedim(dim, -1)
        lines = nn.functional.pad(lines, (0, padded - size)) * signs
        blocks = lines.unflatten(-1, (-1, block)) @ matrix * block**-0.5
        results.append(blocks.flatten(-2).movedim(-1, dim))
    return results


def ratios(g: Tensor, x: Tensor, weight: Tensor) -> dict[str, float]:
    """The summed variance of each product with the transform over that without it."""
    plain_below, plain_weight, _ = Variances().vjps(g, x, weight)
    of_g, of_weight = rotated(1, g, weight.T)
    below = Variances().vjps(of_g, None, of_weight.T)[0]
    of_g, of_x = rotated(0, g, x)
    at_weight = Variances().vjps(of_g, of_x, None)[1]
    return {
        "grad_input": float(below.sum() / plain_below.sum()),
        "grad_weight": float(at_weight.sum() / plain_weight.sum()),
        "largest over RMS, rows of G": peak(g),
        "largest over RMS, rows of G after it": peak(rotated(1, g)[0]),
        "share of the mean over 64 rows in G": float(
            g.unflatten(0, (-1, BLOCK)).mean(1).square().sum() * BLOCK / g.square().sum()
        ),
    }


def peak(x: Tensor) -> float:
    """The largest magnitude of a row over its root mean square, the median over rows."""
    rms = x.square().mean(1).sqrt()
    return float((x.abs().amax(1) / rms)[rms > 0].median())


def layers_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, tuple[Tensor, ...]]:
    """Cotangent, input and weight of every linear layer, as matrices."""
    found, inputs = {}, {}
    hooks = []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            hooks += [
                layer.register_forward_hook(
                    lambda _, x, y, name=name: inputs.update({name: x[0].detach().flatten(0, -2)})
                ),
                layer.register_full_backward_hook(
                    lambda layer, _, g, name=name: found.update(
                        {name: (g[0].flatten(0, -2), inputs[name], layer.weight.detach())}
                    )
                ),
            ]
    nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
    for hook in hooks:
        hook.remove()
    return found


def made_up() -> dict[str, tuple[Tensor, ...]]:
    g, x, weight = torch.randn(4096, 192), torch.randn(4096, 192), torch.randn(192, 192)
    outlier = g.clone()
    outlier[7, 11] = 100.0
    scales = torch.exp(2 * torch.randn(len(g), 1))
    feature = g.clone()
    feature[:, 11] *= 30
    return {
        "Gaussian": (g, x, weight),
        "one entry of 100 standard deviations": (outlier, x, weight),
        "rows whose scales span decades": (g * scales, x, weight),
        "one feature 30 times as large": (feature, x, weight),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="uoft-cs/cifar10")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("results/int8"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    data = Data(arguments.data, batch=64)
    model = build("vit", data.data.image_shape, data.data.num_classes, dim=192, depth=6, patch=4)
    train(model, data, arguments.steps)
    layers = {name: ratios(*parts) for name, parts in layers_of(model, data.draw()).items()}
    result = {
        "command": f"python benchmarks/hadamard.py --data <cifar10> --steps {arguments.steps}",
        "what": "variance with the transform over that without it",
        "made up": {name: ratios(*parts) for name, parts in made_up().items()},
        "layers": layers,
        "median over layers": {
            product: statistics.median(layer[product] for layer in layers.values())
            for product in ("grad_input", "grad_weight")
        },
    }
    rounded = json.loads(json.dumps(result), parse_float=lambda text: float(f"{float(text):.3g}"))
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "hadamard.json").write_text(json.dumps(rounded, indent=1) + "\n")
    print(json.dumps(rounded, indent=1))


if __name__ == "__main__":
    main()
