"""The sketched sites whose keep can be moved, and what each shows in a pass: how uneven its rows are."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from backsketch.estimators import Columns, Rows, Sketch, Split, StoredRows
from backsketch.nn.registry import adapter_of
from backsketch.nn.swap import resketch_, sketch_of
from backsketch.planning.measure.hooks import Hook
from backsketch.planning.measure.passes import places
from backsketch.planning.profiling.curves import least_errors
from backsketch.regions import Mask, Region
from backsketch.regions.rows import scores
from backsketch.torch_private import pytree

__all__ = [
    "Site",
    "Spread",
    "Watch",
    "find_sites",
    "keep_of",
    "spread",
    "weight_layers",
    "with_keep",
]


@dataclass(frozen=True)
class Site:
    """A sketched module, and the sketch that it had when it was found."""

    name: str
    module: nn.Module
    base: Sketch
    keep: float

    @property
    def is_mask(self) -> bool:
        return isinstance(self.base, Mask)

    @property
    def is_layer(self) -> bool:
        return not isinstance(self.base, Mask | Region)

    def share(self, keep: float, left: float) -> float:
        """The part of its work that is done at a keep, a fraction ``left`` of the rows being left by a mask.

        Regions keep a part of those rows. A layer's rows are a part of all, though none that the mask dropped;
        what is not chosen by the cotangent's rows is kept whatever a mask does.
        """
        if not self.is_layer:
            return keep * left
        parts = _parts(self.base) if isinstance(self.base, Split) else (self.base,)
        kept = [p for p in parts if keep_of(p) is not None]
        by_rows = all(isinstance(p, Rows) and p.scores != "uniform" for p in kept)
        return min(keep, left) if by_rows else keep

    def set_keep(self, keep: float) -> None:
        """Move the live sketch; the object that the user gave stays what it is."""
        resketch_(self.module, with_keep(self.base, keep))

    def has_keep(self, keep: float) -> bool:
        """Whether the live sketch is still the one that :meth:`set_keep` left."""
        return sketch_of(self.module) == with_keep(self.base, keep)


def keep_of(sketch: Sketch | None) -> float | None:
    """The keep of a sketch, of the part that has one for a ``Split``; None where nothing can be moved."""
    if isinstance(sketch, Split):
        return next((k for p in _parts(sketch) if (k := keep_of(p)) is not None), None)
    return getattr(sketch, "keep", None)


def with_keep(sketch: Sketch, keep: float) -> Sketch:
    """The same sketch with another keep, in both parts of a ``Split``."""
    if keep_of(sketch) == keep:
        return sketch
    if not isinstance(sketch, Split):
        return dataclasses.replace(sketch, keep=keep)  # type: ignore[type-var]
    moved = [p if keep_of(p) is None else with_keep(p, keep) for p in _parts(sketch)]  # type: ignore[arg-type]
    return Split(*moved)  # type: ignore[arg-type]


def find_sites(model: nn.Module) -> list[Site]:
    """The sketched modules of a model that have a keep, in the order of ``named_modules``."""
    found = []
    for place in places(model):
        keep = keep_of(place.sketch)
        if keep is not None:
            found.append(Site(place.name, place.module, place.sketch, keep))
    return found


def _parts(sketch: Split) -> tuple[Sketch | None, Sketch | None]:
    return sketch.grad_input, sketch.grad_weight


# --- how uneven -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """``E‖error‖²`` that a site would put on its cotangent at each keep of a ladder, and ``‖cotangent‖²``.

    Both are sums over ``count`` cotangents.
    """

    errors: tuple[float, ...]
    energy: float
    count: int = 1

    def __add__(self, other: Spread) -> Spread:
        errors = tuple(a + b for a, b in zip(self.errors, other.errors))
        return Spread(errors, self.energy + other.energy, self.count + other.count)


def spread(row_scores: Tensor, keeps: Sequence[float], live_only: bool = True) -> Spread:
    """The water-filling variance of vectors of scores at all keeps, summed over the vectors.

    Args:
        row_scores: ``(vectors, n)`` or ``(n,)``, non-negative.
        keeps: fractions in (0, 1].
        live_only: keeps count the rows with a positive score, as those of regions do below a mask. Layers keep
            more there: for them it is too much variance.
    """
    s = torch.atleast_2d(row_scores.detach()).to(torch.float64)
    n = s.shape[1]
    if n == 0:
        return Spread((0.0,) * len(keeps), 0.0)
    fractions = torch.tensor(keeps, dtype=s.dtype, device=s.device)
    counted = (s > 0).sum(1, keepdim=True) if live_only else torch.full_like(s[:, :1], n)
    k = (fractions * counted - 1e-6).ceil().clamp(min=1)  # as sampling.num_kept
    errors = least_errors(torch.sort(s).values, k).sum(0)
    *found, energy = torch.cat([errors, s.square().sum()[None]]).tolist()
    by_keep = tuple(0.0 if keep >= 1 else e for keep, e in zip(keeps, found))
    return Spread(by_keep, energy, s.shape[0])


class Watch:
    """Hooks on a site for one pass: the scores of what its output's cotangent brings; :meth:`close` removes them.

    Scores are exact for regions and masks. For layers they are those of ``grad_weight``, a proxy whose scale is
    measured and whose shape is trusted; for sketches that do not choose by scores the shape is ``1/keep - 1``.
    Only a number per row is kept.
    """

    def __init__(self, site: Site) -> None:
        self.site = site
        self.scores: list[Tensor] = []
        self._handle = site.module.register_forward_hook(Hook(self._after))

    def close(self) -> None:
        """Remove the hook."""
        self._handle.remove()

    def spread(self, keeps: Sequence[float]) -> Spread | None:
        """The spread of all that was seen; None if no cotangent came."""
        found = [self._spread(s, keeps) for s in self.scores]
        return functools.reduce(operator.add, found) if found else None

    def _spread(self, scores: Tensor, keeps: Sequence[float]) -> Spread:
        if not self.site.is_layer or _choosing(self.site.base) is not None:
            return spread(scores, keeps, live_only=not self.site.is_mask)
        energy = float(scores.double().square().sum())
        return Spread(tuple((1 / k - 1) * energy for k in keeps), energy)

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        found = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
        if found and module.training and torch.is_grad_enabled():
            x = args[0] if args and isinstance(args[0], Tensor) else None
            weights = None if x is None or not self.site.is_layer else _row_norms(x.detach())
            found[0].register_hook(functools.partial(self._arrived, weights))

    def _arrived(self, inputs: Tensor | None, cotangent: Tensor) -> None:
        self.scores.append(_scores(self.site, cotangent.detach(), inputs))


def _scores(site: Site, g: Tensor, inputs: Tensor | None) -> Tensor:
    if isinstance(site.base, Region | Mask):
        return scores([g], site.base.row_dims)
    if isinstance(_choosing(site.base), Columns):
        return g.norm(dim=[d for d in range(g.ndim) if d != (1 if g.ndim == 4 else g.ndim - 1)])
    norms = _row_norms(g)
    return norms * inputs if inputs is not None and inputs.shape == norms.shape else norms


def _row_norms(x: Tensor) -> Tensor:
    """Of the rows of a linear layer; of the samples of a convolution, whose positions are other ones behind it."""
    return x.flatten(1).norm(dim=1) if x.ndim == 4 else x.reshape(-1, x.shape[-1]).norm(dim=1)


def _choosing(sketch: Sketch) -> Rows | Columns | StoredRows | None:
    """The part of a sketch that draws rows or columns by scores."""
    parts = _parts(sketch) if isinstance(sketch, Split) else (sketch,)
    kinds = [p for p in parts if isinstance(p, Rows | Columns | StoredRows)]
    return kinds[-1] if kinds and kinds[-1].scores != "uniform" else None


def weight_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers with matrix products that backsketch knows, by name."""
    found = {}
    for name, module in model.named_modules():
        adapter = adapter_of(module)
        if adapter is not None and not adapter.for_savers:
            found[name] = module
    return found
