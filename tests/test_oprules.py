"""Every rule of an operator is asked about a small graph: what it says of rows must be so, wherever rows are.

Each case is one operator and its arguments. Its graph has rows along the first dimension, where the rule must
find them again, and then along each other dimension, where it must find them or refuse. Found rows are compared
with numbers: the operator on some rows gives those rows of the operator on all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)
from torch.utils import _pytree as pytree

from backsketch.regions.oprules import KINDS, RULES, label_of
from backsketch.regions.rows import Layout, take
from backsketch.regions.structure import Coupled, Proof, RowSymbols

NUM = 8
KEPT = torch.tensor([6, 1, 3, 4])
NAMESPACES = (torch.ops.aten, torch.ops.prims, torch.ops.backsketch)


# --------------------------------------------------------------------------------------------------
# The cases
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A tensor argument. ``shape`` has the sizes of one row; without rows it has all of them."""

    shape: tuple[int, ...]
    rows: bool = True
    make: Callable[..., Tensor] = torch.randn


class Number:
    """The number of rows, as an argument."""


def R(*shape: int, make: Callable[..., Tensor] = torch.randn) -> Part:
    return Part(shape, True, make)


def T(*shape: int, make: Callable[..., Tensor] = torch.randn) -> Part:
    return Part(shape, False, make)


def bits(*shape: Any) -> Tensor:
    return torch.rand(*shape) > 0.5


def indices(*shape: Any) -> Tensor:
    """Entries below 4."""
    return (torch.rand(*shape) * 4).long()


def signs(*shape: Any) -> Tensor:
    return torch.where(bits(*shape), 1.0, -1.0)


def pairs(*shape: Any) -> Tensor:
    return torch.complex(torch.randn(*shape), torch.randn(*shape))


N = Number()
ONE, TWO, ZERO = [1, 1], [2, 2], [0, 0]
HEADS = (R(2, 4, 8), R(2, 4, 8), R(2, 4, 8))
IMAGE = R(4, 4, 4)
VOLUME = R(4, 4, 4, 4)
STATISTICS = (T(4), T(4), T(4), T(4, make=torch.rand))
SEED = T(make=lambda *shape: torch.tensor(5))
CPU = torch.device("cpu")

Case = tuple[str, tuple[Any, ...]]
"""The overload, behind the name of the operator where there are several, and the arguments."""

CASES: dict[str, Case] = {
    # attention
    "_scaled_dot_product_flash_attention_for_cpu": ("default", HEADS),
    # leading
    "native_group_norm": ("default", (R(4, 6), T(4), T(4), N, 4, 6, 2, 1e-5)),
    "_native_batch_norm_legit_no_training": ("default", (IMAGE, *STATISTICS, 0.1, 1e-5)),
    "native_batch_norm": ("default", (IMAGE, *STATISTICS, False, 0.1, 1e-5)),
    "convolution": ("default", (IMAGE, T(6, 4, 3, 3), T(6), ONE, ONE, ONE, False, ZERO, 1)),
    "_convolution": (
        "default",
        (IMAGE, T(6, 4, 3, 3), T(6), ONE, ONE, ONE, False, ZERO, 1, False, False, False, False),
    ),
    "avg_pool1d": ("default", (R(4, 4), [2])),
    "avg_pool2d": ("default", (IMAGE, TWO)),
    "avg_pool3d": ("default", (VOLUME, [2, 2, 2])),
    "max_pool2d": ("default", (IMAGE, TWO)),
    "max_pool2d_with_indices": ("default", (IMAGE, TWO)),
    "max_pool3d_with_indices": ("default", (VOLUME, [2, 2, 2])),
    "adaptive_avg_pool1d": ("default", (R(4, 4), [2])),
    "_adaptive_avg_pool2d": ("default", (IMAGE, TWO)),
    "_adaptive_avg_pool3d": ("default", (VOLUME, [2, 2, 2])),
    "adaptive_max_pool2d": ("default", (IMAGE, TWO)),
    "upsample_nearest1d": ("default", (R(4, 4), [8])),
    "upsample_nearest2d": ("default", (IMAGE, [8, 8])),
    "upsample_nearest3d": ("default", (VOLUME, [8, 8, 8])),
    "upsample_bilinear2d": ("default", (IMAGE, [8, 8], False)),
    "upsample_bicubic2d": ("default", (IMAGE, [8, 8], False)),
    "upsample_linear1d": ("default", (R(4, 4), [8], False)),
    "upsample_trilinear3d": ("default", (VOLUME, [8, 8, 8], False)),
    "_upsample_bilinear2d_aa": ("default", (IMAGE, TWO, False)),
    "im2col": ("default", (IMAGE, TWO, ONE, ZERO, ONE)),
    "col2im": ("default", (R(8, 9), [4, 4], TWO, ONE, ZERO, ONE)),
    "pixel_shuffle": ("default", (IMAGE, 2)),
    "pixel_unshuffle": ("default", (IMAGE, 2)),
    "channel_shuffle": ("default", (IMAGE, 2)),
    # lines
    "slice": ("Tensor", (R(4, 4), 1, 1, 3)),
    "flip": ("default", (R(4, 4), [1])),
    "roll": ("default", (R(4, 4), [1], [1])),
    "cumsum": ("default", (R(4, 4), 1)),
    "cumprod": ("default", (R(4, 4), 1)),
    "logcumsumexp": ("default", (R(4, 4), 1)),
    "cummax": ("default", (R(4, 4), 1)),
    "cummin": ("default", (R(4, 4), 1)),
    "sort": ("default", (R(4, 4), 1)),
    "topk": ("default", (R(4, 4), 2, 1)),
    "kthvalue": ("default", (R(4, 4), 2, 1)),
    "split": ("Tensor", (R(4, 4), 2, 1)),
    "chunk": ("default", (R(4, 4), 2, 1)),
    "split_with_sizes": ("default", (R(4, 4), [1, 3], 1)),
    "narrow": ("default", (R(4, 4), 1, 1, 2)),
    "unfold": ("default", (R(4, 4), 1, 2, 1)),
    "_softmax": ("default", (R(4, 4), 1, False)),
    "_log_softmax": ("default", (R(4, 4), 1, False)),
    "softmax": ("int", (R(4, 4), 1)),
    "log_softmax": ("int", (R(4, 4), 1)),
    "_safe_softmax": ("default", (R(4, 4), 1)),
    "glu": ("default", (R(4, 4), 1)),
    "slice_scatter": ("default", (R(4, 4), R(2, 4), 1, 0, 2)),
    "select_scatter": ("default", (R(4, 4), R(4), 1, 0)),
    "renorm": ("default", (R(4, 4), 2, 0, 0.5)),
    "_fft_r2c": ("default", (R(4, 4), [1], 0, True)),
    "_fft_c2r": ("default", (R(4, 4, make=pairs), [1], 0, 6)),
    "_fft_c2c": ("default", (R(4, 4, make=pairs), [1], 0, True)),
    "tril": ("default", (R(4, 4),)),
    "triu": ("default", (R(4, 4),)),
    # lookups
    "embedding": ("default", (T(4, 5), R(3, make=indices))),
    "gather": ("default", (R(4, 4), 1, R(2, 4, make=indices))),
    "scatter": ("value", (R(4, 4), 1, R(2, 4, make=indices), 3.0)),
    "scatter_add": ("default", (R(4, 4), 1, R(2, 4, make=indices), R(2, 4))),
    "scatter_reduce": ("two", (R(4, 4), 1, R(2, 4, make=indices), R(2, 4), "sum")),
    "index_select": ("default", (R(4, 4), 1, T(3, make=indices))),
    "index": ("Tensor", (R(4, 4), [None, T(3, make=indices)])),
    # losses
    "nll_loss_forward": ("default", (R(4), R(make=indices), None, 0, -100)),
    "nll_loss2d_forward": ("default", (IMAGE, R(4, 4, make=indices), None, 0, -100)),
    "mse_loss": ("default", (R(4), R(4), 0)),
    "smooth_l1_loss": ("default", (R(4), R(4), 0)),
    "huber_loss": ("default", (R(4), R(4), 0)),
    "binary_cross_entropy": ("default", (R(4, make=torch.rand), R(4, make=torch.rand), None, 0)),
    "soft_margin_loss": ("default", (R(4), R(4, make=signs), 0)),
    # pointwise
    "native_dropout": ("default", (R(4), 0.5, True)),
    "bernoulli": ("p", (R(4), 0.5)),
    "rand_like": ("default", (R(4),)),
    "randn_like": ("default", (R(4),)),
    "where": ("self", (R(4, make=bits), R(4), T(4))),
    "lerp": ("Scalar", (R(4), R(4), 0.5)),
    "clamp": ("default", (R(4), -0.5, 0.5)),
    "prelu": ("default", (R(4), T(4))),
    "_prelu_kernel": ("default", (R(4), T(1, 4))),
    "fill": ("Scalar", (R(4, 4), 1.0)),
    "masked_fill": ("Scalar", (R(4), R(4, make=bits), 0.0)),
    "copy": ("default", (R(4), R(4))),
    "leaky_relu": ("default", (R(4), 0.1)),
    "rrelu_with_noise_functional": ("default", (R(4), R(4), 0.1, 0.3, True)),
    "full": ("default", ([N, 4], 2.0)),
    "zeros": ("default", ([N, 4],)),
    "ones": ("default", ([N, 4],)),
    "empty": ("memory_format", ([N, 4],)),
    "rand": ("default", ([N, 4],)),
    "randn": ("default", ([N, 4],)),
    "new_zeros": ("default", (T(1), [N, 4])),
    "new_ones": ("default", (T(1), [N, 4])),
    "new_full": ("default", (T(1), [N, 4], 2.0)),
    "new_empty": ("default", (T(1), [N, 4])),
    "zeros_like": ("default", (R(4),)),
    "ones_like": ("default", (R(4),)),
    "full_like": ("default", (R(4), 2.0)),
    "empty_like": ("default", (R(4),)),
    # products
    "mm": ("default", (R(4), T(4, 5))),
    "mv": ("default", (R(4), T(4))),
    "bmm": ("default", (R(4, 3), R(3, 5))),
    "addmm": ("default", (T(5), R(4), T(4, 5))),
    "baddbmm": ("default", (R(4, 5), R(4, 3), R(3, 5))),
    "addmv": ("default", (R(), R(4), T(4))),
    "linear": ("default", (R(3, 4), T(5, 4), T(5))),
    # reductions
    "sum": ("dim_IntList", (R(4, 4), [1])),
    "mean": ("dim", (R(4, 4), [1])),
    "amax": ("default", (R(4, 4), [1])),
    "amin": ("default", (R(4, 4), [1])),
    "var": ("correction", (R(4, 4), [1])),
    "std": ("correction", (R(4, 4), [1])),
    "var_mean": ("correction", (R(4, 4), [1])),
    "std_mean": ("correction", (R(4, 4), [1])),
    "logsumexp": ("default", (R(4, 4), [1])),
    "prod": ("dim_int", (R(4, 4), 1)),
    "any": ("dim", (R(4, 4, make=bits), 1)),
    "all": ("dim", (R(4, 4, make=bits), 1)),
    "argmax": ("default", (R(4, 4), 1)),
    "argmin": ("default", (R(4, 4), 1)),
    "linalg_vector_norm": ("default", (R(4, 4), 2, [1])),
    "norm": ("ScalarOpt_dim", (R(4, 4), 2, [1])),
    "max": ("dim", (R(4, 4), 1)),
    "min": ("dim", (R(4, 4), 1)),
    "nansum": ("default", (R(4, 4), [1])),
    "count_nonzero": ("dim_IntList", (R(4, 4), [1])),
    "median": ("dim", (R(4, 4), 1)),
    "mode": ("default", (R(4, 4), 1)),
    "native_layer_norm": ("default", (R(3, 4), [4], T(4), T(4), 1e-5)),
    "_fused_rms_norm": ("default", (R(3, 4), [4], T(4), 1e-5)),
    "rms_norm": ("default", (R(3, 4), [4], T(4), 1e-5)),
    # saved
    "pack": ("default", (R(4, 4, make=torch.ones), SEED, 0, 8, 4, False)),
    "pack_slope": (
        "default",
        (R(4, 4, make=torch.ones), R(4, 4, make=torch.ones), "gelu", SEED, 0, 8, 4),
    ),
    "mask": ("default", (R(512), -0.5, 0.5)),
    # views
    "view": ("default", (R(4, 4), [N, 16])),
    "_unsafe_view": ("default", (R(4, 4), [N, 16])),
    "reshape": ("default", (R(4, 4), [N, 16])),
    "_reshape_copy": ("default", (R(4, 4), [N, 16])),
    "flatten": ("using_ints", (R(4, 4), 0, 1)),
    "unflatten": ("int", (R(4, 4), 1, [2, 2])),
    "unsqueeze": ("default", (R(4), 0)),
    "squeeze": ("dim", (R(1, 4), 1)),
    "view_as_real": ("default", (R(4, 2, make=pairs),)),
    "view_as_complex": ("default", (R(4, 2),)),
    "detach": ("default", (R(4),)),
    "alias": ("default", (R(4),)),
    "clone": ("default", (R(4),)),
    "contiguous": ("default", (R(4),)),
    "_to_copy": ("default", (R(4),)),
    "to": ("dtype", (R(4), torch.float64)),
    "lift_fresh_copy": ("default", (R(4),)),
    "positive": ("default", (R(4),)),
    "convert_element_type": ("default", (R(4), torch.float64)),
    "_conj": ("default", (R(4, make=pairs),)),
    "device_put": ("default", (R(4), CPU)),
    "view_of": ("default", (R(4),)),
    "dropout": ("default", (R(4), 0.5, False)),
    "expand": ("default", (R(1, 4), [N, 3, 4])),
    "repeat": ("default", (R(4, 4), [1, 2, 3])),
    "permute": ("default", (R(4, 5), [1, 0, 2])),
    "transpose": ("int", (R(4, 5), 0, 1)),
    "t": ("default", (R(4),)),
    "swapaxes": ("default", (R(4, 5), 0, 1)),
    "select": ("int", (R(4, 4), 1, 2)),
    "select_copy": ("int", (R(4, 4), 1, 2)),
    "unbind": ("int", (R(4, 4), 1)),
    "unbind_copy": ("int", (R(4, 4), 1)),
    "cat": ("default", ([R(4), R(4)], 1)),
    "concat": ("default", ([R(4), R(4)], 1)),
    "stack": ("default", ([R(4), R(4)], 1)),
    "constant_pad_nd": ("default", (R(4, 4), [1, 1])),
    "reflection_pad1d": ("default", (R(4, 4), [1, 1])),
    "reflection_pad2d": ("default", (IMAGE, [1, 1, 1, 1])),
    "reflection_pad3d": ("default", (VOLUME, [1] * 6)),
    "replication_pad1d": ("default", (R(4, 4), [1, 1])),
    "replication_pad2d": ("default", (IMAGE, [1, 1, 1, 1])),
    "replication_pad3d": ("default", (VOLUME, [1] * 6)),
    "pad": ("default", (R(4, 4), [1, 1])),
}

GPU = "its kernel runs on a GPU alone, and its rule is that of another operator with a case"
STATE = (
    "it changes running statistics or exists to update them: test_regions_guards.py has batch norms"
)
WITHOUT_A_CASE = {
    "iota": "row numbers are an index or nothing: inductor puts it in the place of arange",
    "arange": "row numbers are an index or nothing: test_regions_unbiased.py and test_regions_guards.py",
    "_scaled_dot_product_flash_attention": GPU,
    "_scaled_dot_product_efficient_attention": GPU,
    "_scaled_dot_product_cudnn_attention": GPU,
    "_scaled_dot_product_fused_attention_overrideable": GPU,
    "cudnn_batch_norm": GPU,
    "miopen_batch_norm": GPU,
    "_native_batch_norm_legit": STATE,
    "_native_batch_norm_legit_functional": STATE,
    "_batch_norm_with_update": STATE,
    "_batch_norm_with_update_functional": STATE,
    "_scaled_mm": "it takes 8-bit floats with columns in memory, and not every CPU has it; its rule is that of mm",
    "take_along_dim": "PyTorch takes it apart before a graph shows it",
    "movedim": "its rule refuses it, and PyTorch takes it apart before a graph shows it",
    "scalar_tensor": "its result has no dimension, so no rows",
    "next_seed": "its result has no dimension, so no rows",
}


# --------------------------------------------------------------------------------------------------
# Graphs and numbers
# --------------------------------------------------------------------------------------------------


def operator_of(name: str) -> Any:
    packet = next(getattr(space, name) for space in NAMESPACES if hasattr(space, name))
    return getattr(packet, CASES[name][0])


def is_leaf(argument: Any) -> bool:
    return isinstance(argument, Part | Number)


def placed(part: Part, dim: int, n: Any) -> tuple[list[Any], bool]:
    """Sizes of an argument whose rows lie along ``dim``, and whether it has any."""
    if not part.rows:
        return [*part.shape], False
    shape = [4, *part.shape]
    if dim < len(shape):
        shape[dim] = n
    return shape, dim < len(shape)


def graph_of(name: str, dim: int) -> tuple[Proof, fx.Node]:
    """The operator in a graph whose arguments have rows along ``dim``, and a proof that knows them."""
    dynamic = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    mode = FakeTensorMode(shape_env=ShapeEnv())
    n = mode.from_tensor(torch.empty(NUM), symbolic_context=dynamic).shape[0]
    graph, proof = fx.Graph(), Proof(RowSymbols((frozenset({n.node.expr}),)), label_of)

    number = graph.placeholder("n")
    number.meta["val"] = n

    def argument(part: Any) -> Any:
        if not is_leaf(part):
            return part
        if isinstance(part, Number):
            return number
        shape, has_rows = placed(part, dim, n)
        node = graph.placeholder(f"x{len(graph.nodes)}")
        node.meta["val"] = torch.empty(shape, dtype=part.make(*(part.shape or (1,))).dtype)
        proof.labels[node] = Layout(dim) if has_rows else None
        return node

    def value(a: Any) -> Any:
        return a.meta["val"] if isinstance(a, fx.Node) else a

    with mode, enable_python_dispatcher():
        arguments = pytree.tree_map(argument, CASES[name][1], is_leaf=is_leaf)
        result = operator_of(name)(*pytree.tree_map(value, arguments))
    node = graph.call_function(operator_of(name), arguments)
    node.meta["val"] = result
    return proof, node


def results(name: str, dim: int) -> tuple[list[Any], list[Any]]:
    """What the operator makes of all rows, and of those that are kept."""
    leaves, tree = pytree.tree_flatten(CASES[name][1], is_leaf=is_leaf)
    every, some = [], []
    for leaf in leaves:
        if isinstance(leaf, Part):
            shape, has_rows = placed(leaf, dim, NUM)
            x = leaf.make(*shape)
            every.append(x)
            some.append(x.index_select(dim, KEPT) if has_rows else x)
        else:
            number = isinstance(leaf, Number)
            every.append(NUM if number else leaf)
            some.append(len(KEPT) if number else leaf)
    a, b = (operator_of(name)(*pytree.tree_unflatten(values, tree)) for values in (every, some))
    return as_list(a), as_list(b)


def as_list(values: Any) -> list[Any]:
    return list(values) if isinstance(values, (tuple, list)) else [values]


def is_reproducible(name: str) -> bool:
    random = torch.Tag.nondeterministic_seeded in operator_of(name).tags
    return not random and "empty" not in name


def check_rows(name: str, results: tuple[list[Any], list[Any]], label: list[Any]) -> None:
    """Compare the rows that a rule found with numbers."""
    for whole, part, at in zip(*results, label, strict=True):
        if at is not None:
            whole = take(whole, at.dim, at.axes, [NUM], 0, KEPT)
        assert whole.shape == part.shape
        if is_reproducible(name):
            torch.testing.assert_close(whole, part, equal_nan=True)


# --------------------------------------------------------------------------------------------------
# The tests
# --------------------------------------------------------------------------------------------------


def test_every_rule_has_a_case_or_a_reason():
    assert {*RULES} == {*CASES, *WITHOUT_A_CASE}
    assert not {*CASES} & {*WITHOUT_A_CASE}


@pytest.mark.parametrize("name", RULES)
def test_the_operator_of_a_rule_exists(name):
    assert any(hasattr(space, name) for space in NAMESPACES)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__.split(".")[-1])
def test_every_kind_has_a_rule_with_a_case(kind):
    assert {f.__module__ for f in RULES.values()} <= {k.__name__ for k in KINDS}
    assert any(RULES[name].__module__ == kind.__name__ for name in CASES)


@pytest.mark.parametrize("name", CASES)
def test_rows_along_the_first_dimension_are_found(name):
    proof, node = graph_of(name, 0)
    proof.visit(node)
    label = as_list(proof.labels[node])
    assert any(label)
    check_rows(name, results(name, 0), label)


@pytest.mark.parametrize("name", CASES)
def test_rows_along_another_dimension_are_found_or_refused(name):
    parts = [p for p in pytree.tree_leaves(CASES[name][1], is_leaf=is_leaf) if isinstance(p, Part)]
    for dim in range(1, max((len(p.shape) for p in parts if p.rows), default=0) + 1):
        try:
            (proof, node), found = graph_of(name, dim), results(name, dim)
        except Exception:  # the operator does not take such sizes
            continue
        try:
            proof.visit(node)
        except Coupled:
            continue
        check_rows(name, found, as_list(proof.labels[node]))
