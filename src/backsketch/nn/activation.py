"""Element-wise activations, as modules: only memory savers act there."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backsketch import ops
from backsketch.estimators import Estimator
from backsketch.nn.registry import Adapter, register
from backsketch.nn.swap import Swapped
from backsketch.ops.activation import PiecewiseLinear, Smooth

__all__ = ["RELU", "SketchedActivation"]

Kind = PiecewiseLinear | Smooth


class SketchedActivation(Swapped):
    """An activation that saves a few bits an entry while it trains."""

    def _kind(self) -> Kind:
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        if not self._active():
            result: Tensor = super().forward(input)
            return result
        inplace = getattr(self, "inplace", False)
        return ops.activation(input, self._kind(), self._backsketch, inplace)


# Piecewise linear: one bit an entry, exact ----------------------------------------------------------

RELU = PiecewiseLinear(F.relu)
_RELU6 = PiecewiseLinear(F.relu6, high=6.0)


class SketchedReLU(SketchedActivation, nn.ReLU):
    def _kind(self) -> Kind:
        return RELU


class SketchedReLU6(SketchedActivation, nn.ReLU6):
    def _kind(self) -> Kind:
        return _RELU6


class SketchedLeakyReLU(SketchedActivation, nn.LeakyReLU):
    def _kind(self) -> Kind:
        slope = self.negative_slope
        return PiecewiseLinear(lambda x: F.leaky_relu(x, slope), outside=slope)


class SketchedHardtanh(SketchedActivation, nn.Hardtanh):
    def _kind(self) -> Kind:
        low, high = self.min_val, self.max_val
        return PiecewiseLinear(lambda x: F.hardtanh(x, low, high), low, high)


# Smooth: the derivative, stochastically rounded -------------------------------------------------------

_aten = torch.ops.aten


_GELU = Smooth(F.gelu, "gelu")
_GELU_TANH = Smooth(
    lambda x: F.gelu(x, approximate="tanh"),
    lambda x, y: _aten.gelu_backward(torch.ones_like(x), x, approximate="tanh"),
)


class SketchedGELU(SketchedActivation, nn.GELU):
    def _kind(self) -> Kind:
        return _GELU if self.approximate == "none" else _GELU_TANH


_SILU = Smooth(F.silu, "silu")
_MISH = Smooth(F.mish, lambda x, y: _aten.mish_backward(torch.ones_like(x), x))
_TANH = Smooth(torch.tanh, lambda x, y: 1 - y * y)
_SIGMOID = Smooth(torch.sigmoid, lambda x, y: y * (1 - y))
_HARDSWISH = Smooth(F.hardswish, lambda x, y: _aten.hardswish_backward(torch.ones_like(x), x))


class SketchedSiLU(SketchedActivation, nn.SiLU):
    def _kind(self) -> Kind:
        return _SILU


class SketchedMish(SketchedActivation, nn.Mish):
    def _kind(self) -> Kind:
        return _MISH


class SketchedTanh(SketchedActivation, nn.Tanh):
    def _kind(self) -> Kind:
        return _TANH


class SketchedSigmoid(SketchedActivation, nn.Sigmoid):
    def _kind(self) -> Kind:
        return _SIGMOID


class SketchedHardswish(SketchedActivation, nn.Hardswish):
    def _kind(self) -> Kind:
        return _HARDSWISH


class SketchedSoftplus(SketchedActivation, nn.Softplus):
    def _kind(self) -> Kind:
        beta, threshold = self.beta, self.threshold
        return Smooth(
            lambda x: F.softplus(x, beta, threshold),
            lambda x, y: _aten.softplus_backward(torch.ones_like(x), x, beta, threshold),
        )


class SketchedELU(SketchedActivation, nn.ELU):
    def _kind(self) -> Kind:
        alpha = self.alpha
        return Smooth(
            lambda x: F.elu(x, alpha),
            lambda x, y: _aten.elu_backward(torch.ones_like(x), alpha, 1.0, 1.0, False, x),
        )


# Registration -----------------------------------------------------------------------------------------


def _bit(module: nn.Module, estimator: Estimator) -> float:
    return 1 / 32


def _rounded(module: nn.Module, estimator: Estimator) -> float | None:
    rounding = estimator.rounding()
    return None if rounding is None else rounding.share()


_EXACT_BITS = {
    nn.ReLU: SketchedReLU,
    nn.ReLU6: SketchedReLU6,
    nn.LeakyReLU: SketchedLeakyReLU,
    nn.Hardtanh: SketchedHardtanh,
}
_ROUNDED: dict[type[nn.Module], type[SketchedActivation]] = {
    nn.GELU: SketchedGELU,
    nn.SiLU: SketchedSiLU,
    nn.Mish: SketchedMish,
    nn.Tanh: SketchedTanh,
    nn.Sigmoid: SketchedSigmoid,
    nn.Hardswish: SketchedHardswish,
    nn.Softplus: SketchedSoftplus,
    nn.ELU: SketchedELU,
}


def _register(
    kinds: dict[type[nn.Module], type[SketchedActivation]],
    share: Callable[[nn.Module, Estimator], float | None],
    note: str,
    is_exact: bool = False,
) -> None:
    for kind, mixin in kinds.items():
        register(Adapter(kind, mixin, keeps=share, note=note, is_exact=is_exact))


_register(dict(_EXACT_BITS), _bit, "keeps one bit an entry: exact", is_exact=True)
_register(_ROUNDED, _rounded, "keeps its derivative, rounded")
