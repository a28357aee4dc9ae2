"""What every case must satisfy: the same values forward, exact restoration, unbiased gradients.

The mean of the sketched gradients is compared with the exact gradient along the exact gradient itself and along
random directions, tensor by tensor. A direction passes if the deviation is within

    z * standard error + rare + noise

where z is a Bonferroni bound over all directions of a thousand cases, ``rare`` is an empirical Bernstein
term (what one unseen event of the size of the largest seen one would change), and ``noise`` is the distance
between the exact gradient in the dtype of the case and in float64. A direction that fails is looked at again
with more draws from other seeds, and only one that fails every time is a failure: heavy tails pass, a bias
does not.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from fuzz_cases import Case
from fuzz_modules import SIZES, Model
from torch import Tensor, nn

import backsketch as bs
from backsketch.nn.swap import is_swapped

DRAWS = (80, 400, 3000)
Z = 5.9  # two-sided 4e-9: 1,000 cases of 300 directions at a level of 1e-3
FEW_DIRECTIONS = 3  # random directions for each tensor
Gradients = dict[str, Tensor]


class Rejected(Exception):
    """The case says nothing: PyTorch itself refuses the module, or the sketch has nothing to act on."""


class Failure(AssertionError):
    """A property does not hold."""


def check(case: Case) -> str:
    """Check one case; return how it ended: ``sketched``, or ``refused`` with an error that the library explains.

    Raises:
        Rejected: see there.
        Failure: a property does not hold.
    """
    run = Run(case)
    exact = run.exact()
    model = run.model
    before = _snapshot(model)
    try:
        bs.sketch_(model, {pattern: bs.parse(text) for pattern, text in case.rules})
    except ValueError:
        _same(before, _snapshot(model), "after a refused sketch_")
        return "refused"
    if not any(map(is_swapped, model.modules())):
        raise Rejected("nothing was sketched")
    _same_values(exact.outputs, run.outputs(model))
    _unbiased(run, exact.gradients)
    bs.restore_(model)
    _same(before, _snapshot(model), "after restore_")
    _equal(run.gradients(model), exact.gradients, "after restore_")
    return "sketched"


class Run:
    """A case, built: the model, its data and a fixed cotangent for each output."""

    def __init__(self, case: Case) -> None:
        torch._dynamo.reset()
        torch.manual_seed(case.seed)
        self.case = case
        self.model = Model(case.nodes, case.domain, case.output).train()
        x = torch.randn(case.batch, *SIZES[case.domain])
        # Rows of unequal size, or scores would have nothing to find.
        x *= torch.linspace(0.3, 1.5, case.batch).view(-1, *[1] * (x.ndim - 1))
        self.cotangents = torch.randn(case.batch, 512)
        dtype = torch.bfloat16 if case.dtype == "bfloat16" else torch.float32
        self.model.to(dtype)
        self.x = x.to(dtype)
        if case.channels_last:
            self.model.to(memory_format=torch.channels_last)
            self.x = self.x.contiguous(memory_format=torch.channels_last)

    def exact(self) -> Any:
        try:
            first = Exact(self.outputs(self.model), self.gradients(self.model))
            wide = self._in_double()
        except (RuntimeError, ValueError, UserWarning) as error:
            raise Rejected(str(error)) from error
        if not all(bool(g.isfinite().all()) for g in first.gradients.values()):
            raise Rejected("the exact gradient is not finite")
        self.noise = {n: float((g.double() - wide[n]).norm()) for n, g in first.gradients.items()}
        _equal(self.gradients(self.model), first.gradients, "the second time, unsketched")
        return first

    def _in_double(self) -> Gradients:
        # Structures hold closures over their modules, so the model is built again instead of copied.
        other = Model(self.case.nodes, self.case.domain, self.case.output).train()
        other.load_state_dict(self.model.state_dict())
        return self.gradients(other.double(), self.x.double(), wide=True)

    def outputs(
        self, model: nn.Module, x: Tensor | None = None, wide: bool = False
    ) -> list[Tensor]:
        """Every tensor of the output; dropout masks are the same in each call, buffers are left as they were."""
        torch.manual_seed(self.case.seed + 1)
        with self._autocast(wide), _buffers_untouched(model):
            return list(_tensors(model(self.x if x is None else x)))

    def gradients(self, model: nn.Module, x: Tensor | None = None, wide: bool = False) -> Gradients:
        """Gradients of the parameters and of the input, accumulated over the micro-batches."""
        x = (self.x if x is None else x).detach().clone(memory_format=torch.preserve_format)
        x.requires_grad_()
        for parameter in model.parameters():
            parameter.grad = None
        with _buffers_untouched(model):  # a checkpoint updates them in the backward pass
            for part in x.chunk(self.case.micro_batches):
                outputs = [y for y in self.outputs(model, part, wide) if y.requires_grad]
                torch.autograd.backward(outputs, [self._cotangent(y) for y in outputs])
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return {**found, "input": x.grad}

    def _cotangent(self, y: Tensor) -> Tensor:
        rows = torch.linspace(0.2, 2, len(y))[:, None]
        return (rows * self.cotangents[: len(y), : y.numel() // len(y)]).view(y.shape).to(y)

    def _autocast(self, wide: bool) -> torch.autocast:
        enabled = self.case.dtype == "autocast" and not wide
        return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


class Exact:
    """Outputs and gradients of the model without sketches."""

    def __init__(self, outputs: list[Tensor], gradients: Gradients) -> None:
        self.outputs, self.gradients = [y.detach().clone() for y in outputs], gradients


# --------------------------------------------------------------------------------------------------
# Unbiased
# --------------------------------------------------------------------------------------------------


def _unbiased(run: Run, exact: Gradients) -> None:
    directions = {name: _directions(g) for name, g in exact.items()}
    suspects = {name: torch.ones(len(d), dtype=torch.bool) for name, d in directions.items()}
    message = ""
    for number, draws in enumerate(DRAWS):
        bs.seed(1000 * run.case.seed + number)
        seen: dict[str, list[Tensor]] = {name: [] for name in exact}
        for _ in range(draws):
            ours = run.gradients(run.model)
            if list(ours) != list(exact):
                raise Failure(f"gradients of {sorted(ours)} instead of {sorted(exact)}")
            for name, g in ours.items():
                seen[name].append(directions[name] @ (g.double() - exact[name].double()).flatten())
        message = ""
        for name, rows in seen.items():
            suspects[name] &= _is_out(torch.stack(rows), run.noise[name])
            if bool(suspects[name].any()):
                message = message or _describe(name, torch.stack(rows), suspects[name], exact[name])
        if not message:
            return
    raise Failure(f"biased: {message}")


def _directions(exact: Tensor) -> Tensor:
    """Unit vectors ``(directions, entries)``, float64: the gradient's own direction, then random ones."""
    flat = exact.double().flatten()
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(FEW_DIRECTIONS, flat.numel(), generator=generator, dtype=torch.float64)
    rows = torch.cat([flat[None], random])
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-300)


def _is_out(deviations: Tensor, noise: float) -> Tensor:
    """``(directions,)``: whether the mean of ``(draws, directions)`` is farther from zero than it may be."""
    n = len(deviations)
    mean, error = deviations.mean(0), deviations.std(0) / math.sqrt(n)
    largest = (deviations - mean).abs().amax(0)
    rare = largest * Z * Z / (2 * n)
    return ~(mean.abs() <= Z * error + rare + 3 * noise + 1e-12)


def _describe(name: str, deviations: Tensor, out: Tensor, exact: Tensor) -> str:
    i = int(out.nonzero()[0])
    mean = float(deviations.mean(0)[i])
    error = float(deviations.std(0)[i]) / math.sqrt(len(deviations))
    which = "its own direction" if i == 0 else f"random direction {i}"
    return (
        f"{name} along {which}: off by {mean:.4g} of a norm of {float(exact.norm()):.4g} over "
        f"{len(deviations)} draws, {mean / max(error, 1e-300):.1f} standard errors"
    )


# --------------------------------------------------------------------------------------------------
# Equal
# --------------------------------------------------------------------------------------------------


def _same_values(exact: list[Tensor], ours: list[Tensor]) -> None:
    for number, (a, b) in enumerate(zip(exact, ours, strict=True)):
        if not torch.equal(a, b) or a.stride() != b.stride() or a.dtype != b.dtype:
            raise Failure(f"output {number} differs: {_difference(a, b)}")


def _equal(ours: Gradients, exact: Gradients, when: str) -> None:
    for name, g in exact.items():
        if name not in ours or not torch.equal(ours[name], g):
            raise Failure(f"the gradient of {name} differs {when}: {_difference(ours[name], g)}")


def _difference(a: Tensor, b: Tensor) -> str:
    return (
        f"by {float((a.double() - b.double()).abs().max()):.3g}, strides {a.stride()} and {b.stride()}, "
        f"{a.dtype} and {b.dtype}"
    )


def _snapshot(model: nn.Module) -> dict[str, Any]:
    """Classes, attributes and values of everything in the model."""
    parts: dict[str, Any] = {}
    for name, module in model.named_modules():
        parts[f"class of {name}"] = type(module)
        parts[f"attributes of {name}"] = sorted(module.__dict__)
    for name, tensor in model.state_dict().items():
        parts[f"value of {name}"] = copy.deepcopy(tensor)
    return parts


def _same(before: dict[str, Any], after: dict[str, Any], when: str) -> None:
    for key, value in before.items():
        other = after.get(key)
        same = torch.equal(value, other) if isinstance(value, Tensor) else value == other
        if not same:
            raise Failure(f"{key} is {other} {when}, was {value}")


@contextmanager
def _buffers_untouched(model: nn.Module) -> Iterator[None]:
    before = {name: b.clone() for name, b in model.named_buffers()}
    yield
    with torch.no_grad():
        for name, b in model.named_buffers():
            b.copy_(before[name])


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    else:
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)
