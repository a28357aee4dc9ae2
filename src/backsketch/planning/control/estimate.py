r"""The controller's picture of the extra variance: measured rarely, followed cheaply, evaluated at any keeps.

.. math:: \omega(k_1, \dots, k_S) = r \sum_s w_s C_s(k_s)

:math:`C_s(k)` is the error that site s puts on its cotangent at keep k over the energy of that cotangent: a
closed form of the row scores (:func:`backsketch.planning.measure.rows.row_curve`), which backward passes of
regions compute anyway. Errors of sites add up (they are martingale differences), and :math:`w_s` carries each
to the parameters in units of SGD's variance; it is measured with the site isolated. The factor r is what the
measured total is over the predicted one: growth along the depth, the design's gain over independent draws, and the
drift of all weights between their measurements. For a region over the whole model it starts at one. Measurements
of the first quarter of the steps so far are dropped once there are a few later ones.

All are ratios of sums over a window of the last observations, each scaled by the median of the last energies:
a batch with a rare large gradient weighs what it weighs in an expectation over batches, but gradients that
shrink a hundredfold in the course of training do not leave the past in charge. The window of the curves is the
last 6 % of the steps so far, up to sixty steps: training changes fast at first, and slowly later.
(Exponential forgetting of a time when all rows mattered alike takes as long as the curves have orders of
magnitude.)
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from backsketch.planning.control.calibration import Measured
from backsketch.planning.measure.rows import RowCurve

__all__ = ["Estimate", "Ratio"]

_STABLE, _NOISE = 12, 6  # measurements in a window
_OLD = 0.25  # of the steps so far
_KEPT, _KEPT_ISOLATED = 3, 2  # measurements that are kept however old they are
_WINDOW, _LONGEST, _COTANGENTS = 0.06, 60, 8  # of the steps so far, steps, cotangents
_NEAR = 5  # energies in a median
_ISOLATED_AT_ONCE = 8
_PRIOR = 4  # measurements that a factor of one is worth


@dataclass
class Ratio:
    """Sums of numerators over a sum of denominators, of observations in a window.

    ``size`` is how many are kept, and ``least`` how many even of the first quarter of the steps so far; without
    a size, those of the last steps (see above).
    """

    width: int
    size: int | None = None
    least: int = _KEPT
    terms: list[list[float]] = field(default_factory=list)
    marks: list[list[int]] = field(default_factory=list)  # step and number of cotangents

    def add(
        self, tops: Sequence[float], bottom: float, scale: float, step: int, count: int = 1
    ) -> None:
        """One more observation, in units of ``scale``; nothing changes where that is zero."""
        if not scale > 0:
            return
        self.terms.append([x / scale for x in (*tops, bottom)])
        self.marks.append([step, count])
        while self._is_full(step):
            del self.terms[0], self.marks[0]
        self._sum()

    def _is_full(self, step: int) -> bool:
        if self.size is not None:
            is_old = self.marks[0][0] < _OLD * step
            return len(self.terms) > (self.least if is_old else self.size)
        rest = sum(count for _, count in self.marks[1:])
        return rest >= _COTANGENTS and step - self.marks[0][0] > min(_WINDOW * step, _LONGEST)

    def load(self, terms: Sequence[Sequence[float]], marks: Sequence[Sequence[int]]) -> None:
        """Put back what they were."""
        self.terms, self.marks = [list(t) for t in terms], [list(m) for m in marks]
        self._sum()

    def __post_init__(self) -> None:
        self._sum()

    def _sum(self) -> None:
        columns = zip(*self.terms) if self.terms else [[0.0]] * (self.width + 1)
        *self.tops, self.bottom = map(math.fsum, columns)

    def __getitem__(self, index: int) -> float:
        return self.tops[index] / self.bottom if self.bottom > 0 else 0.0


@dataclass
class Estimate:
    """The running ratios of the model above.

    ``ladder`` is the keeps of all curves; ``expects_one`` says whether r is one in theory. It is for a site over
    the whole model: there the row scores are the norms of the samples' gradients, up to how the Jacobians differ.
    It is not for a single site inside a model, nor for several, whose noise is larger together.
    """

    ladder: tuple[float, ...]
    num_sites: int
    expects_one: bool = True
    curves: list[Ratio] = field(default_factory=list)
    weights: list[Ratio] = field(default_factory=list)
    factor: Ratio = field(default_factory=lambda: Ratio(1, _STABLE))
    square: Ratio = field(default_factory=lambda: Ratio(1, _NOISE, _NOISE))
    energies: list[list[float]] = field(default_factory=list)
    replicas: int = 0

    def __post_init__(self) -> None:
        sites = range(self.num_sites)
        self.curves = [Ratio(len(self.ladder)) for _ in sites]
        self.weights = [Ratio(1, _STABLE, _KEPT_ISOLATED) for _ in sites]
        self.energies = [[] for _ in sites]

    @property
    def is_known(self) -> bool:
        """Whether there was a measurement."""
        return bool(self.factor.terms)

    def follow(self, seen: Mapping[int, RowCurve], step: int) -> None:
        """Take the row scores of training steps into account."""
        for site, found in seen.items():
            if found.energy > 0:
                one = found.energy / found.count
                self.energies[site] = [*self.energies[site], one][-_NEAR:]
                scale = statistics.median(self.energies[site])
                self.curves[site].add(found.errors, found.energy, scale, step, found.count)

    def update(
        self,
        measured: Measured,
        keeps: Sequence[float],
        isolated: Mapping[int, float],
        replicas: int,
        step: int,
    ) -> None:
        """Take a measurement into account.

        Args:
            measured: sums over all ranks.
            keeps: of all sites together; ``isolated`` of those that were measured one by one.
            isolated: see there.
            replicas: how many such micro-batches make the gradient of an optimizer step; the fewest that were ever
                seen count, since passes of others between two steps look like micro-batches.
            step: how many optimizer steps there were.
        """
        self.follow(measured.curves, step)
        scale, found = self._scale, measured.curves
        for s, error in measured.isolated.items():
            relative = self._relative(found.get(s), isolated[s])
            self.weights[s].add([error], measured.sgd * relative, scale, step)
        parts = [self.weight(s) * self._relative(found.get(s), k) for s, k in enumerate(keeps)]
        predicted = math.fsum(parts)
        # It is in the scale too: or the first keeps, whose noise is large, would outweigh all others.
        self.factor.add([measured.error], measured.sgd * predicted, scale * predicted, step)
        self.replicas = min(self.replicas or replicas, replicas)
        self.square.add([measured.square * self.replicas], measured.sgd, scale, step)

    def next_isolated(self) -> list[int]:
        """Sites to measure by themselves: new ones, a few at once, then the one that has waited longest."""
        if self.num_sites == 1:
            return []
        last = [w.marks[-1][0] if w.marks else -1 for w in self.weights]
        new = [i for i, step in enumerate(last) if step < 0]
        return new[:_ISOLATED_AT_ONCE] or [last.index(min(last))]

    def _relative(self, found: RowCurve | None, keep: float) -> float:
        """The error at one keep over the energy of the cotangent."""
        if found is None or keep == 1 or not found.energy > 0:
            return 0.0
        return found.errors[self.ladder.index(keep)] / found.energy

    @property
    def _scale(self) -> float:
        return next((statistics.median(e) for e in self.energies if e), 0.0)

    def weight(self, site: int) -> float:
        """Of a site; the mean of those known for one that was not measured yet."""
        if self.weights[site].bottom:
            return self.weights[site][0]
        known = [w[0] for w in self.weights if w.bottom]
        return math.fsum(known) / len(known) if known else 1.0

    def variance(self, site: int, keep: float) -> float:
        """The extra variance of one site, in units of SGD's."""
        curve = self.curves[site][self.ladder.index(keep)]
        return self.growth * self.weight(site) * curve

    @property
    def growth(self) -> float:
        """The factor r, drawn towards one while few measurements speak."""
        count = len(self.factor.terms)
        prior = _PRIOR * self.factor.bottom / count if count and self.expects_one else 0.0
        total = self.factor.bottom + prior
        return (self.factor.tops[0] + prior) / total if total > 0 else 0.0

    def total(self, keeps: Sequence[float]) -> float:
        """The extra variance at these keeps."""
        return math.fsum(self.variance(s, k) for s, k in enumerate(keeps) if k < 1)

    @property
    def noise_scale(self) -> float:
        """SGD's variance over the squared mean gradient, of an optimizer step; infinite where that is lost."""
        return 1 / self.square[0] if self.square[0] > 0 else math.inf

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        ratios = [*self.curves, *self.weights, self.factor, self.square]
        return {
            "windows": [[list(r.terms), list(r.marks)] for r in ratios],
            "energies": list(self.energies),
            "replicas": self.replicas,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        ratios = [*self.curves, *self.weights, self.factor, self.square]
        for ratio, (terms, marks) in zip(ratios, state["windows"]):
            ratio.load(terms, marks)
        self.energies, self.replicas = [list(e) for e in state["energies"]], state["replicas"]
