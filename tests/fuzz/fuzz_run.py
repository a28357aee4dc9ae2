"""Fuzz at length, or show that deliberate errors are found.

    PYTHONPATH=tests python tests/fuzz/fuzz_run.py --cases 1000 --out results/fuzz/result.json
    PYTHONPATH=tests python tests/fuzz/fuzz_run.py --mutations --out results/fuzz/mutations.json

A failing case is shrunk and printed; pasted into ``fuzz_check.check`` it fails again.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz_check
import pytest
import torch
from fuzz_cases import Case, cases
from hypothesis import HealthCheck, Phase, given, note, reject, seed, settings

from backsketch.sampling import operators
from backsketch.sampling.stream import mix
from mutations import drop_the_weights, shift_the_indices

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


MUTATIONS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "a forgotten weight": drop_the_weights,
    "a shared seed": share_the_seed,
    "a wrong row": shift_the_indices,
}


# Runs -----------------------------------------------------------------------------------------------


def fuzz(number: int, start: int, phases: list[Phase], after: Callable[[Case, str], None]) -> None:
    """Check ``number`` random cases; ``after`` is told of each. The first failure is shrunk and raised."""

    @seed(start)
    @settings(
        max_examples=number,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=phases,
    )
    @given(cases())
    def run(case: Case) -> None:
        note(f"fails: {case!r}")
        try:
            outcome = fuzz_check.check(case)
        except fuzz_check.Rejected:
            after(case, "rejected")
            reject()
        after(case, outcome)

    run()


def run_cases(number: int, start: int) -> dict[str, Any]:
    """Counts of what was checked; raises at a failure."""
    outcomes: collections.Counter[str] = collections.Counter()
    sketches: collections.Counter[str] = collections.Counter()
    layers: collections.Counter[str] = collections.Counter()
    began = time.perf_counter()

    def after(case: Case, outcome: str) -> None:
        outcomes[outcome] += 1
        if outcome == "sketched":
            sketches.update(text.split(":")[0] for _, text in case.rules)
            layers.update(set(re.findall(r"\w+", ", ".join(map(str, case.nodes)))))
        if sum(outcomes.values()) % 50 == 0:
            print(f"{dict(outcomes)}, {time.perf_counter() - began:.0f} s", flush=True)

    fuzz(number, start, [Phase.generate, Phase.shrink], after)
    return {
        "cases": outcomes["sketched"] + outcomes["refused"],
        "failures": 0,
        "outcomes": dict(outcomes),
        "sketches": dict(sorted(sketches.items())),
        "layers": dict(sorted(layers.items())),
        "seconds": round(time.perf_counter() - began),
    }


def cases_until_found(mutation: str, start: int, limit: int = 100) -> int | None:
    """After how many cases a mutation is noticed; None if not within ``limit``."""
    checked = 0

    def after(case: Case, outcome: str) -> None:
        nonlocal checked
        checked += outcome != "rejected"

    with pytest.MonkeyPatch.context() as patch:
        MUTATIONS[mutation](patch)
        try:
            fuzz(limit, start, [Phase.generate], after)
        except fuzz_check.Failure:
            return checked + 1
    return None


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--mutations", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    if options.mutations:
        found = {name: cases_until_found(name, options.seed) for name in MUTATIONS}
        result: dict[str, Any] = {"cases_until_found": found}
    else:
        result = run_cases(options.cases, options.seed)
    result["command"] = "PYTHONPATH=tests python tests/fuzz/fuzz_run.py " + " ".join(sys.argv[1:])
    result["seed"], result["torch"] = options.seed, torch.__version__
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
