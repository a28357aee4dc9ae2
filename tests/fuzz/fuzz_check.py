"""What every case must satisfy: the same values forward, exact restoration, unbiased gradients.

The mean of the sketched gradients is compared with the exact gradient along the exact gradient itself and along
random directions, tensor by tensor. A direction passes if the deviation is within

    z * standard error + rare + noise

where z is a Bonferroni bound over all directions of a thousand cases, ``rare`` is an empirical Bernstein
term (what one unseen event of the size of the largest seen one would change), and ``noise`` is three times the
distance between the exact gradient in the dtype of the case and in float64. A direction that fails is looked at
again with more draws from other seeds, and only one that fails every time is a failure: heavy tails pass, a bias
does not.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from fuzz_cases import Case
from fuzz_modules import SIZES, Model
from torch import Tensor, nn

import backsketch as bs
from backsketch.nn.swap import is_swapped

DRAWS = (60, 300, 2000)
QUICK = (60, 200)  # for what is known to fail
Z = 5.9  # two-sided 4e-9: 1,000 cases of 300 directions at a level of 1e-3
RANDOM_DIRECTIONS = 3  # for each tensor
Gradients = dict[str, Tensor]


class Rejected(Exception):
    """The case says nothing: PyTorch itself refuses the module."""


class Failure(AssertionError):
    """A property does not hold."""


def check(case: Case, draws: tuple[int, ...] = DRAWS) -> str:
    """Check one case, with a number of draws for each look at what deviates.

    Returns:
        How it ended: ``sketched``; ``refused``, by an error of the library that names its reason; or ``left
        exact``, where all that was asked for are regions that run exactly and say why.

    Raises:
        Rejected: see there.
        Failure: a property does not hold. Any other exception is a failure, too.
    """
    run = Run(case)
    model = run.model
    before = _snapshot(model)
    try:
        report = bs.sketch_(model, {pattern: bs.parse(text) for pattern, text in case.rules})
    except ValueError:
        _same(before, _snapshot(model), "after a refused sketch_")
        return "refused"
    if not any(map(is_swapped, model.modules())):
        raise Failure("sketch_ accepted the rules and sketched nothing")
    _same_values(run.exact_outputs, run.values(model))
    _unbiased(run, draws)
    states = [site.state for site in report.sites if site.sketch is not None]
    left_exact = all(state is not None and state.status == "exact" for state in states)
    bs.restore_(model)
    _same(before, _snapshot(model), "after restore_")
    _equal(run.gradients(model), run.exact, "after restore_")
    return "left exact" if left_exact else "sketched"


# Runs -----------------------------------------------------------------------------------------------


class Run:
    """A case, built: the model, its data, a fixed cotangent for each output, and the exact gradients."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(case.seed)
        self.case = case
        self.dtype = torch.bfloat16 if case.dtype == "bfloat16" else torch.float32
        self.model = self._build().to(self.dtype)
        # Rows of unequal size, or scores would have nothing to find.
        sizes = torch.linspace(0.3, 1.5, case.batch).view(-1, *[1] * len(SIZES[case.domain]))
        self.x = (torch.randn(case.batch, *SIZES[case.domain]) * sizes).to(self.dtype)
        self.cotangents = torch.randn(case.batch, 512)
        if case.channels_last:
            self.model.to(memory_format=torch.channels_last)
            self.x = self.x.contiguous(memory_format=torch.channels_last)
        try:
            self.exact_outputs = self.values(self.model)
            self.exact = self.gradients(self.model)
        except (RuntimeError, ValueError, UserWarning) as error:
            raise Rejected(str(error)) from error
        _equal(self.gradients(self.model), self.exact, "the second time, without a sketch")
        self.random_state = torch.get_rng_state()
        self.noise = self._noise()

    def _build(self) -> Model:
        return Model(self.case.nodes, self.case.domain, self.case.output).train()

    def _noise(self) -> dict[str, float]:
        """Distance of each exact gradient from the one in float64, which the dtype of the case explains.

        The few entries of a bias may have been rounded luckily: at least the relative noise of the median tensor.
        """
        wide = self._build()  # again instead of a copy: structures hold closures over their modules
        wide.load_state_dict(self.model.state_dict())
        gradients = self.gradients(wide.double(), self.x.double(), autocast=False)
        noise = {n: float((g.double() - gradients[n]).norm()) for n, g in self.exact.items()}
        sizes = {n: float(g.norm()) for n, g in gradients.items()}
        usual = statistics.median(noise[n] / max(sizes[n], 1e-300) for n in noise)
        return {n: max(noise[n], usual * sizes[n]) for n in noise}

    def values(self, model: nn.Module) -> list[Tensor]:
        """A copy of every tensor of the output."""
        with _buffers_untouched(model):
            return [y.detach().clone() for y in self._outputs(model, self.x)]

    def _outputs(self, model: nn.Module, x: Tensor, autocast: bool = True) -> list[Tensor]:
        """Every tensor of the output; dropout masks are the same in each call."""
        torch.manual_seed(self.case.seed + 1)
        enabled = autocast and self.case.dtype == "autocast"
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            return list(_tensors(model(x)))

    def gradients(
        self, model: nn.Module, x: Tensor | None = None, autocast: bool = True
    ) -> Gradients:
        """Gradients of the parameters and of the input, accumulated over the micro-batches."""
        x = (self.x if x is None else x).detach().clone(memory_format=torch.preserve_format)
        x.requires_grad_()
        for parameter in model.parameters():
            parameter.grad = None
        with _buffers_untouched(model):
            for part in x.chunk(self.case.micro_batches):
                outputs = [y for y in self._outputs(model, part, autocast) if y.requires_grad]
                torch.autograd.backward(outputs, [self._cotangent(y) for y in outputs])
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return {**found, "input": x.grad}

    def _cotangent(self, y: Tensor) -> Tensor:
        rows = torch.linspace(0.2, 2, len(y))[:, None]
        return (rows * self.cotangents[: len(y), : y.numel() // len(y)]).view(y.shape).to(y)


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


# Unbiased -------------------------------------------------------------------------------------------


def _unbiased(run: Run, looks: tuple[int, ...]) -> None:
    run.gradients(run.model)  # the first pass of a region is exact
    if not torch.equal(torch.get_rng_state(), run.random_state):
        raise Failure("the global random stream is not where an exact pass leaves it")
    directions = {name: _directions(g) for name, g in run.exact.items()}
    suspects = {name: torch.ones(len(d), dtype=torch.bool) for name, d in directions.items()}
    message = ""
    for number, draws in enumerate(looks):
        bs.seed(1000 * run.case.seed + number)
        message = ""
        for name, deviations in _deviations(run, directions, draws).items():
            suspects[name] &= _is_out(deviations, run.noise[name])
            if bool(suspects[name].any()) and not message:
                message = _describe(name, deviations, suspects[name], run.exact[name])
        if not message:
            return
    raise Failure(f"biased: {message}")


def _directions(exact: Tensor) -> Tensor:
    """Unit vectors ``(directions, entries)``, float64: the gradient's own direction, then random ones."""
    flat = exact.double().flatten()
    generator = torch.Generator().manual_seed(0)
    shape = (RANDOM_DIRECTIONS, flat.numel())
    rows = torch.cat([flat[None], torch.randn(shape, generator=generator, dtype=torch.float64)])
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-300)


def _deviations(run: Run, directions: dict[str, Tensor], draws: int) -> dict[str, Tensor]:
    """Name to ``(draws, directions)``: deviations of sketched gradients from the exact one."""
    seen: dict[str, list[Tensor]] = {name: [] for name in directions}
    for _ in range(draws):
        ours = run.gradients(run.model)
        if {n: g.dtype for n, g in ours.items()} != {n: g.dtype for n, g in run.exact.items()}:
            raise Failure(
                f"gradients of {sorted(ours)} instead of {sorted(run.exact)}, or of others' dtypes"
            )
        for name, g in ours.items():
            seen[name].append(g.flatten())
    return {
        name: (torch.stack(rows).double() - run.exact[name].double().flatten()) @ directions[name].T
        for name, rows in seen.items()
    }


def _is_out(deviations: Tensor, noise: float) -> Tensor:
    """``(directions,)``: whether the mean of ``(draws, directions)`` is farther from zero than it may be."""
    n = len(deviations)
    mean, error = deviations.mean(0), deviations.std(0) / math.sqrt(n)
    rare = (deviations - mean).abs().amax(0) * Z * Z / (2 * n)
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


# Equal ----------------------------------------------------------------------------------------------


def _same_values(exact: list[Tensor], ours: list[Tensor]) -> None:
    for number, (a, b) in enumerate(zip(exact, ours, strict=True)):
        if a.dtype != b.dtype or a.stride() != b.stride() or not torch.equal(a, b):
            raise Failure(f"output {number} differs: {_difference(a, b)}")


def _equal(ours: Gradients, exact: Gradients, when: str) -> None:
    for name, g in exact.items():
        if name not in ours:
            raise Failure(f"{name} has no gradient {when}")
        if not torch.equal(ours[name], g):
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
