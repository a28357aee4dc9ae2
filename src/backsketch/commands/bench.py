"""The ``backsketch bench`` command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from backsketch.experiments.bench import BenchConfig, as_json, run_bench, table

__all__ = ["bench_command"]


def bench_command(
    configs: Annotated[
        list[Path] | None,
        typer.Argument(help="JSON configurations (see benchmarks/); none: --model alone."),
    ] = None,
    model: Annotated[str, typer.Option(help="vit, mlp or bagnet, as one region.")] = "vit",
    keep: Annotated[str, typer.Option(help="Fractions to try, with commas.")] = "",
    batch_size: Annotated[int, typer.Option(help="0: as configured.")] = 0,
    repeats: Annotated[int, typer.Option(help="Rounds; 0: as configured.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads; 0: as configured.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda; empty: as configured.")] = "",
    clock: Annotated[str, typer.Option(help="wall or cpu time; empty: as configured.")] = "",
    out: Annotated[Path | None, typer.Option(help="Folder for NAME.json.")] = None,
) -> None:
    """Time and saved bytes of sketches against exact, smaller batches and checkpointing."""
    given = {
        "keeps": tuple(float(k) for k in keep.split(",")) if keep else (),
        "batch_size": batch_size,
        "repeats": repeats,
        "threads": threads,
        "device": device,
        "clock": clock,
    }
    overrides = {name: value for name, value in given.items() if value}
    try:
        found = [BenchConfig.load(path) for path in configs or []] or [BenchConfig(model, model)]
        chosen = [replace(config, **overrides) for config in found]  # type: ignore[arg-type]
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    for config in chosen:
        rows = run_bench(config, lambda text: typer.echo(f"\r\033[K{text}", nl=False, err=True))
        typer.echo("\r\033[K", nl=False, err=True)
        typer.echo(table(config, rows) + "\n")
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            text = json.dumps(as_json(config, rows), indent=1)
            (out / f"{config.name}.json").write_text(text + "\n")
