"""The backward pass of a layer as one operator that a compiler does not look into.

Compiled code that spells a sketch out (scores, draws, gathers) takes seconds of tracing and compilation for each
layer, and is no faster than the kernels that eager code uses. As one operator it costs next to nothing to compile,
whatever the sketch, and layers of all shapes share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from backsketch.estimators import Bilinear, Estimator, parse
from backsketch.estimators.base import Gradients, Sketch, registered
from backsketch.sampling import operator
from backsketch.torch_private import CONSTANTS_OF_OBJECTS, traced_as_constant

__all__ = ["OPAQUE", "OpaqueVJP", "note_text"]

Needed = tuple[bool, bool, bool]
OPAQUE: dict[type[Bilinear], OpaqueVJP] = {}  # the kinds of layers that have one


class OpaqueVJP:
    """Calls ``estimator.vjps`` of one kind of layer, in code that is being compiled.

    The estimator goes into the operator as its text, so that compiled code may be cached on disk.

    Args:
        name: of the operator.
        op: the kind of layer, with a weight whose gradient has its shape and contiguous gradients.
    """

    def __init__(self, name: str, op: Bilinear) -> None:
        self._op = op
        self._operator = operator(
            f"{name}(Tensor cotangent, Tensor weight, Tensor[] stored, Tensor seed, SymInt[] shape, str sketch,"
            " bool[] needed) -> Tensor[]",
            self._compute,
            _fake,
        )

    def __call__(
        self,
        estimator: Estimator,
        shape: tuple[int, ...],
        needed: Needed,
        cotangent: Tensor,
        weight: Tensor,
        stored: Sequence[Tensor],
        seed: Tensor,
    ) -> Gradients | None:
        """Gradients of the input of this ``shape``, the weight and the bias.

        None where no text describes the estimator, such as one of a class that is not registered.
        """
        text = _noted_text(estimator)
        if text is None:
            return None
        found = iter(self._operator(cotangent, weight, stored, seed, shape, text, needed))
        below, at_weight, at_bias = (next(found) if wanted else None for wanted in needed)
        return below, at_weight, at_bias

    def _compute(
        self,
        cotangent: Tensor,
        weight: Tensor,
        stored: list[Tensor],
        seed: Tensor,
        shape: list[int],
        sketch: str,
        needed: list[bool],
    ) -> list[Tensor]:
        op, (for_x, for_weight, for_bias) = self._op, needed
        below, at_weight, at_bias = _parsed(sketch).vjps(
            op, op.rows(cotangent), weight, tuple(stored), seed, (for_x, for_weight, for_bias)
        )
        below = None if below is None else op.unrows(below, tuple(shape))
        # What the compiled code was told to expect.
        found = (g for g in (below, at_weight, at_bias) if g is not None)
        return [g.to(cotangent.dtype).contiguous() for g in found]


def _fake(
    cotangent: Tensor,
    weight: Tensor,
    stored: list[Tensor],
    seed: Tensor,
    shape: list[int],
    sketch: str,
    needed: list[bool],
) -> list[Tensor]:
    shapes = (shape, weight.shape, weight.shape[:1])
    return [cotangent.new_empty(s) for s, wanted in zip(shapes, needed) if wanted]


@lru_cache
def _parsed(text: str) -> Estimator:
    sketch = parse(text)
    assert isinstance(sketch, Estimator)
    return sketch


def note_text(sketch: Sketch) -> None:
    """Keep the text of an estimator with it, where code that is being compiled can read it.

    PyTorch before 2.12 gives no objects to functions that are traced as constants.
    """
    if isinstance(sketch, Estimator):
        object.__setattr__(sketch, "_noted", (_text(sketch),))


def _noted_text(estimator: Estimator) -> str | None:
    """The text of an estimator. Nothing notes it in functional code, which old compilers then look into."""
    if hasattr(estimator, "_noted"):
        noted: str | None = estimator._noted[0]
        return noted
    looked_into = torch.compiler.is_compiling() and not CONSTANTS_OF_OBJECTS
    return None if looked_into else _text(estimator)


@traced_as_constant
def _text(estimator: Estimator) -> str | None:
    """The text from which :func:`parse` makes an equal estimator, if there is one."""
    if registered().get(getattr(estimator, "name", "")) is not type(estimator):
        return None
    text = str(estimator)
    return text if parse(text) == estimator else None
