"""``backsketch sweep`` and ``backsketch report``: their options, and their errors as one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from backsketch.experiments.config import SweepConfig, SweepError

__all__ = ["report_command", "sweep_command"]


def sweep_command(
    configs: Annotated[list[Path], typer.Argument(help="JSON files, see benchmarks/sweeps/.")],
    out: Annotated[Path, typer.Option(help="Results go to OUT/NAME.")] = Path("results"),
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes; default: as configured. 0: this one.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder with local copies: DATA/mnist for ylecun/mnist.")
    ] = None,
) -> None:
    """Run grids of small experiments. What has a result is not run again: interrupt it, continue it."""
    failures = []
    with _told():
        from backsketch.experiments.sweep import run_sweep

        if data is not None and not data.is_dir():
            raise SweepError(f"there is no folder {data}")
        console = Console()
        for config in [SweepConfig.load(path) for path in configs]:
            failed = run_sweep(config, out, workers=workers, data=data, console=console)
            failures += failed
            console.print(
                f"{config.name}: {len(config.jobs()) - len(failed)} of {len(config.jobs())} jobs done, "
                f"results in {out / config.name}; next: backsketch report {out / config.name}",
                highlight=False,
            )
    if failures:
        raise typer.Exit(1)


def report_command(
    paths: Annotated[list[Path] | None, typer.Argument(help="Folders; default: results.")] = None,
    page: Annotated[Path, typer.Option(help="The HTML page.")] = Path("runs/report.html"),
) -> None:
    """Tables, figures and one HTML page from the results of sweeps, without running them again."""
    with _told():
        from backsketch.experiments.report import report

        console = Console()
        for path in report(paths or [Path("results")], page, console):
            console.print(f"wrote {path}", highlight=False)


@contextmanager
def _told() -> Iterator[None]:
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        yield
    except SweepError as error:
        errors.print(f"[bold red]error:[/] {escape(str(error))}")
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        errors.print("stopped; finished jobs are kept: the same command continues")
        raise typer.Exit(130) from None
