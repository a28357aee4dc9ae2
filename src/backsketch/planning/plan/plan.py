"""``Plan``: which sketch goes where, what is expected of it, and what came of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from backsketch.estimators import Sketch, parse
from backsketch.planning.plan.knapsack import choose, frontier
from backsketch.planning.profiling.records import Option, Profile, SlotProfile
from backsketch.planning.profiling.sites import LossFn
from backsketch.regions import Mask
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
        standard_error: of ``extra_variance`` over batches and draws, where that was measured.
    """

    time_ratio: float
    extra_variance: float
    saved_bytes: int
    rho: float
    smaller_batch: tuple[float, float] = (1.0, 1.0)
    standard_error: float = 0.0

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

    def measure(
        self, model: nn.Module, batches: Iterable[Any], loss_fn: LossFn, *, draws: int = 2
    ) -> Bill:
        """Measure the bill on a model that this plan was applied to; ``predicted`` stands beside it.

        Args:
            model: after ``bs.sketch_(model, plan)``.
            batches: at least two.
            loss_fn: ``loss_fn(model, batch)`` returns the scalar mean loss of a batch.
            draws: of the sketches, on each batch.

        Returns:
            A :class:`Bill`; ``standard_error`` says how far its extra variance can be trusted.
        """
        from backsketch.planning.plan.validation import measured_bill

        self._measured.append(measured_bill(model, batches, loss_fn, self.predicted, draws))
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
    found = _search(
        profile,
        objective,
        _Limits(
            *(math.inf if x is None else x for x in (max_extra_variance, max_saved_bytes, max_time))
        ),
    )
    if found is None:
        raise ValueError(
            f"plan: nothing meets {', '.join(f'{n}={v}' for n, v in limits.items() if v)}"
        )
    if objective == "time" and max_saved_bytes is None and max_time is None:
        return _or_better(profile, found)
    return found


def plan_of(profile: Profile, rules: Mapping[str, object]) -> Plan:
    """See :meth:`Profile.predict`."""
    left = {pattern: str(parse(str(sketch))) for pattern, sketch in rules.items()}
    masks = [str(Mask(keep=m.keep)) for m in profile.masks]
    mask = masks.index(left.pop("")) if left.get("") in masks else None
    chosen: _Picked = []
    for slot in profile.slots:
        fitting = [o for o in slot.options if o.rules.items() <= left.items()]
        chosen.append(fitting[0] if fitting else None)
        left = {k: v for k, v in left.items() if not fitting or k not in fitting[0].rules}
    if left:
        pattern, text = next(iter(left.items()))
        raise ValueError(f"predict: {pattern!r}: {text} is none of the options of the profile")
    return _assembled(profile, mask, chosen)[0]


# --- search -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Limits:
    variance: float
    saved_bytes: float
    time: float

    def hold(self, bill: Bill) -> bool:
        return (
            bill.extra_variance <= self.variance * (1 + 1e-9)
            and bill.saved_bytes <= self.saved_bytes
            and bill.time_ratio <= self.time * (1 + 1e-9)
        )


_Picked = list[Option | None]
_ROUNDS = 3  # of the search, as choices change what places do to each other
_ROOMS = (
    1.0,
    0.8,
    0.6,
    0.4,
    0.2,
)  # fractions of the room for variance, for the product of two sums


def _search(profile: Profile, objective: str, limits: _Limits) -> Plan | None:
    score = {
        "time": lambda bill: bill.rho,
        "memory": lambda bill: bill.saved_bytes,
        "variance": lambda bill: bill.extra_variance,
    }[objective]
    plans = [
        plan
        for mask in (None, *range(len(profile.masks)))
        for plan in _below(profile, mask, objective, limits)
        if limits.hold(plan.predicted)
    ]
    return min(plans, key=lambda plan: score(plan.predicted), default=None)


def _below(profile: Profile, mask: int | None, objective: str, limits: _Limits) -> Iterator[Plan]:
    """Plans below one mask. Each round knows from the last how much the noise above adds at each place."""
    factors = [1.0] * len(profile.slots)
    for _ in range(_ROUNDS):
        plans = [
            _assembled(profile, mask, _options(profile, picked))
            for picked in _choices(profile, mask, objective, limits, factors)
        ]
        if not plans:
            return
        yield from (plan for plan, _ in plans)
        _, after = min(plans, key=lambda p: (not limits.hold(p[0].predicted), p[0].predicted.rho))
        if max(abs(a - b) for a, b in zip(after, factors)) < 0.01:
            return
        factors = after


def _options(profile: Profile, picked: Sequence[int]) -> _Picked:
    return [slot.options[i - 1] if i else None for slot, i in zip(profile.slots, picked)]


def _choices(
    profile: Profile, mask: int | None, objective: str, limits: _Limits, factors: Sequence[float]
) -> list[list[int]]:
    costs = [_costs(profile, slot, mask, factor) for slot, factor in zip(profile.slots, factors)]
    free = objective == "time" and math.isinf(limits.saved_bytes) and math.isinf(limits.time)
    found = frontier(costs) if objective == "time" else []
    if free and math.isinf(limits.variance):
        return found
    above = profile.masks[mask].variance if mask is not None else 0.0
    room = limits.variance - above
    if room < 0:
        return found
    part = {"time": 0, "variance": 1, "memory": 2}[objective]
    time, size = (limits.time - 1) * profile.step_seconds, limits.saved_bytes - profile.saved_bytes
    rooms = [room * f for f in _ROOMS] if objective == "time" and math.isfinite(room) else [room]
    solved = [choose(costs, part, (time, r, size)) for r in rooms]
    return found + [picked for picked in solved if picked is not None]


def _costs(
    profile: Profile, slot: SlotProfile, mask: int | None, factor: float
) -> list[tuple[float, float, float]]:
    """Seconds, variance, bytes of each option; the first is exact."""
    live = 1.0 if mask is None else profile.masks[mask].keep
    return [
        (0.0, 0.0, 0.0),
        *(
            (o.seconds(live), factor * _variance(profile, o, mask), float(o.saved_bytes))
            for o in slot.options
        ),
    ]


# --- bill -------------------------------------------------------------------------------------------


def _variance(profile: Profile, option: Option, mask: int | None) -> float:
    if mask is None:
        return option.variance
    return option.masked[mask] if option.masked else option.variance * profile.masks[mask].growth


def _in_company(profile: Profile, mask: int | None, options: _Picked) -> tuple[float, list[float]]:
    """Extra variance of all places together, and the factor of each by the noise of the regions above it.

    That noise adds to the cotangent that a sketch meets, whether a mask is above or not: to its error it adds in
    proportion to the error without a mask.
    """
    sketched = {s.name: (s, o) for s, o in zip(profile.slots, options) if o}
    alone = {name: _variance(profile, o, mask) for name, (_, o) in sketched.items()}
    total = dict(alone)
    for _ in profile.slots:  # the noise of one place may pass through all others
        before = dict(total)
        for name, (slot, option) in sketched.items():
            above = math.fsum(
                a * before[n]
                for n, a in slot.arriving.items()
                if n in sketched and sketched[n][1].is_region
            )
            total[name] = alone[name] + option.variance * above
        if total == before:
            break
    factors = [total[s.name] / alone[s.name] if alone.get(s.name) else 1.0 for s in profile.slots]
    above_all = 0.0 if mask is None else profile.masks[mask].variance
    return above_all + math.fsum(total.values()), factors


def _assembled(profile: Profile, mask: int | None, options: _Picked) -> tuple[Plan, list[float]]:
    texts: dict[str, str] = {}
    chosen = [o for o in options if o is not None]
    for option in chosen:
        texts.update(option.rules)
    if mask is not None:
        texts[""] = str(Mask(keep=profile.masks[mask].keep))
    live = 1.0 if mask is None else profile.masks[mask].keep
    ratio = max(1 + math.fsum(o.seconds(live) for o in chosen) / profile.step_seconds, 0.0)
    omega, factors = _in_company(profile, mask, options)
    size = profile.saved_bytes + sum(o.saved_bytes for o in chosen)
    rho = time_to_target_ratio(ratio, 1 + omega, profile.noise_scale)
    bill = Bill(ratio, omega, size, rho, _smaller(profile))
    return Plan(texts, bill, exact_names=_names(profile.slots)), factors


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
