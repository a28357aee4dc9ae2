"""The error that a site injects: in closed form from what passes by, and measured.

A layer injects an error into ``grad_input``, which travels on, and one into ``grad_weight``, which does
not. A region or a mask injects one into the cotangent at its output.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from backsketch.estimators import Bilinear, Estimator
from backsketch.nn.registry import adapter_of
from backsketch.planning.measure.passes import Caught, SketchedSite
from backsketch.planning.measure.rows import row_curve
from backsketch.regions import Mask, Region
from backsketch.regions.rows import scores
from backsketch.torch_private import base_of

__all__ = ["Injected", "own_weights", "predicted"]


@dataclass(frozen=True)
class Injected:
    """``E‖error‖²`` of one site: on what travels on, and on its own weight; None where unknown."""

    travelling: float | None
    weight: float | None


def own_weights(site: SketchedSite) -> set[int]:
    """Ids of the weights whose gradient a layer site sketches; empty for regions and masks."""
    if not isinstance(site.sketch, Estimator):
        return set()
    adapter = adapter_of(site.module)
    assert adapter is not None
    # Some kinds hold a weight transposed, some several in one.
    return {id(base_of(weight)) for _, weight in adapter.weights(site.module)}


def predicted(site: SketchedSite, caught: Caught) -> Injected:
    """The closed forms of section 2 on the tensors of one pass; None where there is none.

    There is none for attention modules (their products are inside), for modules used several times in
    one pass, for ``LowRank("subspace")``, for the permuted design, and beyond some thousand rows.
    """
    if len(caught.cotangents) != 1:
        return Injected(None, None)
    if isinstance(site.sketch, (Region, Mask)):
        found = scores(caught.cotangents, site.sketch.row_dims)
        curve = row_curve(found, (site.sketch.keep,), live_only=isinstance(site.sketch, Region))
        return Injected(curve.errors[0], 0.0)
    adapter = adapter_of(site.module)
    if adapter is None or not isinstance(site.sketch, Estimator):
        return Injected(None, None)
    if adapter.is_exact:
        return Injected(0.0, 0.0)
    op = adapter.product(site.module, caught.inputs[0])
    if op is None:
        return Injected(None, None)
    ((_, weight),) = adapter.weights(site.module)
    return _layer(site.sketch, op, weight, caught)


def _layer(sketch: Estimator, op: Bilinear, weight: Tensor, caught: Caught) -> Injected:
    x = caught.inputs[0]
    g = op.rows(caught.cotangents[0])
    if g.shape[0] > (op.pair_rows if sketch.needs_pairs else op.gram_rows):
        return Injected(None, None)
    try:
        travels = (
            float(sketch.input_variance(op, g, weight.detach())) if caught.grad_inputs else 0.0
        )
        own = float(sketch.weight_variance(op, g, x)) if base_of(weight).requires_grad else 0.0
    except ValueError:  # the estimators say so where they have no closed form
        return Injected(None, None)
    return Injected(travels, own)
