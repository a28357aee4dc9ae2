"""Sweeps resume, repeat nothing and survive what goes wrong; reports need the results alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
from typer.testing import CliRunner

from backsketch import cli, experiments
from backsketch.experiments import Job, Store, SweepConfig, SweepError, problems, run_sweep
from backsketch.experiments.pool import outcomes
from backsketch.experiments.problems.descent import Descent, run
from backsketch.experiments.problems.noise import GaussNewton
from backsketch.experiments.problems.objective import objective
from backsketch.experiments.report import report
from backsketch.experiments.store import Sweep
from backsketch.experiments.views import trade_off
from helpers import quiet

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "benchmarks" / "sweeps").glob("*.json"))
TINY = {
    "report": "depth",
    "workers": 0,
    "parts": [
        {
            "problem": "depth",
            "fixed": {"width": 8, "draws": 3, "batch_size": 8},
            "grid": {
                "depth": [1, 2],
                "residual": [False, True],
                "arm": ["grad_weight only", "shared: one mask"],
            },
        }
    ],
}


@dataclass(frozen=True)
class Counted:
    """A problem that notes each run in a file, and can fail, die or sleep."""

    log: str
    number: int
    how: str = "well"


def counted(options: Counted) -> dict[str, int]:
    with open(options.log, "a") as file:
        file.write(f"{options.number}\n")
    if options.how == "fails":
        raise RuntimeError("on purpose")
    return {"number": options.number}


@pytest.fixture
def counting(monkeypatch, tmp_path):
    table = {**problems.PROBLEMS, "counted": problems.Problem(Counted, counted)}
    monkeypatch.setattr(problems, "PROBLEMS", table)
    log = tmp_path / "log"
    log.write_text("")

    def make(**grid):
        part = {"problem": "counted", "fixed": {"log": str(log)}, "grid": grid}
        return SweepConfig("counted", "depth", [part], workers=0)

    make.runs = lambda: [int(line) for line in log.read_text().split()]
    return make


COMMITTED = [path for path in CONFIGS if (ROOT / "results" / path.stem).is_dir()]


GPU = sorted((ROOT / "benchmarks" / "sweeps" / "gpu").glob("*.json"))


@pytest.mark.parametrize(
    "path", [*CONFIGS, *GPU], ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_every_configuration_can_be_expanded(path):
    assert SweepConfig.load(path).jobs()


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_the_committed_sweeps_are_valid_and_their_results_complete(path):
    config = SweepConfig.load(path)
    store = Store(ROOT / "results" / config.name)
    assert {job.id for job in config.jobs()} <= store.finished()


def test_a_finished_sweep_runs_nothing_and_a_partial_one_only_what_is_missing(counting, tmp_path):
    first = counting(number=[1, 2, 3])
    assert run_sweep(first, tmp_path, console=quiet()) == []
    assert counting.runs() == [1, 2, 3]
    run_sweep(first, tmp_path, console=quiet())
    assert counting.runs() == [1, 2, 3]
    run_sweep(counting(number=[3, 4]), tmp_path, console=quiet())
    assert counting.runs() == [1, 2, 3, 4]


def test_an_interrupted_sweep_keeps_what_is_done_and_continues(counting, tmp_path, monkeypatch):
    config = counting(number=[1, 2, 3])
    save = Store.save
    saved = []

    def interrupted(self, job, record):
        if len(saved) == 1:
            raise KeyboardInterrupt
        saved.append(job)
        save(self, job, record)

    monkeypatch.setattr(Store, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(config, tmp_path, console=quiet())
    monkeypatch.setattr(Store, "save", save)
    assert len(Store(tmp_path / "counted").finished()) == 1
    run_sweep(config, tmp_path, console=quiet())
    assert counting.runs() == [1, 2, 2, 3]  # the second was running when it was cut off
    assert not (tmp_path / "counted" / "jobs").exists()


def test_a_sweep_killed_before_it_was_gathered_is_gathered_next_time(counting, tmp_path):
    config = counting(number=[1])
    Store(tmp_path / "counted").save(config.jobs()[0], {"status": "done", "result": {"number": 1}})
    run_sweep(config, tmp_path, console=quiet())
    assert counting.runs() == []
    assert len(Sweep.load(tmp_path / "counted").jobs) == 1
    assert not (tmp_path / "counted" / "jobs").exists()


@pytest.mark.parametrize("kept", [[1], [1, 4]], ids=["nothing to run", "something to run"])
def test_a_smaller_configuration_loses_no_result_and_reports_only_its_own(counting, tmp_path, kept):
    folder = tmp_path / "counted"
    whole = counting(number=[1, 2, 3])
    run_sweep(whole, tmp_path, console=quiet())
    run_sweep(counting(number=kept), tmp_path, console=quiet())
    assert [options["number"] for options, _ in Sweep.load(folder).done("counted")] == kept
    ran = counting.runs()
    run_sweep(whole, tmp_path, console=quiet())
    assert counting.runs() == ran
    assert len(Sweep.load(folder).jobs) == 3
    run_sweep(counting(number=[1, 2, 3, 4]), tmp_path, console=quiet())
    assert sorted(counting.runs()) == [1, 2, 3, 4]
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "sweep.json"]


def test_a_failed_job_is_recorded_stops_nothing_and_is_tried_again(counting, tmp_path):
    config = counting(number=[1, 2], how=["fails", "well"])
    failed = run_sweep(config, tmp_path, console=quiet())
    assert len(failed) == 2
    records = Store(tmp_path / "counted").records().values()
    assert sorted(record["status"] for record in records) == ["done", "done", "failed", "failed"]
    (one, _) = [record for record in records if record["status"] == "failed"]
    assert one["error"] == "RuntimeError: on purpose"
    assert "counted" in one["trace"]
    run_sweep(config, tmp_path, console=quiet())
    assert counting.runs() == [1, 1, 2, 2, 1, 2]


def test_jobs_run_in_processes_with_equal_results_and_one_that_dies_takes_only_itself():
    """An option that makes the worker's process end stands in for the out-of-memory killer."""
    options = {"width": 8, "draws": 3, "residual": False, "arm": "grad_weight only"}
    good, deadly = (
        Job("depth", {**options, "depth": 2}),
        Job("depth", {**options, "depth": Deadly()}),
    )
    records = {job.id: record for job, record in outcomes([deadly, good], 2, 1)}
    assert records[good.id]["status"] == "done"
    assert records[good.id]["result"] == next(outcomes([good], 0, 1))[1]["result"]
    assert records[deadly.id]["status"] == "failed"
    assert "process died" in records[deadly.id]["error"]


class Deadly(int):
    """Kills the process that unpickles it."""

    def __reduce__(self):
        return os._exit, (9,)


@pytest.mark.slow  # tests/faults has killed commands, too
def test_a_killed_command_continues(tmp_path):
    """SIGKILL in the middle of the real command, with worker processes."""
    content = {**TINY, "workers": 2}
    content["parts"] = [{**TINY["parts"][0], "fixed": {"width": 32, "draws": 60}}]
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(content))
    command = [sys.executable, "-m", "backsketch.cli", "sweep", str(path), "--out", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    jobs = tmp_path / "tiny" / "jobs"
    deadline = time.monotonic() + 120
    while not list(jobs.glob("*.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    workers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]  # none waits forever
    before = Store(tmp_path / "tiny").finished()
    assert before
    config = SweepConfig.load(path)
    run_sweep(config, tmp_path, workers=0, console=quiet())
    assert Store(tmp_path / "tiny").finished() == {job.id for job in config.jobs()}


def children(pid: int) -> list[str]:
    """Process ids of a process's children; none where the system has no such list."""
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return [child for found in lists for child in found.read_text().split()]


def test_results_do_not_depend_on_the_order(config):
    jobs = config.jobs()[:2]
    found = [
        {job.id: record["result"] for job, record in outcomes(order, 0, 1)}
        for order in (jobs, jobs[::-1])
    ]
    assert found[0] == found[1]


def test_ids_are_stable_and_follow_the_options():
    one = Job("descent", {"lr": 0.1, "sketch": "none"}, "descent lr=0.1")
    assert one.id == Job("descent", {"sketch": "none", "lr": 0.1}, "descent lr=0.1").id
    assert one.id == "descent-lr=0.1-" + one.id[-8:]
    assert one.id != Job("descent", {"sketch": "none", "lr": 0.2}, "descent lr=0.1").id


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": []}, "no parts"),
        ({"parts": [{"problem": "other"}]}, "problem must be one of"),
        ({"parts": [{"problem": "depth", "fixed": {"x": 1}}]}, "no option 'x'"),
        ({"parts": [{"problem": "depth", "grid": {"depth": 3}}]}, "non-empty list"),
        ({"parts": [{"problem": "depth", "mistake": 3}]}, "unknown field 'mistake'"),
        ({"workers": -1}, "workers"),
        ({"more": 1}, "unknown field 'more'"),
    ],
)
def test_mistakes_in_a_configuration_are_one_sentence(tmp_path, change, message):
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps({**TINY, **change}))
    with pytest.raises(SweepError, match=message):
        SweepConfig.load(path)
    done = CliRunner().invoke(cli.make_app(), ["sweep", str(path), "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert message in done.output.replace("\n", " ")


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_file_that_is_no_configuration(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(SweepError, match=r"JSON|object"):
        SweepConfig.load(tmp_path / "a.json")
    with pytest.raises(SweepError, match="cannot read"):
        SweepConfig.load(tmp_path / "none.json")


def test_the_commands(tmp_path):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY))
    invoke = lambda *a: CliRunner().invoke(cli.make_app(), list(a))  # noqa: E731
    done = invoke("sweep", str(path), "--out", str(tmp_path))
    assert done.exit_code == 0, done.output
    assert "8 of 8 jobs done" in done.output
    page = tmp_path / "page.html"
    done = invoke("report", str(tmp_path / "tiny"), "--page", str(page))
    assert done.exit_code == 0, done.output
    assert (tmp_path / "tiny" / "tiny.png").read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    assert "data:image/png;base64," in text
    assert 'src="http' not in text
    assert "grad_weight only" in text
    assert invoke("report", str(tmp_path / "nothing"), "--page", str(page)).exit_code == 2


def test_a_report_repeats_itself_and_tells_of_failures(config, tmp_path):
    run_sweep(config, tmp_path, console=quiet())
    pictures = []
    for _ in range(2):
        report([tmp_path], None, quiet())
        pictures.append((tmp_path / "tiny" / "tiny.png").read_bytes())
    assert pictures[0] == pictures[1]
    path = tmp_path / "tiny" / "sweep.json"
    content = json.loads(path.read_text())
    content["jobs"][0].update(status="failed", error="it broke", result=None)
    path.write_text(json.dumps(content))
    report([tmp_path], tmp_path / "page.html", quiet())
    assert "it broke" in (tmp_path / "page.html").read_text()
    path.write_text("{")
    with pytest.raises(SweepError, match="damaged"):
        report([tmp_path], None, quiet())


# The problems --------------------------------------------------------------------------------------------


def test_the_logistic_regression_knows_its_constants():
    task = objective("digits", 300, 0.05, ())
    model = task.build(0)
    assert task.gap(model) > 0
    assert task.smoothness > task.strong_convexity == 0.05
    curvature = GaussNewton(
        model, task, 300
    )  # the Hessian itself here, a model linear in its weights
    assert curvature.sharpness() <= task.smoothness
    # Against the second difference of the objective.
    direction = torch.randn(650, generator=torch.Generator().manual_seed(0))
    direction /= direction.norm()

    def moved(t):
        parts = direction.split([p.numel() for p in model.parameters()])
        with torch.no_grad():
            for p, part in zip(model.parameters(), parts):
                p.copy_(t * part.view(p.shape))
        return task.gap(model)

    second = (moved(0.1) - 2 * moved(0.0) + moved(-0.1)) / 0.01
    assert float(direction @ curvature.product(direction)) == pytest.approx(second, rel=0.02)
    spectrum = curvature.spectrum(direction[None], nodes=12)
    assert sum(share for _, share in spectrum) == pytest.approx(1, rel=1e-4)
    assert sum(c * share for c, share in spectrum) == pytest.approx(second, rel=0.02)


def test_descent_counts_steps_and_cost():
    options = Descent("digits", "rows:keep=0.25", 0.1, target=0.8, limit=200, l2=0.05, seeds=2)
    found = run(options)
    assert 0 < found["reached"] <= options.max_steps
    assert found["last_gap"] <= 0.8
    assert found["cost"] == pytest.approx((1 + 0.25) / 2)  # no grad_input: forward and grad_weight
    assert run(options) == found
    short = Descent("digits", "none", 0.001, target=0.1, limit=200, l2=0.05, seeds=2, max_steps=20)
    assert run(short)["reached"] is None


def test_exports():
    assert experiments.run_sweep is run_sweep


# What README says of the committed results -----------------------------------------------------------------

TASKS = [
    name
    for name in ("logistic_digits", "logistic_mnist", "mlp_mnist")
    if (ROOT / "results" / name).is_dir()
]


@pytest.mark.parametrize("task", TASKS)
def test_what_readme_says_about_gains_is_what_was_measured(task):
    exact, *others = trade_off.arms(Sweep.load(ROOT / "results" / task))
    costs = {(arm.family, arm.keep): trade_off.ratios(arm, exact) for arm in others}
    assert costs["rows", 0.5][1] < 0.9
    assert costs["rows", 0.5][0] < 0.95  # and predicted
    for (family, _), (predicted, measured) in costs.items():
        if family in ("elements", "rows, uniform", "stored rows"):
            assert predicted > 1
            assert measured is None or measured > 1
        if family == "smaller batch":
            assert measured is None or measured == pytest.approx(1, abs=0.15)
    for arm in others:
        uniform = arm.family in ("elements", "rows, uniform")
        if uniform and task != "mlp_mnist":  # v = 1/p with one site; with several they compound
            assert arm.multiplier == pytest.approx(1 / arm.keep, rel=0.15)


def test_predictions_without_noise_or_runs_are_refused():
    with pytest.raises(SweepError, match="noise job"):
        trade_off.arms(Sweep("x", "trade_off", "", {}, ()))
