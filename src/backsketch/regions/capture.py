"""Capture a region's forward and backward graphs, and run them.

``torch.compile`` with a backend built on AOTAutograd does the capture: Dynamo guards on everything
Python that the graph depends on, AOTAutograd supplies the ``autograd.Function``, in which parameters
are inputs (so hooks, DDP and FSDP see their gradients). The leading dimensions are marked dynamic;
their symbols tell which tensors have rows.
"""

from __future__ import annotations

import itertools
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch.utils import _python_dispatch
from torch.utils import _pytree as pytree

from backsketch.regions.compilers import COMPILERS, Compiler
from backsketch.regions.pair import Pair
from backsketch.regions.partition import partition
from backsketch.regions.program import Program
from backsketch.regions.state import CURRENT, RegionState, state_of
from backsketch.regions.structure import RowSymbols

_NAMES = itertools.count()


class Capture:
    """A ``torch.compile`` backend that makes one :class:`Program` per captured graph.

    ``compiler`` turns a graph into something that runs: plain execution, or inductor where the
    surrounding model is compiled. ``copies`` turns true where outputs share memory with each other or with
    an input, so that they have to be copied.
    """

    def __init__(self, mode: str, row_dims: int, compiler: Compiler) -> None:
        self.mode, self.row_dims, self.compiler = mode, row_dims, compiler
        self.programs = 0
        self.copies = False

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        placeholders = gm.graph.find_nodes(op="placeholder")
        fakes = [p.meta.get("example_value") for p in placeholders]
        program = Program(self.row_dims, RowSymbols(()))
        pair = Pair(program)
        self.programs += 1
        split = partition(self.mode, self.compiler.inner_partition(self.mode))

        def prove(joint: fx.GraphModule, joint_inputs: Any, **options: Any) -> Any:
            fw, bw = split(joint, joint_inputs, **options)
            program.symbols = _row_symbols(fakes, self.row_dims)
            program.prove(fw, bw, options["num_fwd_outputs"])
            pair.connect(fw, bw, options["num_fwd_outputs"])
            return fw, bw

        def forward(graph: fx.GraphModule, graph_inputs: Any) -> Callable[..., Any]:
            metadata = getattr(torch._guards.TracingContext.try_get(), "fw_metadata", None)
            _donate_nothing(metadata)
            pair.check(metadata)
            pair.forward = self.compiler.forward(graph, graph_inputs)
            return pair.forward

        def backward(graph: fx.GraphModule, graph_inputs: Any) -> Callable[..., Any]:
            program.build(graph, graph_inputs, self.compiler)
            assert program.exact is not None
            return program.exact

        compiled = aot_autograd(
            fw_compiler=forward,
            bw_compiler=backward,
            inference_compiler=self.compiler.forward,
            partition_fn=prove,
            decompositions=self.compiler.decompositions(),
        )(gm, inputs)
        if pair.forward is None:  # nothing requires a gradient
            return compiled
        self.copies = self.copies or pair.aliases
        if (
            not program.built and pair.backward is not None
        ):  # AOTAutograd puts off what has no symbolic sizes
            program.build(pair.backward, pair.backward_inputs, self.compiler)
        return pair if pair.is_plain(len(inputs)) else _noting(program, compiled)


def _donate_nothing(metadata: Any) -> None:
    """Let no saved tensor be overwritten by the backward pass: that would forbid retain_graph."""
    donated = getattr(metadata, "bw_donated_idxs", None)
    if donated:
        donated.clear()


def _noting(program: Program, run: Callable[..., Any]) -> Callable[..., Any]:
    """AOTAutograd's own runtime, exact: tell the running region why."""

    def call(*args: Any) -> Any:
        if CURRENT.state is not None:
            CURRENT.state.settle("exact", program.refusal)
        return run(*args)

    return call


def _row_symbols(fakes: Sequence[Any], row_dims: int) -> RowSymbols:
    """The symbols that Dynamo made for the leading sizes of the current region's arguments."""
    env = next(
        (f.fake_mode.shape_env for f in fakes if getattr(f, "fake_mode", None) is not None), None
    )
    names = [_size_names(axis) for axis in range(row_dims)]
    axes: list[set[Any]] = [set() for _ in range(row_dims)]
    if env is None:
        return RowSymbols(())
    for symbol, sources in env.var_to_sources.items():
        for source in sources:
            name = source.name() if callable(source.name) else source.name
            for axis in range(row_dims):
                if name in names[axis]:
                    axes[axis] |= env.simplify(symbol).free_symbols
    # An axis that Dynamo made constant must have size one: its rows could not be told apart.
    for axis, size in enumerate(CURRENT.lead):
        if size != 1 and not axes[axis]:
            return RowSymbols(())
    return RowSymbols(tuple(frozenset(a) for a in axes))


def _size_names(axis: int) -> set[str]:
    names = set()
    args, kwargs = CURRENT.inputs
    for root, tree in (("L['args']", args), ("L['kwargs']", kwargs)):
        for path, leaf in pytree.tree_flatten_with_path(tree)[0]:
            if isinstance(leaf, Tensor) and _has_rows(leaf, CURRENT.lead):
                names.add(f"{root}{pytree.keystr(path)}.size()[{axis}]")
    return names


def _has_rows(x: Tensor, lead: tuple[int, ...]) -> bool:
    return x.dim() >= len(lead) and tuple(x.shape[: len(lead)]) == lead


# --- trampolines ------------------------------------------------------------------------------------


class Runner:
    """A compiled call of one module class, shared by every region of that class.

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

    def find(self, module: Any, args: Any, kwargs: Any) -> Callable[..., Any] | None:
        """The compiled code whose guards hold for these arguments.

        Dynamo's own entry (a frame evaluation hook) checks the same guards and runs the same code; the
        way there costs ten times the check.
        """
        scope = {"module": module, "args": args, "kwargs": kwargs, **self.scope}
        for entry in _debug_get_cache_entry_list(self.fresh.__code__):
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
        return self.misleading or self.capture.programs >= torch._dynamo.config.recompile_limit

    @property
    def misleading(self) -> bool:
        """Whether its outputs turned out to share memory, which an ``autograd.Function`` cannot return."""
        return self.capture.copies and not self.scope["copies"]


_RUNNERS: dict[Any, Runner] = {}
_MAX_RENEWALS = 8


def _runner(module: Any, forward: Any, state: RegionState, compiler: str) -> Runner:
    """The runner of this kind of region: made on first use."""
    assert state.spec is not None
    key = (type(module), state.spec.mode, state.spec.row_dims, compiler)
    before = _RUNNERS.get(key)
    if before is None or before.outdated:
        capture = Capture(state.spec.mode, state.spec.row_dims, COMPILERS[compiler])
        copies = before is not None and before.capture.copies
        _RUNNERS[key] = Runner(forward, capture, copies)
    return _RUNNERS[key]


@torch.compiler.disable
def call_from_compiled(module: Any, args: Any, kwargs: Any) -> Any:
    """A graph break: the region's own graphs are compiled apart."""
    return call(module, args, kwargs, "inductor")


def call(module: Any, args: Any, kwargs: Any, compiler: str) -> Any:
    """The forward pass of a region's module."""
    state = state_of(module)
    state.spec = module._backsketch
    forward = module._original_class.forward
    if state.refused:
        return forward(module, *args, **kwargs)
    if state.runner is not None and not state.runner.misleading:
        outputs = _known(state.runner, state, module, args, kwargs)
        if outputs is not _UNKNOWN:
            return outputs
    return run(module, forward, state, args, kwargs, compiler)


def run(
    module: Any,
    forward: Callable[..., Any],
    state: RegionState,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    compiler: str = "plain",
) -> Any:
    """The region's forward pass: exact, and captured for a sketched backward pass if it can be."""
    assert state.spec is not None
    row_dims = state.spec.row_dims
    tensors = _tensors(args, kwargs)
    lead = tuple(tensors[0].shape[:row_dims]) if tensors else ()
    if len(lead) < row_dims:
        state.refuse(f"its first tensor argument does not have {row_dims} dimensions of rows")
        return forward(module, *args, **kwargs)
    if 0 in lead:
        return forward(module, *args, **kwargs)
    if _is_intercepted():
        state.settle("exact", "a TorchDispatchMode is on, in which nothing can be captured")
        return forward(module, *args, **kwargs)
    runner = state.runner
    if runner is None or runner.misleading:
        runner = state.runner = _runner(module, forward, state, compiler)
    rowed = [t for t in tensors if _has_rows(t, lead)]
    try:
        if not _is_new(state, tensors, row_dims):
            return _called(runner, state, module, lead, rowed, args, kwargs)
        with warnings.catch_warnings():
            # Dynamo looks for .grad on every tensor it meets, non-leaf ones included.
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor")
            outputs = _called(runner, state, module, lead, rowed, args, kwargs)
        if not runner.capture.programs:
            state.settle(
                "exact", "torch.compile is switched off, and with it what captures regions"
            )
        return outputs
    except FailOnRecompileLimitHit:
        state.exhausted.append(runner)
        state.runner = None
        if len(state.exhausted) > _MAX_RENEWALS:
            state.refuse("it is recompiled on almost every call")
            return forward(module, *args, **kwargs)
        return run(module, forward, state, args, kwargs, compiler)
    except TorchDynamoException as error:
        if compiler != "plain":  # no C++ compiler, say
            state.runner = None
            return run(module, forward, state, args, kwargs)
        state.refuse(f"it cannot be captured: {_first_line(error)}")
        return forward(module, *args, **kwargs)


def _is_intercepted() -> bool:
    """Whether Dynamo would leave code alone, and for good, as a FLOP counter or the like sees every operator."""
    if getattr(torch._dynamo.config, "inline_torch_dispatch_torch_compile", False):
        return _python_dispatch.any_torch_dispatch_mode_on_stack()
    return _python_dispatch.is_in_any_mode_without_ignore_compile_internals()


def _is_new(state: RegionState, tensors: Sequence[Tensor], row_dims: int) -> bool:
    """Whether arguments like these were not seen before, so that a capture is likely."""
    signature = tuple((t.shape[row_dims:], t.dtype, t.requires_grad) for t in tensors)
    if signature in state.seen:
        return False
    state.seen.add(signature)
    return True


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    if not kwargs and all(isinstance(a, Tensor) for a in args):
        return list(args)
    return [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]


def _called(
    runner: Runner,
    state: RegionState,
    module: Any,
    lead: tuple[int, ...],
    rowed: Sequence[Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run the compiled call with its region on record and its leading dimensions marked dynamic.

    No mark stays on the user's tensors. (Plain statements: context managers cost microseconds.)
    """
    before = CURRENT.state, CURRENT.lead, CURRENT.inputs
    marks = [dict(t.__dict__) for t in rowed]
    CURRENT.state, CURRENT.lead, CURRENT.inputs = state, lead, (args, kwargs)
    CURRENT.depth += 1
    try:
        for t in rowed:
            torch._dynamo.maybe_mark_dynamic(t, _AXES[len(lead)])
        # Or hooks of submodules that come later are never called, and those of one module are taken for another's.
        with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
            return runner.call(module, args, kwargs)
    finally:
        CURRENT.state, CURRENT.lead, CURRENT.inputs = before
        CURRENT.depth -= 1
        for t, attributes in zip(rowed, marks):
            t.__dict__.clear()
            t.__dict__.update(attributes)


_UNKNOWN = object()


def _known(runner: Runner, state: RegionState, module: Any, args: Any, kwargs: Any) -> Any:
    """Run what was compiled before for arguments like these, if anything was."""
    before = CURRENT.state
    CURRENT.state = state
    CURRENT.depth += 1  # also while guards are checked: they see what the capture saw
    try:
        function = runner.find(module, args, kwargs)
        return _UNKNOWN if function is None else function(module, args, kwargs)
    finally:
        CURRENT.state = before
        CURRENT.depth -= 1


_AXES = ((), (0,), (0, 1))
