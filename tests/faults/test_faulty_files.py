"""Folders that cannot be written, full disks and checkpoints that were changed: one sentence, nothing lost."""

from __future__ import annotations

import errno
import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("accelerate")

from backsketch import files
from backsketch.files import UserError, make_folder, only_one, write_whole
from backsketch.train.checkpoint import DIGEST, digest, load_checkpoint, save_checkpoint
from helpers import invoke

QUICK = ["--widths=8", "--batch-size=256", "--epochs=2", "--threads=1", "--sketch=rows:keep=0.5"]

pytestmark = pytest.mark.usefixtures("elsewhere")


def refused(done, message: str) -> None:
    assert done.exit_code == 2, done.output
    assert message in done.output
    assert "Traceback" not in done.output
    assert len(done.output.strip().splitlines()) == 1


class TestOut:
    def test_a_file_is_in_the_way(self):
        Path("taken").write_text("precious")
        refused(invoke("train", *QUICK, "--out", "taken"), "taken: a file is in the way")
        refused(invoke("train", *QUICK, "--out", "taken/below"), "below: a file is in the way")
        assert Path("taken").read_text() == "precious"

    @pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC])
    def test_nothing_can_be_written_there(self, monkeypatch, code):
        Path("out").mkdir()

        def fails(self, content):
            raise OSError(code, os.strerror(code), str(self))

        monkeypatch.setattr(Path, "write_bytes", fails)
        told = f"cannot write results into out: {os.strerror(code).lower()}"
        refused(invoke("train", *QUICK, "--out", "out"), told)
        assert not list(Path("out").iterdir())

    def test_a_folder_that_belongs_to_somebody_else(self):
        if os.getuid() == 0:
            pytest.skip("root may write everywhere")
        Path("out").mkdir(mode=0o500)
        refused(invoke("train", *QUICK, "--out", "out"), "permission denied")

    def test_another_process_trains_there(self):
        Path("out").mkdir()
        Path("out/checkpoint.pt").write_bytes(b"a day of work")
        with only_one(Path("out"), "training"):
            refused(invoke("train", *QUICK, "--out", "out"), "another training is writing into out")
        assert Path("out/checkpoint.pt").read_bytes() == b"a day of work"
        make_folder(Path("out"))
        with only_one(Path("out"), "training"):
            pass


@contextmanager
def nearly_full(limit: int) -> Iterator[None]:
    """No file of this process grows beyond `limit` bytes: the writes fail as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class TestFullDisk:
    @pytest.mark.pictures  # the largest file of a run that was over
    def test_the_earlier_checkpoint_stays_and_no_partial_one_is_left(self):
        assert invoke("train", *QUICK, "--out", "out").exit_code == 0
        before = Path("out/checkpoint.pt").read_bytes()
        with nearly_full(4096):
            done = invoke("train", *QUICK, "--epochs=4", "--out", "other")
        assert done.exit_code == 2, done.output
        assert "cannot write other/checkpoint.pt: file too large" in done.output
        assert "Traceback" not in done.output
        assert not list(Path("other").glob("*.partial"))
        Path("out/result.json").unlink()
        with nearly_full(4096):
            done = invoke("train", "--resume", "--out", "out")
        assert done.exit_code == 2, done.output
        assert Path("out/checkpoint.pt").read_bytes() == before
        assert invoke("train", "--resume", "--out", "out").exit_code == 0

    def test_a_disk_that_is_full_only_when_the_file_is_flushed(self, monkeypatch):
        path = Path("checkpoint.pt")
        save_checkpoint(path, {"step": 1})
        before = path.read_bytes()

        def full(descriptor):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(files.os, "fsync", full)
        with pytest.raises(UserError, match=r"cannot write checkpoint.pt: no space left on device"):
            save_checkpoint(path, {"step": 2})
        assert path.read_bytes() == before
        assert [p.name for p in Path().iterdir()] == ["checkpoint.pt"]

    def test_a_file_below_a_file(self):
        Path("taken").write_text("")
        with pytest.raises(UserError, match=r"cannot write taken/result.json"):
            write_whole(Path("taken/result.json"), b"{}")


def _changes():
    """What somebody may do to a checkpoint, by name."""

    def weight(state):
        next(iter(state["model"].values())).reshape(-1)[0] += 1

    def rate(state):
        state["optimizer"]["param_groups"][0]["lr"] = 5.0

    def config(**changes):
        return lambda state: state["config"].update(changes)

    def history(state):
        state["history"]["losses"].pop()

    def part(name, value):
        return lambda state: state.update({name: value})

    yield "weight", weight
    yield "learning rate", rate
    yield "history", history
    yield "another sketch", config(sketch="none")
    yield "an absurd option", config(epochs=-3)
    yield "an unknown option", config(colour="red")
    yield "a missing part", lambda state: state.pop("random")
    yield "an unknown part", part("colour", "red")
    for name, value in (
        *(("epoch", 10**9), ("epoch", -1), ("epoch", "two"), ("epoch", None), ("epoch", 0)),
        *(("step", 10**9), ("step", -1), ("step", 1.5), ("model", {}), ("model", None)),
        *(("optimizer", {}), ("scheduler", {}), ("random", []), ("history", {}), ("config", {})),
        *(("data", {}), ("processes", 7), ("sketched", False), ("format", 99), ("auto", {})),
        *(("scaler", {"scale": 1.0}), ("config", "none"), ("random", [{}])),
    ):
        yield f"{name} = {value}", part(name, value)


CHANGES = dict(_changes())
ONLY_SIGNED = {
    "an absurd option",
    "an unknown option",
    "scheduler = {}",
    "auto = {}",
    "scaler = {'scale': 1.0}",
}


class TestResume:
    @pytest.fixture(scope="class")
    @classmethod
    def finished(cls, tmp_path_factory):
        folder = tmp_path_factory.mktemp("run") / "out"
        done = invoke("train", *QUICK, "--out", str(folder))
        assert done.exit_code == 0, done.output
        return (folder / "checkpoint.pt").read_bytes()

    @pytest.fixture
    def state(self, finished):
        path = Path("out/checkpoint.pt")
        path.parent.mkdir()
        path.write_bytes(finished)
        return torch.load(path, weights_only=True)

    @pytest.mark.parametrize("change", CHANGES)
    @pytest.mark.parametrize("signed", [False, True], ids=["as it is", "with its digest made anew"])
    def test_a_changed_checkpoint_is_refused_and_left_alone(self, state, change, signed):
        path = Path("out/checkpoint.pt")
        CHANGES[change](state)
        if signed:
            if change in ("weight", "learning rate"):
                pytest.skip("such a checkpoint could have been written")
            if change in ONLY_SIGNED:
                pytest.skip("only the digest guards what a finished run does not read")
            del state[DIGEST]
            state[DIGEST] = digest(state)
        torch.save(state, path)
        content = path.read_bytes()
        done = invoke("train", "--resume", "--out", "out")
        refused(done, "error: " if signed else "heckpoint")
        assert path.read_bytes() == content
        assert not Path("out/result.json").exists()

    def test_a_flipped_bit_in_a_weight_is_noticed(self, state):
        path = Path("out/checkpoint.pt")
        weights = next(iter(state["model"].values())).numpy().tobytes()
        content = bytearray(path.read_bytes())
        content[content.index(weights) + 17] ^= 1
        path.write_bytes(content)
        refused(invoke("train", "--resume", "--out", "out"), "damaged")

    def test_an_intact_checkpoint_is_read(self, state):
        assert load_checkpoint(Path("out/checkpoint.pt"))["epoch"] == 2
        assert invoke("train", "--resume", "--out", "out").exit_code == 0
        assert json.loads(Path("out/result.json").read_text())["steps"] == 10


def test_the_digest_sees_types_keys_order_and_every_bit():
    values = [
        *(
            {"a": 1},
            {"a": 1.0},
            {"a": True},
            {"b": 1},
            {"a": "1"},
            {"a": [1]},
            {"a": [[1]]},
            [1, 2],
        ),
        *(["1, 2"], [], {}, None, torch.zeros(2), torch.zeros(2, 1), torch.zeros(2).double()),
        *(torch.tensor([0.0, -0.0]), torch.zeros(2, dtype=torch.bfloat16), torch.zeros(0)),
    ]
    assert len({digest(value) for value in values}) == len(values)
    assert digest({"a": torch.ones(3)}) == digest({"a": torch.ones(3)})
