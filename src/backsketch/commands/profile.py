"""The ``backsketch profile`` command: what sketches cost for a reference model, and the plan."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F

from backsketch.commands.guard import told
from backsketch.files import make_folder, write_whole
from backsketch.models import build
from backsketch.planning import profile
from backsketch.train.images import ImageData
from backsketch.train.load import load_data

__all__ = ["profile_command"]

Pair = tuple[Tensor, Tensor]
_BATCHES = 8


def profile_command(
    model: Annotated[str, typer.Option(help="mlp, bagnet or vit")] = "mlp",
    data: Annotated[str, typer.Option(help="digits, a dataset id or a local folder")] = "digits",
    batch_size: Annotated[int, typer.Option(min=2)] = 128,
    steps: Annotated[int, typer.Option(min=0, help="of exact training before")] = 50,
    lr: Annotated[float, typer.Option(help="of AdamW in these steps")] = 1e-3,
    objective: Annotated[str, typer.Option(help="time, memory or variance")] = "time",
    max_extra_variance: Annotated[float | None, typer.Option(help="of SGD's variance")] = None,
    max_saved_mib: Annotated[float | None, typer.Option(help="kept for the backward pass")] = None,
    max_time: Annotated[float | None, typer.Option(help="of an exact step")] = None,
    seed: int = 0,
    device: str = "cpu",
    out: Annotated[
        Path | None, typer.Option(help="write the profile as JSON, and a figure beside it")
    ] = None,
) -> None:
    """Measure what sketches would cost and save, and print the best plan, or why there is none."""
    with told("stopped", ValueError, OSError):
        images = load_data(data)
        torch.manual_seed(seed)
        network = build(model, images.image_shape, images.num_classes).to(device)
        batches = [_batch(images, batch_size, seed * 1000 + i, device) for i in range(_BATCHES)]
        _train(network, images, batch_size, steps, lr, seed, device)
        found = profile(network, batches, _loss)
        typer.echo(str(found))
        limit = None if max_saved_mib is None else max_saved_mib * 2**20
        plan = found.plan(objective, max_extra_variance, limit, max_time)
        typer.echo(f"\nthe plan for {objective}:\n{plan}")
        if out is not None:
            make_folder(out.parent)
            found.save(out)
            figure = io.BytesIO()
            found.plot(plan).savefig(figure, format="png", dpi=150)
            write_whole(out.with_suffix(".png"), figure.getvalue())
            typer.echo(f"written: {out} and {out.with_suffix('.png').name}", err=True)


def _loss(model: nn.Module, batch: Pair) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def _batch(data: ImageData, size: int, seed: int, device: str) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(data.num_train, (size,), generator=generator)
    mean, std = (t.view(-1, 1, 1) for t in data.statistics())
    images = (data.train_images[rows].float() - mean) / std
    return images.to(device), data.train_labels[rows].to(device)


def _train(
    model: nn.Module, data: ImageData, size: int, steps: int, lr: float, seed: int, device: str
) -> None:
    """A few exact steps: at initialisation all rows matter alike, and nothing pays."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for step in range(steps):
        optimizer.zero_grad()
        _loss(model, _batch(data, size, (seed + 1) * 100_000 + step, device)).backward()
        optimizer.step()
