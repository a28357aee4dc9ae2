"""The sketched sites whose keep can be moved, and what each shows in a pass: how uneven its rows are."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from backsketch.estimators import Sketch
from backsketch.nn.registry import adapter_of
from backsketch.nn.swap import resketch_, sketch_of
from backsketch.planning.measure.passes import sketched_sites
from backsketch.planning.measure.recorder import listen, tensors_of
from backsketch.planning.measure.rows import RowCurve, column_scores, layer_scores, row_curve
from backsketch.regions import Mask, Region
from backsketch.regions.rows import scores

__all__ = ["MovableSite", "Watch", "movable_sites", "set_keeps", "weight_layers"]


@dataclass(frozen=True)
class MovableSite:
    """A sketched module, and the sketch that it had when it was found."""

    name: str
    module: nn.Module
    base: Sketch
    keep: float

    @property
    def is_mask(self) -> bool:
        return isinstance(self.base, Mask)

    @property
    def is_region(self) -> bool:
        return isinstance(self.base, Region)

    @property
    def is_layer(self) -> bool:
        return not (self.is_mask or self.is_region)

    def share(self, keep: float, left: float) -> float:
        """The part of its work that is done at a keep, a fraction ``left`` of the rows being left by a mask.

        Regions keep a part of those rows. A layer's rows are a part of all, though none that the mask dropped;
        what is not chosen by the cotangent's rows is kept whatever a mask does.
        """
        if not self.is_layer:
            return keep * left
        return min(keep, left) if self.base.chooses() == "rows" else keep

    def set_keep(self, keep: float) -> None:
        """Move the live sketch; the object that the user gave stays what it is."""
        resketch_(self.module, self.base.with_keep(keep))

    def has_keep(self, keep: float) -> bool:
        """Whether the live sketch is still the one that :meth:`set_keep` left."""
        return sketch_of(self.module) == self.base.with_keep(keep)

    def scores(self, cotangent: Tensor, x: Tensor | None) -> Tensor:
        """What a draw here goes by: exact for regions and masks, for layers those of ``grad_weight``."""
        if isinstance(self.base, Region | Mask):
            return scores([cotangent], self.base.row_dims)
        if self.base.chooses() == "columns":
            return column_scores(self.module, cotangent)
        return layer_scores(self.module, x, cotangent)

    def curve(self, row_scores: Tensor, keeps: Sequence[float]) -> RowCurve:
        """The error at each keep; of a layer that does not choose by scores, in proportion to ``1/keep - 1``."""
        if not self.is_layer or self.base.chooses() is not None:
            return row_curve(row_scores, keeps, live_only=not self.is_mask)
        energy = float(row_scores.double().square().sum())
        return RowCurve(tuple((1 / k - 1) * energy for k in keeps), energy)


def movable_sites(model: nn.Module) -> list[MovableSite]:
    """The sketched modules of a model that have a keep, in the order of ``named_modules``."""
    found = [(site, site.sketch.movable_keep()) for site in sketched_sites(model)]
    return [MovableSite(s.name, s.module, s.sketch, keep) for s, keep in found if keep is not None]


def set_keeps(sites: Sequence[MovableSite], keeps: Sequence[float]) -> None:
    """Move all live sketches; nothing where there are no keeps."""
    for site, keep in zip(sites, keeps):
        site.set_keep(keep)


def weight_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers with matrix products that backsketch knows, by name."""
    kinds = [(name, module, adapter_of(module)) for name, module in model.named_modules()]
    return {name: module for name, module, kind in kinds if kind and not kind.for_savers}


class Watch:
    """Hooks on a site for one pass: the scores of what its output's cotangent brings; :meth:`close` removes them.

    Of layers they are a proxy, whose scale is measured and whose shape is trusted. Only a number per row is kept.
    """

    def __init__(self, site: MovableSite) -> None:
        self.site = site
        self.scores: list[Tensor] = []
        self._handles = listen(site.module, self._called, arrived=self._arrived)

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def curve(self, keeps: Sequence[float]) -> RowCurve | None:
        """The curve of all that was seen; None if no cotangent came."""
        found = [self.site.curve(s, keeps) for s in self.scores]
        return functools.reduce(operator.add, found) if found else None

    def _called(self, args: Any, kwargs: Any) -> tuple[Tensor | None] | None:
        if not self.site.module.training:
            return None
        inputs = tensors_of(args[:1]) if self.site.is_layer else []
        return (inputs[0].detach() if inputs else None,)

    def _arrived(self, record: tuple[Tensor | None], index: int, cotangent: Tensor) -> None:
        if index == 0:
            self.scores.append(self.site.scores(cotangent.detach(), *record))
