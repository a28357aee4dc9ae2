"""``bs.variance``: where the extra variance of a sketched model comes from, site by site."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from backsketch.planning.ledger.closed_forms import Injected, own_weights, predicted
from backsketch.planning.ledger.records import Ledger, SiteError
from backsketch.planning.measure.errors import squared_distance, squared_errors, squared_norm
from backsketch.planning.measure.passes import (
    Caught,
    LossFn,
    Passes,
    SketchedSite,
    has_region,
    passes,
    sketched_sites,
)
from backsketch.planning.measure.rows import draw_errors
from backsketch.regions import Mask, Region, state_of
from backsketch.rules import unwrap
from backsketch.theory.noise import GradientSums

__all__ = ["variance"]

B = TypeVar("B")
_CLOSED_FORM_DRAWS = 4  # per batch, where the many rows of a site make its closed form expensive
_MANY_ROWS = 512


def variance(
    model: nn.Module, batches: Iterable[B], loss_fn: LossFn[B], *, draws: int = 8
) -> Ledger:
    r"""The ledger: per site the error injected and what of it arrives at each parameter.

    Two columns. *Isolated*: only that site is active. *Joint*: the sites above it are active too, those
    below are exact, and the same draws are used with and without this site's sketch. The latter are the
    martingale differences :math:`D_k = \hat g_k - \hat g_{k-1}`, so that

    .. math:: \sum_k E\|D_k\|^2 = E\|\hat g - g\|^2 ,

    which the ledger shows as ``cross``: total minus sum, with its standard error. Where sites compound,
    the *isolated* column sums to less.

    Args:
        model: sketched by :func:`backsketch.sketch_`. Left as it is, with its gradients, buffers and modes; no
            random stream moves.
        batches: an iterable of batches, read once and held in memory. Two or more give the SGD variance
            and the noise scale at that batch size.
        loss_fn: ``loss_fn(model, batch)`` returns the scalar mean loss.
        draws: repetitions per batch. A draw costs ``2 S`` forward and backward passes for S sites.

    Returns:
        A :class:`~backsketch.planning.ledger.Ledger`: prints as a table, ``.plot()`` draws it.

    Raises:
        ValueError: no batch, a model without sketched sites, a loss that is not a finite scalar,
            ``draws < 2``.

    Source: arXiv 2602.14701, variance through the graph; the decomposition is
    :func:`backsketch.theory.martingale_decomposition`.

    Example:
        >>> import torch, backsketch as bs
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> _ = bs.sketch_(model, bs.Rows(keep=0.5))
        >>> batches = [torch.randn(16, 8) for _ in range(3)]
        >>> ledger = bs.variance(model, batches, lambda m, x: m(x).square().mean())
        >>> [site.name for site in ledger.sites]
        ['2', '0']
    """
    model = unwrap(model)
    if draws < 2:
        raise ValueError(f"standard errors need two draws or more, got {draws}")
    found = sketched_sites(model)
    if not found:
        raise ValueError(
            "the model has no sketched sites, so there is no variance to account for: call "
            "bs.sketch_(model, rules) first"
        )
    held = list(batches)
    if not held:
        raise ValueError("batches is empty: give at least one batch (two for the noise scale)")
    with passes(model, loss_fn, found) as run:
        left_out = _settle(run, held)
        order = _backward_order(run, held[0], left_out)
        tally = _Tally(run, order)
        for number, batch in enumerate(held):
            tally.batch(batch, number, draws)
    return tally.ledger(len(held), draws, left_out)


def _settle(run: Passes, batches: Sequence[Any]) -> dict[str, str]:
    """Let regions check their rows, as they do on their first batches; what stays exact, and why."""
    regions = [site for site in run.sites if has_region(site)]
    everything = [site.index for site in run.sites]
    for number in range(2 if regions else 0):
        run.gradient(batches[number % len(batches)], number, everything)
    left_out = {}
    for site in regions:
        state = state_of(site.module, site.name)
        if state.status != "active":
            left_out[site.name] = state.reason or "its guards have not come to a verdict"
    return left_out


def _backward_order(run: Passes, batch: Any, left_out: dict[str, str]) -> list[SketchedSite]:
    """The sites as a backward pass meets them, those that it never meets noted and left out."""
    run.gradient(batch, 0, [site.index for site in run.sites])
    by_index = {site.index: site for site in run.sites}
    met = [by_index[i] for i in dict.fromkeys(run.order)]
    for site in run.sites:
        if site not in met:
            left_out.setdefault(site.name, "no gradient reaches it from this loss")
    order = [site for site in met if site.name not in left_out]
    if not order:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise ValueError(f"none of the sketched sites is active: {reasons}")
    return order


@dataclass
class _Column:
    """Samples of the squared error per parameter, one row per batch and draw."""

    samples: list[Tensor] = field(default_factory=list)

    def add(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
        self.samples.append(squared_errors(a, b))

    @property
    def totals(self) -> Tensor:
        return torch.stack(self.samples).sum(1)

    def by_parameter(self, names: Iterable[str]) -> dict[str, float]:
        means = torch.stack(self.samples).mean(0).tolist()
        return {name: value for name, value in zip(names, means) if value > 0}


def _mean(values: Sequence[float | None]) -> float | None:
    """None without values, and where one of them is None."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


class _SiteTally:
    """All that is accumulated about one site."""

    def __init__(self, site: SketchedSite, parameters: dict[str, nn.Parameter]) -> None:
        self.site = site
        ids = own_weights(site)
        self.own = torch.tensor([id(p) in ids for p in parameters.values()])
        self.isolated, self.joint = _Column(), _Column()
        self.injected: list[float | None] = []
        self.closed: dict[str, list[Injected]] = {"exact": [], "noisy": []}
        self.second_moments = [0.0, 0.0]  # exact, noisy
        self.energy: list[float] = []

    def see(self, kind: str, caught: Caught) -> None:
        """Evaluate the closed forms on a pass."""
        self.closed[kind].append(predicted(self.site, caught))

    def inject(self, run: Passes, name: tuple[int, int], exact: Caught, noisy: Caught) -> None:
        """The error on what travels on, in the pass of that name in which only this site is active."""
        sketch = self.site.sketch
        if not isinstance(sketch, (Region, Mask)):
            self.energy.append(squared_norm(exact.grad_inputs))
            return self.injected.append(squared_distance(exact.grad_inputs, noisy.grad_inputs))
        self.energy.append(squared_norm(exact.cotangents))
        if len(exact.cotangents) != 1:
            return self.injected.append(None)
        run.keys.restart(*name)
        run.keys.at(self.site.index)
        self.injected.append(squared_norm(draw_errors(sketch, exact.cotangents)))

    def row(self, names: list[str]) -> SiteError:
        isolated, joint = self.isolated.totals, self.joint.totals
        own = float(torch.stack(self.isolated.samples)[:, self.own].sum(1).mean())
        exact, noisy = (
            Injected(_mean([f.travelling for f in forms]), _mean([f.weight for f in forms]))
            for forms in self.closed.values()
        )
        injected, below = _mean(self.injected), float(isolated.mean()) - own
        gain = below / injected if injected else 0.0
        second = self.second_moments
        return SiteError(
            name=self.site.name,
            sketch=str(self.site.sketch),
            injected=injected,
            injected_weight=own,
            energy=_mean(self.energy) or 0.0,
            predicted=exact.travelling,
            predicted_weight=exact.weight,
            isolated=float(isolated.mean()),
            isolated_error=_standard_error(isolated),
            joint=float(joint.mean()),
            joint_error=_standard_error(joint),
            predicted_isolated=_arriving(exact, gain),
            predicted_joint=_arriving(noisy, gain),
            growth=second[1] / second[0] if second[0] > 0 else math.nan,
            isolated_by_parameter=self.isolated.by_parameter(names),
            joint_by_parameter=self.joint.by_parameter(names),
        )


def _arriving(form: Injected, gain: float) -> float | None:
    if form.travelling is None or form.weight is None:
        return None
    return form.weight + gain * form.travelling


def _standard_error(samples: Tensor) -> float:
    return float(samples.std() / samples.shape[0] ** 0.5)


class _Tally:
    """Runs the passes of each batch and turns what they show into a ledger."""

    def __init__(self, run: Passes, order: Sequence[SketchedSite]) -> None:
        self.run, self.names = run, list(run.parameters)
        self.tallies = [_SiteTally(site, run.parameters) for site in order]
        self.total = _Column()
        self.sums = GradientSums()

    def batch(self, batch: Any, number: int, draws: int) -> None:
        exact, seen = self.run.observed(batch, number)
        self.sums.add(exact)
        for tally in self.tallies:
            tally.see("exact", seen[tally.site.index])
        for draw in range(draws):
            self._draw(batch, number, draw, exact, seen)

    def _draw(
        self, batch: Any, number: int, draw: int, exact: list[Tensor], seen: dict[int, Caught]
    ) -> None:
        before, active = exact, []
        for tally in self.tallies:
            active.append(tally.site.index)
            now, noisy = self.run.observed(batch, number, active, draw)
            tally.joint.add(now, before)
            before = now
            isolated = noisy
            if len(active) > 1:
                now, isolated = self.run.observed(batch, number, active[-1:], draw)
            tally.isolated.add(now, exact)
            index = tally.site.index
            tally.inject(self.run, (number, draw), seen[index], isolated[index])
        self.total.add(before, exact)
        for tally in self.tallies:
            _second_moments(tally, seen, noisy)
            caught = noisy[tally.site.index]
            if draw < _CLOSED_FORM_DRAWS or _num_rows(caught) <= _MANY_ROWS:
                tally.see("noisy", caught)

    def ledger(self, batches: int, draws: int, left_out: dict[str, str]) -> Ledger:
        total = self.total.totals
        cross = total - torch.stack([tally.joint.totals for tally in self.tallies]).sum(0)
        return Ledger(
            sites=tuple(tally.row(self.names) for tally in self.tallies),
            total=float(total.mean()),
            total_error=_standard_error(total),
            cross=float(cross.mean()),
            cross_error=_standard_error(cross),
            sgd_variance=self.sums.sgd_variance if batches > 1 else None,
            noise_scale=self.sums.noise_scale if batches > 1 else None,
            batches=batches,
            draws=draws,
            left_out=left_out,
        )


def _second_moments(tally: _SiteTally, seen: dict[int, Caught], noisy: dict[int, Caught]) -> None:
    for i, caught in enumerate((seen, noisy)):
        tally.second_moments[i] += squared_norm(caught[tally.site.index].cotangents)


def _num_rows(caught: Caught) -> int:
    return max((g.shape[:-1].numel() for g in caught.cotangents), default=0)
