"""Hooks that stay behind when a module is copied or pickled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["Hook"]


class Hook:
    """A method as a hook: a copy of the module gets one that does nothing, and so does compiled code."""

    def __init__(self, method: Callable[..., None]) -> None:
        self.method = method

    def __call__(self, *args: Any) -> None:
        if not torch.compiler.is_compiling():
            self.method(*args)

    def __reduce__(self) -> Any:
        return _inert, ()


def _inert() -> Callable[..., None]:
    return _nothing


def _nothing(*args: Any) -> None:
    return None
