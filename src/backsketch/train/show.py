"""What a person sees of a run: the progress bar, the table that compares two runs, the figure."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from backsketch.files import write_whole
from backsketch.train.config import recipe_of
from backsketch.train.history import Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Metric:
    """What a task is judged by, in `result.json` and in words.

    Attributes:
        key: in the result.
        of: an evaluation in words.
        gap: the difference between two results in words.
        named: a result in words.
    """

    key: str
    of: Callable[[Evaluation], str]
    gap: Callable[[float], str]
    named: Callable[[float], str]


METRICS = {
    "images": Metric(
        "test_accuracy",
        lambda e: f"accuracy {e.accuracy:.2%}",
        lambda d: f"{100 * d:+.1f} points of accuracy",
        lambda v: f"test accuracy {v:.2%}",
    ),
    "text": Metric(
        "test_loss",
        lambda e: f"loss {e.loss:.4f}",
        lambda d: f"{d:+.4f} nats a token",
        lambda v: f"test loss {v:.3f}",
    ),
}


def metric_of(model: str) -> Metric:
    """The metric of a model's task."""
    return METRICS[recipe_of(model).task]


LINES = 5  # how many lines a run prints where there is no terminal
COLOURS = {"exact": "#5b6770", "sketched": "#d1495b"}
SMOOTH = 0.03  # width of the running mean, as a share of the curve


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

    def start(self, name: str, steps: int, done: int, epochs: int, metric: Metric) -> None:
        """A run of `steps` begins, `done` of them earlier."""
        self._name, self._epochs, self._metric, self._test = name, epochs, metric, ""
        self._task = self._bars.add_task(name, total=steps, completed=done, note="")

    def step(self, loss: float | None) -> None:
        """One more step; the loss is None where reading it would make the device wait."""
        if loss is None:
            self._bars.advance(self._task)
        else:
            self._bars.update(self._task, advance=1, note=f"loss {loss:.4f}{self._test}")

    def epoch(self, evaluation: Evaluation, loss: float) -> None:
        """An epoch ends with this training loss."""
        self._test = f"  test {self._metric.of(evaluation)}"
        self._bars.update(self._task, note=f"loss {loss:.4f}{self._test}")
        every = max(self._epochs // LINES, 1)
        shown = evaluation.epoch % every == 0 or evaluation.epoch == self._epochs
        if self._enabled and self._bars.disable and shown:
            self._console.print(
                f"{self._name}: epoch {evaluation.epoch}/{self._epochs}, loss {loss:.4f}, "
                f"test {self._metric.of(evaluation)}, {evaluation.seconds:.1f} s",
                highlight=False,
            )


def comparison(result: Mapping[str, Any]) -> Table:
    """The table of a run, with the exact run and the ratio beside it where there is one."""
    exact = result.get("exact")
    table = Table()
    table.add_column("")
    for heading in ("exact", "sketched", "sketched / exact") if exact else ("value",):
        table.add_column(heading, justify="right")
    for key, label, form, compared in (row for row in _ROWS if row[0] in result):
        values = [exact[key], result[key]] if exact else [result[key]]
        cells = ["not measurable" if v is None else form(v) for v in values]
        if exact:
            known = compared and None not in values and values[0]
            cells.append(f"{values[1] / values[0]:.2f}" if known else "")
        table.add_row(label, *cells)
    return table


def headline(result: Mapping[str, Any]) -> str:
    """Model, data, epochs and sketch in one line."""
    config = result["config"]
    sketch = "exact" if config["sketch"] == "none" else config["sketch"]
    return f"{config['model']} on {Path(config['data']).name}, {config['epochs']} epochs, {sketch}"


def verdict(result: Mapping[str, Any]) -> str:
    """One sentence: did the sketch pay here, in time per step; of `auto`, whose steps differ, in all."""
    exact = result["exact"]
    key, what = (
        ("train_seconds", "the run") if "auto" in result else ("step_seconds_median", "a step")
    )
    ratio = result[key] / exact[key]
    flops = 1 - result["backward_flops_ratio"]
    metric = metric_of(result["config"]["model"])
    gap = metric.gap(result[metric.key] - exact[metric.key])
    pays = (
        f"{what} takes {1 - ratio:.0%} less time"
        if ratio < 1
        else f"{what} takes {ratio - 1:.0%} more time: at these sizes the sketch does not pay here"
    )
    return f"{flops:.0%} less arithmetic in the backward pass, {gap}; {pays}."


def automatic(result: Mapping[str, Any]) -> str:
    """What the sketch `auto` did, and why."""
    auto = result["auto"]
    took = f"profile {auto['profile_seconds']:.1f} s"
    if not auto["plan"]:
        return f"trained exactly ({took}): {auto['reason']}"
    plan = ", ".join(f"{name or '(model)'} {text}" for name, text in auto["plan"].items())
    if "keeps" not in auto:
        return f"{plan} ({took})"
    last = auto["log"][-1:]
    return "\n".join([f"{plan} ({took}), {len(auto['log'])} changes", *last, auto["advice"]])


def _bytes(count: float) -> str:
    return f"{count / 2**20:.2f} MiB"


_ROWS = (
    ("test_accuracy", "test accuracy", "{:.2%}".format, False),
    ("perplexity", "test perplexity", "{:.2f}".format, False),
    ("train_loss", "train loss, last epoch", "{:.4f}".format, False),
    ("steps", "steps", "{:d}".format, False),
    ("step_seconds_median", "median step", lambda s: f"{1000 * s:.2f} ms", True),
    ("tokens_per_second", "tokens a second", "{:,.0f}".format, True),
    ("train_seconds", "training time", "{:.1f} s".format, True),
    ("backward_flops_ratio", "backward arithmetic", "{:.3f}".format, True),
    ("peak_saved_bytes", "saved for the backward", _bytes, True),
    ("extra_variance", "extra variance ω", "{:.3f}".format, False),
)


def plot_result(result: Mapping[str, Any], path: Path) -> None:
    """Write `path` (PNG) from the content of `result.json`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    runs = _runs(result)
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)  # no window, and no global state of pyplot
    left, right = figure.subplots(1, 2, sharey=True)
    for name, run in runs.items():
        _curve(left, run["curve"]["step"], run["curve"]["train_loss"], name)
        _curve(right, run["curve"]["seconds"], run["curve"]["train_loss"], name)
    _dress(left, "optimizer steps")
    _dress(right, "seconds of training")
    left.set_ylabel("training loss")
    _legend(right, runs)
    figure.suptitle(headline(result), x=0.01, ha="left")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    write_whole(path, content.getvalue())


def _runs(result: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    if "exact" in result:
        return {"exact": result["exact"], "sketched": result}
    return {"exact" if result["config"]["sketch"] == "none" else "sketched": result}


def _curve(axes: Axes, x: list[float], y: list[float], name: str) -> None:
    axes.plot(x, y, color=COLOURS[name], alpha=0.2, linewidth=0.8)
    axes.plot(x, _smooth(y), color=COLOURS[name], linewidth=2, label=name)


def _smooth(values: list[float]) -> list[float]:
    """Centred running mean that shrinks at the ends."""
    half = max(int(SMOOTH * len(values) / 2), 1)
    windows = [values[max(i - half, 0) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _dress(axes: Axes, label: str) -> None:
    axes.set_yscale("log")
    axes.set_xlabel(label)
    axes.set_xlim(left=0)
    axes.grid(True, which="major", color="#e4e7ea", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(axes: Axes, runs: Mapping[str, Mapping[str, Any]]) -> None:
    handles, names = axes.get_legend_handles_labels()
    metric = metric_of(next(iter(runs.values()))["config"]["model"])
    labels = [f"{name}, {metric.named(runs[name][metric.key])}" for name in names]
    axes.legend(handles, labels, frameon=False, loc="upper right")
