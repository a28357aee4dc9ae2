"""Fuzz at length, rerun one case, or show that deliberate errors are found.

PYTHONPATH=tests python tests/fuzz/fuzz_run.py --cases 1000 --out results/fuzz/fuzz.json
PYTHONPATH=tests python tests/fuzz/fuzz_run.py --case 17
PYTHONPATH=tests python tests/fuzz/fuzz_run.py --mutations --out results/fuzz/mutations.json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
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


def outcome_of(case: Case, draws: tuple[int, ...] = fuzz_check.DRAWS) -> str:
    """How a case ends: what :func:`fuzz_check.check` returns, ``rejected``, or the kind of failure."""
    try:
        return fuzz_check.check(case, draws)
    except fuzz_check.Rejected:
        return "rejected"
    except fuzz_check.Failure as failure:
        return str(failure).split(":")[0]
    except Exception as error:
        return type(error).__name__


def shrink(case: Case) -> Case:
    """The smallest case found that ends as ``case`` does, leaving out one thing after the other."""

    def kind(case: Case) -> str:
        return outcome_of(case, fuzz_check.QUICK).split(" ")[0]

    wanted = kind(case)
    candidates, tries = smaller(case), 0
    while (candidate := next(candidates, None)) and tries < MAX_SHRINKS:
        tries += 1
        if kind(candidate) == wanted:
            case, candidates = candidate, smaller(candidate)
    return case


def explain(seed: int, draws: tuple[int, ...] = fuzz_check.DRAWS) -> str:
    """What failed in the case of a seed, how to run it again, and a small case that fails alike."""
    try:
        fuzz_check.check(case_of(seed), draws)
        reason = "it passed when it was run again"
    except Exception as error:
        reason = "".join(traceback.format_exception_only(error)).strip()
        reason += "\n" + "".join(traceback.format_tb(error.__traceback__)[-3:])
    return (
        f"case {seed} fails: {reason}"
        f"run it again:  PYTHONPATH=tests python tests/fuzz/fuzz_run.py --case {seed}\n"
        f"it is          {case_of(seed)!r}\n"
        f"made smaller   {shrink(case_of(seed))!r}"
    )


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


def run_cases(
    seeds: range, report: Callable[[str], None], write: Callable[[dict[str, Any]], None]
) -> None:
    """Check the cases of some seeds; what failed is explained at once.

    Args:
        seeds: the cases.
        report: gets lines about the progress and what failed.
        write: gets the result of the cases so far, every fifty cases and at the end.
    """
    outcomes: Counter[str] = Counter()
    sketches: Counter[str] = Counter()
    layers: Counter[str] = Counter()
    failures = []
    began = time.process_time()
    for number, seed in enumerate(seeds, start=1):
        case = case_of(seed)
        outcome = outcome_of(case)
        if outcome not in NO_FAILURE:
            failures.append(seed)
            outcome = "failed"
            report(explain(seed))
        outcomes[outcome] += 1
        if outcome == "sketched":
            sketches.update({text.split(":")[0] for _, text in case.rules})
            layers.update(set().union(*(node.kinds() for node in case.nodes)))
        if number % 50 == 0 or number == len(seeds):
            seconds = round(time.process_time() - began)
            report(f"{number}: {dict(outcomes)}, {seconds} s")
            write(
                {
                    "cases": number,
                    "failures": failures,
                    "outcomes": dict(sorted(outcomes.items())),
                    "sketched_with": dict(sorted(sketches.items())),
                    "layers_in_sketched_cases": dict(sorted(layers.items())),
                    "processor_seconds": seconds,
                }
            )


def main() -> None:
    """Run what the command line asks for; the exit code is 1 where something failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--first", type=int, default=1000, help="seed of the first case")
    parser.add_argument("--case", type=int, help="the seed of one case to run")
    parser.add_argument("--mutations", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    if options.case is not None:
        print(fuzz_check.check(case_of(options.case)))
        return
    results: list[dict[str, Any]] = []

    def write(result: dict[str, Any]) -> None:
        results.append(result)
        result["command"] = " ".join([COMMAND, *sys.argv[1:]])
        result["torch"] = torch.__version__
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(result, indent=1) + "\n")

    if options.mutations:
        write({"cases_until_found": {n: cases_until_found(n, options.first) for n in MUTATIONS}})
        failed = None in results[-1]["cases_until_found"].values()
    else:
        seeds = range(options.first, options.first + options.cases)
        run_cases(seeds, lambda text: print(text, flush=True), write)
        failed = bool(results[-1]["failures"])
    print(json.dumps(results[-1], indent=1))
    sys.exit(failed)


if __name__ == "__main__":
    main()
