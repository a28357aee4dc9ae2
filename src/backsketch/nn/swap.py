"""In-place class swap: how a module becomes a sketched one, and how it comes back.

``module.__class__`` becomes a cached subclass of the module's own class with a mixin in front. The
object stays the same object: parameters, buffers, hooks, state_dict keys, ``isinstance`` and every
reference to it, an optimizer's included, are untouched, and swapping back undoes all of it. Because the
class is cached, ``torch.compile`` sees one class per kind of layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import nn

from backsketch.estimators import Sketch
from backsketch.ops.opaque import note_text

__all__ = [
    "Swapped",
    "exact",
    "is_swapped",
    "resketch_",
    "sketch_of",
    "swap_",
    "switched",
    "unswap_",
]

_SKETCH = "_backsketch"
_EXACT = "_backsketch_exact"


class Swapped(nn.Module):
    """Mixin of every swapped class; ``_backsketch`` holds the sketch."""

    _original_class: ClassVar[type[nn.Module]]
    _mixin_class: ClassVar[type[Swapped]]
    _backsketch: Any
    _backsketch_exact = False

    def _active(self) -> bool:
        """Sketch only where a gradient will be trained on: not in eval, no_grad or ``bs.exact``."""
        return self.training and not self._backsketch_exact and torch.is_grad_enabled()

    def extra_repr(self) -> str:
        inherited = super().extra_repr()
        return (
            f"{inherited}, sketch={self._backsketch}" if inherited else f"sketch={self._backsketch}"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time: pickle and deepcopy must make it again, not look it up.
        reduced: Any = super().__reduce_ex__(max(int(protocol), 2))
        _, arguments, *rest = reduced
        return (_rebuild, (self._mixin_class, self._original_class, arguments[1:]), *rest)


_CLASSES: dict[tuple[type[Swapped], type[nn.Module]], type[Swapped]] = {}


def _swapped_class(mixin: type[Swapped], original: type[nn.Module]) -> type[Swapped]:
    key = (mixin, original)
    if key not in _CLASSES:
        body = {
            "_original_class": original,
            "_mixin_class": mixin,
            "__module__": original.__module__,
            "__doc__": original.__doc__,
            "forward": _forward(mixin, original),
        }
        # A class that writes its name into files, as those of `transformers` do, keeps it.
        prefix = "" if hasattr(original, "save_pretrained") else "Sketched"
        cls: Any = type(f"{prefix}{original.__name__}", (mixin, original), body)
        _CLASSES[key] = cls
    return _CLASSES[key]


def _forward(mixin: type[Swapped], original: type[nn.Module]) -> Callable[..., Any]:
    """The mixin's forward pass under the signature of the original one, which trainers read column names from."""
    sketched = mixin.forward

    @functools.wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, Swapped):  # a copy on the instance has outlived the sketch
            return type(self).forward(self, *args, **kwargs)
        return sketched(self, *args, **kwargs)

    # Dynamo counts recompilations by code object: each class has its own.
    function: Any = forward
    function.__code__ = function.__code__.replace()
    return function


def _rebuild(
    mixin: type[Swapped], original: type[nn.Module], arguments: tuple[Any, ...]
) -> nn.Module:
    cls = _swapped_class(mixin, original)
    return cls.__new__(cls, *arguments)


def swap_(module: nn.Module, mixin: type[Swapped], sketch: Sketch) -> None:
    """Turn ``module`` into a sketched one, in place."""
    assert not is_swapped(module)
    module.__dict__[_SKETCH] = _one_object(sketch)
    module.__class__ = _swapped_class(mixin, type(module))


def resketch_(module: nn.Module, sketch: Sketch) -> None:
    """Give a swapped module another sketch of the same kind; nothing is proven or captured again."""
    assert isinstance(module, Swapped)
    module.__dict__[_SKETCH] = _one_object(sketch)


def _one_object(sketch: Sketch) -> Sketch:
    """The first of all equal sketches: code is compiled anew for each object."""
    try:
        return _first_of(sketch)
    except TypeError:  # of a class that cannot be hashed
        return sketch


@functools.lru_cache(maxsize=1024)
def _first_of(sketch: Sketch) -> Sketch:
    note_text(sketch)
    return sketch


def unswap_(module: nn.Module) -> None:
    """Undo :func:`swap_`; nothing of it remains."""
    assert isinstance(module, Swapped)
    original: Any = module._original_class
    module.__class__ = original
    module.__dict__.pop(_SKETCH)
    module.__dict__.pop(_EXACT, None)


def is_swapped(module: nn.Module) -> bool:
    """Whether :func:`swap_` is in force."""
    return isinstance(module, Swapped)


def sketch_of(module: nn.Module) -> Sketch | None:
    """The sketch of a swapped module, None for any other."""
    return module.__dict__.get(_SKETCH)


@contextmanager
def exact(model: nn.Module) -> Iterator[None]:
    """Exact gradients for every forward pass of ``model`` made inside the block.

    The estimator belongs to the forward pass: what is run inside the block has an exact backward,
    even if ``backward()`` is called outside it. Blocks nest; an exception restores the sketches.

    Raises:
        TypeError: ``model`` is not a module.

    Example:
        >>> import torch, backsketch as bs
        >>> model = torch.nn.Linear(4, 4)
        >>> _ = bs.sketch_(model, bs.Rows(keep=0.5))
        >>> with bs.exact(model):
        ...     model(torch.randn(8, 4)).sum().backward()
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"backsketch acts on a torch.nn.Module; got {type(model).__name__}")
    with switched({m: True for m in model.modules() if isinstance(m, Swapped)}):
        yield


@contextmanager
def switched(exactly: Mapping[nn.Module, bool]) -> Iterator[None]:
    """Some sketched modules exact (True) or sketched (False) inside; afterwards each is what it was."""
    before = {module: module.__dict__.get(_EXACT) for module in exactly}
    try:
        for module, value in exactly.items():
            module.__dict__[_EXACT] = value
        yield
    finally:
        for module, earlier in before.items():
            module.__dict__.pop(_EXACT, None)
            if earlier is not None and isinstance(module, Swapped):
                module.__dict__[_EXACT] = earlier
