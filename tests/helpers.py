"""What several test files share: a small network, its inputs, its gradients, quiet consoles, tiny sweeps."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import backsketch as bs
from backsketch.theory.noise import GradientSums

ROOT = Path(__file__).resolve().parents[1]

# --------------------------------------------------------------------------------------------------
# Processes
# --------------------------------------------------------------------------------------------------


def warm_forkserver() -> None:
    """Start, once, the process from which others fork theirs: it has imported what they need."""
    modules = [
        "backsketch",
        "pytest",
        "torch.distributed.fsdp",
        "torch.distributed.tensor",
        "torch._dynamo",
    ]
    # What is not installed is left out by the server itself.
    multiprocessing.set_forkserver_preload(
        [*modules, "backsketch.experiments.problems", "distributed"]
    )
    forkserver.ensure_running()


# --------------------------------------------------------------------------------------------------
# Models and inputs
# --------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """One layer of each common kind, small: a convolution, a pointwise one, attention, an MLP."""

    def __init__(self, dim: int = 8, hidden: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, dim, 3)
        self.pointwise = nn.Conv2d(dim, dim, 1)
        self.attention = nn.MultiheadAttention(dim, 2, batch_first=True)
        self.head = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, 3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.pointwise(torch.relu(self.stem(x))).flatten(2).transpose(1, 2)
        return self.head(h + self.attention(h, h, h, need_weights=False)[0])


def images(n: int = 6, shape: tuple[int, int, int] = (2, 6, 6)) -> Tensor:
    """``n`` random images of ``(channels, height, width)``; the default suits ``Net``."""
    return torch.randn(n, *shape)


class Called(nn.Module):
    """A model with another way of calling it, for ``check_unbiased``.

    It is not copied, so that what is compiled stays compiled.
    """

    def __init__(self, model: nn.Module, call: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.model = model
        self.__dict__["call"] = model if call is None else call

    def forward(self, *inputs: Any) -> Any:
        return self.call(*inputs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Called:
        return self


# --------------------------------------------------------------------------------------------------
# Gradients
# --------------------------------------------------------------------------------------------------


def gradients(
    model: nn.Module,
    *inputs: Tensor,
    call: Callable[..., Any] | None = None,
    cotangent: Tensor | None = None,
) -> list[Tensor]:
    """Gradients of the trainable parameters, then of the inputs that require one.

    They are those of the sum of squares of the (first) output, or of its product with ``cotangent``.
    """
    outputs = (call or model)(*inputs)
    y = outputs[0] if isinstance(outputs, tuple) else outputs
    leaves = [p for p in (*model.parameters(), *inputs) if p.requires_grad]
    loss = y.square().sum() if cotangent is None else (y * cotangent).sum()
    return list(torch.autograd.grad(loss, leaves))


def named_gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Gradients of a loss by the name of the parameter."""
    names, params = zip(*[(n, p) for n, p in model.named_parameters() if p.requires_grad])
    return dict(zip(names, torch.autograd.grad(loss, params)))


def monte_carlo(
    model: nn.Module,
    batches: list[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    draws: int = 3,
) -> tuple[float, float]:
    """Extra variance and noise scale from ordinary training passes, by none of the means that planning has."""
    parameters, sums, error = list(model.parameters()), GradientSums(), 0.0
    for batch in batches:
        with bs.exact(model):
            exact = torch.autograd.grad(loss_fn(model, batch), parameters)
        sums.add(exact)
        for _ in range(draws):
            noisy = torch.autograd.grad(loss_fn(model, batch), parameters)
            error += sum(float((a - b).square().sum()) for a, b in zip(noisy, exact)) / draws
    return error / len(batches) / sums.sgd_variance, sums.noise_scale


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    """Whether two lists of tensors are the same bit for bit."""
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors are the same bit for bit, with NaN at the same entries, or both None."""
    if a is None or b is None:
        return a is b
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(0), b.nan_to_num(0))


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    """Whether two models have the same parameters, bit for bit."""
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


# --------------------------------------------------------------------------------------------------
# Files and consoles
# --------------------------------------------------------------------------------------------------


def quiet() -> Any:
    """A console that prints nothing."""
    from rich.console import Console

    return Console(quiet=True)


def invoke(*arguments: str) -> Any:
    """What the command line does with some arguments, in this process."""
    from typer.testing import CliRunner

    from backsketch import cli

    return CliRunner().invoke(cli.make_app(), list(arguments))


def sweep_config(folder: Path, description: dict[str, Any]) -> Any:
    """The description of a sweep, read from a file as the command line does."""
    from backsketch.experiments import SweepConfig

    path = folder / "tiny.json"
    path.write_text(json.dumps(description))
    return SweepConfig.load(path)


def script(path: str) -> ModuleType:
    """A Python file of the repository outside the package, imported."""
    file = ROOT / path
    spec = importlib.util.spec_from_file_location(f"script_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look their annotations up there
    spec.loader.exec_module(module)
    return module
