r"""The proof that a captured backward graph is affine in its cotangents, operator by operator.

Let :math:`v_1, v_2, \dots` be the values of the graph that depend on a cotangent, in the order in which they are
computed. :func:`check_linear` walks the graph and lets through only operators that are *affine* in these
values, with coefficients that depend on saved values alone,

.. math:: v_j = A_j(v_1, \dots, v_{j-1}) ,\qquad\text{such as } v_j = v_i B \text{ with a saved } B.

Replace some of these maps by random ones that have the right mean given their arguments,
:math:`E[\tilde v_j \mid \tilde v_1, \dots, \tilde v_{j-1}] = A_j(\tilde v_1, \dots, \tilde v_{j-1})`.

**Unbiased**: expectations pass through affine maps, hence by induction :math:`E[\tilde v_j] = v_j` for every j,
the gradients included. It does not matter whether the noises of different operators are dependent: no two of the
:math:`\tilde v` are ever multiplied, which is what the walk refuses. No row has to be independent of another one.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, fx

from backsketch.regions.partition import backward_nodes, name_of
from backsketch.regions.structure import Coupled, describe

__all__ = ["check_linear"]

_VIEWS = (
    "view _unsafe_view reshape flatten unflatten permute transpose t expand unsqueeze squeeze select slice unbind "
    "split split_with_sizes chunk as_strided movedim diagonal narrow detach alias positive real view_as_real "
    "view_as_complex _conj"
)
_SUMS = "add sub rsub neg sum mean cumsum sum_to_size"
_COPIES = (
    "cat stack clone contiguous _to_copy to copy convert_element_type tril triu constant_pad_nd flip roll repeat "
    "slice_scatter select_scatter as_strided_scatter lift_fresh_copy"
)
_TRANSFORMS = "_fft_r2c _fft_c2r _fft_c2c"
_AFFINE = frozenset(" ".join([_VIEWS, _SUMS, _COPIES, _TRANSFORMS]).split())
_SHAPES = "zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty sym_size"
_SHAPE_ONLY = frozenset(_SHAPES.split())
_BILINEAR = frozenset({"mul", "mm", "bmm", "mv", "dot"})
_SUMS_OF_PRODUCTS = frozenset({"addmm", "baddbmm", "addmv"})
_NORMS = {"saved_layer_norm", "saved_group_norm", "saved_batch_norm"}
_OURS = frozenset({"times", "masked", "saved_mm", "int8_vjps", *_NORMS})
_FIRST = _OURS | {"div", "masked_fill", "index", "gather", "index_select"}
"""Affine in the first argument alone; the others choose, scale or index."""
_OTHERS = {
    "where": (0,),
    "index_put": (1,),
    "scatter": (2,),
    "scatter_add": (2,),
    "index_add": (2,),
}
"""Affine in all arguments but these."""
_COTANGENT_LATER = {"grouped_mm_fallback_backward": 3}
"""Vector-Jacobian products whose cotangent is not the first argument (experts in ``transformers``)."""


def check_linear(graph: fx.Graph) -> None:
    """Prove that every value of a backward graph is affine in its cotangents, one operator at a time.

    Raises:
        Coupled: an operator multiplies two values that depend on a cotangent, or is not known to be affine.
    """
    dependent = backward_nodes(graph)
    for node in graph.nodes:
        if node.op == "call_function" and node in dependent:
            _check(node, dependent)


def _check(node: fx.Node, dependent: set[fx.Node]) -> None:
    name = name_of(node)
    if name in _SHAPE_ONLY:
        return
    affine = node.target is operator.getitem or name in _AFFINE
    if not (_is_continuous(node) and (affine or _is_affine(name, _dependent(node, dependent)))):
        raise Coupled(f"{describe(node)} is not known to be linear in the cotangent")


def _is_affine(name: str, where: set[int]) -> bool:
    """Whether an operator is affine in the arguments at these positions (-1: a keyword) together."""
    if name in _BILINEAR:
        return len(where) == 1
    if name in _SUMS_OF_PRODUCTS:
        return not {1, 2} <= where and -1 not in where
    if name in _OTHERS:
        return not where & {*_OTHERS[name], -1}
    if name in _COTANGENT_LATER:
        return where == {_COTANGENT_LATER[name]}
    is_vjp = "_backward" in name and "double_backward" not in name
    return where == {0} and (is_vjp or name in _FIRST)


def _is_continuous(node: fx.Node) -> bool:
    """Whether nothing is rounded to whole numbers."""
    values = node.meta.get("val")
    values = values if isinstance(values, (tuple, list)) else [values]
    whole = [v for v in values if isinstance(v, Tensor) and not v.dtype.is_floating_point]
    return not node.kwargs.get("rounding_mode") and not any(not v.is_complex() for v in whole)


def _dependent(node: fx.Node, dependent: set[fx.Node]) -> set[int]:
    """Which arguments depend on a cotangent."""
    where = {i for i, a in enumerate(node.args) if _depends(a, dependent)}
    return where | ({-1} if _depends(tuple(node.kwargs.values()), dependent) else set())


def _depends(argument: Any, dependent: set[fx.Node]) -> bool:
    found: set[fx.Node] = set()

    def visit(node: fx.Node) -> fx.Node:
        found.add(node)
        return node

    fx.map_arg(argument, visit)
    return not found.isdisjoint(dependent)
