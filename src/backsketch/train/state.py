"""All that a run must remember to continue exactly: into a checkpoint and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

import backsketch as bs
from backsketch.train.config import mismatch
from backsketch.train.history import History

if TYPE_CHECKING:
    from backsketch.train.loop import Trainer


def state_of(trainer: Trainer, random: list[dict[str, Any]]) -> dict[str, Any]:
    """The state of a run, with the random streams of all processes.

    The order of the data and its augmentation need no state: they follow from the seed, the epoch
    and the step.
    """
    scaler = trainer.accelerator.scaler
    return {
        "config": trainer.job.as_dict(),
        "sketched": trainer.sketched,
        "data": trainer.data.summary(),
        "processes": trainer.accelerator.num_processes,
        "model": trainer.core.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "scheduler": trainer.schedule.state_dict(),
        "scaler": None if scaler is None else scaler.state_dict(),
        "epoch": trainer.epoch,
        "step": trainer.step,
        "random": random,
        "history": trainer.history.state_dict(),
        "auto": None if trainer.auto is None else trainer.auto.state_dict(),
    }


def misfit(trainer: Trainer, state: Mapping[str, Any]) -> str | None:
    """Why this state cannot be continued by this trainer, in words; None where it can."""
    processes, data = trainer.accelerator.num_processes, trainer.data.summary()
    if reason := mismatch(state["config"], trainer.job.as_dict()):
        return reason
    if state["sketched"] != trainer.sketched:
        return "one is exact and the other is sketched"
    if state["data"] != data:
        return f"it was made with the data {state['data']}, not {data}"
    if state["processes"] != processes:
        return f"it was made with {state['processes']} processes, not {processes}"
    return None


def restore(trainer: Trainer, state: Mapping[str, Any]) -> None:
    """Bring a trainer to a state that fits it."""
    trainer.core.load_state_dict(state["model"])
    trainer.optimizer.load_state_dict(state["optimizer"])
    trainer.schedule.load_state_dict(state["scheduler"])
    if trainer.accelerator.scaler is not None:
        trainer.accelerator.scaler.load_state_dict(state["scaler"])
    trainer.epoch, trainer.step = state["epoch"], state["step"]
    trainer.history = History.from_state(state["history"])
    if trainer.auto is not None:
        trainer.auto.load_state_dict(trainer, state["auto"])
    _set_random_state(trainer, state["random"][trainer.accelerator.process_index])


def random_state(trainer: Trainer) -> dict[str, Any]:
    """The random streams of this process: PyTorch's, the device's, the sketches'."""
    device = trainer.accelerator.device
    return {
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "sketch": bs.get_rng_state() if trainer.sketched else None,
    }


def _set_random_state(trainer: Trainer, state: Mapping[str, Any]) -> None:
    device = trainer.accelerator.device
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["device"] is not None:
        torch.cuda.set_rng_state(state["device"], device)
    if state["sketch"] is not None:
        bs.set_rng_state(state["sketch"])
