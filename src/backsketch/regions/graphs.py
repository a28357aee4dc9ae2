"""Making new calls in captured graphs."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from torch import Tensor, fx

__all__ = ["call"]


def call(graph: fx.Graph, target: Any, *args: Any, tag: str | None = None) -> fx.Node:
    """A call at the place where the graph inserts, with the example value that compilers want.

    ``tag`` tells the partitioner of a joint graph which pass it belongs to: ``"is_forward"`` or ``"is_backward"``.
    """
    node = graph.call_function(target, args)
    values = fx.map_arg(list(args), lambda n: n.meta["val"])
    fake = next((v for v in _flat(values) if isinstance(v, Tensor)), None)
    with getattr(fake, "fake_mode", None) or nullcontext():
        node.meta["val"] = target(*values)
    if tag is not None:
        node.meta["partitioner_tag"] = tag
    return node


def _flat(values: Any) -> list[Any]:
    return [x for v in values for x in (_flat(v) if isinstance(v, (list, tuple)) else [v])]
