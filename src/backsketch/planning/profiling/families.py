"""The kinds of sketch that a plan chooses from, as functions of keep: one row each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from backsketch.estimators import Int8, Quantized, Rows, Sketch, Split
from backsketch.planning.profiling.sites import Site
from backsketch.regions import Region

__all__ = ["FAMILIES", "FINE_LADDER", "LADDER", "REFERENCE", "ROUNDING", "Family"]

LADDER = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25)
"""The keeps that plans and controllers use: few, so that nothing is compiled again and again."""

REFERENCE = 0.5
"""The keep at which extra variance is measured."""


FINE_LADDER = (1.0, 0.95, *LADDER, 0.2, 0.16, 0.13, 0.1, 0.08, 0.06, 0.05)
"""The keeps that a controller moves on: neighbours differ by less than half in extra variance."""


@dataclass(frozen=True)
class Family:
    """One way to sketch a site.

    ``noise`` names the families whose extra variances it adds up; ``keeps`` is 1 alone where there is nothing to
    choose. It is timed at one keep; time grows with keep by the parts ``growth`` of the site's exact forward and
    backward pass. ``nested``: below a mask it keeps a fraction of the rows that the mask left, not of all rows.
    ``parts`` are the families that it combines.
    """

    name: str
    rules: Callable[[Site, float], dict[str, Sketch]]
    fits: Callable[[Site], bool]
    noise: tuple[str, ...]
    growth: tuple[float, float] | None = None
    nested: bool = True
    parts: tuple[str, ...] = ()

    @property
    def keeps(self) -> tuple[float, ...]:
        return LADDER if self.growth else (1.0,)

    @property
    def timed_at(self) -> float:
        return REFERENCE if self.growth else 1.0


def _region(mode: str, **more: Any) -> Callable[[Site, float], dict[str, Sketch]]:
    def rules(site: Site, keep: float) -> dict[str, Sketch]:
        assert site.row_dims is not None
        return {site.name: Region(keep, site.row_dims, mode, **more)}  # type: ignore[arg-type]

    return rules


def _on_layers(sketch: Callable[[float], Sketch]) -> Callable[[Site, float], dict[str, Sketch]]:
    return lambda site, keep: {name: sketch(keep) for name in site.layers}


def _in_8_bits(sketch: Callable[[float], Int8]) -> Callable[[Site, float], dict[str, Sketch]]:
    return lambda site, keep: {name: sketch(keep) for name in site.layers_in_8_bits}


def _can_be_region(site: Site) -> bool:
    return site.row_dims is not None


def _has_layers(site: Site) -> bool:
    return bool(site.layers)


def _has_8_bits(site: Site) -> bool:
    return bool(site.layers_in_8_bits)


def _can_be_region_in_8_bits(site: Site) -> bool:
    return _can_be_region(site) and _has_8_bits(site)


def _weights(keep: float) -> Split:
    return Split(grad_weight=Rows(keep=keep))


def _quantized(_: float) -> Sketch:
    return Quantized(bits=4)


FAMILIES = (
    Family("save", _region("save"), _can_be_region, ("save",), (0, 1)),
    Family("recompute", _region("recompute"), _can_be_region, ("save",), (1, 1)),
    Family("weights", _on_layers(_weights), _has_layers, ("weights",), (0, 0.5), nested=False),
    Family("quantized", _on_layers(_quantized), _has_layers, ("quantized",)),
    Family("int8", _in_8_bits(lambda _: Int8()), _has_8_bits, ("int8",)),
    Family("int8 codes", _in_8_bits(lambda _: Int8(save=True)), _has_8_bits, ("int8 codes",)),
    Family(
        "int8 weights",
        _in_8_bits(lambda keep: Int8(_weights(keep))),
        _has_8_bits,
        ("weights", "int8"),
        (0, 0.1),
        nested=False,
        parts=("weights", "int8"),
    ),
    Family(
        "int8 save",
        _region("save", arithmetic="int8"),
        _can_be_region_in_8_bits,
        ("save", "int8"),
        (0, 0.5),
        parts=("save", "int8"),
    ),
)

ROUNDING = tuple(f.name for f in FAMILIES if not f.growth)
"""The families without a keep to choose."""
