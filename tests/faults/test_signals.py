"""A signal that comes at an awkward moment still stops the run."""

from __future__ import annotations

import json
import signal
import warnings
from pathlib import Path

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")
pytest.importorskip("typer")
import typer
from typer.testing import CliRunner

from backsketch import cli
from backsketch.commands.guard import told
from backsketch.experiments import SweepConfig, run_sweep, sweep
from backsketch.signals import asked, noted
from backsketch.train import Interrupted, run, tasks, train
from backsketch.train.errors import StopRequest
from helpers import quiet

TINY = {
    "report": "depth",
    "workers": 0,
    "parts": [
        {
            "problem": "depth",
            "fixed": {"width": 8, "draws": 2, "batch_size": 8, "residual": False},
            "grid": {"depth": [1, 2, 3], "arm": ["grad_weight only"]},
        }
    ],
}
QUICK = {"model_options": {"widths": [8]}, "batch_size": 256, "epochs": 2, "sketch": "none"}

# Python prints an exception that comes within a finalizer, and forgets it.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class Swallows:
    """Gets a signal while it is finalized."""

    def __init__(self, signum: int) -> None:
        self.signum = signum

    def __del__(self) -> None:
        signal.raise_signal(self.signum)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_sweep_stops_after_the_job_in_which_a_finalizer_swallowed_the_signal(
    tmp_path, monkeypatch, signum
):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY))
    outcomes = sweep.outcomes

    def interrupted(*arguments):
        for outcome in outcomes(*arguments):
            Swallows(signum)
            yield outcome

    monkeypatch.setattr(sweep, "outcomes", interrupted)
    before = signal.getsignal(signum)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(SweepConfig.load(path), tmp_path, console=quiet())
    assert len(list((tmp_path / "tiny" / "jobs").glob("*.json"))) == 1
    assert signal.getsignal(signum) is before
    monkeypatch.setattr(sweep, "outcomes", outcomes)
    assert run_sweep(SweepConfig.load(path), tmp_path, console=quiet()) == []


def test_a_command_whose_beginning_swallowed_ctrl_c_stops_all_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny.json").write_text(json.dumps(TINY))
    load = SweepConfig.load

    def interrupted(path):
        Swallows(signal.SIGINT)
        return load(path)

    monkeypatch.setattr(SweepConfig, "load", interrupted)
    done = CliRunner().invoke(cli.make_app(), ["sweep", "tiny.json", "--out=."])
    assert done.exit_code == 130
    assert len(list(Path("tiny/jobs").glob("*.json"))) == 1
    monkeypatch.setattr(SweepConfig, "load", load)
    assert CliRunner().invoke(cli.make_app(), ["sweep", "tiny.json", "--out=."]).exit_code == 0


def test_ctrl_c_while_the_application_is_made_is_a_sentence_and_130(monkeypatch, capsys):
    def interrupted():
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(cli, "make_app", interrupted)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 130
    assert "stopped before anything was begun" in capsys.readouterr().err


def test_a_signal_is_forgotten_with_the_block_that_it_came_in():
    with noted(signal.SIGINT, signal.SIGTERM):
        with noted():
            Swallows(signal.SIGINT)
            assert asked() == signal.SIGINT
        assert StopRequest().signum == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert asked() == StopRequest().signum == 0


def test_a_training_stops_at_its_first_step_if_a_finalizer_swallowed_ctrl_c(tmp_path, monkeypatch):
    load = tasks.load_data

    def interrupted(*arguments, **options):
        Swallows(signal.SIGINT)
        return load(*arguments, **options)

    monkeypatch.setattr(tasks, "load_data", interrupted)
    with pytest.raises(Interrupted) as caught:
        train(QUICK, out=tmp_path / "out", console=quiet())
    assert caught.value.exit_code == 130
    monkeypatch.setattr(tasks, "load_data", load)
    assert train(QUICK, out=tmp_path / "out", resume=True, console=quiet())["steps"] == 10


def test_before_the_first_step_a_signal_acts_at_once(tmp_path, monkeypatch):
    def interrupted(*arguments, **options):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(tasks, "load_data", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(QUICK, out=tmp_path / "out", console=quiet())
    assert not Path(tmp_path / "out").exists()


def test_before_the_first_step_sigterm_ends_even_a_process_that_waits_for_another():
    """A handler of Python's would run only after the wait: for a rank whose peer has died, never."""
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert signal.getsignal(signal.SIGTERM) is before
        stop.wait_for_steps()
        signal.raise_signal(signal.SIGTERM)
        assert stop.signum == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.pictures
def test_while_results_are_written_the_run_finishes(tmp_path, monkeypatch):
    write = run.write_json

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)
        write(*arguments)

    monkeypatch.setattr(run, "write_json", interrupted)
    assert train(QUICK, out=tmp_path / "out", console=quiet())["steps"] == 10
    assert (tmp_path / "out" / "plot.png").is_file()


def test_an_interrupt_in_the_middle_of_a_capture_is_not_explained() -> None:
    """PyTorch warns with a traceback of the forward pass where a backward pass in anomaly mode ends."""

    def interrupted() -> None:
        with told("stopped"):
            warnings.warn("Error detected in MmBackward0. Traceback of forward call", stacklevel=1)
            raise KeyboardInterrupt

    with pytest.raises(typer.Exit) as ended:
        interrupted()
    assert ended.value.exit_code == 130
