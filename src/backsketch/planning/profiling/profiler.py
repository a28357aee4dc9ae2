"""What each sketch at each site would cost and save, measured on this device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from backsketch.nn.registry import SMALL_WEIGHT
from backsketch.planning.measure.passes import LossFn
from backsketch.planning.profiling.assembly import assembled
from backsketch.planning.profiling.observe import observe
from backsketch.planning.profiling.records import ProfileData
from backsketch.planning.profiling.sites import find_sites
from backsketch.planning.profiling.times import site_costs

__all__ = ["STAGES", "NothingToSketch", "first_batches", "measured", "stages"]

_MOST_BATCHES = 4  # that are looked at, for SGD's own noise
STAGES = 4  # and one per batch


class NothingToSketch(ValueError):
    """A model has no site for a sketch."""


def first_batches(batches: Iterable[Any]) -> list[Any]:
    data = []
    for batch in batches:
        data.append(batch)
        if len(data) == _MOST_BATCHES:
            break
    if len(data) < 2:
        raise ValueError(
            f"profile: needs at least two batches to see SGD's own noise, got {len(data)}"
        )
    return data


def measured(
    model: nn.Module, data: Sequence[Any], loss_fn: LossFn[Any], tick: Callable[[str], None]
) -> tuple[ProfileData, list[list[Tensor]]]:
    """The profile without trials, and the exact gradients of the first batches."""
    tick("looking for sites")
    sites = find_sites(model, data[0], loss_fn)
    if not sites:
        raise NothingToSketch(
            "profile: nothing to sketch: no residual branch, no linear layer or convolution of more than "
            f"{SMALL_WEIGHT} weights"
        )
    seen = observe(model, loss_fn, data, sites, tick)
    tick("times of sketches")
    costs = site_costs(model, sites, seen.calls)
    return assembled(sites, seen, costs), seen.exact


@contextmanager
def stages(name: str, total: int, show: bool) -> Iterator[Callable[[str], None]]:
    """A progress bar, where there are a terminal and rich: a function that begins the next stage, by its name."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        yield lambda text: None
        return
    console = Console(stderr=True)
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=28),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    shown = show and console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not shown) as bar:
        task = bar.add_task(name, total=total, note="", completed=-1)
        yield lambda text: bar.update(task, advance=1, note=text)
