"""Checkpoints: written whole or not at all, read with checks and without running code."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import backsketch as bs
from backsketch.files import write_whole
from backsketch.train.errors import TrainError

CHECKPOINT = "checkpoint.pt"  # in the folder of a run
FORMAT = 3
DIGEST = "digest"
KINDS: Mapping[str, type | tuple[type, ...]] = {
    "format": int,
    "config": Mapping,
    "sketched": bool,
    "data": Mapping,
    "processes": int,
    "model": Mapping,
    "optimizer": Mapping,
    "scheduler": Mapping,
    "scaler": (Mapping, type(None)),
    "epoch": int,
    "step": int,
    "random": list,
    "history": Mapping,
    "auto": (Mapping, type(None)),
}


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write `state` to `path` whole or not at all: whatever goes wrong, the earlier file stays.

    Raises:
        UserError: the disk is full, say.
    """
    content = {"format": FORMAT, **state}
    buffer = io.BytesIO()  # PyTorch's own file writer does not say why it failed
    torch.save({**content, DIGEST: digest(content)}, buffer)
    write_whole(path, buffer.getvalue())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, onto the CPU.

    Raises:
        TrainError: no such file, not a checkpoint, damaged, or changed since it was written.
    """
    if not path.is_file():
        raise TrainError(f"there is no checkpoint {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and runtime errors all mean the same to the user
        raise TrainError(
            f"the checkpoint {path} is damaged or not a checkpoint; remove it to start afresh"
        ) from error
    if not isinstance(state, dict) or "format" not in state:
        raise TrainError(f"{path} is not a checkpoint of backsketch train")
    if state["format"] != FORMAT:
        raise TrainError(
            f"the checkpoint {path} has format {state['format']!r}, this version reads {FORMAT}"
        )
    if reason := _fault(state):
        raise TrainError(
            f"the checkpoint {path} is damaged or not a checkpoint of backsketch train: {reason}"
        )
    return state


def digest(value: Any) -> str:
    """A hash of nested containers, tensors and plain values, the same in every process."""
    found = hashlib.sha256()
    _feed(found.update, value)
    return found.hexdigest()


def _feed(update: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        update(f"tensor {value.dtype} {tuple(value.shape)}".encode())
        update(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        update(f"mapping {len(value)}".encode())
        for key, item in value.items():
            update(f"key {key!r}".encode())
            _feed(update, item)
    elif isinstance(value, (list, tuple)):
        update(f"list {len(value)}".encode())
        for item in value:
            _feed(update, item)
    else:
        update(f"{type(value).__name__} {value!r}".encode())


def _fault(state: dict[str, Any]) -> str:
    """What is wrong with the content, in words; empty where nothing is. Takes the digest out."""
    expected = state.pop(DIGEST, None)
    if missing := set(KINDS) - set(state):
        return f"it lacks {min(missing)!r}"
    if unknown := set(state) - set(KINDS):
        return f"it has an unknown part {min(map(str, unknown))!r}"
    for name, kind in KINDS.items():
        if not isinstance(state[name], kind):
            return f"its {name!r} is {type(state[name]).__name__}"
    return "" if digest(state) == expected else "it was changed after it was written"


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
