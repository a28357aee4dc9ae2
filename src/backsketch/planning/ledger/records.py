"""The variance ledger: what each site adds to the variance of the gradient, as data, text and figure."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backsketch.report import table_lines

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Ledger", "SiteError"]


@dataclass(frozen=True)
class SiteError:
    """One row: all variances are sums over entries, means over batches and draws.

    Attributes:
        name: of the module; sites are in backward order, the one nearest to the loss first.
        sketch: as text.
        injected: error on what travels on: ``grad_input`` of a layer, the output's cotangent of a region
            or mask; exact cotangents. None where it cannot be seen from outside.
        injected_weight: error of a layer's own ``grad_weight``.
        energy: squared norm of the exact gradient that ``injected`` is the error of.
        predicted, predicted_weight: the closed forms of these two; None where there is none.
        isolated: what arrives at the parameters with only this site active.
        joint: the martingale difference: sites above active, sites below exact, same draws with and
            without this site's sketch.
        isolated_error, joint_error: standard errors.
        predicted_isolated, predicted_joint: the closed form of the injected error, at exact and at noisy
            cotangents, times the measured gain of the exact Jacobians below.
        growth: second moment of the cotangent at the site's output, all sites active, over the exact one.
        isolated_by_parameter, joint_by_parameter: where it arrives.
    """

    name: str
    sketch: str
    injected: float | None
    injected_weight: float
    energy: float
    predicted: float | None
    predicted_weight: float | None
    isolated: float
    isolated_error: float
    joint: float
    joint_error: float
    predicted_isolated: float | None
    predicted_joint: float | None
    growth: float
    isolated_by_parameter: Mapping[str, float]
    joint_by_parameter: Mapping[str, float]

    @property
    def relative(self) -> float | None:
        """``ω_l = injected / energy``: the factor ``1 + ω_l`` is this site's part of the growth."""
        return None if self.injected is None or not self.energy else self.injected / self.energy

    @property
    def compounding(self) -> float:
        """``joint / isolated``: how much the noise of the sites above adds to this site's."""
        return self.joint / self.isolated if self.isolated > 0 else 1.0


@dataclass(frozen=True)
class Ledger:
    """What :func:`backsketch.variance` found.

    Attributes:
        sites: in backward order.
        total: extra variance with all sites active, ``E‖ĝ − g‖²``; ``total_error`` its standard error.
        cross: ``total`` minus the sum of the *joint* column, zero in expectation, from the same
            draws; ``cross_error`` its standard error.
        sgd_variance: of the exact minibatch gradient at this batch size; None for a single batch.
        noise_scale: ``sgd_variance`` over the squared norm of the mean gradient, without bias.
        batches, draws: how many were used.
        left_out: sites that run exactly after all, with the reason.
    """

    sites: tuple[SiteError, ...]
    total: float
    total_error: float
    cross: float
    cross_error: float
    sgd_variance: float | None
    noise_scale: float | None
    batches: int
    draws: int
    left_out: Mapping[str, str]

    @property
    def sum_isolated(self) -> float:
        """The sum of the *isolated* column: less than the total where sites compound."""
        return sum(site.isolated for site in self.sites)

    @property
    def sum_joint(self) -> float:
        """The sum of the *joint* column: the total, within Monte Carlo error."""
        return sum(site.joint for site in self.sites)

    @property
    def extra_variance(self) -> float | None:
        """``ω``, the total in units of the SGD variance."""
        return self._relative(self.total)

    @property
    def multiplier(self) -> float | None:
        """``v = 1 + ω``."""
        return None if self.extra_variance is None else 1 + self.extra_variance

    @property
    def predicted_multiplier(self) -> float | None:
        """``v`` from the closed forms; None where a site has none."""
        parts = [site.predicted_joint for site in self.sites]
        if any(part is None for part in parts):
            return None
        omega = self._relative(sum(part for part in parts if part is not None))
        return None if omega is None else 1 + omega

    def _relative(self, value: float) -> float | None:
        return value / self.sgd_variance if self.sgd_variance else None

    # Storage -------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; :meth:`from_dict` is the inverse."""
        plain = dataclasses.asdict(self)
        if self.noise_scale is not None and math.isinf(self.noise_scale):
            plain["noise_scale"] = "inf"
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Ledger:
        """A ledger from what :meth:`to_dict` gave.

        Raises:
            ValueError: fields are missing or unknown.
        """
        try:
            sites = tuple(SiteError(**site) for site in plain["sites"])
            scale = plain["noise_scale"]
            return cls(**{**plain, "sites": sites, "noise_scale": scale and float(scale)})
        except (KeyError, TypeError) as error:
            raise ValueError(f"this is not a variance ledger: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the ledger as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Ledger:
        """Read what :meth:`save` wrote."""
        return cls.from_dict(json.loads(Path(path).read_text()))

    # Text and figure -----------------------------------------------------------------------------

    def __str__(self) -> str:
        header = (
            "site", "sketch", "injected", "closed form", "isolated", "joint", "predicted",
            "joint/isolated", "growth",
        )  # fmt: skip
        rows = [header, *(self._row(site) for site in self.sites)]
        return "\n".join([*table_lines(rows, 2), *self._summary()])

    def _row(self, site: SiteError) -> tuple[str, ...]:
        closed = None if site.predicted is None or not site.energy else site.predicted / site.energy
        cells = ["" if value is None else f"{value:.3f}" for value in (site.relative, closed)]
        arriving = (site.isolated, site.joint, site.predicted_joint)
        cells += [self._cell(value) for value in arriving]
        cells += [f"×{site.compounding:.2f}", f"×{site.growth:.2f}"]
        return (site.name or "(model)", site.sketch, *cells)

    def _cell(self, value: float | None) -> str:
        if value is None:
            return ""
        relative = self._relative(value)
        return f"{value:.3g}" if relative is None else f"{relative:.4f}"

    def _summary(self) -> list[str]:
        unit = "units of the SGD variance" if self.sgd_variance else "absolute variances"
        ratio = self.sum_isolated / self.sum_joint if self.sum_joint > 0 else 1.0
        error = self._cell(self.total_error)
        lines = [
            f"total {self._cell(self.total)} ± {error}, sum joint {self._cell(self.sum_joint)}, sum "
            f"isolated {self._cell(self.sum_isolated)} (×{ratio:.2f}), in {unit}; {self.batches} batches, "
            f"{self.draws} draws each",
            "injected: relative error on what travels on; growth: second moment of the cotangent over exact",
        ]
        if self.multiplier is not None and self.noise_scale is not None:
            predicted = self.predicted_multiplier
            told = "" if predicted is None else f" (predicted {predicted:.3f})"
            lines.append(
                f"variance multiplier v = {self.multiplier:.3f}{told}, noise scale β = "
                f"{self.noise_scale:.3g}"
            )
        lines += [f"left out: {name}: {reason}" for name, reason in self.left_out.items()]
        return lines

    def plot(self) -> Figure:
        """A matplotlib figure: the two columns with the prediction, and growth with depth.

        Raises:
            ModuleNotFoundError: matplotlib is missing; it is in the extra ``backsketch[train]``.
        """
        from backsketch.planning.plots import plot_ledger

        return plot_ledger(self)
