"""Norms, as modules: only memory savers act there."""

from __future__ import annotations

from torch import Tensor, nn

from backsketch import ops
from backsketch.estimators import Estimator
from backsketch.nn.registry import Adapter, register
from backsketch.nn.swap import Swapped
from backsketch.torch_private import BatchNormBase

__all__ = ["SketchedBatchNorm", "SketchedGroupNorm", "SketchedLayerNorm", "SketchedRMSNorm"]


class SketchedLayerNorm(Swapped, nn.LayerNorm):
    """A layer norm that keeps its input in a few bits while it trains."""

    def forward(self, input: Tensor) -> Tensor:
        if not self._active():
            return super().forward(input)
        return ops.layer_norm(
            input, self.normalized_shape, self.weight, self.bias, self.eps, sketch=self._backsketch
        )


class SketchedRMSNorm(Swapped, nn.RMSNorm):
    """An RMS norm that keeps its input in a few bits while it trains."""

    def forward(self, x: Tensor) -> Tensor:
        if not self._active():
            return super().forward(x)
        return ops.rms_norm(
            x, self.normalized_shape, self.weight, self.eps, sketch=self._backsketch
        )


class SketchedGroupNorm(Swapped, nn.GroupNorm):
    """A group norm that keeps its input in a few bits while it trains."""

    def forward(self, input: Tensor) -> Tensor:
        if not self._active():
            return super().forward(input)
        return ops.group_norm(
            input, self.num_groups, self.weight, self.bias, self.eps, sketch=self._backsketch
        )


class SketchedBatchNorm(Swapped, BatchNormBase):
    """A batch norm that keeps its input in a few bits while it trains."""

    def forward(self, input: Tensor) -> Tensor:
        if not self._active():
            return super().forward(input)
        self._check_input_dim(input)
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        tracked = self.track_running_stats
        return ops.batch_norm(
            input,
            self.running_mean if tracked else None,
            self.running_var if tracked else None,
            self.weight,
            self.bias,
            momentum,
            self.eps,
            sketch=self._backsketch,
        )


def _kept(module: nn.Module, estimator: Estimator) -> float | None:
    rounding = estimator.rounding()
    return None if rounding is None else rounding.share(twice=True)


_NOTE = "keeps its input in two roundings"
for _kind, _mixin in {
    nn.LayerNorm: SketchedLayerNorm,
    nn.RMSNorm: SketchedRMSNorm,
    nn.GroupNorm: SketchedGroupNorm,
    nn.BatchNorm1d: SketchedBatchNorm,
    nn.BatchNorm2d: SketchedBatchNorm,
    nn.BatchNorm3d: SketchedBatchNorm,
}.items():
    register(Adapter(_kind, _mixin, keeps=_kept, note=_NOTE))
