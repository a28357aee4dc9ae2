"""``backsketch sweep``: run what is missing, keep what is there."""

from __future__ import annotations

import signal
from collections.abc import Generator
from contextlib import closing
from pathlib import Path

from rich.console import Console

from backsketch.experiments.cluster import outcomes_on
from backsketch.experiments.config import Job, SweepConfig
from backsketch.experiments.live import LiveTable
from backsketch.experiments.pool import Outcome, outcomes
from backsketch.experiments.store import Store
from backsketch.files import make_folder, only_one
from backsketch.signals import asked, noted

__all__ = ["run_sweep"]


def run_sweep(
    config: SweepConfig,
    out: Path,
    *,
    workers: int | None = None,
    on: str | None = None,
    data: Path | None = None,
    console: Console | None = None,
) -> list[str]:
    """Run the jobs of a sweep that have no result yet.

    Idempotent: with all results there it does nothing. After an interruption of any kind it continues
    with what is missing; failed jobs are recorded, do not stop the others, and are tried again next time.
    Results of jobs that the configuration no longer names are put aside, and found again when it does.

    Args:
        config: the sweep.
        out: parent of the result folder ``out/NAME``.
        workers: processes of this machine; by default the configuration's.
        on: address of a Dask scheduler, on whose workers the jobs run instead.
        data: folder with local copies of datasets, as the processes see it.
        console: where progress goes.

    Returns:
        Labels of the jobs that failed.

    Raises:
        UserError: the folder cannot be written, another sweep is writing there, or no scheduler answers.
        KeyboardInterrupt: on Ctrl-C or SIGTERM; finished jobs are kept.
    """
    folder = out / config.name
    make_folder(folder)
    # SIGTERM acts as Ctrl-C, so that worker processes are not left behind.
    with noted(signal.SIGINT, signal.SIGTERM), only_one(folder, "sweep"):
        store, where = Store(folder), None if data is None else str(data)
        missing = [job for job in config.jobs() if job.id not in store.finished()]
        if on is None:
            count = config.workers if workers is None else workers
            stream = outcomes(missing, count, config.threads, where)
        else:
            stream = outcomes_on(on, missing, config.threads, where)
        return _run(config, store, missing, stream, console or Console())


def _run(
    config: SweepConfig,
    store: Store,
    missing: list[Job],
    stream: Generator[Outcome, None, None],
    console: Console,
) -> list[str]:
    failed = []
    total = len(config.jobs())
    live = LiveTable(console, config.name, total, total - len(missing))
    with live, closing(stream):  # processes end with the sweep, however it ends
        for job, record in stream:
            store.save(job, record)
            live.ended(job, record)
            if asked():  # and the exception was lost
                raise KeyboardInterrupt
            if record["status"] == "failed":
                failed.append(job.label)
    if missing or not store.is_gathered(config):
        store.gather(config)
    else:
        store.describe(config)
    return failed
