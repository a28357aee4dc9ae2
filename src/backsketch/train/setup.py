"""Optimizer, schedule and accelerator from the configuration: three small registries."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    SequentialLR,
)

from backsketch.train.config import TrainConfig
from backsketch.train.errors import TrainError


def make_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """The optimizer, without weight decay on biases, norms and other vectors."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    # The gradient scaler of fp16 may skip a step, which a fused one hides from accelerate.
    fused = config.precision != "fp16"
    if config.optimizer == "adamw":
        return AdamW(groups, lr=config.lr, fused=fused)
    return SGD(
        groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=fused
    )


def one_cycle(optimizer: Optimizer, steps: int, warmup: int) -> LRScheduler:
    """Half a cosine up from 1/25 and half a cosine down to 0 (Smith and Topin 2018)."""
    (peak,) = {group["lr"] for group in optimizer.param_groups}
    rising = warmup if warmup > 1 else 0  # one step of warm-up would begin at its end: 0 over 0
    # One step more than there are, whose rate of about zero no step is wasted on.
    return OneCycleLR(
        optimizer, peak, total_steps=steps + 1, pct_start=rising / (steps + 1), cycle_momentum=False
    )


def cosine(optimizer: Optimizer, steps: int, warmup: int) -> LRScheduler:
    """Linear warm-up, then half a cosine down to 0 (Loshchilov and Hutter 2017)."""
    return _after_warmup(optimizer, CosineAnnealingLR(optimizer, steps - warmup), warmup)


def constant(optimizer: Optimizer, steps: int, warmup: int) -> LRScheduler:
    """Linear warm-up, then constant."""
    return _after_warmup(optimizer, ConstantLR(optimizer, factor=1.0, total_iters=0), warmup)


def _after_warmup(optimizer: Optimizer, schedule: LRScheduler, warmup: int) -> LRScheduler:
    if warmup == 0:
        return schedule
    rise = LinearLR(optimizer, 1 / (warmup + 1), total_iters=warmup)
    return SequentialLR(optimizer, [rise, schedule], milestones=[warmup])


SCHEDULES: Mapping[str, Callable[[Optimizer, int, int], LRScheduler]] = {
    "one-cycle": one_cycle,
    "cosine": cosine,
    "constant": constant,
}


def make_schedule(optimizer: Optimizer, config: TrainConfig, steps: int) -> LRScheduler:
    """PyTorch's learning rate schedule over `steps` optimizer steps, of which a share warms up."""
    warmup = min(round(config.warmup * steps), steps - 1)
    return SCHEDULES[config.schedule](optimizer, steps, warmup)


def make_accelerator(device: str, precision: str) -> Accelerator:
    """Processes, device and precision; under torchrun or `accelerate launch` one per process.

    Raises:
        TrainError: the device is not there, or cannot compute in that precision.
    """
    wanted = _device(device)
    cpu = wanted.type == "cpu"
    if cpu and precision == "fp16":
        raise TrainError("fp16 needs a GPU; on a CPU use bf16 or fp32")
    if wanted.index is not None:
        torch.accelerator.set_device_index(wanted.index)
    # The state is a process-wide singleton that refuses a second precision; each run has its own.
    AcceleratorState._reset_state(reset_partial_state=True)
    mixed = "no" if precision == "fp32" else precision
    accelerator = Accelerator(cpu=cpu, mixed_precision=mixed)
    if accelerator.device.type != wanted.type:
        raise TrainError(
            f"device {device} was asked for, but {accelerator.device} is what there is"
        )
    return accelerator


def _device(name: str) -> torch.device:
    available = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return available or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise TrainError(f"there is no device called {name!r}; say cpu, cuda or cuda:0") from error
    there = device.type == "cpu" or (available is not None and available.type == device.type)
    if not there or (device.index or 0) >= max(torch.accelerator.device_count(), 1):
        raise TrainError(f"the device {name} is not available on this machine")
    return device
