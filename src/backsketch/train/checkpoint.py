"""Checkpoints: written whole or not at all, read with checks and without running code."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import backsketch as bs
from backsketch.train.errors import TrainError

FORMAT = 3
KEYS = {
    *("format", "config", "sketched", "data", "processes"),
    *("model", "optimizer", "scheduler", "scaler"),
    *("epoch", "step", "random", "history", "auto"),
}


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write `state` to `path` atomically: a crash leaves the earlier file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    torch.save({"format": FORMAT, **state}, partial)
    os.replace(partial, path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, onto the CPU.

    Raises:
        TrainError: no such file, not a checkpoint, or damaged.
    """
    if not path.is_file():
        raise TrainError(f"there is no checkpoint {path} to resume from")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and runtime errors all mean the same to the user
        raise TrainError(
            f"the checkpoint {path} is damaged or not a checkpoint; remove it to start afresh"
        ) from error
    if not isinstance(state, dict) or set(state) != KEYS:
        raise TrainError(f"{path} is not a checkpoint of backsketch train")
    if state["format"] != FORMAT:
        raise TrainError(
            f"the checkpoint {path} has format {state['format']}, this version reads {FORMAT}"
        )
    return state


def random_state(device: torch.device, sketched: bool) -> dict[str, Any]:
    """The random streams of this process: PyTorch's, the device's, the sketches'."""
    return {
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "sketch": bs.get_rng_state() if sketched else None,
    }


def set_random_state(device: torch.device, state: Mapping[str, Any]) -> None:
    """Set the streams to what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["device"] is not None:
        torch.cuda.set_rng_state(state["device"], device)
    if state["sketch"] is not None:
        bs.set_rng_state(state["sketch"])
