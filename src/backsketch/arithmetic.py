"""How much of a backward pass lies in which module, counted on a batch: products of matrices, no timings."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from backsketch.nn.swap import exact
from backsketch.ops.flops import COUNTS
from backsketch.torch_private import in_backward, pytree
from backsketch.untouched import untouched

__all__ = ["Arithmetic", "backward_arithmetic", "differentiate", "product_counter", "spread_batch"]


@dataclass
class Arithmetic:
    """Floating point operations of an exact backward pass: in all, and of some modules by name."""

    total: int = 0
    modules: dict[str, int] = field(default_factory=dict)


def backward_arithmetic(
    model: nn.Module, forward: Callable[[], object], names: Collection[str]
) -> Arithmetic:
    """Count the products of matrices in an exact backward pass of ``model``.

    A module's backward has one product for its inputs and one for its weights, where they need gradients,
    each as large as its forward pass. Attention counts as its mathematical form, whichever kernel computes it.
    What activation checkpointing computes again counts as part of the backward pass, and of no module.

    Args:
        model: any module; gradients, buffers and random streams are left as they were.
        forward: runs it once and returns its outputs.
        names: qualified names of the modules to count, none of them inside another.
    """
    result = Arithmetic(modules=dict.fromkeys(names, 0))
    counter = product_counter()
    with (
        untouched(model, training=True, seed=0),
        exact(model),
        counter,
        _watched(model, result, counter),
    ):
        outputs = forward()
        before = counter.get_total_flops()
        differentiate(model, outputs)
        result.total = counter.get_total_flops() - before
    return result


def product_counter() -> FlopCounterMode:
    """PyTorch's counter of products of matrices, with what it lacks: grouped ones, attention on a CPU, ours.

    Its own count of a grouped convolution's ``grad_weight`` is too large by the number of groups, and that of a
    fused attention's backward pass has the scores computed again, which the mathematical form keeps.
    """
    aten = torch.ops.aten
    lacking: dict[Any, Any] = {
        **COUNTS,
        aten._grouped_mm: _grouped,
        aten.convolution_backward: _convolution_backward,
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
        aten._scaled_dot_product_flash_attention_backward: _attention_backward,
        aten._scaled_dot_product_efficient_attention_backward: _attention_backward,
        aten._scaled_dot_product_cudnn_attention_backward: _attention_backward,
    }
    return FlopCounterMode(display=False, custom_mapping=lacking)


def differentiate(model: nn.Module, outputs: object) -> None:
    """Run the backward pass: of the loss, where the model returns one by name, else of all outputs, from ones."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
    tensors = pytree.tree_leaves(outputs) if loss is None else [loss]
    tensors = [y for y in tensors if isinstance(y, Tensor) and y.requires_grad]
    leaves = [p for p in model.parameters() if p.requires_grad]
    ones = [torch.ones_like(y) for y in tensors]
    torch.autograd.grad(tensors, leaves, ones, allow_unused=True)


def spread_batch(
    model: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a call, by position and by name; a dictionary given alone is spread if its keys are names."""
    if len(inputs) != 1 or options or not isinstance(inputs[0], Mapping):
        return inputs, options
    try:
        inspect.signature(model.forward).bind(**inputs[0])
    except TypeError:
        return inputs, options
    return (), dict(inputs[0])


@contextmanager
def _watched(model: nn.Module, result: Arithmetic, counter: FlopCounterMode) -> Iterator[None]:
    handles = []
    for name in result.modules:
        module, started = model.get_submodule(name), [0]
        handles += _watch(module, name, started, result, counter)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch(
    module: nn.Module, name: str, started: list[int], result: Arithmetic, counter: FlopCounterMode
) -> list[Any]:
    weights = [p for p in module.parameters() if p.dim() > 1]
    trained = sum(p.numel() for p in weights if p.requires_grad)
    share = trained / max(sum(p.numel() for p in weights), 1)

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        started[0] = counter.get_total_flops()

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if in_backward():  # checkpointing runs the module again
            return
        leaves = pytree.tree_leaves((args, kwargs))
        follows = any(isinstance(x, Tensor) and x.requires_grad for x in leaves)
        work = counter.get_total_flops() - started[0]
        result.modules[name] += round(work * (follows + share))

    return [
        module.register_forward_pre_hook(enter, with_kwargs=True),
        module.register_forward_hook(leave, with_kwargs=True),
    ]


def _grouped(a: tuple[int, ...], b: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Of one product over groups of rows, or of columns where both operands have two dimensions."""
    return 2 * a[-2] * a[-1] * b[-1]


def _attention(
    query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *_: Any, **__: Any
) -> int:
    """Scores and their product with the values; a causal mask saves nothing."""
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _attention_backward(
    cotangent: Any, query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *_: Any, **__: Any
) -> int:  # fmt: skip
    """Two products for each of the two in the forward pass."""
    return 2 * _attention(query, key, value)


def _convolution_backward(
    cotangent: tuple[int, ...],
    x: tuple[int, ...],
    weight: tuple[int, ...],
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    wanted: list[bool],
    **_: Any,
) -> int:
    """Each product visits every weight once for each position of the smaller side."""
    positions = math.prod((x if transposed else cotangent)[2:])
    return 2 * x[0] * positions * math.prod(weight) * (wanted[0] + wanted[1])
