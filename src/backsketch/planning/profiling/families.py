"""The kinds of sketch that a plan chooses from, as functions of keep: one row each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from backsketch.estimators import Quantized, Rows, Sketch, Split
from backsketch.planning.profiling.sites import Site
from backsketch.regions import Region

__all__ = ["FAMILIES", "FINE_LADDER", "LADDER", "REFERENCE", "Family"]

LADDER = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25)
"""The keeps that plans and controllers use: few, so that nothing is compiled again and again."""

REFERENCE = 0.5
"""The keep at which extra variance is measured."""


FINE_LADDER = (1.0, 0.95, *LADDER, 0.2, 0.16, 0.13, 0.1, 0.08, 0.06, 0.05)
"""The keeps that a controller moves on: neighbours differ by less than half in extra variance."""


@dataclass(frozen=True)
class Family:
    """One way to sketch a site.

    ``noise`` names the family whose extra variance it shares; ``keeps`` is 1 alone where there is nothing to
    choose; ``times`` are the keeps at which it is timed, time being affine in keep. ``nested``: below a mask it
    keeps a fraction of the rows that the mask left, not of all rows.
    """

    name: str
    rules: Callable[[Site, float], dict[str, Sketch]]
    fits: Callable[[Site], bool]
    noise: str
    keeps: tuple[float, ...] = LADDER
    times: tuple[float, ...] = (0.75, 0.3)
    nested: bool = True

    @property
    def own_weights_only(self) -> bool:
        """Whether its errors stay in the gradients of the site's own weights."""
        return self.noise == self.name != "save"


def _region(mode: str) -> Callable[[Site, float], dict[str, Sketch]]:
    def rules(site: Site, keep: float) -> dict[str, Sketch]:
        assert site.row_dims is not None
        return {site.name: Region(keep=keep, row_dims=site.row_dims, mode=mode)}  # type: ignore[arg-type]

    return rules


def _on_layers(sketch: Callable[[float], Sketch]) -> Callable[[Site, float], dict[str, Sketch]]:
    return lambda site, keep: {name: sketch(keep) for name in site.layers}


def _can_be_region(site: Site) -> bool:
    return site.row_dims is not None


def _has_layers(site: Site) -> bool:
    return bool(site.layers)


def _weights(keep: float) -> Sketch:
    return Split(grad_weight=Rows(keep=keep))


def _quantized(_: float) -> Sketch:
    return Quantized(bits=4)


FAMILIES = (
    Family("save", _region("save"), _can_be_region, "save"),
    Family("recompute", _region("recompute"), _can_be_region, "save"),
    Family("weights", _on_layers(_weights), _has_layers, "weights", nested=False),
    Family("quantized", _on_layers(_quantized), _has_layers, "quantized", (1.0,), (1.0,)),
)
