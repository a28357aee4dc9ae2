"""Runs jobs in local processes. One that fails, or takes its process down, does not stop the rest."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from backsketch.experiments.config import Job

__all__ = ["Outcome", "outcomes", "prepare", "run_job"]

Outcome = tuple[Job, dict[str, Any]]
_DIED = {"status": "failed", "error": "its process died (out of memory?)", "trace": ""}
DATA_VARIABLE = "BACKSKETCH_DATA"


def run_job(problem: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Run one job; the record says what came out, or why nothing did."""
    from backsketch.experiments.problems import PROBLEMS

    began = time.perf_counter()
    try:
        entry = PROBLEMS[problem]
        result = entry.run(entry.options(**options))
    except Exception as error:  # recorded: the other jobs go on
        lines = traceback.format_exception(error)
        return {
            "status": "failed",
            "error": f"{type(error).__name__}: {error}",
            "trace": "".join(lines),
        }
    return {"status": "done", "seconds": time.perf_counter() - began, "result": result}


def outcomes(
    jobs: Sequence[Job], workers: int, threads: int, data: str | None = None
) -> Generator[Outcome, None, None]:
    """Run jobs and yield their records as they end.

    Args:
        jobs: what to run.
        workers: processes; 0 for this one.
        threads: of PyTorch in each process.
        data: folder with local copies of datasets, see :mod:`backsketch.experiments.problems.data`.
    """
    if not jobs:
        return
    if workers == 0:
        prepare(threads, data)
        for job in jobs:
            yield job, run_job(job.problem, job.options)
        return
    before = set(multiprocessing.active_children())
    slots = [_Worker(threads, data) for _ in range(min(workers, len(jobs)))]
    try:
        yield from _spread(jobs, slots)
    finally:  # where it is not finished, what still runs is of no use
        for child in set(multiprocessing.active_children()) - before:
            child.terminate()
        for slot in slots:
            slot.close()


def _spread(jobs: Sequence[Job], slots: Sequence[_Worker]) -> Generator[Outcome, None, None]:
    waiting, idle = deque(jobs), list(slots)
    running: dict[Future[dict[str, Any]], tuple[Job, _Worker]] = {}
    while waiting or running:
        while waiting and idle:
            job, worker = waiting.popleft(), idle.pop()
            running[worker.start(job)] = job, worker
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            job, worker = running.pop(future)
            idle.append(worker)
            died = isinstance(future.exception(), BrokenProcessPool)
            yield job, dict(_DIED) if died else future.result()


class _Worker:
    """A pool of one process, which makes known whose job took it down, and a new process after that.

    loky's pools were tried: their process outlives a parent that was killed, until its job ends, and a larger pool
    does not say which of its jobs was at fault.
    """

    def __init__(self, threads: int, data: str | None) -> None:
        self._initial = threads, data
        self._pool = self._new_pool()

    def start(self, job: Job) -> Future[dict[str, Any]]:
        try:
            return self._pool.submit(run_job, job.problem, dict(job.options))
        except BrokenProcessPool:  # by the job before
            self._pool = self._new_pool()
            return self._pool.submit(run_job, job.problem, dict(job.options))

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _new_pool(self) -> ProcessPoolExecutor:
        spawn = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        return ProcessPoolExecutor(1, spawn, initializer=_enter, initargs=self._initial)


def _enter(threads: int, data: str | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    threading.Thread(target=_end_with_parent, daemon=True).start()
    prepare(threads, data)


def _end_with_parent() -> None:
    """End this process with its parent. A parent that is killed cannot tell its workers to stop."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def prepare(threads: int, data: str | None) -> None:
    """Set up a process for jobs: PyTorch's threads, and the folder with local copies of datasets."""
    import torch

    torch.set_num_threads(threads)
    if data is not None:
        os.environ[DATA_VARIABLE] = data
