"""What every case must satisfy: the same values forward, exact restoration, unbiased gradients.

The mean of the sketched gradients is compared with the exact gradient, tensor by tensor, along the exact gradient
itself and along the direction in which other draws deviate. A direction passes if the deviation is within

    z * standard error + rare + noise

where z is a Bonferroni bound over all directions of a thousand cases, ``rare`` is an empirical Bernstein
term (what one unseen event of the size of the largest seen one would change), and ``noise`` is twice the
distance between the exact gradient in the dtype of the case, rounded in a few ways, and in float64. A direction
that fails is looked at again with more draws from other seeds, and only one that fails every time is a failure:
heavy tails pass, a bias does not.
"""

from __future__ import annotations

import copy
import math
import statistics
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from fuzz_cases import Case
from fuzz_modules import SIZES, Model
from torch import Tensor, nn

import backsketch as bs
from backsketch.nn.swap import is_swapped
from backsketch.regions.state import RunsExactly
from backsketch.untouched import seed_torch

DRAWS = (60, 300, 2000)
QUICK = (60, 200)  # for what is known to fail
Z = 5.7  # two-sided 1e-8: 1,000 cases of 100 directions at a level of 1e-3
ORDER_OF_SUMS = 5e-6
SCALES = (1.0, 1.19, 1.41, 1.68)
"""Of the cotangents. Gradients are linear in them, and at each scale they are rounded anew."""
DIRECTIONS = ("the gradient", "the deviation of other draws")
Gradients = dict[str, Tensor]


class Rejected(Exception):
    """The case says nothing: PyTorch itself refuses the module, or computes something else the second time."""


class Failure(AssertionError):
    """A property does not hold."""


def check(case: Case, draws: tuple[int, ...] = DRAWS, device: str = "cpu") -> str:
    """Check one case, with a number of draws for each look at what deviates, on a device.

    Returns:
        How it ended: ``sketched``; ``refused``, by an error of the library that names its reason; or ``left
        exact``, where all that was asked for are regions that run exactly and say why.

    Raises:
        Rejected: see there.
        Failure: a property does not hold. Any other exception is a failure, too.
    """
    with warnings.catch_warnings(), _repeatable(device):
        # PyTorch says it once in a process, and where would depend on the cases before.
        warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
        return _checked(Run(case, device), draws)


def _checked(run: Run, draws: tuple[int, ...]) -> str:
    case, model = run.case, run.model
    before = _snapshot(model)
    try:
        report = bs.sketch_(model, {pattern: bs.parse(text) for pattern, text in case.rules})
    except ValueError:
        _same(before, _snapshot(model), "after a refused sketch_")
        return "refused"
    if not any(map(is_swapped, model.modules())):
        raise Failure("sketch_ accepted the rules and sketched nothing")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RunsExactly)  # that, and why, is in the report
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
    """A case, built: the model, its data, a fixed cotangent for each output, and the exact gradients.

    All random numbers of it come from the CPU, so that a case is the same on every device.
    """

    def __init__(self, case: Case, device: str = "cpu") -> None:
        seed_torch(case.seed)
        self.case, self.device = case, torch.device(device)
        self.dtype = torch.bfloat16 if case.dtype == "bfloat16" else torch.float32
        self.model = self._build().to(self.device, self.dtype)
        # Rows of unequal size, or scores would have nothing to find.
        sizes = torch.linspace(0.3, 1.5, case.batch).view(-1, *[1] * len(SIZES[case.domain]))
        x = torch.randn(case.batch, *SIZES[case.domain]) * sizes
        self.x = x.to(self.device, self.dtype)
        self.cotangents = torch.randn(case.batch, 512).to(self.device)
        if case.channels_last:
            self.model.to(memory_format=torch.channels_last)
            self.x = self.x.contiguous(memory_format=torch.channels_last)
        try:
            self._try_deterministically()
            self.exact_outputs = self.values(self.model)
            self.exact = self.gradients(self.model)
            again = self.gradients(self.model)
            self.random_states = self.streams()
            self.noise = self._noise()
        except (RuntimeError, ValueError, UserWarning) as error:
            raise Rejected(str(error)) from error
        self._same_again(again)

    def streams(self) -> list[Tensor]:
        """The state of every global random stream that the case may draw from."""
        states = [torch.get_rng_state()]
        return [*states, torch.cuda.get_rng_state(self.device)] if self._is_cuda else states

    @property
    def _is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def _try_deterministically(self) -> None:
        """Raise where PyTorch has no deterministic kernel on a GPU: there two passes would differ anyway."""
        if self._is_cuda:
            torch.use_deterministic_algorithms(True)
            try:
                self.gradients(self.model)
            finally:
                torch.use_deterministic_algorithms(True, warn_only=True)

    def _same_again(self, again: Gradients) -> None:
        try:
            _equal(again, self.exact, "the second time, without a sketch")
        except Failure as difference:
            if self._is_cuda:
                raise Rejected(str(difference)) from difference
            raise

    def _build(self) -> Model:
        return Model(self.case.nodes, self.case.domain, self.case.output).train()

    def _noise(self) -> dict[str, float]:
        """Distance of each exact gradient from the one in float64, which the dtype of the case explains.

        The largest one at a few scales of the cotangents: a single rounding may be a lucky one, above all where
        the terms of a sum cancel, as in the gradient of a bias below a batch norm, which is rounding and nothing
        else. At least the relative noise of the median tensor, and what another order of a sum may change in
        float32.
        """
        wide = self._build()  # again instead of a copy: structures hold closures over their modules
        wide.load_state_dict(self.model.state_dict())
        wide.to(self.device, torch.float64)
        gradients = self.gradients(wide, self.x.double(), autocast=False)
        noise = dict.fromkeys(self.exact, 0.0)
        for scale in SCALES:
            for n, g in self.gradients(self.model, scale=scale).items():
                distance = float((g.double() / scale - gradients[n]).norm())
                noise[n] = max(noise[n], distance)
        sizes = {n: float(g.norm()) for n, g in gradients.items()}
        usual = statistics.median(noise[n] / max(sizes[n], 1e-300) for n in noise)
        return {n: max(noise[n], max(usual, ORDER_OF_SUMS) * sizes[n]) for n in noise}

    def values(self, model: nn.Module) -> list[Tensor]:
        """A copy of every tensor of the output."""
        with _buffers_untouched(model):
            return [y.detach().clone() for y in self._outputs(model, self.x)]

    def _outputs(self, model: nn.Module, x: Tensor, autocast: bool = True) -> list[Tensor]:
        """Every tensor of the output; dropout masks are the same in each call."""
        seed_torch(self.case.seed + 1)
        enabled = autocast and self.case.dtype == "autocast"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=enabled):
            return list(_tensors(model(x)))

    def gradients(
        self,
        model: nn.Module,
        x: Tensor | None = None,
        autocast: bool = True,
        scale: float = 1.0,
    ) -> Gradients:
        """Gradients of the parameters and of the input, accumulated over the micro-batches.

        Args:
            model: the case's, or another of the same structure.
            x: by default that of the case.
            autocast: whether to run as the case does.
            scale: of the cotangents.
        """
        x = (self.x if x is None else x).detach().clone(memory_format=torch.preserve_format)
        x.requires_grad_()
        for parameter in model.parameters():
            parameter.grad = None
        with _buffers_untouched(model):
            for part in x.chunk(self.case.micro_batches):
                outputs = [y for y in self._outputs(model, part, autocast) if y.requires_grad]
                torch.autograd.backward(outputs, [self._cotangent(y, scale) for y in outputs])
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return {**found, "input": x.grad}

    def _cotangent(self, y: Tensor, scale: float) -> Tensor:
        rows = scale * torch.linspace(0.2, 2, len(y)).to(self.device)[:, None]
        return (rows * self.cotangents[: len(y), : y.numel() // len(y)]).view(y.shape).to(y)


@contextmanager
def _repeatable(device: str) -> Iterator[None]:
    """On a GPU: deterministic kernels where there are any, float32 without TF32, no warnings of that."""
    if not device.startswith("cuda"):
        yield
        return
    warnings.filterwarnings("ignore", "(?i).*(determinis|cuda|cudnn|cublas)", UserWarning)
    cudnn = torch.backends.cudnn
    cudnn.deterministic, cudnn.conv.fp32_precision = True, "ieee"
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


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
    if not all(map(torch.equal, run.streams(), run.random_states)):
        raise Failure("the global random stream is not where an exact pass leaves it")
    suspects = {(name, which) for name in run.exact for which in DIRECTIONS}
    for number, draws in enumerate(looks):
        bs.seed(1000 * run.case.seed + number)
        found = {}
        for name, deviations in _deviations(run, draws).items():
            for which, along in _directions(run.exact[name], deviations).items():
                if (name, which) in suspects and _is_out(along, run.noise[name]):
                    found[name, which] = along
        if not found:
            return
        suspects = set(found)
    (name, which), along = next(iter(found.items()))
    raise Failure(
        f"biased: {name} along {which}: off by {float(along.mean()):.4g} of a norm of "
        f"{float(run.exact[name].norm()):.4g} over {len(along)} draws, "
        f"{float(along.mean() / _standard_error(along)):.1f} standard errors"
    )


def _deviations(run: Run, draws: int) -> dict[str, Tensor]:
    """Name to ``(draws, entries)``: deviations of sketched gradients from the exact one, in float64."""
    seen: dict[str, list[Tensor]] = {name: [] for name in run.exact}
    dtypes = {name: g.dtype for name, g in run.exact.items()}
    for _ in range(draws):
        ours = run.gradients(run.model)
        if {name: g.dtype for name, g in ours.items()} != dtypes:
            raise Failure(
                f"gradients of {sorted(ours)} instead of {sorted(dtypes)}, or of others' dtypes"
            )
        for name, g in ours.items():
            seen[name].append(g.flatten())
    return {
        n: torch.stack(rows).double() - run.exact[n].double().flatten() for n, rows in seen.items()
    }


def _directions(exact: Tensor, deviations: Tensor) -> dict[str, Tensor]:
    """Name to ``(draws,)``: components of the deviations along the gradient, and along their own mean.

    The mean is that of the first half of the draws, and the components are those of the second half, so that they
    are independent: a bias in whatever direction is seen as if it had been known before.
    """
    half = len(deviations) // 2
    mean = deviations[:half].mean(0)
    gradient = exact.double().flatten()
    return {
        DIRECTIONS[0]: deviations @ gradient / gradient.norm().clamp(min=1e-300),
        DIRECTIONS[1]: deviations[half:] @ mean / mean.norm().clamp(min=1e-300),
    }


def _is_out(along: Tensor, noise: float) -> bool:
    """Whether the mean of ``(draws,)`` is farther from zero than it may be."""
    mean = along.mean()
    rare = (along - mean).abs().max() * Z * Z / (2 * len(along))
    return not bool(mean.abs() <= Z * _standard_error(along) + rare + 2 * noise + 1e-12)


def _standard_error(along: Tensor) -> Tensor:
    return along.std().clamp(min=1e-300) / math.sqrt(len(along))


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
