"""What a training step keeps, measured: distinct storages, not tensors, and peaks of the process or device.

A tensor that two operations save is kept once; a view keeps its whole storage. So bytes are counted by
storage, each for the module whose forward pass saved it first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from backsketch.arithmetic import differentiate, spread_batch
from backsketch.regions import RegionModule
from backsketch.torch_private import is_compiled, pytree
from backsketch.untouched import untouched

__all__ = ["SavedBytes", "kept_by", "peak_bytes", "peak_of", "saved_bytes"]

_HIGH_WATER = "VmHWM"


@dataclass
class SavedBytes:
    """Bytes kept for the backward pass; prints as a table.

    ``modules`` maps a module's qualified name to what its own forward pass (not that of a module inside it)
    saved first. ``inputs`` and ``parameters`` are kept, too, but exist anyway: they are not in ``total``.
    """

    modules: dict[str, int] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)
    inputs: int = 0
    parameters: int = 0

    @property
    def total(self) -> int:
        """Bytes of all modules."""
        return sum(self.modules.values())

    def under(self, name: str) -> int:
        """Bytes of a module and all below it."""
        inside = f"{name}." if name else ""
        return sum(b for n, b in self.modules.items() if n == name or n.startswith(inside))

    def __str__(self) -> str:
        rows = [
            (
                name or "(model)",
                self.types.get(name, ""),
                mebibytes(size),
                f"{size / self.total:.1%}",
            )
            for name, size in self.modules.items()
            if size
        ]
        header = ("module", "type", "saved", "")
        widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
        lines = [
            f"{n.ljust(widths[0])}  {t.ljust(widths[1])}  {s.rjust(widths[2])}  {p.rjust(widths[3])}".rstrip()
            for n, t, s, p in (header, *rows)
        ]
        lines.insert(1, "  ".join("-" * w for w in widths))
        return "\n".join(
            [
                *lines,
                f"{mebibytes(self.total)} kept for the backward pass; apart from that "
                f"{mebibytes(self.inputs)} of inputs and {mebibytes(self.parameters)} of parameters and buffers",
            ]
        )


def mebibytes(size: int) -> str:
    """A number of bytes as text, in MiB, or KiB below a tenth of one."""
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 / 10 else f"{size / 2**10:.1f} KiB"


def saved_bytes(model: nn.Module, *inputs: Any, **options: Any) -> SavedBytes:
    """Measure what one forward pass keeps for its backward pass, module by module.

    Args:
        model: any module, in the mode that it is in; compiled modules are one entry.
        *inputs: arguments of its forward pass; a batch that is a dictionary may be given as it is.
        **options: its keyword arguments.

    Returns:
        :class:`SavedBytes`. Buffers, gradients and random streams are left as they were.

    Example:
        >>> import torch, backsketch as bs
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
        >>> x = torch.randn(1024, 64)
        >>> bs.saved_bytes(model, x).total
        262144
        >>> report = bs.sketch_(model, bs.Quantized(bits=4))
        >>> bs.saved_bytes(model, x).total < 0.45 * 262144  # x was an input, its codes are not
        True
    """
    inputs, options = spread_batch(model, inputs, options)
    with untouched(model):
        if is_compiled(model):
            model(*inputs, **options)  # the hooks below must not be there when it is traced
        return kept_by(model, lambda: model(*inputs, **options), (inputs, options))


def kept_by(
    model: nn.Module, forward: Callable[[], object], inputs: Any = (), hook: bool = True
) -> SavedBytes:
    """The same for any forward pass of ``model``: with a loss, say. Nothing is put back.

    Without ``hook`` all is put down to the model: for a forward pass that is compiled, not by ``model``.
    """
    names = {id(m): name for name, m in model.named_modules()}
    stack = [""]
    saved: dict[
        int, tuple[torch.UntypedStorage, str]
    ] = {}  # holding one keeps its address from reuse

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved.setdefault(storage.data_ptr(), (storage, stack[-1]))
        return tensor

    with ExitStack() as hooks:
        for module in _traceable(model) if hook else ():
            hooks.enter_context(_named(module, names[id(module)], stack))
        hooks.enter_context(saved_tensors_hooks(pack, lambda tensor: tensor))
        output = forward()
    result = SavedBytes({}, {name: type(m).__name__ for name, m in model.named_modules()})
    own = _addresses([*model.parameters(), *model.buffers()])
    given = _addresses(t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor))
    for address, (storage, name) in saved.items():
        if address in own:
            result.parameters += storage.nbytes()
        elif address in given:
            result.inputs += storage.nbytes()
        else:
            result.modules[name] = result.modules.get(name, 0) + storage.nbytes()
    del output
    order = {name: i for i, name in enumerate(result.types)}
    result.modules = dict(sorted(result.modules.items(), key=lambda item: order[item[0]]))
    return result


def _addresses(tensors: Any) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tensors}


def _traceable(module: nn.Module) -> Iterator[nn.Module]:
    """Modules that may be given a hook: nothing in a compiled one or a region, which would be made anew."""
    if is_compiled(module):
        return
    yield module
    if isinstance(module, RegionModule):
        return
    for child in module.children():
        yield from _traceable(child)


@contextmanager
def _named(module: nn.Module, name: str, stack: list[str]) -> Iterator[None]:
    """While the module's forward pass runs, its name is on top of the stack."""

    def enter(*_: Any) -> None:
        stack.append(name)

    def leave(*_: Any) -> None:
        stack.pop()

    handles = [
        module.register_forward_pre_hook(enter),
        module.register_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# Peaks ------------------------------------------------------------------------------------------------


def peak_bytes(model: nn.Module, *inputs: Any, **options: Any) -> int | None:
    """Peak memory of a forward and a backward pass above what is in use before it.

    On a GPU, of PyTorch's allocator; on the CPU, of the process (resident memory, on Linux; what the C
    library holds free from earlier steps hides part of it, so compare fresh processes).

    Args:
        model: any module. Gradients are put back as they were, and so is what :func:`saved_bytes` puts back.
        *inputs: arguments of its forward pass; the backward pass starts from its loss, where the
            model returns one by name, else from ones in all outputs.
        **options: its keyword arguments.

    Returns:
        Bytes, or None where the operating system does not tell.
    """
    device = next((t.device for t in model.parameters()), torch.device("cpu"))
    inputs, options = spread_batch(model, inputs, options)
    with untouched(model):
        return peak_of(lambda: differentiate(model, model(*inputs, **options)), device)


def peak_of(step: Callable[[], object], device: torch.device | str = "cpu") -> int | None:
    """Peak memory while ``step()`` runs, above what is in use before it; see :func:`peak_bytes`."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before = _status("VmRSS")
        step()
        return max(0, _status(_HIGH_WATER) - before)
    except (OSError, LookupError):
        return None


def _status(key: str) -> int:
    """A line of ``/proc/self/status``, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return 1024 * int(line.split()[1])
    raise LookupError(key)
