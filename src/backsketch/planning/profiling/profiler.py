"""``bs.profile``: what each sketch at each slot would cost and save, measured on this device."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from backsketch.convert import restore_, sketch_
from backsketch.memory import kept_by
from backsketch.nn.registry import SMALL_WEIGHT
from backsketch.nn.swap import is_swapped
from backsketch.planning.measure.calls import Call, backward, watching
from backsketch.planning.measure.passes import Passes, passes
from backsketch.planning.profiling.curves import Curves, curves, mask_weights, ratio, water_filling
from backsketch.planning.profiling.families import FAMILIES, LADDER, REFERENCE, Family
from backsketch.planning.profiling.noise import MASK_REFERENCE, Noise, mask_noise, region_noise
from backsketch.planning.profiling.progress import stages
from backsketch.planning.profiling.records import MaskOption, Option, Profile, SlotProfile
from backsketch.planning.profiling.sites import LossFn, Slot, find_slots
from backsketch.planning.profiling.times import Cost, place_costs, timed
from backsketch.regions.rows import scores
from backsketch.rules import unwrap
from backsketch.sampling import num_kept
from backsketch.theory.noise import GradientSums
from backsketch.untouched import repeatable, untouched

__all__ = ["profile"]

_BATCHES = 8  # for SGD's own noise
_CLOSELY = 2  # of them for the noise of sketches
_STEPS = 5  # timed
_STAGES = 1 + len(FAMILIES) + sum(f.own_weights_only for f in FAMILIES)  # and one per batch


def profile(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn,
    *,
    progress: bool = True,
) -> Profile:
    """Measure what sketches would do to the training of a model.

    Finds the places by itself, times them alone on this device, counts the bytes that they save for the
    backward, and measures the extra variance of each at keep 0.5 on two batches, carried to the other keeps, and
    below masks, by the closed form of the row scores.

    Args:
        model: without sketches; it is left as it was, gradients, buffers, modes and random streams included.
        batches: an iterable of at least two batches, as training draws them; the first eight are used.
        loss_fn: ``loss_fn(model, batch)`` returns the scalar mean loss of a batch.
        progress: show a progress bar.

    Returns:
        A :class:`Profile`: ``print`` it, :meth:`Profile.save` it, :meth:`Profile.plan` with it.

    Raises:
        ValueError: fewer than two batches, a loss that is not finite, a model that is sketched already or has
            nothing to sketch.
    """
    model = unwrap(model)
    data = _batches(batches)
    if any(is_swapped(m) for m in model.modules()):
        raise ValueError("profile: the model is sketched already; call bs.restore_(model) first")
    with (
        stages("profile", _STAGES + len(data), progress) as tick,
        untouched(model, training=True, seed=0),
    ):
        try:
            return _measured(model, data, loss_fn, tick)
        finally:
            restore_(model)


def _batches(batches: Iterable[Any]) -> list[Any]:
    data = []
    for batch in batches:
        data.append(batch)
        if len(data) == _BATCHES:
            break
    if len(data) < 2:
        raise ValueError(
            f"profile: needs at least two batches to see SGD's own noise, got {len(data)}"
        )
    return data


def _measured(
    model: nn.Module, data: Sequence[Any], loss_fn: LossFn, tick: Callable[[str], None]
) -> Profile:
    tick("looking for places")
    slots = find_slots(model, data[0], loss_fn)
    if not slots:
        raise ValueError(
            "profile: nothing to sketch: no residual branch, no linear layer or convolution of more than "
            f"{SMALL_WEIGHT} weights"
        )
    observed = _observe(model, loss_fn, data, slots, tick)
    costs = place_costs(model, slots, observed.first, tick)
    errors: dict[tuple[str, str], float] = {}
    for family in (f for f in FAMILIES if f.own_weights_only):
        tick(f"extra variance of {family.name}")
        for name, error in _weight_errors(model, loss_fn, data, family, slots, observed).items():
            errors[name, family.name] = error
    for slot in slots:
        if slot.row_dims is not None and slot.name in observed.noise[0]:
            errors[slot.name, "save"] = fmean(n[slot.name].alone for n in observed.noise)
    return _assembled(slots, observed, costs, errors)


# --- exact passes -----------------------------------------------------------------------------------


@dataclass
class _Observed:
    """What exact passes showed; the lists have an entry per batch that was watched."""

    device: str
    saved_bytes: int = 0
    step_seconds: float = 0.0
    sums: GradientSums = field(default_factory=GradientSums)
    exact: list[list[Tensor]] = field(default_factory=list)
    curves: list[Curves] = field(default_factory=list)
    noise: list[dict[str, Noise]] = field(default_factory=list)
    masks: list[float] = field(default_factory=list)
    output: list[Tensor] = field(default_factory=list)
    first: dict[str, Call] = field(default_factory=dict)


def _observe(
    model: nn.Module,
    loss_fn: LossFn,
    data: Sequence[Any],
    slots: Sequence[Slot],
    tick: Callable[[str], None],
) -> _Observed:
    seen = _Observed(str(next(model.parameters()).device))
    times = []
    with passes(model, loss_fn, among=()) as run:
        for number, batch in enumerate(data):
            tick("exact passes")
            if number < _CLOSELY:
                gradient = _watched(run, slots, batch, number, seen)
            else:
                seconds, gradient = timed(lambda: run.gradient(batch, number))  # noqa: B023
                times.append(seconds)
            seen.sums.add(gradient)
        while len(times) < _STEPS:
            times.append(timed(lambda: run.gradient(data[0], 0))[0])
    seen.step_seconds = statistics.median(times)
    with repeatable(model, 0):
        seen.saved_bytes = kept_by(model, lambda: loss_fn(model, data[0])).total
    return seen


def _watched(
    run: Passes, slots: Sequence[Slot], batch: Any, number: int, seen: _Observed
) -> list[Tensor]:
    """An exact pass, and on its graph the noise of single places."""
    names = {"", *(s.name for s in slots), *(name for s in slots for name in s.layers)}
    with watching(run.model, names) as calls, run.loss(batch, number) as loss:
        gradient = backward(loss, list(run.parameters.values()), calls, retain_graph=True)
        seen.noise.append(region_noise(run, calls, slots, number))
        output = _maskable(calls[""], slots)
        if output:
            seen.masks.append(mask_noise(run, output, number))
            seen.output.append(scores(output.cotangents, 1))
    weights = mask_weights(output.cotangents[0]) if output else {}
    seen.curves.append(curves(slots, calls, weights))
    seen.exact.append(gradient)
    if not seen.first:
        seen.first = {name: found[0] for name, found in calls.items() if found[0].cotangents}
    return gradient


def _maskable(calls: list[Call], slots: Sequence[Slot]) -> Call | None:
    """The model's call, if its output is one tensor with a row per sample.

    Not where the whole model is one place: a region over it is that mask, and saves time as well.
    """
    if len(calls) != 1 or len(calls[0].cotangents) != 1 or any(not slot.name for slot in slots):
        return None
    g = calls[0].cotangents[0]
    return calls[0] if g.ndim > 1 and g.shape[0] > 1 else None


# --- sketched passes --------------------------------------------------------------------------------


def _weight_errors(
    model: nn.Module,
    loss_fn: LossFn,
    data: Sequence[Any],
    family: Family,
    slots: Sequence[Slot],
    seen: _Observed,
) -> dict[str, float]:
    """``‖ĝ − g‖²`` by slot, all of them sketched at once: errors of ``grad_weight`` stay where they are made."""
    fitting = [s for s in slots if family.fits(s)]
    if not fitting:
        return {}
    sketch_(model, {k: v for s in fitting for k, v in family.rules(s, REFERENCE).items()})
    errors = dict.fromkeys((s.name for s in fitting), 0.0)
    with passes(model, loss_fn) as run:
        everything = [place.index for place in run.places]
        for number, exact in enumerate(seen.exact):
            noisy = run.gradient(data[number], number, everything)
            for name, a, b in zip(run.parameters, noisy, exact):
                owners = [s.name for s in fitting if _owns(s, name)] or list(errors)
                for owner in owners:
                    errors[owner] += float((a - b).double().square().sum()) / len(owners)
    restore_(model)
    return {name: error / len(seen.exact) for name, error in errors.items()}


def _owns(slot: Slot, parameter: str) -> bool:
    return any(parameter.startswith(f"{layer}.") for layer in slot.layers)


# --- everything together ----------------------------------------------------------------------------


def _assembled(
    slots: Sequence[Slot],
    seen: _Observed,
    costs: Mapping[tuple[str, str], Cost],
    errors: Mapping[tuple[str, str], float],
) -> Profile:
    """Relative to the exact step and to SGD's variance."""
    sgd = seen.sums.sgd_variance
    places = tuple(
        SlotProfile(
            slot.name,
            slot.kind,
            slot.row_dims,
            slot.layers,
            tuple(_options(slot, seen, costs, errors)) if sgd > 0 else (),
            _arriving(slot, seen.noise, sgd),
        )
        for slot in slots
    )
    return Profile(
        places,
        tuple(_masks(seen)) if sgd > 0 else (),
        seen.step_seconds,
        seen.saved_bytes,
        seen.sums.noise_scale,
        sgd,
        seen.device,
        torch.__version__,
    )


def _options(
    slot: Slot,
    seen: _Observed,
    costs: Mapping[tuple[str, str], Cost],
    errors: Mapping[tuple[str, str], float],
) -> Iterator[Option]:
    masks = LADDER if seen.masks else ()
    for family in FAMILIES:
        error, cost = errors.get((slot.name, family.noise)), costs.get((slot.name, family.name))
        if error is None or cost is None or not family.fits(slot):
            continue
        omega = error / seen.sums.sgd_variance
        for keep in family.keeps:
            yield Option(
                family.name,
                keep,
                {n: str(s) for n, s in family.rules(slot, keep).items()},
                cost.fixed,
                cost.slope * keep,
                omega * _scale(slot, family, seen, 1.0, keep),
                cost.saved_bytes,
                family.nested,
                tuple(omega * _scale(slot, family, seen, mask, keep) for mask in masks),
            )


def _scale(slot: Slot, family: Family, seen: _Observed, mask: float, keep: float) -> float:
    """Extra variance at a keep below a mask, over what was measured."""
    if len(family.keeps) == 1:  # rounding: in proportion to the energy of the cotangents
        return 1 + _relative(seen, mask) if mask < 1 else 1.0
    return ratio(seen.curves, (slot.name, family.noise), mask, keep, REFERENCE)


def _relative(seen: _Observed, mask: float) -> float:
    """``E‖error‖²`` of a mask on the output, over the energy of its cotangent."""
    parts = [
        water_filling(s, [num_kept(s.shape[0], mask)])[0] / max(float(s.square().sum()), 1e-300)
        for s in seen.output
    ]
    return fmean(parts)


def _masks(seen: _Observed) -> Iterator[MaskOption]:
    if not seen.masks:
        return
    measured, base = fmean(seen.masks) / seen.sums.sgd_variance, _relative(seen, MASK_REFERENCE)
    for keep in LADDER:
        relative = _relative(seen, keep)
        yield MaskOption(keep, measured * relative / base if base > 0 else 0.0, 1 + relative)


def _arriving(slot: Slot, noise: Sequence[Mapping[str, Noise]], sgd: float) -> dict[str, float]:
    """By how much a unit of extra variance at other places adds to the errors made here, relative.

    The growth measured with all others at the reference keep, shared among them by the energy of their noise.
    """
    if slot.name not in noise[0]:
        return {}
    alone, company = (
        math.fsum(getattr(n[slot.name], kind) for n in noise) for kind in ("alone", "company")
    )
    energy = {o: math.fsum(n[o].arriving.get(slot.name, 0.0) for n in noise) for o in noise[0]}
    total = math.fsum(energy.values())
    if not (company > alone > 0 and total > 0):
        return {}
    return {
        other: (company / alone - 1) * part / total * sgd / fmean(n[other].company for n in noise)
        for other, part in energy.items()
        if part > 0
    }
