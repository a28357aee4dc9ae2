"""The two configurations of this package: what to sketch, never how it is going."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from backsketch.estimators.base import Sketch, check_choice, register
from backsketch.sampling import ROW_DESIGNS

__all__ = ["Mask", "Region"]


_ROW_DIMS = (1, 2)


@register("region")
@dataclass(frozen=True)
class Region(Sketch):
    r"""Run the whole backward pass of a submodule on a random subset of its rows.

    A module whose rows do not interact has a block diagonal Jacobian, so its VJP is a sum over rows,

    .. math:: J^\top g = \sum_i J_i^\top g_i, \qquad
              \widehat{J^\top g} = \sum_{i \in S} J_i^\top g_i / \pi_i,

    and the Horvitz-Thompson estimate on the right is unbiased whatever the module does inside a row.
    Inclusion probabilities are proportional to :math:`\|g_i\|` (water-filling): a row with a zero
    cotangent contributes nothing and is never drawn, so regions below a :class:`Mask` shrink with it.

    Args:
        keep: fraction of the rows with a non-zero cotangent that is kept, in (0, 1]; 1 is exact.
        row_dims: how many leading dimensions count rows: 1 for samples, 2 for tokens (only for modules
            that treat positions independently).
        arithmetic: ``"int8"`` computes the matrix products of the backward pass from stochastically rounded
            8-bit operands, on the kept rows (:class:`backsketch.Int8` tells the mathematics). With ``keep=1`` no
            row is dropped and none has to be independent: any module that can be captured is allowed,
            ``BatchNorm`` in training mode included. A recomputed forward pass stays exact.
        save: ``"int8"`` or ``"int4"`` keeps what the backward graph reads in a few bits, rounded
            stochastically, where an operator is linear in it: inputs of matrix products, derivatives of
            activations, norms (by two roundings). Fused attention runs again, with the linear layers and the norm
            in front of it; what unknown operators read stays as it is. Below ``keep=1`` the codes of the kept rows
            are taken: only tensors whose rows have a multiple of 64 entries are rounded. Needs ``mode="save"``.
        mode: ``"save"`` keeps the activations of the exact forward pass and slices them, at cost
            ``1 + 2 keep`` (a forward pass is 1); ``"recompute"`` keeps the inputs only and recomputes
            the kept rows, dropout masks included, at cost ``1 + 3 keep``.
        design: how the rows are drawn, see :data:`backsketch.sampling.ROW_DESIGNS`. The default, ``"shuffled"``,
            draws systematically within a random order of the samples: neighbouring tokens stratify the sample
            for free, and samples that alternate (pairs, as in preference training) cannot fall in step with it.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> Region(keep=0.5, mode="recompute")
        Region(keep=0.5, row_dims=1, mode='recompute', arithmetic='exact', save='exact', design='shuffled')
    """

    keep: float
    row_dims: int = 1
    mode: Literal["save", "recompute"] = "save"
    arithmetic: Literal["exact", "int8"] = "exact"
    save: Literal["exact", "int8", "int4"] = "exact"
    design: str = "shuffled"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "row_dims", self.row_dims, _ROW_DIMS)
        check_choice(self, "mode", self.mode, ("save", "recompute"))
        check_choice(self, "arithmetic", self.arithmetic, ("exact", "int8"))
        check_choice(self, "save", self.save, ("exact", "int8", "int4"))
        if self.save != "exact" and self.mode != "save":
            raise ValueError(
                f"Region: save={self.save!r} needs mode='save': a recompute keeps its inputs alone"
            )
        check_choice(self, "design", self.design, ROW_DESIGNS)

    def is_exact(self) -> bool:
        """Whether nothing is randomized."""
        return self.keep == 1 and self.arithmetic == self.save == "exact"


@register("mask")
@dataclass(frozen=True)
class Mask(Sketch):
    r"""Drop whole rows of the cotangent at a module's output; the forward pass is the identity.

    .. math:: \hat g_i = g_i \, 1[i \in S] / \pi_i

    has full shape, expectation :math:`g` and at most ``ceil(keep * n)`` non-zero rows. Regions and row
    sketches below never draw a zero row, so one draw here shrinks everything upstream of it.

    Outputs without rows (an auxiliary loss) stay exact. A loss that the module computes itself from the
    outputs with rows would never pass the mask: that raises in the first training step. Put the mask
    on the module before the loss.

    Args:
        keep: fraction of the rows that is kept, in (0, 1]; 1 is exact.
        row_dims: how many leading dimensions count rows (1: samples, 2: tokens).
        design: as of a :class:`Region`.

    Raises:
        ValueError: an argument is out of range.
    """

    keep: float
    row_dims: int = 1
    design: str = "shuffled"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "row_dims", self.row_dims, _ROW_DIMS)
        check_choice(self, "design", self.design, ROW_DESIGNS)

    def is_exact(self) -> bool:
        """Whether nothing is randomized."""
        return self.keep == 1
