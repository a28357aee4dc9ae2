"""Which layers can be sketched, and how: one row per kind, keyed by the class whose forward is known."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter, is_lazy
from torch.nn.utils import parametrize

from backsketch.estimators import Bilinear, Estimator
from backsketch.nn.swap import Swapped

__all__ = [
    "SMALL_WEIGHT",
    "Adapter",
    "adapter_of",
    "advice",
    "foreign",
    "inherent",
    "is_small",
    "refusal",
    "register",
    "register_reason",
]


@dataclass(frozen=True)
class Adapter:
    """How one kind of layer is sketched.

    ``weights`` lists the layer's sketched products as (bilinear op, weight): an estimator that refuses
    one of them refuses the layer. A kind without products (an activation, a norm) has ``keeps`` instead:
    what a memory saver keeps of its input, as a fraction of float32, or None where it cannot act; no
    other estimator has anything to do there. ``note`` is what the report says of it. ``rows`` puts the rows of
    its input or output (samples, tokens, positions) along dimension 0, ``product`` is the bilinear op of its one
    product for an input, None where there is none or several, and ``is_exact`` says that a sketched layer of
    this kind still has the exact gradient. ``check`` names what keeps one module of the kind from being sketched.
    """

    kind: type[nn.Module]
    mixin: type[Swapped]
    weights: Callable[[nn.Module], list[tuple[Bilinear, Tensor]]] = lambda module: []
    methods: tuple[str, ...] = ("forward",)
    keeps: Callable[[nn.Module, Estimator], float | None] | None = None
    note: str = ""
    rows: Callable[[Tensor], Tensor] = lambda tensor: tensor.reshape(-1, tensor.shape[-1])
    product: Callable[[nn.Module, Tensor], Bilinear | None] = lambda module, x: None
    is_exact: bool = False
    check: Callable[[nn.Module], str | None] = lambda module: None

    @property
    def for_savers(self) -> bool:
        """Whether only memory savers act at this kind of layer."""
        return self.keeps is not None


SMALL_WEIGHT = 4096
"""Layers with fewer weights than this are not expected to gain time from a sketch."""

MakeAdapter = Callable[[type[nn.Module]], Adapter]

_ADAPTERS: dict[type[nn.Module], Adapter] = {}
_FOREIGN: dict[str, tuple[Callable[[type], bool], MakeAdapter]] = {}
_REASONS: dict[type[nn.Module], str] = {}


def register(adapter: Adapter) -> None:
    """Make a kind of layer known."""
    _ADAPTERS[adapter.kind] = adapter
    _adapter_of_class.cache_clear()


def foreign(
    name: str, recognise: Callable[[type], bool] | None = None
) -> Callable[..., MakeAdapter]:
    """Decorator: make a kind of layer of another library known, which need not be imported for it.

    Args:
        name: qualified name of the class, or what to call the kind where ``recognise`` finds it.
        recognise: whether a class is of this kind.

    The decorated function makes the adapter of such a class.
    """

    def decorate(make: MakeAdapter) -> MakeAdapter:
        _FOREIGN[name] = recognise or (lambda cls: _qualified(cls) == name), make
        _adapter_of_class.cache_clear()
        return make

    return decorate


def _qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def register_reason(kind: type[nn.Module], reason: str) -> None:
    """Say why a kind of layer with weights cannot be sketched."""
    _REASONS[kind] = reason


def inherent(module: nn.Module) -> str | None:
    """Why no layer sketch exists for a module's kind, where that is known."""
    reasons = (_REASONS[cls] for cls in type(module).__mro__ if cls in _REASONS)
    return next(reasons, None)


def with_products() -> list[str]:
    """Names of the kinds of layers whose products can be sketched."""
    return [*(kind.__name__ for kind, a in _ADAPTERS.items() if not a.for_savers), *_FOREIGN]


def supported() -> list[str]:
    """Names of the layers that can be sketched."""
    return [*(kind.__name__ for kind in _ADAPTERS), *_FOREIGN]


def adapter_of(module: nn.Module) -> Adapter | None:
    """The adapter of a module's kind, subclasses included."""
    kind: type = type(module)
    return _adapter_of_class(kind)


@functools.cache
def _adapter_of_class(kind: type) -> Adapter | None:
    for cls in kind.__mro__:
        if cls in _ADAPTERS:
            return _ADAPTERS[cls]
        for recognise, make in _FOREIGN.values():
            if recognise(cls):
                return make(cls)
    return None


def is_small(module: nn.Module) -> bool:
    """Whether a layer of a known kind has so few weights that a sketch would not save time there."""
    adapter = adapter_of(module)
    assert adapter is not None
    return sum(weight.numel() for _, weight in adapter.weights(module)) < SMALL_WEIGHT


def advice(module: nn.Module, estimator: Estimator) -> str:
    """Why no gain in time is expected of an estimator at a layer of a known kind; empty where one is."""
    if is_small(module):
        return "small: expect no gain in time"
    adapter = adapter_of(module)
    assert adapter is not None
    return next(filter(None, (estimator.advice(*pair) for pair in adapter.weights(module))), "")


def refusal(module: nn.Module, estimator: Estimator) -> str | None:
    """Why ``estimator`` cannot act at ``module``, or None if it can."""
    adapter = adapter_of(module)
    if adapter is None:
        reason = inherent(module)
        if reason:
            return f"{type(module).__name__}: {reason}"
        return f"{type(module).__name__} is not a layer that backsketch knows ({', '.join(supported())})"
    return _structural(module, adapter) or _numerical(module, adapter, estimator)


def _structural(module: nn.Module, adapter: Adapter) -> str | None:
    name = type(module).__name__
    # Parametrized first: there, too, the class is not the one that was written.
    if parametrize.is_parametrized(module):
        return f"{name} is parametrized (its class is swapped already); remove the parametrization first"
    for method in adapter.methods:
        if getattr(type(module), method) is not getattr(adapter.kind, method):
            return (
                f"{name} overrides {adapter.kind.__name__}.{method}, so its backward is not known"
            )
        if method in module.__dict__:
            return f"its {method} was replaced on the instance, which would bypass the sketch"
    if any(is_lazy(p) or isinstance(p, UninitializedParameter) for p in module.parameters(False)):
        return f"{name} has no weights yet: run one batch through the model first"
    return adapter.check(module)


def _numerical(module: nn.Module, adapter: Adapter, estimator: Estimator) -> str | None:
    if adapter.keeps is not None:
        name = type(module).__name__
        if not estimator.saves_memory:
            return (
                f"{name} has no products to sketch: only memory savers such as Quantized act there"
            )
        if adapter.keeps(module, estimator) is None:
            return f"{name} can be saved in a few bits by Quantized, but not by {estimator}"
    for op, weight in adapter.weights(module):
        if not weight.is_floating_point():
            return f"its weight has dtype {weight.dtype}; real floating point is needed"
        reason = estimator.refusal(op, weight)
        if reason:
            return reason
    return None
