r"""Is this gradient unbiased? A statistical test for our modules and for yours.

The mean of many sketched gradients is compared with autograd's exact one, entry by entry, with a
z-test at a Bonferroni-corrected level, and along a few directions in which small biases of many
entries add up (the exact gradient itself, and random signs).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from backsketch import ops
from backsketch.arithmetic import spread_batch
from backsketch.estimators import Estimator, Exact, Sketch
from backsketch.nn.swap import Swapped, exact
from backsketch.untouched import seed_torch

__all__ = ["Moments", "UnbiasedReport", "check_unbiased", "gradient_moments"]

_LEVEL = 1e-6
_NUM_DIRECTIONS = 8
_RARE = 40.0
_AT_ONCE = 25  # gradients in memory
_RELATIVE_ROUNDING = 1e-5
_ROUNDING_OF_OTHERS = 1e-7

Draw = Callable[[], dict[str, Tensor]]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class Moments:
    """Running moments of the deviation of one gradient tensor from its exact value."""

    exact: Tensor
    draws: int = 0
    rounding: float | Tensor = 0.0
    """Deviation of an entry that is rounding, not bias: both gradients are sums in finite precision."""
    first: Tensor = field(init=False)
    second: Tensor = field(init=False)
    fourth: Tensor = field(init=False)
    largest: float = 0.0
    directions: Tensor = field(init=False)
    along: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        # Each of two numbers is at most half a unit of its last digit off: much, where digits are few.
        last_digit = torch.finfo(self.exact.dtype).eps
        self.exact = self.exact.detach().double()
        least = _RELATIVE_ROUNDING * _largest(self.exact) + 1e-12
        of_entries = last_digit * self.exact.abs()
        self.rounding = torch.as_tensor(self.rounding).to(of_entries).clamp(min=least) + of_entries
        self.first, self.second, self.fourth = (torch.zeros_like(self.exact) for _ in range(3))
        generator = torch.Generator().manual_seed(0)
        shape = (_NUM_DIRECTIONS, self.exact.numel())
        signs = torch.randint(2, shape, generator=generator).to(self.exact) * 2 - 1
        self.directions = torch.cat([self.exact.flatten()[None], signs])

    def add(self, gradient: Tensor) -> None:
        """Take one sketched gradient into account."""
        self.add_all([gradient])

    def add_all(self, gradients: Sequence[Tensor]) -> None:
        """Take several into account, in fewer operations."""
        d = torch.stack([g.detach() for g in gradients]).double() - self.exact
        self.draws += len(gradients)
        squares = d.square()
        self.first += d.sum(0)
        self.second += squares.sum(0)
        self.fourth += squares.square().sum(0)
        self.largest = max(self.largest, _largest(d))
        self.along.append(d.flatten(1) @ self.directions.T)

    @property
    def variance(self) -> Tensor:
        """``E‖estimate − exact‖²``, summed over the entries (a float64 scalar)."""
        return self.second.sum() / self.draws

    @property
    def mean(self) -> Tensor:
        """Mean of the sketched gradients."""
        return self.exact + self.first / self.draws


@dataclass
class UnbiasedReport:
    """What :func:`check_unbiased` measured: per tensor the largest z and the relative variance."""

    draws: int
    threshold: float
    largest_z: dict[str, float]
    relative_variance: dict[str, float]

    def __str__(self) -> str:
        lines = [f"unbiased within |z| < {self.threshold:.2f} over {self.draws} draws"]
        for name, z in self.largest_z.items():
            lines.append(
                f"  {name}: largest |z| {z:.2f}, E‖err‖²/‖g‖² {self.relative_variance[name]:.3g}"
            )
        return "\n".join(lines)


def check_unbiased(
    module_or_estimator: nn.Module | Sketch,
    *inputs: Any,
    draws: int = 2000,
    reference: nn.Module | None = None,
    seed: int = 0,
    **options: Any,
) -> UnbiasedReport:
    """Raise unless the mean of many sketched gradients is the exact gradient.

    Args:
        module_or_estimator: a module with sketches in it, in training mode (it is copied, not changed);
            or a layer estimator, which is tried on a linear layer.
        *inputs: arguments of the module's forward; floating-point tensors get their gradients checked,
            too. For an estimator: ``x`` ``(*, in)``, ``weight`` ``(out, in)`` and ``bias`` ``(out,)``, or
            nothing for a random case.
        draws: number of sketched gradients. The smallest bias that can be seen shrinks as
            ``1 / sqrt(draws)``.
        reference: a module with the exact backward, for a module whose randomness is its own; by
            default the same module inside :func:`backsketch.exact`.
        seed: for the cotangent and for the module's own randomness (dropout), which is the same in
            every draw. The global random streams are left as they were.

        **options: keyword arguments of the module's forward. A batch that is a dictionary may be given as it is.

    Returns:
        An :class:`UnbiasedReport` with the largest z and the relative variance of each tensor.

    Raises:
        AssertionError: a gradient is biased. The message names the tensor, the entry, the measured and
            the expected value.
        ValueError: nothing in the module is sketched, or it is in eval mode.

    Example:
        >>> import backsketch as bs
        >>> report = bs.testing.check_unbiased(bs.Rows(keep=0.5), draws=500)
        >>> sorted(report.largest_z)
        ['bias', 'weight', 'x']
    """
    moments = gradient_moments(
        module_or_estimator, *inputs, draws=draws, reference=reference, seed=seed, **options
    )
    tests = sum(m.exact.numel() + _NUM_DIRECTIONS + 1 for m in moments.values())
    threshold = _normal_quantile(1 - _LEVEL / (2 * max(tests, 1)))
    for name, m in moments.items():
        _check_entries(name, m, threshold)
        _check_directions(name, m, threshold)
    return UnbiasedReport(
        draws,
        threshold,
        {name: float(_z(m).abs().max()) if m.exact.numel() else 0.0 for name, m in moments.items()},
        {name: float(m.variance / m.exact.square().sum()) for name, m in moments.items()},
    )


def gradient_moments(
    module_or_estimator: nn.Module | Sketch,
    *inputs: Any,
    draws: int = 2000,
    reference: nn.Module | None = None,
    seed: int = 0,
    **options: Any,
) -> dict[str, Moments]:
    """The moments behind :func:`check_unbiased`: of each gradient, the deviation from exact."""
    if draws < 2:
        raise ValueError(f"draws must be at least 2; got {draws}")
    if isinstance(module_or_estimator, nn.Module):
        arguments = spread_batch(module_or_estimator, inputs, options)
        sketched, precise = _module_draws(module_or_estimator, arguments, reference, seed)
    elif options:
        raise TypeError(f"an estimator is tried on x, weight and bias; got also {sorted(options)}")
    else:
        sketched, precise = _estimator_draws(module_or_estimator, inputs, seed)
    exact_gradients = precise()
    # Gradients that vanish by symmetry (of the keys' bias under softmax) are rounding and nothing else.
    scale = max((_largest(g) for g in exact_gradients.values()), default=0.0)
    moments = {
        name: Moments(gradient, rounding=_ROUNDING_OF_OTHERS * scale)
        for name, gradient in exact_gradients.items()
    }
    for first in range(0, draws, _AT_ONCE):
        found = [sketched() for _ in range(min(_AT_ONCE, draws - first))]
        for name in moments:
            moments[name].add_all([gradients[name] for gradients in found])
    return moments


# --------------------------------------------------------------------------------------------------
# Gradients
# --------------------------------------------------------------------------------------------------


def _estimator_draws(estimator: Any, inputs: tuple[Any, ...], seed: int) -> tuple[Draw, Draw]:
    if not isinstance(estimator, Estimator):
        raise ValueError(f"check_unbiased needs a module or a layer estimator; got {estimator!r}")
    generator = torch.Generator().manual_seed(seed)
    defaults = [torch.randn(shape, generator=generator) for shape in ((16, 6), (8, 6), (8,))]
    if inputs:
        defaults[2] = torch.zeros(inputs[1].shape[0]) if len(inputs) > 1 else defaults[2]
        if len(inputs) == 1:
            defaults[1] = torch.randn(8, inputs[0].shape[-1], generator=generator)
    values = [*inputs, *defaults[len(inputs) :]]
    leaves = {
        name: v.detach().clone().requires_grad_()
        for name, v in zip(("x", "weight", "bias"), values)
    }
    shape = (*leaves["x"].shape[:-1], leaves["weight"].shape[0])
    cotangent = torch.randn(shape, generator=generator).to(leaves["x"])

    def gradients(sketch: Estimator) -> dict[str, Tensor]:
        y = ops.linear(leaves["x"], leaves["weight"], leaves["bias"], sketch)
        return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), cotangent)))

    return lambda: gradients(estimator), lambda: gradients(Exact())


def _module_draws(
    module: nn.Module, arguments: Arguments, reference: nn.Module | None, seed: int
) -> tuple[Draw, Draw]:
    sketched = [m for m in module.modules() if isinstance(m, Swapped)]
    if reference is None and not sketched:
        raise ValueError(
            "nothing in this module is sketched: call bs.sketch_(module, ...) first, or give the exact "
            "module as reference"
        )
    if sketched and not any(m.training for m in sketched):
        raise ValueError(
            "the module is in eval mode, where sketches do not act: call module.train()"
        )

    def draw(model: nn.Module, is_exact: bool) -> dict[str, Tensor]:
        with _frozen(model, seed):
            return _module_gradients(model, arguments, is_exact, seed)

    model = copy.deepcopy(module)
    other = copy.deepcopy(module if reference is None else reference)
    return lambda: draw(model, False), lambda: draw(other, True)


def _module_gradients(
    model: nn.Module, arguments: Arguments, is_exact: bool, seed: int
) -> dict[str, Tensor]:
    leaves: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad}
    inputs = [_leaf(f"input[{i}]", value, leaves) for i, value in enumerate(arguments[0])]
    options = {name: _leaf(f"input[{name!r}]", v, leaves) for name, v in arguments[1].items()}
    with exact(model) if is_exact else nullcontext():
        outputs = model(*inputs, **options)
    outputs = [y for y in _tensors(outputs) if y.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(y.shape, generator=generator).to(y) for y in outputs]
    # As a training step does it: torch.autograd.grad is not for every model (reentrant checkpoints).
    for leaf in leaves.values():
        leaf.grad = None
    torch.autograd.backward(outputs, cotangents)
    return {n: leaf.grad for n, leaf in leaves.items() if leaf.grad is not None}


def _leaf(name: str, value: Any, leaves: dict[str, Tensor]) -> Any:
    """An argument whose gradient is checked, too, if it can have one."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    # A clone with the strides of the user's tensor: non-contiguous inputs are a case to test.
    leaf = value.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    leaves[name] = leaf
    return leaf


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)


@contextmanager
def _frozen(model: nn.Module, seed: int) -> Iterator[None]:
    """The same dropout masks in every draw, and buffers (running statistics) put back afterwards."""
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    with torch.random.fork_rng():
        seed_torch(seed)
        yield
    with torch.no_grad():
        for name, b in model.named_buffers():
            b.copy_(buffers[name])


# --------------------------------------------------------------------------------------------------
# Statistics
# --------------------------------------------------------------------------------------------------


def _largest(tensor: Tensor) -> float:
    return float(tensor.detach().abs().max()) if tensor.numel() else 0.0


def _standard_error(m: Moments) -> Tensor:
    mean = m.first / m.draws
    variance = (m.second / m.draws - mean * mean).clamp(min=0)
    return (variance / (m.draws - 1)).sqrt()


def _allowance(m: Moments, threshold: float) -> Tensor:
    """What the normal law misses of rare events, in absolute terms, per entry.

    An entry that deviated in a handful of draws only (a row of small inclusion probability) is a
    Poisson count, whose sample variance may be zero while its mean is off by one event in ``draws``.
    So is one that never deviated from a value a little too large: a row that is nearly always drawn, and
    was never missed. Where nothing in the tensor is random there are no such rows.
    """
    effective = m.second.square() / m.fourth.clamp(min=1e-300)
    rare = threshold**2 * m.largest / m.draws
    mean = m.first / m.draws
    variance = m.second / m.draws - mean.square()
    is_random = variance.sum() > 1e-10 * mean.square().sum()
    never_missed = (variance <= 1e-10 * mean.square()) & is_random
    vanishing = threshold**2 * m.mean.abs() / m.draws
    return torch.where(effective < _RARE, rare, torch.where(never_missed, vanishing, 0.0))


def _z(m: Moments) -> Tensor:
    deviation = (m.first / m.draws).abs() - m.rounding
    return deviation.clamp(min=0) / _standard_error(m).clamp(min=1e-300)


def _check_entries(name: str, m: Moments, threshold: float) -> None:
    if not m.exact.numel():
        return
    deviation = (m.first / m.draws).abs()
    bound = threshold * _standard_error(m) + _allowance(m, threshold) + m.rounding
    excess = (deviation - bound).flatten()
    if bool((excess <= 0).all()):
        return
    # Named: the entry that is farthest out, in units of what was allowed. NaN counts as far.
    worst = int((deviation / bound).flatten().nan_to_num(nan=torch.inf).argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), m.exact.shape))
    measured, expected = float(m.mean.flatten()[worst]), float(m.exact.flatten()[worst])
    raise AssertionError(
        f"the gradient of {name!r} is biased: entry {index} has mean {measured:.6g} over {m.draws} draws, "
        f"expected {expected:.6g} (z = {float(_z(m).flatten()[worst]):.1f}, allowed {threshold:.1f}; "
        f"{int((excess > 0).sum())} of {excess.numel()} entries are out of bounds)"
    )


def _check_directions(name: str, m: Moments, threshold: float) -> None:
    along = torch.cat(m.along)
    mean, error = along.mean(0), along.std(0) / math.sqrt(m.draws)
    scale = m.directions.abs() @ torch.as_tensor(m.rounding).expand_as(m.exact).flatten()
    # Directions have no rare events of their own, but inherit those of the entries.
    heavy = along.square().sum(0).square() / along.pow(4).sum(0).clamp(min=1e-300) < _RARE
    rare = torch.where(heavy, threshold**2 * along.abs().amax(0) / m.draws, 0.0)
    out = ~(mean.abs() <= threshold * error + scale + rare)
    if bool(out.any()):
        i = int(out.nonzero()[0])
        expected = float(m.directions[i] @ m.exact.flatten())
        which = "along the exact gradient" if i == 0 else f"along random direction {i}"
        raise AssertionError(
            f"the gradient of {name!r} is biased {which}: inner product {expected + float(mean[i]):.6g} over "
            f"{m.draws} draws, expected {expected:.6g} (z = {float(mean[i] / error[i]):.1f}, allowed "
            f"{threshold:.1f}); no single entry stands out"
        )


def _normal_quantile(p: float) -> float:
    return math.sqrt(2) * float(torch.erfinv(torch.tensor(2 * p - 1, dtype=torch.float64)))
