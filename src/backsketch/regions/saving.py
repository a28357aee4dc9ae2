"""Saved tensors of a captured graph in a few bits, as the operators that read them allow.

The joint graph is edited before it is split. What a backward operator reads of the forward pass is rounded
where the operator is linear in it, or replaced by what it is linear in (:mod:`.uses` has the rules).
Fused attention runs again (:mod:`.again`). A tensor with one reader that needs it as it is (batch norms, pooling,
whatever is not known) is kept as it is for all of them. :mod:`.noises` proves the edited graph unbiased; a
tensor at which that fails is rounded apart for each of its readers, and kept as it is if that is not enough.

Rows that are drawn in the backward pass (``keep`` below 1) are a function of the cotangents of the region's
outputs and of random numbers of their own. The forward pass is exact, so that these do not depend on what was
rounded in it: given the drawn rows, the roundings are as random as before, and the mean over them is the gradient
of those rows.
"""

from __future__ import annotations

from torch import fx

from backsketch.regions.compilers import copied
from backsketch.regions.linearity import check_linear
from backsketch.regions.noises import MetTwice, check_independent
from backsketch.regions.saver import Saver
from backsketch.regions.structure import RowSymbols
from backsketch.regions.uses import use_of

__all__ = ["round_saved"]


def round_saved(
    joint: fx.GraphModule, bits: int, products: bool, symbols: RowSymbols | None = None
) -> fx.GraphModule:
    """A copy of a joint graph whose backward part reads rounded tensors.

    Args:
        joint: the forward and the backward pass, with tangents among the placeholders.
        bits: of the codes, 8 or 4.
        products: keep the inputs of large linear layers as the 8-bit codes of integer products.
        symbols: of the rows, if the backward part is to run on some of them.

    Raises:
        Coupled: it is not proven that the graph is affine in its cotangents, or that its rows do not interact.
    """
    apart: set[str] = set()
    exact: set[str] = set()
    while True:
        edited = copied(joint)
        saver = Saver(edited.graph, bits, products, symbols, apart, exact)
        saver.run(use_of)
        edited.graph.eliminate_dead_code()
        check_linear(edited.graph)
        try:
            check_independent(edited.graph)
        except MetTwice as error:
            name = saver.rounded_at[error.rounding]
            if name in exact:
                raise
            (exact if name in apart else apart).add(name)
            continue
        edited.graph.lint()
        edited.recompile()
        return edited
