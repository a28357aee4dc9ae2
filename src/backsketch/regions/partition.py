"""Split a captured joint graph into a forward graph and a backward graph.

Both modes edit the joint graph and leave the split itself to PyTorch's default partitioner, which
saves whatever the backward nodes still read from the forward nodes:

* *save*: views are repeated in the backward graph, so that a tensor that is read through several views
  is saved, and later sliced, once.
* *recompute*: everything is repeated in the backward graph, except inputs and random numbers. Dropout
  masks are saved values, so that a kept row sees its own mask again, bit for bit.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from backsketch.regions.structure import expr, is_random
from backsketch.torch_private import default_partition

aten = torch.ops.aten
Partition = Callable[..., tuple[fx.GraphModule, fx.GraphModule]]

_VIEW_NAMES = "view _unsafe_view reshape permute transpose t expand unsqueeze squeeze detach alias"
_PIECE_NAMES = "select slice unbind split split_with_sizes chunk"
VIEWS, PIECES = frozenset(_VIEW_NAMES.split()), frozenset(_PIECE_NAMES.split())
RANGES = frozenset(["arange", "iota"])


def name_of(node: fx.Node) -> str:
    """The name of a node's operator, without its overload; empty where it has none."""
    return getattr(getattr(node.target, "overloadpacket", None), "__name__", "")


def args_of(node: fx.Node) -> tuple[Any, ...]:
    """The positional arguments of a node."""
    return node.args


def is_turned(node: fx.Node) -> fx.Node | None:
    """What a node is the transpose of, if it is one of a matrix."""
    swaps = node.target is aten.permute.default and list(args_of(node)[1]) == [1, 0]
    return args_of(node)[0] if node.target is aten.t.default or swaps else None


def backward_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that depend on a tangent."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        tangent = node.op == "placeholder" and "tangents" in str(node.target)
        if tangent or any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


class Repeat:
    """Copies forward nodes in front of their first backward reader.

    ``with_dropout`` computes the outputs of dropouts again from their inputs and masks.
    """

    def __init__(
        self, graph: fx.Graph, repeatable: Callable[[fx.Node], bool], with_dropout: bool = False
    ) -> None:
        self.graph, self.repeatable, self.with_dropout = graph, repeatable, with_dropout
        self.backward = backward_nodes(graph)
        self.copies: dict[fx.Node, fx.Node] = {}

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if node in self.backward and node.op == "call_function":
                with self.graph.inserting_before(node):
                    node.args = fx.map_arg(node.args, self._read)
                    node.kwargs = fx.map_arg(node.kwargs, self._read)

    def _read(self, node: fx.Node) -> fx.Node:
        if node in self.backward or node.op != "call_function":
            return node
        if not isinstance(node.meta.get("val"), (torch.Tensor, tuple, list)):
            return node  # sizes are saved as integers
        if node not in self.copies:
            self.copies[node] = self._copy(node)
        return self.copies[node]

    def _copy(self, node: fx.Node) -> fx.Node:
        if not self.repeatable(node):
            return (self.with_dropout and _replayed_dropout(self, node)) or node
        copy = self.graph.node_copy(node, self._read)
        copy.meta = {k: v for k, v in node.meta.items() if k != "partitioner_tag"}
        copy.meta["partitioner_tag"] = "is_backward"
        return copy


def _replayed_dropout(repeat: Repeat, node: fx.Node) -> fx.Node | None:
    """The output of a dropout, from its input and its saved mask, bit for bit."""
    source = node.args[0] if node.target is operator.getitem else None
    if not isinstance(source, fx.Node) or name_of(source) != "native_dropout" or node.args[1] != 0:
        return None
    x, p = source.args[:2]
    masks = [u for u in source.users if u.args[1] == 1]
    if not masks:
        return None
    return _dropped(repeat.graph, node, repeat._read(x), masks[0], p)  # type: ignore[arg-type]


def _dropped(graph: fx.Graph, node: fx.Node, x: fx.Node, mask: fx.Node, p: Any) -> fx.Node:
    """``x * mask / (1 - p)`` in the place of ``node``, with the roundings of eager PyTorch.

    On a CPU that multiplies by ``mask / (1 - p)`` in the type of ``x``; the operator for the gradient has
    the quotient in float32, which in bfloat16 gave other values wherever it has more than eight bits.
    """
    value = node.meta["val"]
    if value.device.type != "cpu":
        args = (x, mask, dropout_scale(p, value))
        return _like(graph, node, aten.native_dropout_backward.default, args)
    kept = _like(graph, node, aten.mul.Tensor, (x, mask))
    return _like(graph, node, aten.mul.Tensor, (kept, dropout_scale(p, value)))


def dropout_scale(p: float, like: torch.Tensor) -> float:
    """By what a dropout multiplies the entries that it keeps, rounded as eager PyTorch does it."""
    if p == 1:
        return 0.0
    return _eager_quotient(1 - p, like.dtype) if like.device.type == "cpu" else 1 / (1 - p)


def _eager_quotient(q: float, dtype: torch.dtype) -> float:
    """``1 / q`` as PyTorch computes it for a tensor of ``dtype`` and a number: in float32 at least.

    In plain numbers, because tensors made during a capture have no values.
    """
    wide = torch.promote_types(dtype, torch.float32)
    return _rounded(_rounded(1 / _rounded(q, wide), wide), dtype)


def _rounded(x: float, dtype: torch.dtype) -> float:
    """``x`` with the mantissa of a floating-point type, to nearest even."""
    fraction, exponent = math.frexp(x)
    bits = 1 - round(math.log2(torch.finfo(dtype).eps))
    return math.ldexp(round(math.ldexp(fraction, bits)), exponent - bits)


def _as_eager_dropout(graph: fx.Graph) -> None:
    """Give the gradients of dropouts the roundings of eager PyTorch."""
    backward = aten.native_dropout_backward.default
    for node in graph.find_nodes(op="call_function", target=backward):
        cotangent, mask, _ = node.args
        dropout = mask.args[0] if mask.target is operator.getitem else None
        if not isinstance(dropout, fx.Node) or name_of(dropout) != "native_dropout":
            continue
        with graph.inserting_before(node):
            new = _dropped(graph, node, cotangent, mask, dropout.args[1])
        if new.target is backward:  # not on a CPU
            graph.erase_node(new)
            continue
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def _like(graph: fx.Graph, node: fx.Node, operation: Any, args: tuple[Any, ...]) -> fx.Node:
    """A new backward node whose value looks like that of ``node``."""
    new = graph.call_function(operation, args)
    new.meta = {"val": node.meta["val"], "partitioner_tag": "is_backward"}
    if "tensor_meta" in node.meta:
        new.meta["tensor_meta"] = node.meta["tensor_meta"]
    return new


def _is_view(node: fx.Node) -> bool:
    """Views that are cheaper to repeat than to slice; a small piece of a tensor is not.

    Row numbers are made again as well: those of the rows that are kept are other ones.
    """
    if name_of(node) in RANGES:
        return not isinstance(node.meta["val"].shape[0], int)
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return False
    if node.target is operator.getitem:
        return name_of(source) in PIECES and _is_large_piece(node, source.args[0])
    if name_of(node) in PIECES:
        return isinstance(node.meta["val"], (tuple, list)) or _is_large_piece(node, source)
    return name_of(node) in VIEWS


def _is_large_piece(piece: fx.Node, whole: Any) -> bool:
    share = expr(piece.meta["val"].numel()) / expr(whole.meta["val"].numel())
    return bool(share.is_number and share >= 0.125)


def _is_deterministic(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        source = node.args[0]
        return isinstance(source, fx.Node) and _is_deterministic(source)
    return not is_random(node)


def _mark_dropout_masks(graph: fx.Graph) -> None:
    """Give every random dropout a node for its mask, read or not, so that it can be saved."""
    for node in list(graph.nodes):
        if name_of(node) == "native_dropout" and not any(u.args[1] == 1 for u in node.users):
            with graph.inserting_after(node):
                mask = graph.call_function(operator.getitem, (node, 1))
            mask.meta = {**node.meta, "val": node.meta["val"][1]}
            mask.meta.pop("tensor_meta", None)


def _save_random(graph: fx.Graph) -> None:
    """A partitioner that recomputes what is cheap must not draw random numbers again."""
    for node in graph.nodes:
        drawn = node.args[0] if node.target is operator.getitem else node
        is_tensor = isinstance(node.meta.get("val"), torch.Tensor)
        if is_tensor and isinstance(drawn, fx.Node) and is_random(drawn):
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def partition(
    mode: str, inner: Partition | None, edit: Callable[[fx.GraphModule], fx.GraphModule]
) -> Partition:
    """The partition function of a mode; ``inner`` replaces the default split.

    ``edit`` returns the joint graph that is split in the place of the one it is given.
    """

    def split(joint: fx.GraphModule, inputs: Any, **options: Any) -> Any:
        joint = edit(joint)
        graph = joint.graph
        _as_eager_dropout(graph)
        if mode == "recompute":
            _mark_dropout_masks(graph)
            Repeat(graph, _is_deterministic, with_dropout=True).run()
        else:
            Repeat(graph, _is_view).run()
        if inner is not None:
            _save_random(graph)
        graph.lint()
        joint.recompile()
        return (inner or default_partition)(joint, inputs, **options)

    return split
