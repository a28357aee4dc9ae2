"""The kinds of sketch that a plan chooses from, as functions of keep: one row each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import attrgetter

from backsketch.estimators import Int8, Quantized, Rows, Sketch, Split
from backsketch.planning.profiling.sites import Site
from backsketch.regions import Region

__all__ = [
    "FAMILIES",
    "FINE_LADDER",
    "IN_8_BITS",
    "LADDER",
    "REFERENCE",
    "REGIONS",
    "ROUNDING",
    "Family",
]

LADDER = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25)
"""The keeps that plans and controllers use: few, so that nothing is compiled again and again."""

REFERENCE = 0.5
"""The keep at which extra variance is measured."""


FINE_LADDER = (1.0, 0.95, *LADDER, 0.2, 0.16, 0.13, 0.1, 0.08, 0.06, 0.05)
"""The keeps that a controller moves on: neighbours differ by less than half in extra variance."""


@dataclass(frozen=True)
class Family:
    """One way to sketch a site.

    ``on`` names the modules of a site that it sketches, none where it does not fit; ``sketch`` is that of each.
    ``noise`` names the families whose extra variances it adds up; ``keeps`` is 1 alone where there is nothing to
    choose. It is timed at one keep; time grows with keep by the parts ``growth`` of the site's exact forward and
    backward pass. ``nested``: below a mask it keeps a fraction of the rows that the mask left, not of all rows.
    ``parts`` are the families that it combines. The noise of a region travels on to the sites below.
    """

    name: str
    on: Callable[[Site], tuple[str, ...]]
    sketch: Callable[[Site, float], Sketch]
    noise: tuple[str, ...]
    growth: tuple[float, float] | None = None
    nested: bool = True
    parts: tuple[str, ...] = ()
    is_region: bool = False
    in_8_bits: bool = False

    @property
    def keeps(self) -> tuple[float, ...]:
        return LADDER if self.growth else (1.0,)

    @property
    def timed_at(self) -> float:
        return REFERENCE if self.growth else 1.0

    def rules(self, site: Site, keep: float) -> dict[str, Sketch]:
        return {name: self.sketch(site, keep) for name in self.on(site)}


def _region(site: Site, keep: float) -> Region:
    assert site.row_dims is not None
    return Region(keep, site.row_dims)


def _weights(_: Site, keep: float) -> Split:
    return Split(grad_weight=Rows(keep=keep))


def _whole(site: Site) -> tuple[str, ...]:
    return () if site.row_dims is None else (site.name,)


_layers, _in_8_bits = attrgetter("layers"), attrgetter("layers_in_8_bits")

FAMILIES = (
    Family("save", _whole, _region, ("save",), (0, 1), is_region=True),
    Family(
        "recompute",
        _whole,
        lambda *at: replace(_region(*at), mode="recompute"),
        ("save",),
        (1, 1),
        is_region=True,
    ),
    Family("weights", _layers, _weights, ("weights",), (0, 0.5), nested=False),
    Family("quantized", _layers, lambda *_: Quantized(bits=4), ("quantized",)),
    Family("int8", _in_8_bits, lambda *_: Int8(), ("int8",), in_8_bits=True),
    Family("int8 codes", _in_8_bits, lambda *_: Int8(save=True), ("int8 codes",), in_8_bits=True),
    Family(
        "int8 weights",
        _in_8_bits,
        lambda *at: Int8(_weights(*at)),
        ("weights", "int8"),
        (0, 0.1),
        nested=False,
        parts=("weights", "int8"),
        in_8_bits=True,
    ),
    Family(
        "int8 save",
        lambda site: _whole(site) if site.layers_in_8_bits else (),
        lambda *at: replace(_region(*at), arithmetic="int8"),
        ("save", "int8"),
        (0, 0.5),
        parts=("save", "int8"),
        is_region=True,
        in_8_bits=True,
    ),
)

ROUNDING = tuple(f.name for f in FAMILIES if not f.growth)
"""The families without a keep to choose."""

REGIONS, IN_8_BITS = (
    tuple(f.name for f in FAMILIES if getattr(f, field)) for field in ("is_region", "in_8_bits")
)
