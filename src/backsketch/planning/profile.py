"""``bs.profile``: what each sketch at each slot would cost and save, measured on this device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from backsketch.convert import restore_, sketch_
from backsketch.memory import kept_by
from backsketch.nn.swap import is_swapped
from backsketch.planning.families import FAMILIES, LADDER, Family
from backsketch.planning.observe import (
    Call,
    Curve,
    mean_curve,
    replay,
    row_curve,
    watch,
    weight_curve,
)
from backsketch.planning.passes import Passes, passes
from backsketch.planning.record import MaskOption, Option, Profile, SlotProfile
from backsketch.planning.slots import LossFn, Slot, find_slots
from backsketch.regions import Mask
from backsketch.rules import unwrap
from backsketch.theory.noise import GradientSums
from backsketch.untouched import untouched

__all__ = ["profile"]

_REFERENCE = 0.5  # the keep of the Monte Carlo passes
_MASK_REFERENCE = 0.7
_REPEATS = 5


def profile(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn,
    *,
    progress: bool = True,
) -> Profile:
    """Measure what sketches would do to the training of a model.

    Finds the places by itself, times them alone on this device, counts the bytes that they save for the
    backward, and measures the extra variance of each: one Monte Carlo pass per place and batch, carried to
    the other keeps by the closed form of the row scores.

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
    try:
        with _bar(progress) as tick, untouched(model, training=True, seed=0):
            return _measured(model, data, loss_fn, tick)
    finally:
        restore_(model)


def _measured(
    model: nn.Module, data: Sequence[Any], loss_fn: LossFn, tick: Callable[[str], None]
) -> Profile:
    tick("looking for places")
    with passes(model, loss_fn, among=()) as run:
        run.gradient(data[0], 0)  # the checks of the loss, before anything is swapped
    slots = find_slots(model, data[0], loss_fn)
    if not slots:
        raise ValueError(
            "profile: nothing to sketch: no residual branch, no linear layer or convolution of more than "
            "4096 weights"
        )
    tick("exact passes")
    observed = _Observed(model, loss_fn, data, slots)
    seconds = _times(model, slots, observed.calls, tick)
    noise, mask = _noise(model, loss_fn, data, slots, observed, tick)
    return observed.profile(slots, seconds, noise, mask)


def _batches(batches: Iterable[Any]) -> list[Any]:
    data = []
    for batch in batches:
        data.append(batch)
        if len(data) == 8:
            break
    if len(data) < 2:
        raise ValueError(
            f"profile: needs at least two batches to see SGD's own noise, got {len(data)}"
        )
    return data


@contextmanager
def _bar(show: bool) -> Iterator[Callable[[str], None]]:
    """A progress bar on the terminal where rich is installed, nothing elsewhere."""
    try:
        from rich.console import Console
        from rich.status import Status
    except ImportError:
        yield lambda text: None
        return
    console = Console(stderr=True)
    if not show or not console.is_terminal:
        yield lambda text: None
        return
    with Status("profile", console=console) as status:
        yield lambda text: status.update(f"profile: {text}")


# --- exact passes -----------------------------------------------------------------------------------


class _Observed:
    """Exact gradients of all batches, and what the slots received in them."""

    def __init__(
        self, model: nn.Module, loss_fn: LossFn, data: Sequence[Any], slots: Sequence[Slot]
    ) -> None:
        self.exact: list[list[Tensor]] = []
        self.calls: dict[str, Call] = {}
        curves: dict[tuple[str, str], list[Curve]] = {}
        sums = GradientSums()
        with passes(model, loss_fn, among=()) as run:
            for number, batch in enumerate(data):
                grads: list[Tensor] = []
                calls, layers = watch(
                    model,
                    slots,
                    lambda: grads.extend(run.gradient(batch, number)),  # noqa: B023
                )
                if not number:
                    self.calls = calls
                for key, curve in _curves(slots, calls, layers):
                    curves.setdefault(key, []).append(curve)
                self.exact.append(grads)
                sums.add(grads)
        self.curves = {key: mean_curve(found) for key, found in curves.items()}
        self.sgd, self.beta = sums.sgd_variance, sums.noise_scale
        self.step = _step_seconds(model, loss_fn, data[0])
        self.bytes = _saved(lambda: loss_fn(model, data[0]), model)

    def profile(
        self,
        slots: Sequence[Slot],
        seconds: dict[tuple[str, str, float], tuple[float, int]],
        noise: dict[tuple[str, str], float],
        mask: tuple[MaskOption, ...],
    ) -> Profile:
        """Everything put together, relative to the exact step and to SGD's variance."""
        rows = tuple(
            SlotProfile(
                slot.name,
                slot.kind,
                slot.row_dims,
                slot.layers,
                self._options(slot, seconds, noise),
            )
            for slot in slots
        )
        return Profile(
            rows,
            mask,
            self.step,
            self.bytes,
            self.beta,
            self.sgd,
            str(_device(self.exact)),
            torch.__version__,
        )

    def _options(
        self,
        slot: Slot,
        seconds: dict[tuple[str, str, float], tuple[float, int]],
        noise: dict[tuple[str, str], float],
    ) -> tuple[Option, ...]:
        found = []
        base = seconds.get((slot.name, "exact", 1.0))
        for family in FAMILIES:
            points = [
                (k, *seconds[key])
                for k in family.times
                if (key := (slot.name, family.name, k)) in seconds
            ]
            if base is None or not points or (slot.name, family.noise) not in noise:
                continue
            reference = noise[slot.name, family.noise]
            curve = self.curves.get((slot.name, family.noise))
            slope, constant = _affine([(k, s) for k, s, _ in points])
            for keep in family.keeps:
                scale = curve.over(_REFERENCE)[keep] if curve else 1.0
                rules = {n: str(s) for n, s in family.rules(slot, keep).items()}
                found.append(
                    Option(
                        family.name,
                        keep,
                        rules,
                        constant - base[0],
                        slope * keep,
                        reference * scale,
                        points[0][2] - base[1],
                    )
                )
        return tuple(found)


def _curves(
    slots: Sequence[Slot], calls: dict[str, Call], layers: dict[str, Call]
) -> Iterator[tuple[tuple[str, str], Curve]]:
    for slot in slots:
        call = calls.get(slot.name)
        if call is not None and call.cotangent is not None and slot.row_dims is not None:
            yield (slot.name, "save"), row_curve(call.cotangent, slot.row_dims)
        parts = [
            weight_curve(layers[n].args[0], g)
            for n in slot.layers
            if n in layers and (g := layers[n].cotangent) is not None and layers[n].args
        ]
        if parts:
            yield (slot.name, "weights"), mean_curve(parts)


def _device(grads: Sequence[Sequence[Tensor]]) -> torch.device:
    return grads[0][0].device


def _affine(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Slope and constant of time in keep; a constant alone from one point."""
    if len(points) == 1:
        return 0.0, points[0][1]
    (a, ta), (b, tb) = points[0], points[-1]
    slope = max((ta - tb) / (a - b), 0.0)
    return slope, (ta + tb) / 2 - slope * (a + b) / 2


# --- time and bytes ---------------------------------------------------------------------------------


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _median_seconds(work: Callable[[], Any], repeats: int = _REPEATS) -> float:
    times = []
    for _ in range(repeats):
        _synchronize()
        start = time.perf_counter()
        work()
        _synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)  # of few: another job on the machine must not decide


def _step_seconds(model: nn.Module, loss_fn: LossFn, batch: Any) -> float:
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        torch.autograd.grad(loss_fn(model, batch), parameters, allow_unused=True)

    with torch.random.fork_rng():
        step()
        return _median_seconds(step, 5)


def _saved(forward: Callable[[], Any], model: nn.Module) -> int:
    with torch.random.fork_rng():
        return kept_by(model, forward).total


def _times(
    model: nn.Module,
    slots: Sequence[Slot],
    calls: dict[str, Call],
    tick: Callable[[str], None],
) -> dict[tuple[str, str, float], tuple[float, int]]:
    """Seconds and saved bytes of every slot alone: exact, and each family at the keeps it is timed at.

    Slots of one class and size stand for each other: a deep model has few kinds of block.
    """
    found: dict[tuple[str, str, float], tuple[float, int]] = {}
    alike: dict[Any, list[Slot]] = {}
    for slot in slots:
        if slot.name in calls:
            kind = _kind(model.get_submodule(slot.name), calls[slot.name])
            alike.setdefault((kind, slot.row_dims), []).append(slot)
    first = [group[0] for group in alike.values()]

    def run(name: str, family: str, keep: float) -> None:
        module, call = model.get_submodule(name), calls[name]
        with torch.random.fork_rng():
            for _ in range(2):  # a region proves itself on the first
                replay(module, call)
            seconds = _median_seconds(lambda: replay(module, call))
            size = _saved(lambda: module(*call.args, **call.kwargs), module)
        found[name, family, keep] = seconds, size

    for slot in first:
        run(slot.name, "exact", 1.0)
    for family in FAMILIES:
        fitting = [s for s in first if family.fits(s)]
        for keep in family.times if fitting else ():
            tick(f"timing {family.name} at {keep:g}")
            sketch_(model, {k: v for s in fitting for k, v in family.rules(s, keep).items()})
            for slot in fitting:
                run(slot.name, family.name, keep)
            restore_(model)
    for group in alike.values():
        measured = [(k, v) for k, v in found.items() if k[0] == group[0].name]
        for slot in group[1:]:
            found.update({(slot.name, *key[1:]): value for key, value in measured})
    return found


def _kind(module: nn.Module, call: Call) -> Any:
    tensors = [t for t in pytree.tree_leaves((call.args, call.kwargs)) if isinstance(t, Tensor)]
    shapes = tuple((tuple(t.shape), t.dtype, t.requires_grad) for t in tensors)
    sizes = tuple((name, tuple(p.shape), p.requires_grad) for name, p in module.named_parameters())
    return type(module), shapes, sizes


# --- extra variance ---------------------------------------------------------------------------------


def _noise(
    model: nn.Module,
    loss_fn: LossFn,
    data: Sequence[Any],
    slots: Sequence[Slot],
    observed: _Observed,
    tick: Callable[[str], None],
) -> tuple[dict[tuple[str, str], float], tuple[MaskOption, ...]]:
    """Extra variance of each slot and noise family at the reference keep, and of masks on the output."""
    found: dict[tuple[str, str], float] = {}
    for family in FAMILIES:
        fitting = [s for s in slots if family.fits(s)]
        if family.noise != family.name or not fitting:
            continue
        tick(f"extra variance of {family.name}")
        rules = {k: v for s in fitting for k, v in family.rules(s, _REFERENCE).items()}
        sketch_(model, rules)
        with passes(model, loss_fn) as run:
            errors = _errors(run, family, fitting, data, observed.exact)
        restore_(model)
        for slot in fitting:
            if observed.sgd > 0:
                found[slot.name, family.name] = errors[slot.name] / observed.sgd
    tick("extra variance of masks")
    if any(not slot.name for slot in slots):
        return found, ()  # a region over the whole model is a mask that saves time as well
    return found, _masks(model, loss_fn, data, observed)


def _errors(
    run: Passes,
    family: Family,
    slots: Sequence[Slot],
    data: Sequence[Any],
    exact: Sequence[Sequence[Tensor]],
) -> dict[str, float]:
    """``‖ĝ − g‖²`` with one slot's sketches active at a time, averaged over two batches.

    Errors of ``grad_weight`` stay where they are made, so one pass shows those of all slots.
    """
    everything = [place.index for place in run.places]
    pairs = list(enumerate(data))[:2]
    run.gradient(data[0], 0, everything)  # regions prove themselves
    names = list(run.parameters)
    errors = dict.fromkeys((s.name for s in slots), 0.0)
    for number, batch in pairs:
        if family.name != "save":
            noisy = run.gradient(batch, number, everything)
            for name, a, b in zip(names, noisy, exact[number]):
                owner = next((s.name for s in slots if _owns(s, name)), None)
                error = float((a - b).double().square().sum())
                for slot in errors if owner is None else (owner,):
                    errors[slot] += error / (len(errors) if owner is None else 1)
            continue
        for place in run.places:
            noisy = run.gradient(batch, number, [place.index])
            error = sum(
                float((a - b).double().square().sum()) for a, b in zip(noisy, exact[number])
            )
            errors[place.name] += error
    return {name: error / len(pairs) for name, error in errors.items()}


def _owns(slot: Slot, parameter: str) -> bool:
    return any(parameter.startswith(f"{layer}.") for layer in slot.layers)


def _masks(
    model: nn.Module, loss_fn: LossFn, data: Sequence[Any], observed: _Observed
) -> tuple[MaskOption, ...]:
    """A mask on the model's output, if that is one tensor with a row per sample."""
    caught: list[Tensor] = []

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim > 1 and output.requires_grad:
            output.register_hook(lambda g: caught.append(g.detach()))

    with passes(model, loss_fn, among=()) as run:
        handle = model.register_forward_hook(after)
        run.gradient(data[0], 0)
        handle.remove()
    if len(caught) != 1 or caught[0].shape[0] < 2 or observed.sgd <= 0:
        return ()
    shape = row_curve(caught[0], 1)
    sketch_(model, {"": Mask(keep=_MASK_REFERENCE)})
    with passes(model, loss_fn) as run:
        error = 0.0
        for number, batch in list(enumerate(data))[:4]:
            noisy = run.gradient(batch, number, [0])
            pairs = zip(noisy, observed.exact[number])
            error += sum(float((a - b).double().square().sum()) for a, b in pairs)
    restore_(model)
    reference = error / min(len(data), 4) / observed.sgd
    return tuple(
        MaskOption(keep, reference * shape.over(_MASK_REFERENCE)[keep], 1 + shape.relative[keep])
        for keep in LADDER
    )
