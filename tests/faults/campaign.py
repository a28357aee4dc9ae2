"""Kill trainings and sweeps at random moments, continue them, and compare with what an undisturbed run leaves.

    python tests/faults/campaign.py --cases 100 --out results/faults/faults.json

A case is a job, one to three mishaps at random moments, each followed by what a user would type then, and a last
run to the end. It is clean if every run ends as it should (exit code, a sentence instead of a traceback, no
partial file) and the end is that of the undisturbed run, bit for bit, clocks apart. The exit code is 1 if one is
not.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # forked processes inherit no threads
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

torch.set_num_threads(1)
sys.path.append(str(Path(__file__).parents[1]))

from deaths import DEATHS, Moment  # noqa: E402
from jobs import JOBS, ROUND, Job, differences  # noqa: E402
from processes import Process  # noqa: E402
from sabotage import MUTATIONS  # noqa: E402

LIMIT = 900  # seconds after which a run hangs; on a busy machine one takes minutes


@dataclass(frozen=True)
class Case:
    """A job and what happens to it, in order.

    Attributes:
        number: of the case; it seeds all its draws.
        job: a name in `JOBS`.
        mishaps: names in `DEATHS`, with their moments.
    """

    number: int
    job: str
    mishaps: tuple[tuple[str, Moment], ...]

    @classmethod
    def draw(cls, number: int, seed: int) -> Case:
        """Jobs in turn, and their deaths in turn, so that few cases have some of each."""
        rng = random.Random(f"{seed} {number}")
        rounds, place = divmod(number, len(ROUND))
        name = ROUND[place]
        turn = rounds * ROUND.count(name) + ROUND[:place].count(name)
        deaths = JOBS[name].deaths
        mishaps = [(deaths[turn % len(deaths)], Moment.draw(rng))]
        while rng.random() < 0.4 and len(mishaps) < 3:
            mishaps.append((rng.choice(deaths), Moment.draw(rng)))
        return cls(number, name, tuple(mishaps))


class Campaign:
    """Runs cases in folders below one, and an undisturbed run of each job once."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.seed = root, seed
        self._whole: dict[str, Any] = {}
        self._seconds: dict[str, float] = {}  # of the quickest run so far

    def run(self, case: Case) -> dict[str, Any]:
        """What happened, as plain values; `fault` is empty where all was well."""
        began, used = time.monotonic(), _cpu_seconds()
        folder = self.root / str(case.number)
        folder.mkdir()
        codes: list[list[int | None]] = []
        fault = self._fault(case, folder, codes)
        shutil.rmtree(folder)
        return {
            "case": case.number,
            "job": case.job,
            "mishaps": [f"{what} at {moment}" for what, moment in case.mishaps],
            "codes": codes,
            "seconds": round(time.monotonic() - began, 1),
            "cpu_seconds": round(_cpu_seconds() - used, 1),
            "fault": fault,
        }

    def _fault(self, case: Case, folder: Path, codes: list[list[int | None]]) -> str:
        job, rng = JOBS[case.job], random.Random(f"{self.seed} {case.number} deaths")
        whole, may_be_torn = self._undisturbed(case.job), False
        for what, moment in case.mishaps:
            processes = _start(job, folder)
            moment.wait(processes[0], folder, self._seconds[case.job])
            DEATHS[what].act(processes, rng)
            hanging = _finish(processes)
            codes.append([process.code for process in processes])
            if not any(codes[-1]):  # it was through: this machine is faster now
                took = min(self._seconds[case.job], processes[0].seconds)
                self._seconds[case.job] = took
            if hanging:
                return f"{what}: still running after {LIMIT} s: {processes[0].said[-2000:]}"
            if reason := DEATHS[what].fault(processes):
                return f"{what}: {reason}"
            left = [str(p) for p in folder.rglob("*.partial")]
            may_be_torn |= "killed" in what
            if left and not may_be_torn:
                return f"{what}: left {left}"
        processes = _start(job, folder)
        if _finish(processes) or any(process.code for process in processes):
            return f"continued: {[(p.code, p.said[-2000:]) for p in processes]}"
        found = list(differences(whole, job.outcome(folder)))
        return f"{len(found)} differences, such as {found[:5]}" if found else ""

    def _undisturbed(self, name: str) -> Any:
        """What a job leaves if nothing happens to it."""
        if name not in self._whole:
            folder = self.root / f"undisturbed-{len(self._whole)}"
            folder.mkdir()
            processes = _start(JOBS[name], folder)
            if _finish(processes) or any(process.code for process in processes):
                raise RuntimeError(f"{name} fails by itself: {processes[0].said}")
            self._whole[name] = JOBS[name].outcome(folder)
            self._seconds[name] = processes[0].seconds
        return self._whole[name]


def _start(job: Job, folder: Path) -> list[Process]:
    """All ranks of a job, continuing if there is something to continue from."""
    resume = job.has_something(folder)
    ranks = [{}] if job.ranks == 1 else _ranks(job.ranks)
    return [Process(lambda: job.start(resume), folder, rank) for rank in ranks]


def _ranks(count: int) -> list[Mapping[str, str]]:
    """What torchrun sets for each process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**common, "RANK": str(i), "LOCAL_RANK": str(i)} for i in range(count)]


def _finish(processes: Sequence[Process]) -> bool:
    """Wait for the end; whether one of them had to be killed for it."""
    for process in processes:
        process.wait(LIMIT)
    hanging = any(process.poll() is None for process in processes)
    for process in processes:
        process.end()
    return hanging


def _cpu_seconds() -> float:
    """Of this process and those that have ended below it."""
    return sum(os.times()[:4])


def _warm_up() -> None:
    """Load what runs need, once: by a plot, and by a region that is captured and forgotten."""
    import datasets  # noqa: F401
    import sklearn.datasets  # noqa: F401
    from matplotlib.figure import Figure

    import backsketch as bs
    import backsketch.experiments.problems
    import backsketch.experiments.sweep
    import backsketch.train.run
    from backsketch.torch_private import load_compiler

    Figure().subplots().figure.savefig(io.BytesIO())
    load_compiler()
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    bs.sketch_(model, bs.Region(keep=0.5))
    model(torch.randn(8, 4)).sum().backward()
    bs.restore_(model)
    torch._dynamo.reset()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of cases")
    parser.add_argument("--processes", type=int, default=1, help="that share the cases, by job")
    parser.add_argument("--until-fault", action="store_true", help="stop at the first one")
    parser.add_argument("--mutation", choices=MUTATIONS, help="a fault in the library, to be found")
    parser.add_argument("--out", type=Path, help="a JSON file")
    arguments = parser.parse_args()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    _warm_up()
    if arguments.mutation:
        MUTATIONS[arguments.mutation]()
    began = time.monotonic()
    numbers = range(arguments.cases) if arguments.only is None else arguments.only
    cases = [Case.draw(number, arguments.seed) for number in numbers]
    records = _shared(cases, arguments.seed, arguments.processes, arguments.until_fault)
    clean = sum(not record["fault"] for record in records)
    seconds = time.monotonic() - began
    print(f"{clean} of {len(records)} cases clean, {seconds:.0f} s")
    if arguments.out:
        _write(arguments.out, records, clean, seconds)
    return int(clean < len(cases))


def _shared(
    cases: Sequence[Case], seed: int, count: int, until_fault: bool
) -> list[dict[str, Any]]:
    """The records of cases, by number, from processes each of which takes all cases of some jobs."""
    jobs = [job for job, _ in Counter(case.job for case in cases).most_common()]
    shares = [[c for c in cases if jobs.index(c.job) % count == i] for i in range(count)]
    with tempfile.TemporaryDirectory() as root:
        files = [Path(root) / f"{i}.jsonl" for i in range(count)]
        started: list[Process] = []
        try:
            if count == 1:
                _run(shares[0], seed, Path(root), files[0], until_fault)
            else:
                started = [_fork(s, seed, file, until_fault) for s, file in zip(shares, files)]
            while any(process.poll(1.0) is None for process in started):
                pass
        except KeyboardInterrupt:
            print("stopped; the cases so far:")
        for process in started:
            process.end()
            print(process.said)
        lines = [line for file in files if file.exists() for line in file.read_text().splitlines()]
    return sorted(map(json.loads, lines), key=lambda record: record["case"])


def _fork(cases: Sequence[Case], seed: int, out: Path, until_fault: bool) -> Process:
    (folder := out.with_suffix("")).mkdir()
    return Process(partial(_run, cases, seed, folder, out, until_fault), folder, {})


def _run(cases: Sequence[Case], seed: int, folder: Path, out: Path, until_fault: bool) -> None:
    """Run cases one after the other; each record is a line of a file."""
    campaign = Campaign(folder, seed)
    for case in cases:
        record = campaign.run(case)
        print("FAULT" if record["fault"] else "clean", json.dumps(record), flush=True)
        with open(out, "a") as file:
            file.write(json.dumps(record) + "\n")
        if until_fault and record["fault"]:
            return


def _write(path: Path, records: Sequence[Mapping[str, Any]], clean: int, seconds: float) -> None:
    mishaps = [
        (m.split(" at ")[0], codes) for r in records for m, codes in zip(r["mishaps"], r["codes"])
    ]
    head = {
        "command": f"python {' '.join(sys.argv)}",
        "clean": clean,
        "cases": len(records),
        "seconds": round(seconds),
        "cpu_seconds": round(_cpu_seconds()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "mishaps": dict(Counter(what for what, _ in mishaps)),
        "of them before the end": dict(Counter(what for what, codes in mishaps if any(codes))),
    }
    lines = ",\n".join(json.dumps(record) for record in records)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{json.dumps(head, indent=1)[:-2]},\n "records": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    sys.exit(main())
