"""``backsketch sweep``: run what is missing, keep what is there."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType

from rich.console import Console

from backsketch.experiments.config import SweepConfig
from backsketch.experiments.live import LiveTable
from backsketch.experiments.pool import outcomes
from backsketch.experiments.store import Store
from backsketch.files import make_folder, only_one

__all__ = ["run_sweep"]


def run_sweep(
    config: SweepConfig,
    out: Path,
    *,
    workers: int | None = None,
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
        workers: processes; by default the configuration's.
        data: folder with local copies of datasets.
        console: where progress goes.

    Returns:
        Labels of the jobs that failed.

    Raises:
        UserError: the folder cannot be written, or another sweep is writing there.
        KeyboardInterrupt: on Ctrl-C or SIGTERM; finished jobs are kept.
    """
    folder = out / config.name
    make_folder(folder)
    with only_one(folder, "sweep"):
        return _run(config, Store(folder), workers, data, console or Console())


def _run(
    config: SweepConfig, store: Store, workers: int | None, data: Path | None, console: Console
) -> list[str]:
    jobs = config.jobs()
    finished = store.finished()
    missing = [job for job in jobs if job.id not in finished]
    failed = []
    count = config.workers if workers is None else workers
    stream = outcomes(missing, count, config.threads, None if data is None else str(data))
    live = LiveTable(console, config.name, len(jobs), len(jobs) - len(missing))
    with live, _stoppable() as stop, closing(stream):  # processes end with the sweep
        for job, record in stream:
            store.save(job, record)
            live.ended(job, record)
            stop()
            if record["status"] == "failed":
                failed.append(job.label)
    if missing or not store.is_gathered(config):
        store.gather(config)
    else:
        store.describe(config)
    return failed


@contextmanager
def _stoppable() -> Iterator[Callable[[], None]]:
    """SIGTERM as Ctrl-C, so that worker processes are not left behind.

    Yields a function that raises what was lost: Python forgets an exception that comes within a finalizer.
    """
    asked = []

    def stop(signum: int, frame: FrameType | None) -> None:
        asked.append(signum)
        raise KeyboardInterrupt

    def check() -> None:
        if asked:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield check
        return
    before = {signum: signal.signal(signum, stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield check
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
