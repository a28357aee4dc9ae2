"""Which module a trainer calls: not always the one that it was given."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from backsketch.planning.measure.recorder import Hook

__all__ = ["Outermost"]


class Outermost:
    """Watches all modules of a model until :meth:`close`, and notes those that no other one calls."""

    def __init__(self, model: nn.Module) -> None:
        self.names: set[str] = set()
        self._depth = 0
        self._handles: list[Any] = []
        for name, module in model.named_modules():
            if next(module.parameters(), None) is not None:
                self._watch(name, module)

    def _watch(self, name: str, module: nn.Module) -> None:
        def enter(module: nn.Module, args: Any) -> None:
            if self._depth == 0 and module.training and torch.is_grad_enabled():
                self.names.add(name)
            self._depth += 1

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self._depth -= 1

        self._handles += [
            module.register_forward_pre_hook(Hook(enter)),
            module.register_forward_hook(Hook(leave), always_call=True),
        ]

    def close(self) -> str | None:
        """Remove the hooks; returns the name of the one module, None where there were none or several.

        Modules without parameters, such as a loss, may be called beside it: they are not looked at.
        """
        for handle in self._handles:
            handle.remove()
        self._handles = []
        return next(iter(self.names)) if len(self.names) == 1 else None
