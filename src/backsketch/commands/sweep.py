"""``backsketch sweep`` and ``backsketch report``: their options, and their errors as one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from backsketch.commands.guard import told
from backsketch.experiments.config import SweepConfig, SweepError

__all__ = ["report_command", "sweep_command"]


def sweep_command(
    configs: Annotated[list[Path], typer.Argument(help="JSON files, see benchmarks/sweeps/.")],
    out: Annotated[Path, typer.Option(help="Results go to OUT/NAME.")] = Path("results"),
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes; default: as configured. 0: this one.")
    ] = None,
    on: Annotated[
        str | None,
        typer.Option(
            help="Address of a Dask scheduler whose workers run the jobs: tcp://host:8786."
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder with local copies: DATA/mnist for ylecun/mnist.")
    ] = None,
) -> None:
    """Run grids of small experiments. What has a result is not run again: interrupt it, continue it."""
    failures = []
    with told("stopped; finished jobs are kept: the same command continues"):
        from backsketch.experiments.sweep import run_sweep

        if on is not None and workers is not None:
            raise SweepError("--workers are those of this machine; a cluster has its own")
        if on is None and data is not None and not data.is_dir():
            raise SweepError(f"there is no folder {data}")
        console = Console()
        for config in [SweepConfig.load(path) for path in configs]:
            failed = run_sweep(config, out, workers=workers, on=on, data=data, console=console)
            failures += failed
            console.print(
                f"{config.name}: {len(config.jobs()) - len(failed)} of {len(config.jobs())} jobs done, "
                f"results in {out / config.name}; next: backsketch report {out / config.name}",
                highlight=False,
                markup=False,
            )
    if failures:
        raise typer.Exit(1)


def report_command(
    paths: Annotated[list[Path] | None, typer.Argument(help="Folders; default: results.")] = None,
    page: Annotated[Path, typer.Option(help="The HTML page.")] = Path("runs/report.html"),
) -> None:
    """Tables, figures and one HTML page from the results of sweeps, without running them again."""
    with told("stopped; finished jobs are kept: the same command continues"):
        from backsketch.experiments.report import report

        console = Console()
        for path in report(paths or [Path("results")], page, console):
            console.print(f"wrote {path}", highlight=False, markup=False)
