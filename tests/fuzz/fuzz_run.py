"""Fuzz at length, rerun one case, or show that deliberate errors are found.

PYTHONPATH=tests python tests/fuzz/fuzz_run.py --cases 1000 --out results/fuzz/fuzz.json
PYTHONPATH=tests python tests/fuzz/fuzz_run.py --case 17
PYTHONPATH=tests python tests/fuzz/fuzz_run.py --mutations --out results/fuzz/mutations.json
PYTHONPATH=tests python tests/fuzz/fuzz_run.py --cases 1000 --device cuda --processes 12 --seconds 300
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import fuzz_check
import pytest
import torch
from fuzz_cases import Case, case_of, smaller

from backsketch.sampling import operators
from backsketch.sampling.stream import mix
from mutations import Mutation, drop_the_weights, shift_the_indices

COMMAND = "PYTHONPATH=tests python tests/fuzz/fuzz_run.py"
MAX_SHRINKS = 60
NO_FAILURE = ("sketched", "left exact", "refused", "rejected")

# Failures -------------------------------------------------------------------------------------------


def outcome_of(case: Case, draws: tuple[int, ...] = fuzz_check.DRAWS, device: str = "cpu") -> str:
    """How a case ends: what :func:`fuzz_check.check` returns, ``rejected``, or the kind of failure."""
    try:
        return fuzz_check.check(case, draws, device)
    except fuzz_check.Rejected:
        return "rejected"
    except fuzz_check.Failure as failure:
        return str(failure).split(":")[0]
    except Exception as error:
        return type(error).__name__


def shrink(case: Case, device: str = "cpu") -> Case:
    """The smallest case found that ends as ``case`` does, leaving out one thing after the other."""

    def kind(case: Case) -> str:
        return outcome_of(case, fuzz_check.QUICK, device).split(" ")[0]

    wanted = kind(case)
    candidates, tries = smaller(case), 0
    while (candidate := next(candidates, None)) and tries < MAX_SHRINKS:
        tries += 1
        if kind(candidate) == wanted:
            case, candidates = candidate, smaller(candidate)
    return case


def explain(
    seed: int,
    draws: tuple[int, ...] = fuzz_check.DRAWS,
    device: str = "cpu",
    in_a_hurry: bool = False,
) -> str:
    """What failed in the case of a seed, how to run it again, and a small case that fails alike.

    In a hurry no smaller case is looked for, which takes as long as sixty cases.
    """
    try:
        fuzz_check.check(case_of(seed), draws, device)
        reason = "it passed when it was run again\n"
    except Exception as error:
        reason = "".join(traceback.format_exception_only(error)).strip()
        reason += "\n" + "".join(traceback.format_tb(error.__traceback__)[-3:])
    there = "" if device == "cpu" else f" --device {device}"
    text = (
        f"case {seed} fails: {reason}"
        f"run it again:  {COMMAND} --case {seed}{there}\n"
        f"it is          {case_of(seed)!r}\n"
    )
    return text if in_a_hurry else f"{text}made smaller   {shrink(case_of(seed), device)!r}"


# Mutations ------------------------------------------------------------------------------------------


def share_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """All draws of a pass have one seed, so that layers along a chain keep the same rows."""
    passes = 0
    gradients = fuzz_check.Run.gradients

    def counted(*arguments: Any, **options: Any) -> fuzz_check.Gradients:
        nonlocal passes
        passes += 1
        return gradients(*arguments, **options)

    monkeypatch.setattr(fuzz_check.Run, "gradients", counted)
    monkeypatch.setattr(operators, "fresh", lambda: mix(passes))


MUTATIONS: dict[str, Mutation] = {
    "a forgotten weight": drop_the_weights,
    "a shared seed": share_the_seed,
    "a wrong row": shift_the_indices,
}


def cases_until_found(mutation: str, start: int, limit: int = 100) -> int | None:
    """After how many cases a mutation is noticed; None if not within ``limit``."""
    with pytest.MonkeyPatch.context() as patch:
        MUTATIONS[mutation](patch)
        for number in range(limit):
            if outcome_of(case_of(start + number), fuzz_check.QUICK) not in (
                "sketched",
                "refused",
                "rejected",
            ):
                return number + 1
    return None


# Runs -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """How the case of a seed ended, what there is to say of a failure, and processor seconds."""

    seed: int
    outcome: str
    explanation: str
    seconds: float


def ended(seed: int, device: str, in_a_hurry: bool) -> Ended:
    """Check the case of a seed; a failure is explained at once."""
    began, explanation = time.process_time(), ""
    outcome = outcome_of(case_of(seed), device=device)
    if outcome not in NO_FAILURE:
        outcome, explanation = "failed", explain(seed, device=device, in_a_hurry=in_a_hurry)
    return Ended(seed, outcome, explanation, time.process_time() - began)


def prepare() -> None:
    """Set up a process that checks cases."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")


def checked(seeds: range, device: str, processes: int, limit: float | None) -> Iterator[Ended]:
    """Check the cases of some seeds, in this process or several; none is begun after ``limit`` seconds."""
    deadline = time.monotonic() + (float("inf") if limit is None else limit)
    waiting = (seed for seed in seeds if time.monotonic() < deadline)
    if processes == 1:
        return (ended(seed, device, limit is not None) for seed in waiting)
    return _in_processes(processes, waiting, device, limit is not None)


def _in_processes(processes: int, seeds: Iterator[int], *rest: Any) -> Iterator[Ended]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, prepare) as pool:

        def submit(number: int) -> set[Future[Ended]]:
            return {pool.submit(ended, seed, *rest) for seed in islice(seeds, number)}

        running = submit(processes)
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            running |= submit(len(done))
            yield from (future.result() for future in done)


def run_cases(
    cases: Iterable[Ended],
    report: Callable[[str], None],
    write: Callable[[dict[str, Any]], None],
    every: int = 50,
) -> None:
    """Count how cases end, and tell of what failed.

    Args:
        cases: as they end.
        report: gets lines about the progress and what failed.
        write: gets the result of the cases so far, every so many cases and at the end.
        every: how many.
    """
    outcomes: Counter[str] = Counter()
    sketches: Counter[str] = Counter()
    layers: Counter[str] = Counter()
    failures: list[int] = []
    processor_seconds, number = 0.0, 0

    def tell() -> None:
        report(f"{number}: {dict(outcomes)}, {round(processor_seconds)} s")
        write(
            {
                "cases": number,
                "failures": sorted(failures),
                "outcomes": dict(sorted(outcomes.items())),
                "sketched_with": dict(sorted(sketches.items())),
                "layers_in_sketched_cases": dict(sorted(layers.items())),
                "processor_seconds": round(processor_seconds),
            }
        )

    for number, result in enumerate(cases, start=1):
        outcomes[result.outcome] += 1
        processor_seconds += result.seconds
        if result.outcome == "failed":
            failures.append(result.seed)
            report(result.explanation)
        if result.outcome == "sketched":
            case = case_of(result.seed)
            sketches.update({text.split(":")[0] for _, text in case.rules})
            layers.update(set().union(*(node.kinds() for node in case.nodes)))
        if number % every == 0:
            tell()
    if number % every or not number:
        tell()


def arguments() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--first", type=int, default=1000, help="seed of the first case")
    parser.add_argument("--case", type=int, help="the seed of one case to run")
    parser.add_argument("--mutations", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="cpu", help="where the cases run: cpu or cuda")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seconds", type=float, help="after which no case is begun")
    return parser.parse_args()


def main() -> None:
    """Run what the command line asks for; the exit code is 1 where something failed."""
    options = arguments()
    if options.device != "cpu":  # read when CUDA starts: repeatable products, none in TF32
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
    prepare()
    if options.case is not None:
        print(fuzz_check.check(case_of(options.case), device=options.device))
        return
    results: list[dict[str, Any]] = []

    def write(result: dict[str, Any]) -> None:
        results.append(result)
        result["command"] = " ".join([COMMAND, *sys.argv[1:]])
        result["torch"] = torch.__version__
        if options.device != "cpu":
            result["device"] = torch.cuda.get_device_name(options.device)
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(result, indent=1) + "\n")

    if options.mutations:
        write({"cases_until_found": {n: cases_until_found(n, options.first) for n in MUTATIONS}})
        failed = None in results[-1]["cases_until_found"].values()
    else:
        seeds = range(options.first, options.first + options.cases)
        cases = checked(seeds, options.device, options.processes, options.seconds)
        report = lambda text: print(text, flush=True)  # noqa: E731
        run_cases(cases, report, write, every=50 if options.seconds is None else 10)
        failed = bool(results[-1]["failures"])
    print(json.dumps(results[-1], indent=1))
    sys.exit(failed)


if __name__ == "__main__":
    main()
