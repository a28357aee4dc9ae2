"""``backsketch`` without a command: its help, or its version."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

__all__ = ["root_command"]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"backsketch {version('backsketch')}")
        raise typer.Exit


def root_command(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and stop."
        ),
    ] = False,
) -> None:
    """Cheaper training with unbiased, randomized backward passes."""
