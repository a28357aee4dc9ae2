r"""What one recorded training call shows: SGD's variance, the noise scale, and the error of the sketches.

**SGD's variance from two halves.** Let a minibatch gradient be :math:`g = \tfrac1n\sum_{i\le n} s_i` with
independent samples, :math:`E s_i = \bar g`. The cotangents of the first n/2 rows alone give :math:`g_a`,
those of the others :math:`g_b`, and :math:`g = g_a + g_b`. The two are independent with one distribution, so

.. math:: E\|g_a - g_b\|^2 = 2\,\mathrm{Var}(g_a) = 2\,\frac{n/2}{n^2}\,E\|s - \bar g\|^2
          = \frac{1}{n} E\|s - \bar g\|^2 = \mathrm{Var}(g) = \sigma^2, \qquad
          4\,E\langle g_a, g_b\rangle = \|\bar g\|^2 .

Both are free of bias at this very batch size, from one batch, and their ratio is the noise scale. With an odd
n the first is too large by :math:`\|\bar g\|^2/n^2`, and the factor 4 is :math:`n^2/(n_a n_b)`. Rows are the
leading dimension of the outputs; in a batch whose order is no accident the halves are not alike. A model that
returns its loss is run on each half of its batch instead, and each half's loss has its share of the cotangent.

**The extra variance.** A pass with the sketches active, on the same numbers and cotangents, gives
:math:`\|\hat g - g\|^2`, one draw of its numerator.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from backsketch.nn.registry import adapter_of
from backsketch.nn.swap import switched
from backsketch.planning.control.ranks import added
from backsketch.planning.control.sites import MovableSite, Watch, set_keeps, weight_layers
from backsketch.planning.measure.errors import squared_distance, squared_norm
from backsketch.planning.measure.recorder import listen, tensors_of
from backsketch.planning.measure.replay import Recorder, Replay, replaying
from backsketch.planning.measure.rows import RowCurve
from backsketch.regions import RegionModule, state_of

__all__ = ["Measured", "Unmeasurable", "Work", "measure", "over_ranks"]

_JOINT_DRAWS = 3  # of several sites together: their factor drifts, so that few measurements count


class Unmeasurable(Exception):
    """Why a call shows nothing."""


@dataclass(frozen=True)
class Work:
    """Multiply-adds of a layer's forward pass, and how many products of that size its backward pass has."""

    size: float
    products: int


@dataclass(frozen=True)
class Measured:
    """Sums over what was replayed; ratios of them are free of the scale of the loss.

    ``sgd`` and ``square`` are unbiased for the variance and the squared mean of a micro-batch gradient,
    ``error`` is ``‖ĝ − g‖²`` with all sites active, ``isolated`` with one.
    """

    sgd: float
    square: float
    error: float
    isolated: dict[int, float]
    curves: dict[int, RowCurve]
    work: dict[str, Work]


def measure(
    model: nn.Module,
    recorder: Recorder,
    sites: Sequence[MovableSite],
    keeps: Sequence[float],
    isolated: Mapping[int, float],
    ladder: Sequence[float],
    name: int,
    with_work: bool,
) -> Measured:
    """Replay a recorded call: exactly in two halves, with all sites active, and with single ones.

    Args:
        model: the user's own module. The sites are at other keeps afterwards: put them back.
        recorder: closed, with a call.
        sites: all of them.
        keeps: of all sites together.
        isolated: sites to measure one by one, and the keep for that.
        ladder: keeps for the curves.
        name: of the draws.
        with_work: also count the arithmetic of the layers.

    Raises:
        Unmeasurable: there is no such call, or no two halves of it.
    """
    call = recorder.call
    if call is None:
        raise Unmeasurable(
            "no training call of the model was seen: give the controller the object that you call, the result of "
            "torch.compile included, and call step() once per optimizer step"
        )
    if not call.cotangents:
        raise Unmeasurable("no gradient has reached the outputs of the model")
    if not call.is_intact:
        raise Unmeasurable("the arguments of the model were overwritten since the forward pass")
    modules = [site.module for site in sites]
    with replaying(model, call, name) as replay:
        with switched(dict.fromkeys(modules, True)):
            outputs, cotangents, work = _forward(model, replay, with_work)
            if all(g.ndim == 0 for g in cotangents):
                sgd, factor = _halves_of_batch(replay, outputs, cotangents)
                exact = replay.vjp(outputs, cotangents)
            else:
                parts, factor = _halves(cotangents)
                first = replay.vjp(outputs, parts[0], retain=True)
                second = replay.vjp(outputs, parts[1])
                sgd = squared_distance(first, second)
                exact = [a.add_(b) for a, b in zip(first, second)]
                del first, second
        del outputs
        square = factor * (squared_norm(exact) - sgd) / 4
        set_keeps(sites, keeps)
        if any(isinstance(m, RegionModule) and state_of(m).status == "pending" for m in modules):
            replay.vjp(*replay.forward())  # regions check their rows
        curves, sketched = _watched(replay, sites, ladder)
        errors = [squared_distance(sketched, exact)]
        del sketched
        draws = _JOINT_DRAWS if len(sites) > 1 else 1
        others = [2 + len(sites) + i for i in range(draws - 1)]
        errors += [squared_distance(replay.vjp(*replay.forward(n)), exact) for n in others]
        error = math.fsum(errors) / draws
        single = {}
        for i, keep in isolated.items():
            sites[i].set_keep(keep)
            with switched(dict.fromkeys(modules[:i] + modules[i + 1 :], True)):
                single[i] = squared_distance(replay.vjp(*replay.forward(2 + i)), exact)
    return Measured(sgd, square, error, single, curves, work)


def _halves(cotangents: Sequence[Tensor]) -> tuple[tuple[list[Tensor], list[Tensor]], float]:
    sizes = {g.shape[0] if g.ndim else 0 for g in cotangents}
    if len(sizes) != 1 or (n := sizes.pop()) == 0:
        raise Unmeasurable(
            "the outputs that get a gradient do not share a leading dimension of samples, so that SGD's own "
            "variance cannot be measured: let the model return such outputs, or the loss as a single number"
        )
    if n < 2:
        raise Unmeasurable("a batch of one sample has no halves")
    half = n // 2
    first, second = [g.clone() for g in cotangents], [g.clone() for g in cotangents]
    for a, b in zip(first, second):
        a[half:] = 0
        b[:half] = 0
    return (first, second), n * n / (half * (n - half))


def _halves_of_batch(
    replay: Replay, losses: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> tuple[float, float]:
    """SGD's variance, from the losses of two halves of the batch, where the model returns its loss alone.

    Whether the loss is a mean over the samples or a sum is told by its value.
    """
    n = replay.num_rows
    if n < 2:
        raise Unmeasurable("a batch of one sample has no halves")
    half = n // 2
    try:
        parts = [replay.forward(0, rows)[0] for rows in (slice(half), slice(half, None))]
    except Exception as error:  # a model may ask for batches of one size
        raise Unmeasurable(f"the model cannot be run on a half of its batch: {error}") from error
    shares = [half / n, 1 - half / n]
    if _distance(losses, parts, (1.0, 1.0)) < _distance(losses, parts, shares):
        shares = [1.0, 1.0]
    first, second = (
        replay.vjp(part, [g * share for g in cotangents]) for part, share in zip(parts, shares)
    )
    return squared_distance(first, second), n * n / (half * (n - half))


def _distance(
    whole: Sequence[Tensor], parts: Sequence[Sequence[Tensor]], shares: Sequence[float]
) -> float:
    """Between losses of a batch and the weighted sums of those of its halves."""
    return math.fsum(
        abs(float((all_ - shares[0] * a - shares[1] * b).detach()))
        for all_, a, b in zip(whole, *parts)
    )


def _watched(
    replay: Replay, sites: Sequence[MovableSite], ladder: Sequence[float]
) -> tuple[dict[int, RowCurve], list[Tensor]]:
    """A pass with all sites active, and the row curve of what each received."""
    watches = [Watch(site) for site in sites]
    try:
        gradients = replay.vjp(*replay.forward(1))
    finally:
        for watch in watches:
            watch.close()
    found = {i: watch.curve(ladder) for i, watch in enumerate(watches)}
    return {i: s for i, s in found.items() if s is not None}, gradients


def _forward(
    model: nn.Module, replay: Replay, with_work: bool
) -> tuple[list[Tensor], list[Tensor], dict[str, Work]]:
    work: dict[str, Work] = {}
    handles = []
    for name, layer in (weight_layers(model) if with_work else {}).items():
        handles += listen(layer, lambda args, kwargs: args, partial(_count, work, name, layer))
    try:
        outputs, cotangents = replay.forward()
    finally:
        for handle in handles:
            handle.remove()
    return outputs, cotangents, work


def _count(
    work: dict[str, Work], name: str, layer: nn.Module, args: Any, outputs: list[Tensor]
) -> None:
    adapter = adapter_of(layer)
    if adapter is None or not outputs:
        return
    weights = [w for _, w in adapter.weights(layer)]
    size = sum(math.prod(w.shape) * outputs[0].numel() / w.shape[0] for w in weights)
    products = int(any(t.requires_grad for t in tensors_of(args)[:1]))
    products += int(any(w.requires_grad for w in weights))
    before = work.get(name, Work(0.0, products))
    work[name] = Work(before.size + size, products)


# --- of several processes ---------------------------------------------------------------------------


def over_ranks(ranks: Sequence[Measured | None]) -> Measured | None:
    """The sums over the ranks that could measure, with the work of the first.

    Returns:
        None where no rank could measure, a number is not finite, or SGD's own variance is zero.
    """
    found = [m for m in ranks if m is not None]
    isolated, curves = added(m.isolated for m in found), added(m.curves for m in found)
    sgd, square, error = (
        math.fsum(getattr(m, f) for m in found) for f in ("sgd", "square", "error")
    )
    numbers = [sgd, square, error, *isolated.values()]
    numbers += [x for c in curves.values() for x in (c.energy, *c.errors)]
    if not found or not all(map(math.isfinite, numbers)) or not sgd > 0:
        return None
    return Measured(sgd, square, error, isolated, curves, found[0].work)
