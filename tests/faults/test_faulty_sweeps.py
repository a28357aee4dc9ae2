"""Results and configurations of sweeps with something wrong inside, and two sweeps in one folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("matplotlib")
from rich.console import Console

from backsketch.experiments import SweepConfig, SweepError, run_sweep
from backsketch.experiments.report import report
from backsketch.files import UserError, only_one
from helpers import invoke

RESULTS = Path(__file__).resolve().parents[2] / "results"
TINY = {
    "report": "depth",
    "workers": 0,
    "parts": [
        {
            "problem": "depth",
            "fixed": {"width": 8, "draws": 2, "batch_size": 8, "residual": False},
            "grid": {"depth": [1, 2], "arm": ["grad_weight only"]},
        }
    ],
}


def gathered(folder: Path, **changes) -> Path:
    """A committed sweep with some fields changed."""
    folder.mkdir()
    content = json.loads((RESULTS / "depth" / "sweep.json").read_text())
    (folder / "sweep.json").write_text(json.dumps({**content, **changes}))
    return folder


def test_markup_in_a_result_is_printed_as_it_is(tmp_path):
    odd = "[/bold] [red]not red[/red] [link=x]"
    failed = {"id": odd, "problem": "depth", "options": {}, "status": "failed", "error": odd}
    jobs = json.loads((RESULTS / "depth" / "sweep.json").read_text())["jobs"]
    folder = gathered(tmp_path / "odd", about=odd, jobs=[*jobs, failed])
    page = tmp_path / "page.html"
    done = invoke("report", str(folder), "--page", str(page))
    assert done.exit_code == 0, done.output
    assert f"failed: {odd}: {odd}" in " ".join(done.output.split())
    assert "[/bold]" in page.read_text()


def test_markup_in_labels_and_titles_reaches_the_tables(tmp_path):
    sweep = json.loads((RESULTS / "ledgers" / "sweep.json").read_text())
    for job in sweep["jobs"]:
        job["options"]["name"] = "[/x][b]odd[/b]"
    folder = tmp_path / "odd"
    folder.mkdir()
    (folder / "sweep.json").write_text(json.dumps(sweep))
    done = invoke("report", str(folder), "--page", str(tmp_path / "page.html"))
    assert done.exit_code in (0, 2), done.output
    assert "Traceback" not in done.output
    assert done.exception is None or isinstance(done.exception, SystemExit)


@pytest.mark.parametrize(
    "changes",
    [
        *({"jobs": 3}, {"jobs": [3]}, {"jobs": [{}]}, {"name": 5}, {"name": "../outside"}),
        *({"machine": None}, {"colour": "red"}, {"report": "none"}, {"report": ["depth"]}),
        {"jobs": [{"id": "a", "problem": "depth", "options": {}, "status": "done", "result": {}}]},
        {"jobs": [{"id": "a", "problem": "depth", "options": {}, "status": "done"}]},
        {"jobs": [{"id": "a", "problem": "depth", "options": {}, "status": "lost"}]},
    ],
)
def test_a_result_that_makes_no_sense_is_one_sentence(tmp_path, changes):
    folder = gathered(tmp_path / "odd", **changes)
    done = invoke("report", str(folder), "--page", str(tmp_path / "page.html"))
    assert done.exit_code == 2, done.output
    assert str(folder) in done.output
    assert "Traceback" not in done.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["odd"]


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[1]", b"{", b'{"report": 1, "parts": 2}'])
def test_a_configuration_that_is_none_is_one_sentence(tmp_path, content):
    path = tmp_path / "sweep.json"
    path.write_bytes(content)
    for command in (["sweep", str(path), "--out", str(tmp_path)], ["report", str(path)]):
        done = invoke(*command)
        assert done.exit_code == 2, done.output
        assert "Traceback" not in done.output


def test_two_sweeps_in_one_folder(tmp_path):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY))
    config, quiet = SweepConfig.load(path), Console(quiet=True)
    (tmp_path / "tiny").mkdir()
    with only_one(tmp_path / "tiny", "sweep"):
        with pytest.raises(UserError, match="another sweep is writing into"):
            run_sweep(config, tmp_path, console=quiet)
        done = invoke("sweep", str(path), "--out", str(tmp_path))
        assert done.exit_code == 2
        assert "another sweep" in done.output
    assert run_sweep(config, tmp_path, console=quiet) == []
    assert len(json.loads((tmp_path / "tiny" / "sweep.json").read_text())["jobs"]) == 2


def test_what_a_killed_sweep_left_half_written_is_no_obstacle(tmp_path):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY))
    jobs = tmp_path / "tiny" / "jobs"
    jobs.mkdir(parents=True)
    (jobs / "a-job-of-earlier-0123abcd.json.partial").write_text("{")
    assert run_sweep(SweepConfig.load(path), tmp_path, console=Console(quiet=True)) == []
    assert not jobs.exists()


def test_a_folder_of_results_that_is_a_file(tmp_path):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY))
    (tmp_path / "out").write_text("precious")
    done = invoke("sweep", str(path), "--out", str(tmp_path / "out"))
    assert done.exit_code == 2
    assert "a file is in the way" in done.output
    assert (tmp_path / "out").read_text() == "precious"


def test_an_unknown_report_is_named(tmp_path):
    with pytest.raises(SweepError, match="no view 'none'"):
        report([gathered(tmp_path / "odd", report="none")], None, Console(quiet=True))
