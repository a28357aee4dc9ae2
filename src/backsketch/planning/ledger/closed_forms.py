"""The error that a site injects: in closed form from what passes by, and measured.

A layer injects an error into ``grad_input``, which travels on, and one into ``grad_weight``, which does
not. A region or a mask injects one into the cotangent at its output.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from backsketch import sampling
from backsketch.estimators import Bilinear, Estimator, Projection
from backsketch.nn.activation import SketchedActivation
from backsketch.nn.registry import adapter_of
from backsketch.ops.activation import PiecewiseLinear
from backsketch.ops.conv2d import bilinear_conv2d
from backsketch.ops.linear import Linear
from backsketch.planning.measure.passes import Caught, Place
from backsketch.regions import Mask, Region
from backsketch.regions import rows as row_ops
from backsketch.theory import variance

__all__ = ["Injected", "measured_rows", "own_weights", "predicted"]

_MOST_ROWS = {
    True: 4096,
    False: 256,
}  # of a linear layer, of a convolution: Gram matrices in between


@dataclass(frozen=True)
class Injected:
    """``E‖error‖²`` of one site: on what travels on, and on its own weight; None where unknown."""

    travelling: float | None
    weight: float | None


def own_weights(place: Place) -> set[int]:
    """Ids of the weights whose gradient a layer site sketches; empty for regions and masks."""
    if not isinstance(place.sketch, Estimator):
        return set()
    adapter = adapter_of(place.module)
    assert adapter is not None
    return {id(weight) for _, weight in adapter.weights(place.module)}


def predicted(place: Place, caught: Caught) -> Injected:
    """The closed forms of section 2 on the tensors of one pass; None where there is none.

    There is none for attention modules (their products are inside), for modules used several times in
    one pass, for ``LowRank("subspace")``, for the permuted design, and beyond some thousand rows.
    """
    if len(caught.cotangents) != 1:
        return Injected(None, None)
    if isinstance(place.sketch, (Region, Mask)):
        scores, k = _row_draw(place.sketch, caught.cotangents[0])
        return Injected(float(variance.minimal_sampling(scores, k)), 0.0)
    if isinstance(place.module, SketchedActivation):
        exact = isinstance(place.module._kind(), PiecewiseLinear)  # one bit an entry says it all
        return Injected(0.0, 0.0) if exact else Injected(None, None)
    op = _bilinear(place.module, caught.inputs[0])
    if op is None or not isinstance(place.sketch, Estimator):
        return Injected(None, None)
    return _layer(place.sketch, op, place.module, caught)


def _layer(sketch: Estimator, op: Bilinear, module: nn.Module, caught: Caught) -> Injected:
    weight, x = module.weight, caught.inputs[0]
    assert isinstance(weight, Tensor)
    g = op.rows(caught.cotangents[0])
    is_linear = isinstance(op, Linear)
    if g.shape[0] > _MOST_ROWS[is_linear] or not (is_linear or not isinstance(sketch, Projection)):
        return Injected(None, None)
    try:
        travels = (
            float(sketch.input_variance(op, g, weight.detach())) if caught.grad_inputs else 0.0
        )
        own = float(sketch.weight_variance(op, g, x)) if weight.requires_grad else 0.0
    except ValueError:  # the estimators say so where they have no closed form
        return Injected(None, None)
    return Injected(travels, own)


def _bilinear(module: nn.Module, x: Tensor) -> Bilinear | None:
    if isinstance(module, nn.Linear):
        return Linear()
    if isinstance(module, nn.Conv2d) and x.ndim == 4:
        if isinstance(module.padding, str) or module.padding_mode != "zeros":
            return None
        sizes = module.kernel_size, module.stride, module.padding, module.dilation
        return bilinear_conv2d(*sizes, module.groups, (x.shape[2], x.shape[3]))
    return None


def _row_draw(sketch: Region | Mask, cotangent: Tensor) -> tuple[Tensor, int]:
    """Scores and sample size at the boundary, as :mod:`backsketch.regions` draws there."""
    scores = row_ops.scores([cotangent], sketch.row_dims)
    n = math.prod(cotangent.shape[: sketch.row_dims])
    live = int(torch.count_nonzero(scores)) if isinstance(sketch, Region) else n
    return scores, min(n, sampling.num_kept(live, sketch.keep)) if live else n


def measured_rows(place: Place, cotangent: Tensor) -> float:
    """``‖error‖²`` that the next draw of a region or mask puts on this cotangent."""
    assert isinstance(place.sketch, (Region, Mask))
    scores, k = _row_draw(place.sketch, cotangent)
    if isinstance(place.sketch, Region):
        sample = sampling.draw_live(scores, place.sketch.keep)
    else:
        sample = sampling.draw(scores, k, sampling.next_seed(cotangent))
    if sample is None:
        return 0.0
    factors = torch.full_like(scores, -1.0).index_add(0, sample.indices, sample.weights)
    return float((factors.double() * scores.double()).square().sum())
