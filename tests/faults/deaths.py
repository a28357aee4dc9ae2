"""What happens to a run, when, and how it may end then."""

from __future__ import annotations

import os
import random
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from processes import Process, children

__all__ = ["DEATHS", "Death", "Moment"]

IGNORED = re.compile(r"Exception ignored in: .*?KeyboardInterrupt: *\n", re.DOTALL)
"""What Python prints of a Ctrl-C that comes within a finalizer. The run has to stop nevertheless."""

PROGRESS = re.compile(r": done,|epoch \d+/")
"""What a run says of each job or epoch: after a signal it may end the one that it is at, and be at its end."""


@dataclass(frozen=True)
class Moment:
    """A time, or the writing of a file.

    Attributes:
        share: of the seconds that an undisturbed run takes.
        write: instead of that, so many files are being written, the present one included.
    """

    share: float = 0.0
    write: int = 0

    @classmethod
    def draw(cls, rng: random.Random) -> Moment:
        """Two in three are times: few moments are those of a write, which are the dangerous ones."""
        if rng.random() < 1 / 3:
            return cls(write=rng.randint(1, 5))
        return cls(share=rng.random())

    def wait(self, process: Process, folder: Path, seconds: float) -> None:
        """Return at this moment of a process's life, or at its end."""
        if not self.write:
            process.wait(self.share * seconds - process.seconds)
            return
        count, writing = 0, False
        while process.poll(0.0005) is None:
            before, writing = writing, _is_writing(folder)
            count += writing and not before
            if count == self.write:
                return

    def __str__(self) -> str:
        return f"write {self.write}" if self.write else f"{self.share:.0%}"


def _is_writing(folder: Path) -> bool:
    """Whether there is a file that is not whole yet."""
    for part in (folder, folder / "out", folder / "tiny", folder / "tiny" / "jobs"):
        try:
            if any(name.endswith(".partial") for name in os.listdir(part)):
                return True
        except FileNotFoundError:
            continue
    return False


@dataclass(frozen=True)
class Death:
    """One kind of mishap.

    Attributes:
        act: brings it about.
        fault: what is wrong with how the processes ended, in words; empty where nothing is.
    """

    act: Callable[[Sequence[Process], random.Random], None]
    fault: Callable[[Sequence[Process]], str]


def _signal(signum: int) -> Callable[[Sequence[Process], random.Random], None]:
    def act(processes: Sequence[Process], rng: random.Random) -> None:
        for process in processes:
            process.send(signum)

    return act


def _fill_disk(processes: Sequence[Process], rng: random.Random) -> None:
    free = rng.choice([0, 100, 5_000, 40_000])
    for process in processes:
        process.fill_disk(free)


def _kill_rank(processes: Sequence[Process], rng: random.Random) -> None:
    """One dies at once; the launcher asks the others to end a second later, and waits half a minute."""
    victim = rng.choice(processes)
    victim.send(signal.SIGKILL)
    for process in processes:
        if process is not victim and process.wait(1.0) is None:
            process.send(signal.SIGTERM)
            process.wait(30)


def _kill_worker(processes: Sequence[Process], rng: random.Random) -> None:
    """One of the processes that a run started, which need not be there yet."""
    (process,) = processes
    while process.poll(0.005) is None:
        if found := children(process.pid):
            try:
                os.kill(rng.choice(found), signal.SIGKILL)
            except ProcessLookupError:  # it has just ended
                continue
            return


def _ended(*codes: int, saying: str = "") -> Callable[[Sequence[Process]], str]:
    """They ended with one of these codes, and without a traceback; those that failed say why."""

    def fault(processes: Sequence[Process]) -> str:
        for process in processes:
            if process.code not in (0, *codes):
                return f"exit code {process.code}: {process.said[-2000:]}"
            went_on = PROGRESS.findall(process.said_after_signal)
            if process.code == 0 and len(went_on) > 1:
                return f"went on after the signal: {process.said[-2000:]}"
            if "Traceback" in IGNORED.sub("", process.said):
                return f"a traceback: {process.said[-2000:]}"
            if process.code == 2 and saying not in process.said:
                return f"no {saying!r} in {process.said[-2000:]}"
        return ""

    return fault


def _rank_fault(processes: Sequence[Process]) -> str:
    """A rank whose peer has died fails as well, in its own time: none waits for ever, none succeeds alone."""
    codes = [process.code for process in processes]
    if any(code is None for code in codes):
        return f"a rank went on alone: {codes}"
    if 0 in codes and any(codes) and not _had_finished(processes):
        return f"a rank succeeded alone: {codes}"
    return ""


def _had_finished(processes: Sequence[Process]) -> bool:
    """Whether the results were there already when one was killed."""
    return any("wrote" in process.said for process in processes)


def _worker_fault(processes: Sequence[Process]) -> str:
    """PyTorch raises in the loop whose worker has died; a sweep tells of the job that failed, and goes on."""
    (process,) = processes
    return "" if process.code in (0, 1) else f"exit code {process.code}: {process.said[-2000:]}"


DEATHS: Mapping[str, Death] = {
    "killed": Death(_signal(signal.SIGKILL), _ended(-signal.SIGKILL)),
    "interrupted": Death(_signal(signal.SIGINT), _ended(130)),
    "terminated": Death(_signal(signal.SIGTERM), _ended(-signal.SIGTERM, 143, 130)),
    "disk full": Death(_fill_disk, _ended(2, saying="cannot write")),
    "rank killed": Death(_kill_rank, _rank_fault),
    "worker killed": Death(_kill_worker, _worker_fault),
}
