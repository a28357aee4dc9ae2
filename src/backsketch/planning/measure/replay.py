"""One training call of a module, recorded as it happens and run again: no loss function is needed.

A gradient is ``J^T g`` with the cotangents g of the module's outputs. A recorder keeps references to the
arguments, the random state and g of one call; :class:`Replay` runs the forward pass again on the same
numbers and applies its own VJP to g, or to a part of it. ``.grad``, hooks on parameters (data parallel ones
included), buffers, modes and random streams stay what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from backsketch.planning.measure.recorder import listen, repeatable_arguments, tensors_of, vjp
from backsketch.sampling import keyed
from backsketch.torch_private import pytree, version_of
from backsketch.untouched import untouched

__all__ = ["Recorder", "Replay", "replaying"]


@dataclass(eq=False)
class _Call:
    """A call's arguments and random state, and the cotangents that have arrived since."""

    args: Any = ((), {})
    versions: tuple[int, ...] = ()
    states: tuple[Tensor, ...] = ()
    autocast: tuple[str, torch.dtype, bool] = ("cpu", torch.float32, False)
    cotangents: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, args: Any, device: torch.device) -> _Call:
        states = [torch.get_rng_state()]
        if device.type == "cuda":
            states.append(torch.cuda.get_rng_state(device))
        kind = device.type
        autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        return cls(args, _versions(args), tuple(states), autocast)

    @property
    def is_intact(self) -> bool:
        """Whether cotangents came and no argument was overwritten since."""
        return bool(self.cotangents) and self.versions == _versions(self.args)


class Recorder:
    """Records a module for one optimizer step; :meth:`close` removes its hooks.

    ``call`` is the first call that got cotangents (the last one without), ``count`` how many got some: the
    micro-batches of an optimizer step.
    """

    def __init__(self, module: nn.Module) -> None:
        self.call: _Call | None = None
        self.count = 0
        self._module = module
        self._handles = listen(module, self._called, arrived=self._arrived)

    def close(self) -> None:
        """Remove the hooks; what was recorded stays."""
        for handle in self._handles:
            handle.remove()

    def _called(self, args: Any, kwargs: Any) -> _Call | None:
        if not self._module.training:
            return None
        if self.call is not None and self.call.cotangents:
            return _Call()  # only counted
        self.call = _Call.of((args, kwargs), _device(self._module))
        return self.call

    def _arrived(self, call: _Call, index: int, cotangent: Tensor) -> None:
        self.count += not call.cotangents
        if call is not self.call:
            call.cotangents[index] = cotangent.new_empty(0)
            return
        before, g = call.cotangents.get(index), cotangent.detach()
        call.cotangents[index] = g if before is None else before + g


def _device(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def _versions(args: Any) -> tuple[int, ...]:
    return tuple(map(version_of, tensors_of(args)))


# --- running it again -------------------------------------------------------------------------------


@dataclass
class Replay:
    """Runs a recorded call; made by :func:`replaying`."""

    model: nn.Module
    call: _Call
    parameters: Sequence[nn.Parameter]
    restart: Callable[[int], None]

    def forward(
        self, number: int = 0, rows: slice | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The outputs that got cotangents, and these.

        Where a loss is among them, the others got theirs through it, and it is the only one.

        Args:
            number: names the sketches' draws.
            rows: of the batch, None for all: of every argument whose first dimension is that of the first tensor.
        """
        torch.set_rng_state(self.call.states[0])
        for state in self.call.states[1:]:
            torch.cuda.set_rng_state(state, _device(self.model))
        self.restart(number)
        args, kwargs = repeatable_arguments(self._arguments(rows))
        kind, dtype, on = self.call.autocast
        with torch.enable_grad(), torch.autocast(kind, dtype, enabled=on):
            outputs = [t for t in tensors_of(self.model(*args, **kwargs)) if t.requires_grad]
        got = [i for i in sorted(self.call.cotangents) if i < len(outputs)]
        got = [i for i in got if self.call.cotangents[i].ndim == 0] or got
        return [outputs[i] for i in got], [self.call.cotangents[i] for i in got]

    @property
    def num_rows(self) -> int:
        """Samples in the batch, by the first argument that is no plain number."""
        sizes = [t.shape[0] for t in tensors_of(self.call.args) if t.ndim]
        return sizes[0] if sizes else 0

    def _arguments(self, rows: slice | None) -> Any:
        n = self.num_rows
        if rows is None:
            return self.call.args
        return pytree.tree_map_only(
            Tensor, lambda t: t[rows] if t.ndim and t.shape[0] == n else t, self.call.args
        )

    def vjp(
        self, outputs: Sequence[Tensor], cotangents: Sequence[Tensor], retain: bool = False
    ) -> list[Tensor]:
        """Gradients of the trainable parameters; zeros where unused."""
        return vjp(outputs, self.parameters, cotangents, retain)


@contextmanager
def replaying(model: nn.Module, call: _Call, name: int) -> Iterator[Replay]:
    """A call ready to be run again; ``name`` fixes the draws of the sketches."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    with untouched(model, training=True, seed=0), keyed() as keys:
        yield Replay(model, call, parameters, lambda number: keys.restart(name, number))
