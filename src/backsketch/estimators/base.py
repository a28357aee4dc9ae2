"""Base classes of the sketches, and the contract that every estimator obeys.

A sketch is a frozen dataclass: the object is the configuration, and it holds no state.

Notation: ``X`` input rows, ``W`` weight, ``G`` cotangent, all with their rows (samples, tokens,
positions) along dimension 0; the columns of ``G`` (output channels) lie along dimension 1. Any further
dimensions are the positions of a convolution. The two vector-Jacobian products of a layer are bilinear:

    grad_input  = op.input_vjp(G, W)         linear layer: G W
    grad_weight = op.weight_vjp(G, X)        linear layer: Gᵀ X

**Invariant, tested for every member of the family:** for every fixed ``X, W, G``

    E[estimator.estimate_input(op, G, W, seed)]                            = op.input_vjp(G, W)
    E[estimator.estimate_weight(op, G, estimator.store(op, X, s), seed)]   = op.weight_vjp(G, X)

where the expectation is over the seeds. ``grad_bias`` is not an estimator's business: it is cheap, and
always exact.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, fx

if TYPE_CHECKING:
    from backsketch.estimators.bilinear import Bilinear
    from backsketch.rounding import Rounding

__all__ = [
    "Estimator",
    "Gradients",
    "Sketch",
    "check_choice",
    "check_keep",
    "nonfinite",
    "register",
    "spec",
]

_REGISTRY: dict[str, type[Sketch]] = {}

T = TypeVar("T", bound="type[Sketch]")
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # of input, weight and bias


class Sketch:
    """Anything that :func:`backsketch.sketch_` can put somewhere: an estimator, a region, a mask."""

    name: ClassVar[str]
    _keep_text: str

    def __post_init__(self) -> None:
        """Validate ``keep`` and store its text, for the sketches that have this field."""
        if hasattr(self, "keep"):
            check_keep(self, self.keep)
            object.__setattr__(self, "_keep_text", repr(self.keep))

    @property
    def fraction(self) -> float:
        """``keep``, in the form that code traced by ``torch.compile`` must use.

        Dynamo turns a float attribute that takes a second value (in another layer or step) into a symbol,
        which an autograd Function cannot hold. It never does so with text.
        """
        return float(self._keep_text)

    def chooses(self) -> Literal["rows", "columns", "stored rows"] | None:
        """What it draws by scores: rows or columns of the cotangent, rows of the input; None for nothing."""
        return None

    def movable_keep(self) -> float | None:
        """The keep that a plan or a controller may move; None where there is none."""
        return getattr(self, "keep", None)

    def with_keep(self, keep: float) -> Any:
        """The same sketch with another keep, in all its parts that have one."""
        if self.movable_keep() in (None, keep):
            return self
        return dataclasses.replace(self, keep=keep)  # type: ignore[type-var]

    def __str__(self) -> str:
        return spec(self)


class Estimator(Sketch):
    """An unbiased estimator of a layer's two vector-Jacobian products.

    Subclasses are frozen dataclasses that override the methods whose results they randomize. The methods of
    this class are exact.
    """

    def estimate_input(
        self, op: Bilinear, cotangent: Tensor, weight: Tensor, seed: Tensor
    ) -> Tensor:
        """An unbiased estimate of ``op.input_vjp(cotangent, weight)``, of the same shape."""
        return op.input_vjp(cotangent, weight)

    def estimate_weight(
        self, op: Bilinear, cotangent: Tensor, stored: tuple[Tensor, ...], seed: Tensor
    ) -> Tensor:
        """An unbiased estimate of ``op.weight_vjp(cotangent, x)`` from what :meth:`store` kept."""
        return op.weight_vjp(cotangent, op.rows(stored[0]))

    def vjps(
        self,
        op: Bilinear,
        cotangent: Tensor,
        weight: Tensor,
        stored: tuple[Tensor, ...],
        seed: Tensor,
        needed: tuple[bool, bool, bool],
    ) -> Gradients:
        """Estimates of the gradients of the rows of the input and of the weight, and the exact one of the bias.

        ``needed`` tells which of the three are wanted; the others are None.
        """
        if needed[0] and needed[1]:
            x = self.dequantized_input(op, cotangent, stored)
            if x is not None:
                return op.vjps(cotangent, x, weight, needed[2])
        return (
            self.estimate_input(op, cotangent, weight, seed) if needed[0] else None,
            self.estimate_weight(op, cotangent, stored, seed) if needed[1] else None,
            op.bias_vjp(cotangent) if needed[2] else None,
        )

    def store(self, op: Bilinear, x: Tensor, seed: Tensor | None) -> tuple[Tensor, ...]:
        """What the forward pass saves of its input for ``grad_weight``: by default the input."""
        return (x,)

    def dequantized_input(
        self, op: Bilinear, cotangent: Tensor, stored: tuple[Tensor, ...]
    ) -> Tensor | None:
        """Return an unbiased estimate of the rows of X if this estimator randomizes nothing else.

        Both products are then computed together with it in place of X (:meth:`Bilinear.vjps`). Estimators
        that randomize the products themselves return None.
        """
        return None

    def rounding(self) -> Rounding | None:
        """Return how this estimator rounds a saved tensor, or None if it does not round.

        Activations, norms and attention keep what they save in this form. Where it is None they stay exact.
        """
        return None

    needs_forward_seed: ClassVar[bool] = False
    """Whether :meth:`store` draws random numbers and so needs a seed in the forward pass."""

    saves_memory: ClassVar[bool] = False
    """Whether this estimator is a memory saver, which keeps less of the input than the exact layer does."""

    needs_pairs: ClassVar[bool] = False
    """Whether the closed form of its variance takes products of all pairs of rows."""

    needs_rows: ClassVar[bool] = True
    """Whether this estimator looks at single rows or columns. If it does not, a convolution is computed as
    such and not as a product of matrices, which would cost copies."""

    def is_exact(self) -> bool:
        """Whether nothing is randomized, so that the layer may stay what it is."""
        return getattr(self, "keep", None) == 1

    def work(self) -> tuple[float, float]:
        """Arithmetic of (grad_input, grad_weight), as fractions of the exact products."""
        return 1.0, 1.0

    def saved(self) -> float:
        """Bytes that :meth:`store` keeps, as a fraction of the float32 input."""
        return 1.0

    def refusal(self, op: Bilinear, weight: Tensor) -> str | None:
        """Why this estimator makes no sense for a layer, or None if it does."""
        return None

    def advice(self, op: Bilinear, weight: Tensor) -> str:
        """What the report says of a layer where no gain in time is expected; empty where one is."""
        return ""

    def input_variance(self, op: Bilinear, cotangent: Tensor, weight: Tensor) -> Tensor:
        """``E‖error‖²`` of :meth:`estimate_input` in closed form (a float64 scalar)."""
        return torch.zeros((), dtype=torch.float64)

    def weight_variance(self, op: Bilinear, cotangent: Tensor, x: Tensor) -> Tensor:
        """``E‖error‖²`` of :meth:`estimate_weight` in closed form (a float64 scalar).

        ``cotangent`` has its rows in place (``op.rows``); ``x`` is as the forward pass received it.
        """
        return torch.zeros((), dtype=torch.float64)


def register(name: str) -> Any:
    """Class decorator: give a sketch the name by which :func:`backsketch.parse` knows it."""

    def decorate(cls: T) -> T:
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return decorate


def registered() -> dict[str, type[Sketch]]:
    """Name to class of every known sketch."""
    return dict(_REGISTRY)


def spec(sketch: Sketch) -> str:
    """The text that :func:`backsketch.parse` turns back into ``sketch``."""
    arguments = []
    for field in dataclasses.fields(sketch):  # type: ignore[arg-type]
        value = getattr(sketch, field.name)
        if value == field.default:
            continue
        arguments.append(f"{field.name}={_format(value)}")
    return sketch.name + (":" + ",".join(arguments) if arguments else "")


def _format(value: object) -> str:
    if isinstance(value, Sketch):
        return f"({spec(value)})"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


# --------------------------------------------------------------------------------------------------
# Validation shared by the dataclasses
# --------------------------------------------------------------------------------------------------


def check_keep(owner: object, keep: object) -> None:
    """Raise ValueError unless ``keep`` is a number in (0, 1]."""
    if isinstance(keep, fx.Proxy):  # PyTorch 2.10 and 2.11, at the second keep in one process
        raise ValueError(
            "this version of PyTorch compiles layer sketches with one keep in each process; set "
            "torch._dynamo.config.specialize_float = True before, or use PyTorch 2.12 or later"
        )
    number = isinstance(keep, int | float) and not isinstance(keep, bool)
    if not number or not math.isfinite(keep) or not 0 < keep <= 1:  # type: ignore[arg-type, operator]
        raise ValueError(
            f"{type(owner).__name__}: keep is the fraction that is kept and must lie in (0, 1], "
            f"1 meaning exact; got {keep!r}"
        )


def check_choice(owner: object, field: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        near = difflib.get_close_matches(str(value), [str(c) for c in choices], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        allowed = ", ".join(repr(c) for c in choices)
        raise ValueError(
            f"{type(owner).__name__}: {field} must be one of {allowed}; got {value!r}{hint}"
        )


def nonfinite(cotangent: Tensor) -> Tensor:
    """Zero, or NaN if the cotangent holds a NaN or an Inf.

    Added to an estimate that may not look at every row, so that GradScaler and the user see what the
    exact gradient would have shown them.
    """
    return cotangent.sum(dtype=torch.promote_types(cotangent.dtype, torch.float32)) * 0
