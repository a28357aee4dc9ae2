"""Rules: patterns over the modules of a model, and what each of them matches."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from backsketch.estimators import Sketch
from backsketch.nn.registry import Adapter, adapter_of
from backsketch.regions import Mask
from backsketch.torch_private import compiled_from

__all__ = ["Pattern", "Patterns", "Tree", "matches", "no_match", "normalise", "show", "unwrap"]

Filter = Callable[[str, nn.Module], bool]
Pattern = str | type | Filter
Patterns = list[tuple[Pattern, Sketch | None]]


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside ``torch.compile`` and data-parallel wrappers."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"backsketch acts on a torch.nn.Module; got {type(model).__name__}")
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif (inner := compiled_from(model)) is not None:
            model = inner
        else:
            return model


def normalise(rules: Any) -> Patterns:
    """A sketch, a plan or a mapping as a list of pairs, first match first; raises for anything else."""
    rules = getattr(rules, "rules", rules)
    if isinstance(rules, Sketch):
        return [("", rules)]
    if not isinstance(rules, Mapping) or not rules:
        raise TypeError(
            "rules must be a sketch such as bs.Rows(keep=0.25), a plan, or a non-empty mapping from "
            f"pattern to sketch; got {rules!r}{_parse_hint(rules)}"
        )
    problems, malformed = [], []
    for pattern, sketch in rules.items():
        if isinstance(pattern, str):
            malformed += _malformed(pattern)
        elif not (
            issubclass(pattern, nn.Module) if isinstance(pattern, type) else callable(pattern)
        ):
            problems.append(
                f"{pattern!r} is neither a name pattern, nor a module type, nor a filter (name, module) -> bool"
            )
        if sketch is not None and not isinstance(sketch, Sketch):
            problems.append(f"{show(pattern)}: {sketch!r} is not a sketch{_parse_hint(sketch)}")
    if problems:
        raise TypeError("rules: " + "; ".join(problems))
    if malformed:
        raise ValueError("rules: " + "; ".join(malformed))
    return list(rules.items())


def _parse_hint(sketch: Any) -> str:
    return "; turn text into a sketch with bs.parse" if isinstance(sketch, str) else ""


def _malformed(pattern: str) -> list[str]:
    try:
        re.compile(pattern.removeprefix("re:") if pattern.startswith("re:") else "")
    except re.error as error:
        return [f"{pattern!r} is not a regular expression: {error}"]
    return []


def show(pattern: Pattern) -> str:
    """A pattern as it stands in a message."""
    return (
        repr(pattern) if isinstance(pattern, str) else getattr(pattern, "__name__", repr(pattern))
    )


def matches(pattern: Pattern, name: str, module: nn.Module) -> bool:
    """Whether a pattern matches a module under one of its names."""
    if isinstance(pattern, type):
        return isinstance(module, pattern)
    if not isinstance(pattern, str):
        return bool(pattern(name, module))
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return fnmatch.fnmatchcase(name, pattern)


def no_match(pattern: Pattern, tree: Tree) -> str:
    """The message for a pattern that matches nothing: what it may have meant."""
    if isinstance(pattern, type):
        kinds = sorted({type(m).__name__ for _, m in tree.named})
        return f"no module is a {pattern.__name__}; the model has {', '.join(kinds)}"
    if not isinstance(pattern, str):
        return f"the filter {show(pattern)} is true of no module"
    names = [name for name, _ in tree.named if name]
    near = (
        difflib.get_close_matches(pattern.removeprefix("re:"), names, n=4, cutoff=0.4) or names[:4]
    )
    return f"pattern {pattern!r} matches no module; near names: {', '.join(near) or '(none)'}"


class Tree:
    """The modules of a model with all their names: a shared module has several."""

    def __init__(self, model: nn.Module) -> None:
        self.named = list(model.named_modules(remove_duplicate=False))
        self.lookup = dict(self.named)
        self.order = {name: i for i, (name, _) in enumerate(self.named)}
        self.names: dict[int, list[str]] = {}
        for name, module in self.named:
            self.names.setdefault(id(module), []).append(name)

    def unique(self) -> list[tuple[str, nn.Module]]:
        """Every module once, under its first name."""
        return [(name, module) for name, module in self.named if self.names[id(module)][0] == name]

    def layers(self) -> list[tuple[str, nn.Module, Adapter]]:
        """Every layer of a known kind, once, under its first name."""
        known = [(name, module, adapter_of(module)) for name, module in self.unique()]
        return [(name, module, adapter) for name, module, adapter in known if adapter is not None]

    def chain(self, name: str) -> list[tuple[str, nn.Module]]:
        """The module of that name and all above it, up to the model."""
        parts = name.split(".") if name else []
        above = [".".join(parts[:i]) for i in range(len(parts), -1, -1)]
        return [(n, self.lookup[n]) for n in above]

    def first_rule(self, module: nn.Module, patterns: Patterns) -> int | None:
        """Index of the first pattern that matches the module, under any name, or one above it.

        A mask acts on an output only: it says nothing about the layers inside.
        """
        chain = [pair for name in self.names[id(module)] for pair in self.chain(name)]
        for i, (pattern, sketch) in enumerate(patterns):
            if not isinstance(sketch, Mask) and any(matches(pattern, n, m) for n, m in chain):
                return i
        return None

    def direct_rule(self, module: nn.Module, patterns: Patterns) -> int | None:
        """Index of the first pattern that matches the module itself, under any name."""
        for i, (pattern, _) in enumerate(patterns):
            if any(matches(pattern, name, module) for name in self.names[id(module)]):
                return i
        return None

    def is_topmost(self, name: str, patterns: Patterns, index: int) -> bool:
        """Whether no module above this one gets its sketch from the same rule."""
        return all(self.direct_rule(m, patterns) != index for _, m in self.chain(name)[1:])

    def owner_reason(self, module: nn.Module) -> str | None:
        """Why a layer inside another known layer is not a site of its own."""
        for name in self.names[id(module)]:
            for above, parent in self.chain(name)[1:]:
                if adapter_of(parent) is not None:
                    kind = type(parent).__name__
                    return f"{kind} {above or '(the model)'!r} reads its weights itself: sketch that one"
        return None
