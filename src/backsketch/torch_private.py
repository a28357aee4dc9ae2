"""All private interfaces of PyTorch that the library uses, each with the reason and the fallback.

No other module imports a name with a leading underscore from ``torch``, or asks a tensor, a module or an
operator for such an attribute; a subclass of a layer of ``torch.nn`` may ask itself. What belongs to the compiler
is imported inside the functions here, because it takes seconds that ``import backsketch`` need not spend.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm as BatchNormBase
from torch.nn.modules.conv import _ConvNd as ConvBase
from torch.nn.modules.conv import _ConvTransposeNd as ConvTransposeBase
from torch.nn.modules.loss import _Loss as LossBase

# torch.utils.pytree is public, but does not name the paths of leaves.
from torch.utils import _pytree as pytree

__all__ = [
    "CONSTANTS_OF_OBJECTS",
    "BatchNormBase",
    "ConvBase",
    "ConvTransposeBase",
    "ForwardFacts",
    "LossBase",
    "aot_autograd",
    "autocast_is_on",
    "base_of",
    "batch_norm_with_statistics",
    "boxed",
    "buffers_of",
    "changed_inputs",
    "changes_arguments",
    "checkpoints_allow_grad",
    "compile_inner",
    "compiled_entries",
    "compiled_from",
    "compiler_error",
    "decompositions",
    "default_partition",
    "float8_matmul",
    "forward_facts",
    "grouped_matmul",
    "hooks_are_guarded",
    "in_backward",
    "is_compiled",
    "is_compiled_in_place",
    "is_functorch_wrapped",
    "is_view",
    "layout_of",
    "load_compiler",
    "logging_is_left_out",
    "mark_dynamic",
    "min_cut_partition",
    "position_of",
    "pytree",
    "recompile_limit",
    "recompile_limit_error",
    "same_but_no_view",
    "scaled_float8_matmul",
    "traced_as_constant",
    "transforms_are_active",
    "twin_of",
    "unseen_by_compiler",
    "version_of",
    "without_autocast",
    "without_history",
]


# --- eager ------------------------------------------------------------------------------------------


def in_backward() -> bool:
    """Whether this thread runs a backward pass. Without the interface: never."""
    task = getattr(torch._C, "_current_graph_task_id", None)
    return task is not None and task() != -1


def is_functorch_wrapped(x: Tensor) -> bool:
    """Whether a function transform looks at ``x``, so that no value of it may be read.

    There is no public test. Without the private one every tensor counts as wrapped: values are then not
    read, and zero rows may be drawn for nothing.
    """
    test = getattr(getattr(torch._C, "_functorch", None), "is_functorch_wrapped_tensor", None)
    return True if test is None else bool(test(x))


def transforms_are_active() -> bool:
    """Whether a function transform (``torch.func``) is under way.

    There is no public test. Without the private one it counts as so: Functions then take the longer way.
    """
    test = getattr(torch._C, "_are_functorch_transforms_active", None)
    return True if test is None else bool(test())


def float8_matmul(a: Tensor, b: Tensor) -> Tensor | None:
    """The float32 product of two matrices of 8-bit floats; None where PyTorch has none.

    The first has its rows, the second its columns in contiguous memory, and dimensions are multiples of 16. There
    is no public product. Without the private one, codes are multiplied as floats.
    """
    product = getattr(torch, "_scaled_mm", None)
    if product is None:
        return None
    one = torch.ones((), device=a.device)
    # Fast accumulation drops bits of the sum, by a rule and not by chance: a bias.
    result: Tensor = product(a, b, one, one, out_dtype=torch.float32, use_fast_accum=False)
    return result


def scaled_float8_matmul(a: Tensor, b: Tensor, row: Tensor | None, column: Tensor) -> Tensor:
    """``diag(row) (a @ b) diag(column)`` of 8-bit floats in bfloat16, the dtype in which PyTorch scales rows.

    Args:
        a: ``(m, depth)``, its rows in contiguous memory.
        b: ``(depth, n)``, its columns in contiguous memory.
        row: scales ``(m,)``, or fewer; None is one.
        column: scales ``(n,)``, or fewer.

    Raises:
        NotImplementedError: there is no such product; :func:`float8_matmul` is the way without it.
    """
    product = getattr(torch, "_scaled_mm", None)
    if product is None:
        raise NotImplementedError("this PyTorch multiplies no 8-bit floats")
    if row is None:
        row = a.new_ones(a.shape[0], dtype=torch.float32)
    row, column = (
        F.pad(scale, (0, wanted - scale.shape[0]))
        for scale, wanted in ((row, a.shape[0]), (column, b.shape[1]))
    )
    scales = {"scale_a": row[:, None], "scale_b": column[None]}
    result: Tensor = product(a, b, **scales, out_dtype=torch.bfloat16, use_fast_accum=False)
    return result


def grouped_matmul() -> Callable[..., Tensor] | None:
    """The function by which fused experts multiply; None where PyTorch has none.

    Models call the private name, so that it is what has to be recognised. Without it no model calls it.
    """
    return getattr(torch, "_grouped_mm", None)


def layout_of(x: Tensor) -> torch.memory_format:
    """The memory format that ``x`` has.

    There is no public question for it. Without the private one it is contiguous: values stay right, and only
    the strides of a result differ.
    """
    try:
        from torch._prims_common import suggest_memory_format
    except ImportError:
        return torch.contiguous_format
    return suggest_memory_format(x)


def same_but_no_view(y: Tensor) -> Tensor:
    """``y`` as a tensor that autograd does not take for a view, so that it may be modified in place.

    The public ways are a copy, which is the fallback, or a view.
    """
    operator = getattr(torch.ops.aten, "_unsafe_view", None)
    return y.clone() if operator is None else operator(y, y.shape)


def is_view(x: Tensor) -> bool:
    """Whether autograd takes ``x`` for a view. There is no public test; without one every tensor counts as one."""
    test = getattr(x, "_is_view", None)
    return True if test is None else bool(test())


def base_of(x: Tensor) -> Tensor:
    """What ``x`` is a view of, or ``x`` itself; where there is no telling, too."""
    base = getattr(x, "_base", None)
    return x if base is None else base


def without_history(x: Tensor) -> Tensor:
    """``x``, or what it shows where it is a view, whose base would keep its own history alive.

    A tensor is detached at 1 µs.
    """
    return x.detach() if is_view(x) else x


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """The dictionary in which a module itself holds its buffers, also those that are None.

    ``named_buffers`` leaves those out. Without the private dictionary this one is empty: buffers that a module
    assigns anew stay.
    """
    own: dict[str, Tensor | None] = getattr(module, "_buffers", {})
    return own


def version_of(x: Tensor) -> int:
    """How often ``x`` was changed in place. Without the private counter it never was: a replay of what a call was
    given may then see a changed value, and says nothing.
    """
    version: int = getattr(x, "_version", 0)
    return version


def twin_of(module: nn.Module, known: dict[nn.Module, nn.Module] | None = None) -> nn.Module:
    """A tree of modules of its own around the same parameters and buffers.

    ``copy.copy`` of a module shares the dictionaries that hold them, and a deep copy copies the tensors. Where the
    private dictionaries are gone it is a deep copy, which costs memory alone.
    """
    known = {} if known is None else known
    if module not in known:
        if not hasattr(module, "_modules"):
            return copy.deepcopy(module)
        twin = known[module] = copy.copy(module)
        twin._parameters, twin._buffers = dict(module._parameters), dict(module._buffers)
        twin._modules = {n: m and twin_of(m, known) for n, m in module._modules.items()}
    return known[module]


def compiled_from(module: nn.Module) -> nn.Module | None:
    """The user's module inside what ``torch.compile`` made of it; None where ``module`` is no such thing.

    It is public by the name of its parameters alone. Should the name change, sketches go into the wrapper, whose
    modules are the same.
    """
    inner: nn.Module | None = getattr(module, "_modules", {}).get("_orig_mod")
    return inner


def is_compiled(module: nn.Module) -> bool:
    """Whether a module was compiled, by ``torch.compile`` or in place; without the private marks it was not."""
    return is_compiled_in_place(module) or compiled_from(module) is not None


def is_compiled_in_place(module: nn.Module) -> bool:
    """Whether ``module.compile()`` was called, which hides its calls; without the private mark it was not."""
    return getattr(module, "_compiled_call_impl", None) is not None


def position_of(operator: Any, argument: str) -> int | None:
    """Where an argument of an operator stands; None where it has none of that name.

    The signature of an operator is public nowhere. Without it there is no such argument.
    """
    schema = getattr(operator, "_schema", None)
    names = [] if schema is None else [a.name for a in schema.arguments]
    return names.index(argument) if argument in names else None


def changes_arguments(operator: Any) -> bool:
    """Whether an operator changes an argument in place. Without a signature it counts as so."""
    schema = getattr(operator, "_schema", None)
    return True if schema is None else bool(schema.is_mutable)


def autocast_is_on() -> bool:
    """Whether autocast is on for the CPU or an accelerator."""
    return torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")


def without_autocast() -> AbstractContextManager[Any]:
    """Autocast off on every device inside the block, at no cost where it is off already.

    The private guard takes one call for all devices; nested public ``torch.autocast`` blocks replace it.
    """
    if not autocast_is_on():
        return nullcontext()
    guard = getattr(torch._C, "_DisableAutocast", None)
    return _autocast_blocks() if guard is None else guard()


@contextmanager
def _autocast_blocks() -> Iterator[None]:
    with torch.autocast("cpu", enabled=False):
        if not torch.cuda.is_available():
            yield
            return
        with torch.autocast("cuda", enabled=False):
            yield


def batch_norm_with_statistics(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    state: tuple[Tensor | None, Tensor | None],
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, mean and reciprocal deviation of a batch norm in training, as ``F.batch_norm`` makes them.

    ``F.batch_norm`` does not return the statistics, and ``torch.native_batch_norm`` may take another
    kernel, whose last bits differ; it is the fallback.
    """
    implementation = getattr(torch, "_batch_norm_impl_index", None)
    if implementation is None:
        return torch.native_batch_norm(x, weight, bias, *state, True, momentum, eps)
    cudnn = torch.backends.cudnn.enabled
    return implementation(x, weight, bias, *state, True, momentum, eps, cudnn)[:3]


CONSTANTS_OF_OBJECTS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 12)
"""Whether functions that are traced as constants may be called with objects: not so in PyTorch 2.11 and before."""


def traced_as_constant(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: Dynamo calls the function while it traces and takes the result for a constant.

    ``torch.compiler.assume_constant_result`` does the same and imports the compiler. Should the mark
    lose its meaning, Dynamo traces the function, which then breaks the graph.
    """
    function.__dict__["_dynamo_marked_constant"] = True
    return function


# --- Dynamo -----------------------------------------------------------------------------------------


def load_compiler() -> None:
    """Import the compiler now: seconds that would otherwise fall into the first captured call."""


def compiled_entries(code: Any) -> Sequence[Any]:
    """Dynamo's compiled versions of a code object, with their guards.

    Checked directly they cost a tenth of Dynamo's own way in. Without them every call takes that way.
    """
    try:
        from torch._dynamo.eval_frame import _debug_get_cache_entry_list
    except ImportError:
        return ()
    return _debug_get_cache_entry_list(code)


def recompile_limit() -> int:
    """How many graphs Dynamo makes of one code object; its default where the setting is gone."""
    return int(getattr(torch._dynamo.config, "recompile_limit", 8))


def recompile_limit_error() -> type[Exception]:
    """What Dynamo raises at the limit under ``fullgraph=True``; its base class where it has no own one."""
    from torch._dynamo import exc

    return getattr(exc, "FailOnRecompileLimitHit", exc.TorchDynamoException)


def compiler_error() -> type[Exception]:
    """The base class of what Dynamo raises about code that it cannot capture: messages for users."""
    from torch._dynamo.exc import TorchDynamoException

    return TorchDynamoException


def hooks_are_guarded() -> AbstractContextManager[Any]:
    """Let Dynamo guard on the hooks of submodules while it captures.

    By default hooks that come later are never called, and those of one module are taken for another's.
    Without the setting hooks must be registered before the first forward pass.
    """
    try:
        return torch._dynamo.config.patch(skip_nnmodule_hook_guards=False)
    except AttributeError:
        return nullcontext()


def logging_is_left_out() -> AbstractContextManager[Any]:
    """Let Dynamo capture a module that writes to a log, without what it writes.

    Without the setting such a module cannot be captured.
    """
    try:
        names = ("ignore_logging_functions", "ignore_logger_methods")  # the second before 2.11
        name = names[not hasattr(torch._dynamo.config, names[0])]
        methods = {f for f in vars(logging.Logger).values() if callable(f)}
        return torch._dynamo.config.patch({name: getattr(torch._dynamo.config, name) | methods})
    except AttributeError:
        return nullcontext()


def mark_dynamic(x: Tensor, axes: Sequence[int]) -> None:
    """Make the sizes of ``axes`` symbols, unless the graph needs them to be numbers."""
    torch._dynamo.maybe_mark_dynamic(x, axes)


def unseen_by_compiler() -> bool:
    """Whether Dynamo would leave code alone for good, because a mode such as a FLOP counter sees all.

    Without the private tests a capture is tried, and ends with Dynamo's own reason.
    """
    from torch.utils import _python_dispatch as modes

    if getattr(torch._dynamo.config, "inline_torch_dispatch_torch_compile", False):
        name = "any_torch_dispatch_mode_on_stack"
    else:
        name = "is_in_any_mode_without_ignore_compile_internals"
    test = getattr(modes, name, None)
    return test is not None and bool(test())


# --- AOTAutograd ------------------------------------------------------------------------------------


def aot_autograd(**options: Any) -> Callable[..., Any]:
    """A ``torch.compile`` backend from compilers of the forward and the backward graph.

    The same function is public nowhere; ``functorch.compile.aot_module`` lacks the symbols that this one
    is given. Without it nothing can be captured, and regions run exactly with the ImportError as reason.
    """
    from torch._dynamo.backends.common import aot_autograd as backend

    return backend(**options)


class ForwardFacts(NamedTuple):
    """What AOTAutograd found out about a forward graph while it traced.

    ``trained`` are the outputs that require a gradient, ``num_cotangents`` how many cotangents the
    backward graph takes, ``mutates`` whether an input or buffer is changed, ``aliases`` whether outputs
    share memory with each other or with an input.
    """

    trained: tuple[int, ...]
    num_cotangents: int
    mutates: bool
    aliases: bool


def forward_facts() -> ForwardFacts | None:
    """The facts about the graph that is being compiled, whose saved tensors are kept for ``retain_graph``.

    AOTAutograd would let the backward pass overwrite saved tensors ("donated buffers"), which forbids it.
    Where it does not tell (None), a region cannot run its graphs by itself and runs exactly.
    """
    context = torch._guards.TracingContext.try_get()
    metadata: Any = getattr(context, "fw_metadata", None)
    if metadata is None:
        return None
    donated = getattr(metadata, "bw_donated_idxs", None)
    if donated:
        donated.clear()
    outputs = enumerate(metadata.output_info)
    mutated = metadata.num_mutated_inp_runtime_indices or metadata.mutated_graph_handled_indices
    return ForwardFacts(
        tuple(i for i, o in outputs if o.requires_grad and issubclass(o.raw_type, Tensor)),
        len(metadata.traced_tangents),
        bool(mutated),
        bool(metadata.num_outputs_aliased),
    )


def changed_inputs() -> frozenset[int]:
    """Positions of the inputs, buffers among them, that the graph which is being compiled changes in place."""
    context = torch._guards.TracingContext.try_get()
    metadata: Any = getattr(context, "fw_metadata", None)
    inputs = getattr(metadata, "input_info", ())
    return frozenset(i for i, found in enumerate(inputs) if found.mutates_data)


def boxed(function: Callable[..., Any]) -> Callable[[list[Any]], Any]:
    """A function of many arguments as one of a list of them, by the mark that AOTAutograd looks for.

    Without the mark AOTAutograd passes the arguments one by one, with a warning.
    """

    def call(args: list[Any]) -> Any:
        return function(*args)

    call._boxed_call = True  # type: ignore[attr-defined]
    return call


def default_partition(joint: Any, inputs: Any, **options: Any) -> Any:
    """AOTAutograd's split of a joint graph that saves what the backward pass reads."""
    from functorch.compile import default_partition as partition

    return partition(joint, inputs, **options)


def min_cut_partition(joint: Any, inputs: Any, **options: Any) -> Any:
    """AOTAutograd's split that recomputes what is cheap."""
    from functorch.compile import min_cut_rematerialization_partition as partition

    return partition(joint, inputs, **options)


# --- inductor ---------------------------------------------------------------------------------------


def decompositions() -> dict[Any, Any]:
    """Inductor's table of decompositions; without it, operators are compiled as they are."""
    try:
        from torch._inductor.decomposition import select_decomp_table
    except ImportError:
        return {}
    return dict(select_decomp_table())


@contextmanager
def checkpoints_allow_grad() -> Iterator[None]:
    """Reentrant checkpoints inside run as those that are not: only these allow ``torch.autograd.grad``.

    Who trains holds the function ``checkpoint`` itself, so what it calls is replaced. Without the interface
    they stay as they are, and PyTorch refuses.
    """
    from torch.utils import checkpoint as module

    before = getattr(module, "CheckpointFunction", None)
    if before is None:
        yield
        return

    class NotReentrant:
        @staticmethod
        def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
            return module.checkpoint(
                function, *args, use_reentrant=False, preserve_rng_state=preserve
            )

    module.__dict__["CheckpointFunction"] = NotReentrant
    try:
        yield
    finally:
        module.__dict__["CheckpointFunction"] = before


def compile_inner(graph: Any, inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
    """Compile one graph with inductor, as its own backend does after AOTAutograd.

    ``torch._inductor.compile`` is public, but has no symbolic sizes. Without it the capture fails and the
    region is captured again for plain execution.
    """
    from torch._inductor.compile_fx import compile_fx_inner

    return compile_fx_inner(graph, inputs, **options)
