"""The progress bar: rate, remaining time, training loss; plain lines without a terminal."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from backsketch.train.history import Evaluation

LINES = 5  # how many lines a run prints where there is no terminal


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f} steps/s", style="cyan")


class TrainProgress:
    """One bar per run. `enabled` is true on the main process only."""

    def __init__(self, console: Console, enabled: bool = True):
        self._console, self._enabled = console, enabled
        self._bars = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=28),
            TextColumn("{task.completed}/{task.total}"),
            _Rate(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not (enabled and console.is_terminal),
        )

    def __enter__(self) -> TrainProgress:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def start(self, name: str, steps: int, done: int, epochs: int) -> None:
        """A run of `steps` begins, `done` of them earlier."""
        self._name, self._epochs, self._accuracy = name, epochs, ""
        self._task = self._bars.add_task(name, total=steps, completed=done, note="")

    def step(self, loss: float | None) -> None:
        """One more step; the loss is None where reading it would make the device wait."""
        if loss is None:
            self._bars.advance(self._task)
        else:
            self._bars.update(self._task, advance=1, note=f"loss {loss:.4f}{self._accuracy}")

    def epoch(self, evaluation: Evaluation, loss: float) -> None:
        """An epoch ends with this training loss."""
        self._accuracy = f"  test {evaluation.accuracy:.2%}"
        self._bars.update(self._task, note=f"loss {loss:.4f}{self._accuracy}")
        every = max(self._epochs // LINES, 1)
        shown = evaluation.epoch % every == 0 or evaluation.epoch == self._epochs
        if self._enabled and self._bars.disable and shown:
            self._console.print(
                f"{self._name}: epoch {evaluation.epoch}/{self._epochs}, loss {loss:.4f}, "
                f"test accuracy {evaluation.accuracy:.2%}, {evaluation.seconds:.1f} s",
                highlight=False,
            )
