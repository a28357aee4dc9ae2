"""`result.json` and the table that compares an exact and a sketched run."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from backsketch.files import write_whole
from backsketch.train.history import History
from backsketch.train.loop import Trainer

PACKAGES = (
    "backsketch",
    "torch",
    "accelerate",
    "datasets",
    "scikit-learn",
    "numpy",
    "tokenizers",
    "transformers",
)
CURVE_POINTS = 400


def result_of(trainer: Trainer, setup_seconds: float) -> dict[str, Any]:
    """What a finished run has to say, with plain values.

    Keys: `test_accuracy`, `test_loss` at the end; `train_loss`, mean over the last epoch; `steps`;
    `wall_seconds`, preparation included; `train_seconds`, `step_seconds_median`, training steps
    only; `backward_flops_ratio`, matrix products of a backward pass over those of the exact one;
    `peak_saved_bytes`, kept for the backward in one step; `extra_variance`, mean over the
    measurements in `extra_variance_by_epoch`; `diverged`; `config`, `data`, `versions`, `device`,
    `processes`; for the sketch `auto` what it chose, changed and advises, under that key (the arithmetic
    is then the mean over the steps of the run, the bytes those at its end); `evaluations` and `curve`, the run
    over time. Of text also `perplexity`, `tokens_per_second` and `sample`; its losses are in nats a token, and its
    accuracy is that of the next token.
    """
    history, final = trainer.history, trainer.history.evaluations[-1]
    train_loss = trainer.last_epoch_loss()
    return {
        "test_accuracy": final.accuracy,
        "test_loss": final.loss,
        "train_loss": train_loss,
        "steps": len(history.losses),
        "wall_seconds": history.wall_seconds + setup_seconds,
        "train_seconds": history.train_seconds,
        "step_seconds_median": history.median_step_seconds(),
        **trainer.cost,
        **trainer.data.outcome(trainer.config, trainer.core, history),
        **({} if trainer.auto is None else {"auto": trainer.auto.result()}),
        "extra_variance": history.mean_extra_variance(),
        "extra_variance_by_epoch": {str(k): v for k, v in history.extra_variances.items()},
        "diverged": not math.isfinite(train_loss),
        "config": trainer.config.as_dict(),
        "data": trainer.data.summary(),
        "versions": versions(),
        "device": device_name(trainer.accelerator.device),
        "processes": trainer.accelerator.num_processes,
        "evaluations": [vars(e) for e in history.evaluations],
        "curve": curve(history),
    }


def curve(history: History, points: int = CURVE_POINTS) -> dict[str, list[float]]:
    """Loss against steps and training seconds, averaged over at most `points` stretches."""
    count = len(history.losses)
    edges = torch.linspace(0, count, min(count, points) + 1).round().int().tolist()
    seconds = history.cumulative_seconds()
    stretches = [history.losses[a:b] for a, b in pairwise(edges)]
    return {
        "step": edges[1:],
        "seconds": [seconds[edge - 1] for edge in edges[1:]],
        "train_loss": [sum(losses) / len(losses) for losses in stretches],
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    found["torch"] = torch.__version__
    return found


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's architecture and the threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.machine()}, {torch.get_num_threads()} threads"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write whole or not at all; numbers that JSON cannot hold become null."""
    text = json.dumps(_finite(content), indent=2, allow_nan=False)
    write_whole(path, f"{text}\n".encode())


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
