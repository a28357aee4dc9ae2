"""Measure a model, and put it back as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from backsketch.sampling import get_rng_state, set_rng_state
from backsketch.torch_private import buffers_of, checkpoints_allow_grad

__all__ = ["repeatable", "seed_torch", "untouched"]


def seed_torch(seed: int) -> None:
    """Seed PyTorch's random streams, as ``torch.manual_seed`` does, which is slow where there is no accelerator.

    That function then notes the call stack for each kind of device that may come into use later, and keeps
    the notes: several milliseconds and some kilobytes a call, more than a small model's backward pass.
    """
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


@contextmanager
def untouched(
    model: nn.Module, *, training: bool = False, seed: int | None = None
) -> Iterator[None]:
    """Afterwards buffers, modes and every random stream are as before.

    Args:
        model: any module.
        training: put a model that evaluates in training mode; parts that a training model keeps in eval
            mode stay there.
        seed: of PyTorch's stream inside; None leaves the stream where it is.
    """
    modes = {module: module.training for module in model.modules()}
    stream = get_rng_state()
    with repeatable(model, seed):
        try:
            if training and not model.training:
                model.train()
            yield
        finally:
            set_rng_state(stream)
            for module, mode in modes.items():
                module.training = mode


@contextmanager
def repeatable(model: nn.Module, seed: int | None) -> Iterator[None]:
    """PyTorch's stream and the buffers as before afterwards: two such blocks see the same dropout masks.

    What is checkpointed inside may be differentiated by ``torch.autograd.grad``, reentrant or not.
    """
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    buffers = [
        (buffers_of(module), name, buffer)
        for module in model.modules()
        for name, buffer in buffers_of(module).items()
    ]
    values = [(b, b.detach().clone()) for b in model.buffers()]
    with torch.random.fork_rng(devices=devices), checkpoints_allow_grad():
        if seed is not None:
            seed_torch(seed)
        try:
            yield
        finally:
            for own, name, buffer in buffers:  # a module may have assigned another
                own[name] = buffer
            with torch.no_grad():
                for buffer, value in values:
                    buffer.copy_(value)
