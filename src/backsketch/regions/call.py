"""The forward pass of a region: known code, a capture, or the module itself."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from backsketch.regions.capture import has_rows
from backsketch.regions.context import Call, run_as
from backsketch.regions.patience import told_if_slow
from backsketch.regions.runner import Runner, runner_for
from backsketch.regions.state import Runtime, runtime_of
from backsketch.torch_private import (
    compiler_error,
    hooks_are_guarded,
    logging_is_left_out,
    mark_dynamic,
    pytree,
    recompile_limit_error,
    unseen_by_compiler,
)

__all__ = ["call", "call_from_compiled"]

_MAX_RENEWALS = 8
_AXES = ((), (0,), (0, 1))
_UNKNOWN = object()

# Captures one at a time: they mark the arguments, which threads may share.
_CAPTURING = threading.RLock()


@torch.compiler.disable
def call_from_compiled(module: Any, args: Any, kwargs: Any) -> Any:
    """A graph break: the region's own graphs are compiled apart."""
    return call(module, args, kwargs, "inductor")


def call(module: Any, args: Any, kwargs: Any, compiler: str) -> Any:
    """The forward pass of a region's module."""
    region = runtime_of(module)
    region.spec = spec = module._backsketch
    # Inductor would take apart the operators by which saved tensors are told.
    compiler = compiler if spec.save == "exact" else "plain"
    forward = module._original_class.forward
    if region.refused:
        return forward(module, *args, **kwargs)
    if region.runner is not None and region.runner.fits:
        outputs = run_as(Call(region), _known, region.runner, module, args, kwargs)
        if outputs is not _UNKNOWN:
            return outputs
    return _new(module, forward, region, args, kwargs, compiler)


def _known(runner: Runner, module: Any, args: Any, kwargs: Any) -> Any:
    """Run what was compiled before for arguments like these, if anything was."""
    function = runner.find(module, args, kwargs)
    return _UNKNOWN if function is None else function(module, args, kwargs)


def _new(
    module: Any,
    forward: Callable[..., Any],
    region: Runtime,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    compiler: str,
) -> Any:
    """The forward pass on arguments of a new kind: captured if it can be, else that of the module."""
    assert region.spec is not None
    tensors = _tensors(args, kwargs)
    lead = tuple(tensors[0].shape[: region.spec.row_dims]) if tensors else ()
    if _runs_as_is(region, lead):
        return forward(module, *args, **kwargs)
    runner = region.runner
    if runner is None or not runner.fits:
        runner = region.runner = runner_for(module, forward, region.spec, compiler)
    this = Call(region, lead, (args, kwargs))
    try:
        return _captured(runner, this, module, tensors)
    except recompile_limit_error():
        region.exhausted.append(runner)
        region.runner = None
        if len(region.exhausted) > _MAX_RENEWALS:
            region.refuse("it is recompiled on almost every call")
            return forward(module, *args, **kwargs)
        return _new(module, forward, region, args, kwargs, compiler)
    except torch.OutOfMemoryError:
        raise
    except (
        Exception
    ) as error:  # whatever the compiler raises: most of it is not an error of Dynamo's
        if compiler != "plain":  # no C++ compiler, say
            region.runner = None
            return _new(module, forward, region, args, kwargs, "plain")
        outputs = forward(module, *args, **kwargs)  # the module's own errors are raised here
        region.refuse(
            f"it cannot be captured: {_cause(error)}",
            "Put regions on the modules inside it that do not do this",
        )
        return outputs


def _runs_as_is(region: Runtime, lead: tuple[int, ...]) -> bool:
    """Whether nothing is to be captured for these arguments; the region's state says why."""
    assert region.spec is not None
    row_dims = region.spec.row_dims
    if len(lead) < row_dims:
        region.refuse(f"its first tensor argument does not have {row_dims} dimensions of rows")
        return True
    if 0 in lead:
        return True
    if unseen_by_compiler():
        region.settle("exact", "a TorchDispatchMode is on, in which nothing can be captured")
        return True
    return False


def _captured(runner: Runner, this: Call, module: Any, tensors: Sequence[Tensor]) -> Any:
    region = this.region
    if not _is_new(region, tensors, len(this.lead)):
        return run_as(this, _traced, runner, this, module, tensors)
    with warnings.catch_warnings():
        # Dynamo looks for .grad on every tensor it meets, non-leaf ones included.
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor")
        # It makes an instance of an autograd.Function, of which PyTorch warns.
        warnings.filterwarnings("ignore", ".*should not be instantiated", DeprecationWarning)
        with told_if_slow(region.state.name):
            outputs = run_as(this, _traced, runner, this, module, tensors)
    if not runner.capture.programs:
        region.settle("exact", "torch.compile is switched off, and with it what captures regions")
    return outputs


def _traced(runner: Runner, this: Call, module: Any, tensors: Sequence[Tensor]) -> Any:
    """Enter Dynamo with the leading dimensions marked dynamic; no mark stays on the user's tensors."""
    rowed = [t for t in tensors if has_rows(t, this.lead)]
    with _CAPTURING:
        marks = [dict(t.__dict__) for t in rowed]
        try:
            for t in rowed:
                mark_dynamic(t, _AXES[len(this.lead)])
            with hooks_are_guarded(), logging_is_left_out():
                return runner.call(module, *this.inputs)
        finally:
            for t, attributes in zip(rowed, marks):
                t.__dict__.clear()
                t.__dict__.update(attributes)


def _is_new(region: Runtime, tensors: Sequence[Tensor], row_dims: int) -> bool:
    """Whether arguments like these were not seen before, so that a capture is likely."""
    signature = tuple((t.shape[row_dims:], t.dtype, t.requires_grad) for t in tensors)
    if signature in region.seen:
        return False
    region.seen.add(signature)
    return True


def _cause(error: Exception) -> str:
    """What was raised, in one line; Dynamo wraps what a backend raises."""
    inner = getattr(error, "inner_exception", None) or error
    line = next((line.strip() for line in str(inner).splitlines() if line.strip()), "")
    if isinstance(error, compiler_error()) and inner is error and line:
        return line
    return f"{type(inner).__name__}: {line}".rstrip(": ")


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    if not kwargs and all(isinstance(a, Tensor) for a in args):
        return list(args)
    return [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
