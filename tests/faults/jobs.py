"""What is killed: tiny trainings and sweeps, each with what must be the same whatever happened to it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import loader_loop
import torch
from torch import Tensor

from backsketch import cli
from steering import steered

__all__ = ["JOBS", "ROUND", "Job", "differences"]

CLOCKS = {
    *("wall_seconds", "train_seconds", "step_seconds", "step_seconds_median"),
    *("seconds", "versions", "machine"),
}
"""Names of what is measured by a clock, and may differ between equal runs."""


@dataclass(frozen=True)
class Job:
    """Something that can be started, interrupted and continued.

    Attributes:
        start: does all of it, in a process of its own; told whether to continue from what is there.
        ranks: how many processes it is made of.
        outcome: what has to be the same, from the files that it left.
        has_something: whether there is something to continue from.
        deaths: names of what may happen to it.
    """

    start: Callable[[bool], int | None]
    outcome: Callable[[Path], Any]
    has_something: Callable[[Path], bool]
    deaths: tuple[str, ...]
    ranks: int = 1
    environment: Mapping[str, str] = field(default_factory=dict)


def _command(*arguments: str) -> None:
    sys.argv = ["backsketch", *arguments]
    cli.main()


# --- trainings --------------------------------------------------------------------------------------

COMMON = (
    *("--limit-train=832", "--batch-size=64", "--epochs=4"),  # 52 steps
    *("--evaluations=2", "--threads=1", "--device=cpu"),
)


def _training(
    *options: str,
    compare: bool = False,
    ranks: int = 1,
    steering: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Job:
    """``backsketch train`` on the digits; `steering` decides what the sketch auto finds."""

    def start(resume: bool) -> None:
        with steering():
            _command("train", *COMMON, *options, "--out=out", *["--resume"] * resume)

    names = ("exact.pt", "checkpoint.pt") if compare else ("checkpoint.pt",)
    deaths = ("killed", "interrupted", "terminated", "disk full")
    return Job(
        start,
        lambda folder: _trained(folder / "out", names),
        lambda folder: any((folder / "out" / name).is_file() for name in names),
        deaths if ranks == 1 else ("rank killed", "rank killed", "terminated"),
        ranks,
    )


def _trained(out: Path, names: tuple[str, ...]) -> dict[str, Any]:
    found = {name: torch.load(out / name, weights_only=True) for name in names}
    for state in found.values():
        state.pop("digest")
    return {**found, "result.json": json.loads((out / "result.json").read_text())}


# --- sweeps -----------------------------------------------------------------------------------------

SWEEP = {
    "report": "depth",
    "parts": [
        {
            "problem": "depth",
            "fixed": {"width": 24, "draws": 40, "batch_size": 8, "residual": False},
            "grid": {"depth": [1, 2, 3, 4], "arm": ["grad_weight only", "shared: one mask"]},
        }
    ],
}


def _sweep(workers: int) -> Job:
    def start(resume: bool) -> None:
        Path("tiny.json").write_text(json.dumps(SWEEP))
        _command("sweep", "tiny.json", f"--workers={workers}", "--out=.")

    alone = ("killed", "interrupted", "terminated", "disk full")
    return Job(
        start,
        lambda folder: json.loads((folder / "tiny" / "sweep.json").read_text()),
        lambda folder: True,  # the same command continues
        ("killed", "terminated", "worker killed", "worker killed") if workers else alone,
    )


# --- a loop of one's own ----------------------------------------------------------------------------


def _own_loop() -> Job:
    return Job(
        loader_loop.run,
        lambda folder: torch.load(folder / "state.pt", weights_only=True),
        lambda folder: (folder / "state.pt").is_file(),
        ("killed", "worker killed", "worker killed"),
    )


VIT = ("--model=vit", "--dim=16", "--depth=1", "--patch=4", "--heads=2")
AUTO = ("--widths=64,64", "--sketch=auto")
REGIONS = '{"blocks.*.mlp": "region:keep=0.5,row_dims=2", "": "mask:keep=0.75"}'
JOBS: Mapping[str, Job] = {
    "mlp, rows": _training("--widths=32,32", "--sketch=rows:keep=0.5"),
    "mlp, compared": _training("--widths=32", "--sketch=int8", "--compare", compare=True),
    "vit, regions in bf16": _training(*VIT, f"--sketch={REGIONS}", "--precision=bf16"),
    "bagnet, columns, accumulated": _training(
        *("--model=bagnet", "--receptive-field=5", "--width=4", "--optimizer=sgd"),
        *("--sketch=columns:keep=0.5", "--grad-accumulation=2", "--limit-train=448"),
    ),
    "auto, a region": _training(*AUTO, steering=lambda: steered("save")),
    "auto, 8 bits and rounding": _training(
        *AUTO, steering=lambda: steered("quantized", in_8_bits=True)
    ),
    "auto, back to exact": _training(*AUTO, steering=lambda: steered("save", sketched=2.0)),
    "two ranks, rows": _training("--widths=32,32", "--sketch=rows:keep=0.5", ranks=2),
    "two ranks, auto": _training(*AUTO, steering=lambda: steered("save"), ranks=2),
    "own loop with a loader": _own_loop(),
    "sweep": _sweep(0),
    "sweep in two processes": _sweep(2),
}

ROUND = (
    *(
        "mlp, rows",
        "auto, a region",
        "sweep",
        "own loop with a loader",
        "auto, 8 bits and rounding",
    ),
    *("mlp, compared", "two ranks, rows", "bagnet, columns, accumulated", "auto, back to exact"),
    *("mlp, rows", "auto, a region", "vit, regions in bf16", "own loop with a loader", "sweep"),
    *("auto, 8 bits and rounding", "two ranks, auto", "mlp, compared", "auto, a region"),
    *("mlp, rows", "sweep in two processes"),
)
"""The jobs of twenty cases, the quick ones more often."""


# --- comparison -------------------------------------------------------------------------------------


def differences(a: Any, b: Any, where: str = "") -> Iterator[str]:
    """The places at which two outcomes differ, clocks apart; bit for bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.dtype != b.dtype or a.shape != b.shape or _bits(a) != _bits(b):
            yield where
    elif isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in [*a, *(k for k in b if k not in a)]:
            if key not in CLOCKS:
                yield from differences(a.get(key, ...), b.get(key, ...), f"{where}/{key}")
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b)):
            yield from differences(x, y, f"{where}/{i}")
    elif type(a) is not type(b) or a != b:
        yield where


def _bits(x: Tensor) -> bytes:
    return x.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
