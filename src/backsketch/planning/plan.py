"""``Plan``: which sketch goes where, what is expected of it, and what came of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from backsketch.estimators import Sketch, parse
from backsketch.planning.record import MaskOption, Option, Profile, SlotProfile
from backsketch.planning.slots import LossFn
from backsketch.planning.solve import choose
from backsketch.theory.cost import smaller_batch_ratio, time_to_target_ratio

__all__ = ["Bill", "Plan", "make_plan"]

_OBJECTIVES = ("time", "memory", "variance")
_SMALLER = (0.75, 0.5, 0.25)


@dataclass(frozen=True)
class Bill:
    """What a plan costs.

    Attributes:
        time_ratio: of a step, exact = 1.
        extra_variance: in units of SGD's.
        saved_bytes: kept for the backward.
        rho: time to a target relative to exact training.
        smaller_batch: the best fraction of the batch, and its own rho.
    """

    time_ratio: float
    extra_variance: float
    saved_bytes: int
    rho: float
    smaller_batch: tuple[float, float] = (1.0, 1.0)

    def __str__(self) -> str:
        return (
            f"a step takes {self.time_ratio:.2f} of exact, extra variance {self.extra_variance:.3f} of SGD's, "
            f"{self.saved_bytes / 2**20:.1f} MiB saved; time to a target {self.rho:.2f} of exact"
        )


@dataclass(frozen=True)
class Plan:
    """Rules for :func:`backsketch.sketch_`, with the bill.

    ``bs.sketch_(model, plan)`` applies it. ``reason`` says why a plan is exact, and what would be better.
    """

    texts: Mapping[str, str]
    predicted: Bill
    reason: str = ""
    exact_names: tuple[str, ...] = field(default=(), repr=False)
    _measured: list[Bill] = field(default_factory=list, repr=False, compare=False)

    @property
    def measured(self) -> Bill | None:
        """What :meth:`measure` found last, None before."""
        return self._measured[-1] if self._measured else None

    def measure(self, model: nn.Module, batches: Iterable[Any], loss_fn: LossFn) -> Bill:
        """Measure the bill on a model that this plan was applied to; ``predicted`` stands beside it.

        Args:
            model: after ``bs.sketch_(model, plan)``.
            batches: at least two.
            loss_fn: ``loss_fn(model, batch)`` returns the scalar mean loss of a batch.
        """
        from backsketch.planning.check import measured_bill

        self._measured.append(measured_bill(model, batches, loss_fn, self.predicted))
        return self._measured[-1]

    @property
    def rules(self) -> dict[str, Sketch | None]:
        """What :func:`backsketch.sketch_` reads: patterns and sketches, every layer exact in the exact plan."""
        if not self.texts:
            return dict.fromkeys(self.exact_names or ("*",), None)
        return {pattern: parse(text) for pattern, text in self.texts.items()}

    @property
    def is_exact(self) -> bool:
        """Whether nothing is sketched."""
        return not self.texts

    def __str__(self) -> str:
        lines = [f"{pattern or '(model)':<32} {text}" for pattern, text in self.texts.items()]
        return "\n".join([*lines, str(self.predicted), *([self.reason] if self.reason else [])])


def make_plan(
    profile: Profile,
    objective: str,
    max_extra_variance: float | None,
    max_saved_bytes: float | None,
    max_time: float | None,
) -> Plan:
    """See :meth:`Profile.plan`."""
    if objective not in _OBJECTIVES:
        raise ValueError(
            f"plan: objective must be one of {', '.join(_OBJECTIVES)}; got {objective!r}"
        )
    limits = {
        "max_extra_variance": max_extra_variance,
        "max_saved_bytes": max_saved_bytes,
        "max_time": max_time,
    }
    for name, limit in limits.items():
        if limit is not None and not limit > 0:
            raise ValueError(f"plan: {name} must be positive; got {limit!r}")
    if objective == "variance" and max_saved_bytes is None and max_time is None:
        raise ValueError(
            "plan: objective='variance' needs max_saved_bytes or max_time; exact has none"
        )
    if objective == "memory":
        max_extra_variance = 0.1 if max_extra_variance is None else max_extra_variance
        max_time = 1.1 if max_time is None else max_time
    found = _search(profile, objective, max_extra_variance, max_saved_bytes, max_time)
    if found is None:
        raise ValueError(
            f"plan: nothing meets {', '.join(f'{n}={v}' for n, v in limits.items() if v)}"
        )
    mask, options = found
    plan = _assembled(profile, mask, options)
    if objective == "time" and max_saved_bytes is None and max_time is None:
        return _or_better(profile, plan)
    return plan


@dataclass(frozen=True)
class _Below:
    """Every option below one mask."""

    mask: MaskOption | None
    costs: list[list[tuple[float, float, float]]]  # seconds, variance, bytes; the first is exact

    @property
    def variance(self) -> float:
        return self.mask.variance if self.mask else 0.0


def _below(profile: Profile, mask: MaskOption | None) -> _Below:
    live, growth = (mask.keep, mask.growth) if mask else (1.0, 1.0)
    costs = []
    for slot in profile.slots:
        rows = [(0.0, 0.0, 0.0)]
        rows += [(o.seconds(live), o.variance * growth, float(o.saved_bytes)) for o in slot.options]
        costs.append(rows)
    return _Below(mask, costs)


def _search(
    profile: Profile,
    objective: str,
    max_variance: float | None,
    max_bytes: float | None,
    max_time: float | None,
) -> tuple[MaskOption | None, list[Option | None]] | None:
    best: tuple[float, MaskOption | None, list[int]] | None = None
    for mask in (None, *profile.masks):
        below = _below(profile, mask)
        for picked in _candidates(profile, below, objective, max_variance, max_bytes, max_time):
            score = _score(profile, below, picked, objective)
            if best is None or score < best[0] - 1e-12:
                best = score, mask, picked
    if best is None:
        return None
    _, mask, picked = best
    return mask, [s.options[i - 1] if i else None for s, i in zip(profile.slots, picked)]


def _candidates(
    profile: Profile,
    below: _Below,
    objective: str,
    max_variance: float | None,
    max_bytes: float | None,
    max_time: float | None,
) -> list[list[int]]:
    """Choices on the frontier: for time, the fastest at each of a range of extra variances."""
    room = math.inf if max_variance is None else max_variance - below.variance
    byte_room = math.inf if max_bytes is None else max_bytes - profile.saved_bytes
    time_room = math.inf if max_time is None else (max_time - 1) * profile.step_seconds
    if room < 0:
        return []
    kind = {"time": 0, "variance": 1, "memory": 2}[objective]
    if objective != "time":
        found = [choose(below.costs, kind, (time_room, room, byte_room))]
        return [picked for picked in found if picked is not None]
    # rho is a product of two sums: its minimum lies on their frontier, which is walked.
    grid = [room] if math.isfinite(room) else [2.0]
    grid += [g for i in range(1, 25) if (g := 2.0 * (i / 24) ** 2.5) < grid[0]]
    solved = [choose(below.costs, 0, (time_room, g, byte_room)) for g in grid]
    return [picked for picked in solved if picked is not None]


def _score(profile: Profile, below: _Below, picked: Sequence[int], objective: str) -> float:
    seconds, variance, size = (
        math.fsum(rows[i][part] for rows, i in zip(below.costs, picked)) for part in range(3)
    )
    variance += below.variance
    if objective == "memory":
        return size
    if objective == "variance":
        return variance
    ratio = max(1 + seconds / profile.step_seconds, 0.0)
    return time_to_target_ratio(ratio, 1 + variance, profile.noise_scale)


def _assembled(profile: Profile, mask: MaskOption | None, options: Sequence[Option | None]) -> Plan:
    texts: dict[str, str] = {}
    live, growth = (mask.keep, mask.growth) if mask else (1.0, 1.0)
    chosen = [o for o in options if o is not None]
    for option in chosen:
        texts.update(option.rules)
    if mask is not None:
        texts[""] = f"mask:keep={mask.keep:g}"
    ratio = max(1 + math.fsum(o.seconds(live) for o in chosen) / profile.step_seconds, 0.0)
    omega = (mask.variance if mask else 0.0) + growth * math.fsum(o.variance for o in chosen)
    size = profile.saved_bytes + sum(o.saved_bytes for o in chosen)
    rho = time_to_target_ratio(ratio, 1 + omega, profile.noise_scale)
    return Plan(
        texts, Bill(ratio, omega, size, rho, _smaller(profile)), exact_names=_names(profile.slots)
    )


def _names(slots: Sequence[SlotProfile]) -> tuple[str, ...]:
    return tuple(slot.name for slot in slots)


def _smaller(profile: Profile) -> tuple[float, float]:
    ratios = [(smaller_batch_ratio(b, profile.noise_scale), b) for b in (1.0, *_SMALLER)]
    rho, b = min(ratios)
    return b, rho


def _or_better(profile: Profile, plan: Plan) -> Plan:
    """The plan, or the exact one with the reason where exact training or a smaller batch is as good."""
    b, rho = plan.predicted.smaller_batch
    if plan.predicted.rho < min(rho, 1.0) - 0.01 and not plan.is_exact:
        return plan
    if b < 1 and rho < 0.99:
        reason = (
            f"exact: a batch of {b:g} of the size reaches a target in {rho:.2f} of the time (noise scale "
            f"{profile.noise_scale:.3g}), the best sketches in {plan.predicted.rho:.2f}: use the smaller batch"
        )
    else:
        reason = f"exact: no sketch beats exact training here (the best has rho {plan.predicted.rho:.2f})"
    bill = Bill(1.0, 0.0, profile.saved_bytes, 1.0, (b, rho))
    return Plan({}, bill, reason, _names(profile.slots))
