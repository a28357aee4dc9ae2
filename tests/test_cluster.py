"""A sweep on the workers of a Dask cluster of two processes, which the tests start."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("sklearn")
pytest.importorskip("distributed")
import dask
import distributed
from typer.testing import CliRunner

from backsketch import cli
from backsketch.experiments import Job, SweepError, run_sweep
from backsketch.experiments.cluster import outcomes_on
from backsketch.experiments.pool import outcomes
from backsketch.experiments.store import Sweep
from helpers import quiet, sweep_config, warm_forkserver
from test_sweep import TINY

DEPTH = {"width": 8, "residual": False, "arm": "grad_weight only"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    warm_forkserver()
    options = {"threads_per_worker": 1, "dashboard_address": None, "silence_logs": 50}
    with (
        dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"}),
        distributed.LocalCluster(n_workers=2, host="127.0.0.1", **options) as started,
    ):
        yield started


def values(records: list[tuple[Job, dict[str, Any]]]) -> dict[str, Any]:
    assert {record["status"] for _, record in records} == {"done"}, records
    return {job.id: record["result"] for job, record in records}


def test_a_sweep_leaves_the_files_of_a_local_one(cluster, tmp_path):
    config = sweep_config(tmp_path, TINY)
    assert not run_sweep(config, tmp_path / "there", on=cluster.scheduler_address, console=quiet())
    assert not run_sweep(config, tmp_path / "here", console=quiet())
    there, here = (Sweep.load(tmp_path / name / config.name).jobs for name in ("there", "here"))
    assert {r["id"]: r["result"] for r in there} == {r["id"]: r["result"] for r in here}


def test_the_job_of_a_lost_worker_runs_again(cluster):
    jobs = [Job("depth", {**DEPTH, "depth": 2, "draws": 60 + i}) for i in range(6)]
    with distributed.Client(cluster) as client:
        stream = outcomes_on(cluster.scheduler_address, jobs, 1)
        records = [next(stream)]
        busy = {worker for worker, tasks in client.processing().items() if tasks}
        assert busy  # what it was doing has to be done by another, or by its successor
        os.kill(next(iter(client.run(os.getpid, workers=[busy.pop()]).values())), signal.SIGKILL)
        records += list(stream)
    assert values(records) == values(list(outcomes(jobs, 0, 1)))


def test_what_a_job_raises_is_its_record(cluster):
    job = Job("depth", {**DEPTH, "depth": 2, "draws": 2, "arm": "none"})
    (found,) = outcomes_on(cluster.scheduler_address, [job], 1)
    assert found[1]["status"] == "failed"


def test_where_nobody_answers_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr("backsketch.experiments.cluster._SECONDS", 0.3)
    config = sweep_config(tmp_path, TINY)
    with pytest.raises(SweepError, match=r"no Dask scheduler answers at 'tcp://127\.0\.0\.1:9'"):
        run_sweep(config, tmp_path, on="tcp://127.0.0.1:9", console=quiet())
    found = CliRunner().invoke(
        cli.make_app(), ["sweep", "some.json", "--on", "tcp://x", "--workers", "2"]
    )
    assert found.exit_code == 2
    assert "--workers" in found.output
