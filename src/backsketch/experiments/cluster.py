"""Runs jobs on the workers of a Dask cluster. A job whose worker is lost runs again on another one.

Ray was looked at, too: it does the same, is thirty times as large, and runs on fewer versions of Python.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Generator, Mapping, Sequence
from typing import Any

from backsketch.experiments.config import Job, SweepError
from backsketch.experiments.pool import Outcome, prepare, run_job

__all__ = ["outcomes_on"]

_SECONDS = 10  # to find the scheduler in
_ONE_AT_A_TIME = threading.Lock()


def outcomes_on(
    address: str, jobs: Sequence[Job], threads: int, data: str | None = None
) -> Generator[Outcome, None, None]:
    """Run jobs on a cluster and yield their records as they end.

    Dask sends a job whose worker has died to another worker, three times; then it counts as failed. What was
    not begun is withdrawn where the generator is closed; what runs ends for nothing.

    Args:
        address: of the scheduler, such as ``tcp://host:8786``. Its workers need this package.
        jobs: what to run.
        threads: of PyTorch in each worker.
        data: folder with local copies of datasets, as the workers see it.

    Raises:
        SweepError: the package ``distributed`` is missing, or nobody answers at the address.
    """
    if not jobs:
        return
    try:
        from distributed import Client, as_completed
    except ImportError:
        raise SweepError(
            "--on needs the package `distributed`: pip install 'backsketch[cluster]'"
        ) from None
    try:
        client = Client(address, timeout=_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:  # nobody there, or no address
        raise SweepError(f"no Dask scheduler answers at {address!r}: {error}") from None
    run = uuid.uuid4().hex
    with client:
        started = {
            client.submit(
                _run, job.problem, dict(job.options), threads, data, key=f"{job.id}-{run}"
            ): job
            for job in jobs
        }
        try:
            for future in as_completed(list(started), loop=client.loop):
                yield started[future], _record(future)
        finally:
            client.cancel(list(started))


def _record(future: Any) -> dict[str, Any]:
    error = future.exception() if future.status == "error" else None
    if future.status == "finished":
        record: dict[str, Any] = future.result()
        return record
    why = f"its workers died: {error}" if error else f"the scheduler dropped it ({future.status})"
    return {"status": "failed", "error": why, "trace": ""}


def _run(
    problem: str, options: Mapping[str, Any], threads: int, data: str | None
) -> dict[str, Any]:
    """In a worker: its jobs share random streams, so that one of several threads waits for the others."""
    with _ONE_AT_A_TIME:
        prepare(threads, data)
        return run_job(problem, options)
