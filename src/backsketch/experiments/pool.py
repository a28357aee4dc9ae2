"""Jobs over local processes: one that fails, or takes its process down, does not stop the rest."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from backsketch.experiments.config import Job

__all__ = ["outcomes", "run_job"]

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
        _prepare(threads, data)
        for job in jobs:
            yield job, run_job(job.problem, job.options)
        return
    todo = list(jobs)
    while todo:
        suspects, todo = yield from _pooled(todo, min(workers, len(todo)), threads, data)
        if len(suspects) == 1:
            yield suspects[0], dict(_DIED)
            continue
        for job in suspects:  # one of these took its process down: alone, it takes only itself
            left, _ = yield from _pooled([job], 1, threads, data)
            if left:
                yield job, dict(_DIED)


def _pooled(
    jobs: Sequence[Job], workers: int, threads: int, data: str | None
) -> Generator[Outcome, None, tuple[list[Job], list[Job]]]:
    """Yields outcomes; returns, where a process died, the jobs that were running and the others."""
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),  # CUDA does not survive a fork
        initializer=_enter,
        initargs=(threads, data),
    )
    pending: dict[Future[Any], Job] = {}
    waiting = list(jobs)
    finished = False
    try:
        while waiting or pending:
            # No more than there are processes, so that a broken pool has few suspects.
            while waiting and len(pending) < workers:
                job = waiting.pop(0)
                pending[pool.submit(run_job, job.problem, dict(job.options))] = job
            done, _ = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                if not isinstance(future.exception(), BrokenProcessPool):
                    yield pending.pop(future), future.result()
            if any(isinstance(future.exception(), BrokenProcessPool) for future in done):
                return list(pending.values()), waiting
        finished = True
        return [], []
    except BrokenProcessPool:  # while a job was handed over
        return list(pending.values()), [job, *waiting]
    finally:
        if not finished:  # no need to wait for what nobody will read
            for child in set(multiprocessing.active_children()) - before:
                child.terminate()
        pool.shutdown(wait=True, cancel_futures=True)


def _enter(threads: int, data: str | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _prepare(threads, data)


def _end_with_parent() -> None:
    """A parent that is killed cannot tell its workers, which would wait for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _prepare(threads: int, data: str | None) -> None:
    import torch

    torch.set_num_threads(threads)
    if data is not None:
        os.environ[DATA_VARIABLE] = data
