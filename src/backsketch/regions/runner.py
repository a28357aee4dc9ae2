"""A compiled call, shared by every region of one class."""

from __future__ import annotations

import itertools
import threading
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from backsketch.regions.capture import Capture
from backsketch.regions.compilers import COMPILERS
from backsketch.regions.spec import Region
from backsketch.torch_private import compiled_entries, pytree, recompile_limit

__all__ = ["Runner", "runner_for"]

_NAMES = itertools.count()


class Runner:
    """A compiled call of one module class.

    Its code object is its own, so Dynamo's caches and recompilation limits are not shared with
    anything else.
    """

    def __init__(self, forward: Callable[..., Any], capture: Capture, copies: bool) -> None:
        def region(module: Any, args: Any, kwargs: Any) -> Any:
            outputs = forward(module, *args, **kwargs)
            return pytree.tree_map_only(Tensor, torch.clone, outputs) if copies else outputs

        name = f"backsketch_region_{next(_NAMES)}"
        code = region.__code__.replace(co_name=name)
        self.closure = region.__closure__
        self.fresh = types.FunctionType(code, region.__globals__, name, None, self.closure)
        self.scope = {"forward": forward, "copies": copies}
        self.capture = capture
        self.call = torch.compile(self.fresh, backend=capture, fullgraph=True)
        self.direct: dict[int, types.FunctionType] = {}
        self.kernels = attention_kernels()

    @property
    def fits(self) -> bool:
        """Whether its graphs have the attention that is wanted now, and outputs that are their own memory."""
        return not self.misleading and self.kernels == attention_kernels()

    def find(self, module: Any, args: Any, kwargs: Any) -> Callable[..., Any] | None:
        """The compiled code whose guards hold for these arguments.

        Dynamo's own entry (a frame evaluation hook) checks the same guards and runs the same code; the
        way there costs ten times the check.
        """
        scope = {"module": module, "args": args, "kwargs": kwargs, **self.scope}
        for entry in compiled_entries(self.fresh.__code__):
            if entry.guard_manager.check(scope):
                return self._function(entry.code)
        return None

    def _function(self, code: types.CodeType) -> types.FunctionType:
        function = self.direct.get(id(code))
        if function is None or function.__code__ is not code:
            function = types.FunctionType(
                code, self.fresh.__globals__, code.co_name, None, self.closure
            )
            self.direct[id(code)] = function
        return function

    @property
    def outdated(self) -> bool:
        """Whether outputs have to be copied after all, or Dynamo would give up on one more graph."""
        return self.misleading or self.capture.programs >= recompile_limit()

    @property
    def misleading(self) -> bool:
        """Whether its outputs turned out to share memory, which an ``autograd.Function`` cannot return."""
        return self.capture.copies and not self.scope["copies"]


def attention_kernels() -> tuple[bool, ...]:
    """Which kernels attention may take: a captured graph holds one of them, and Dynamo's guards do not ask."""
    on = torch.backends.cuda
    return (
        on.flash_sdp_enabled(),
        on.mem_efficient_sdp_enabled(),
        on.math_sdp_enabled(),
        on.cudnn_sdp_enabled(),
    )


_RUNNERS: dict[Any, Runner] = {}
_LOCK = threading.Lock()


def runner_for(module: Any, forward: Any, spec: Region, compiler: str) -> Runner:
    """The runner of this kind of region: made on first use, and again when the last one is outdated."""
    all_rows = spec.keep == 1
    # Kept rows in 8 bits come from the same graphs, if inductor does not have to compile them at once.
    arithmetic = spec.arithmetic if all_rows or compiler != "plain" else None
    settings = (spec.mode, spec.row_dims, arithmetic, spec.save, all_rows, compiler)
    key = (type(module), *settings, *attention_kernels())
    with _LOCK:
        before = _RUNNERS.get(key)
        if before is None or before.outdated:
            copies = before is not None and before.capture.copies
            capture = Capture(spec, COMPILERS[compiler], copies)
            _RUNNERS[key] = Runner(forward, capture, copies)
        return _RUNNERS[key]
