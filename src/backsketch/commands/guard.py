"""What every command does with an error: one sentence for what the user can set right, and an exit code."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape

from backsketch.files import UserError
from backsketch.signals import noted

__all__ = ["told", "writer"]


def writer() -> Console:
    """Standard error, for sentences. Of several processes, the first one speaks."""
    first = os.environ.get("RANK", "0") == "0"
    return Console(stderr=True, highlight=False, soft_wrap=True, quiet=not first)


@contextmanager
def told(stopped: str, *also: type[Exception]) -> Iterator[None]:
    """Turn errors into a sentence: exit code 2 for what a user can set right, 130 after Ctrl-C.

    Args:
        stopped: what to say after Ctrl-C.
        also: further exceptions whose message is such a sentence.
    """
    kinds: tuple[type[Exception], ...] = (UserError, *also)
    try:
        with warnings.catch_warnings(), noted():
            # Captures run in anomaly mode, which would explain an interrupt by the line that it met.
            warnings.filterwarnings("ignore", "Error detected in", UserWarning)
            yield
    except kinds as error:
        writer().print(f"[bold red]error:[/] {escape(str(error))}")
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        writer().print(stopped)
        raise typer.Exit(130) from None
