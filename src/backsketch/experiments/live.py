"""The live table of a sweep: a bar and the last jobs; plain lines without a terminal."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from backsketch.experiments.config import Job

__all__ = ["LiveTable"]

SHOWN = 8


class LiveTable:
    """Progress of ``total`` jobs, ``done`` of them from earlier runs."""

    def __init__(self, console: Console, name: str, total: int, done: int) -> None:
        self._console, self._total, self._count, self._failed = console, total, done, 0
        self._bar = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=console,
        )
        note = f"{done} from before" if done else ""
        self._task = self._bar.add_task(name, total=total, completed=done, note=note)
        self._last: deque[tuple[str, str, str]] = deque(maxlen=SHOWN)
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=4)
        if not console.is_terminal and done:
            told = f"{name}: {done} of {total} jobs are there already"
            console.print(told, highlight=False, markup=False)

    def __enter__(self) -> LiveTable:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def ended(self, job: Job, record: Mapping[str, Any]) -> None:
        """A job has ended with this record."""
        failed = record["status"] == "failed"
        self._count, self._failed = self._count + 1, self._failed + failed
        told = record["error"] if failed else f"{record['seconds']:.1f} s"
        self._last.append((job.label, record["status"], told))
        note = f"{self._failed} failed" if self._failed else ""
        self._bar.update(self._task, advance=1, note=note)
        if not self._console.is_terminal:
            line = f"{self._count}/{self._total} {job.label}: {record['status']}, {told}"
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _render(self) -> Group:
        table = Table(box=None, pad_edge=False)
        for heading in ("job", "status", ""):
            table.add_column(heading, overflow="ellipsis", no_wrap=True)
        for label, status, told in self._last:
            style = "red" if status == "failed" else None
            table.add_row(*map(Text, (label, status, told)), style=style)
        return Group(table, self._bar)
