"""``sketch_`` and ``restore_``: which module gets which sketch, decided whole before anything changes."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from backsketch.estimators import Estimator, Sketch
from backsketch.nn.registry import Adapter, adapter_of, refusal
from backsketch.nn.swap import Swapped, is_swapped, swap_, unswap_
from backsketch.report import Report, Site

__all__ = ["restore_", "sketch_"]

Pattern = str | type
Rules = Any  # Sketch | Plan | Mapping[Pattern, Sketch | None]; a Plan has its mapping under .rules

_SMALL_WEIGHT = 128 * 128


def sketch_(model: nn.Module, rules: Rules) -> Report:
    """Sketch the backward pass of ``model``, in place.

    Args:
        model: any module. Its parameters, state_dict keys, hooks and identity stay what they are; an
            optimizer built before keeps working.
        rules: one sketch for the whole model, or a mapping from pattern to sketch, None meaning exact.
            A pattern is a glob on the qualified name (``"blocks.*.mlp"``; ``""`` is the model itself),
            ``"re:..."`` a regular expression that must match the whole name, or a module type. The first
            match wins. A layer estimator goes to every supported layer at or below the modules that its
            pattern matches. Rules describe the whole model: a second call replaces the first.

    Returns:
        A :class:`~backsketch.report.Report`: one row a layer, sketched or left exact with the reason.

    Raises:
        ValueError: a pattern that matches nothing (near names are listed) or has no effect, a layer
            that the estimator cannot act on. All problems are reported at once, and nothing is changed.
        TypeError: ``rules`` or ``model`` is of the wrong kind.

    Example:
        >>> import torch, backsketch as bs
        >>> model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.ReLU())
        >>> report = bs.sketch_(model, {"0": bs.Rows(keep=0.25)})
        >>> report["0"].backward
        0.25
    """
    model = _unwrap(model)
    patterns = _normalise(rules)
    before = [(m, m._mixin_class, m._backsketch) for m in model.modules() if isinstance(m, Swapped)]
    for swapped, _, _ in before:
        unswap_(swapped)
    try:
        resolution = _resolve(model, patterns)
    except Exception:
        for swapped, mixin, old in before:
            swap_(swapped, mixin, old)
        raise
    for module, adapter, sketch in resolution.swaps:
        swap_(module, adapter.mixin, sketch)
    return Report(resolution.sites)


def restore_(model: nn.Module) -> nn.Module:
    """Give ``model`` back its own classes, exactly as before :func:`sketch_`; returns ``model``.

    A model that is not sketched is left as it is.
    """
    for module in _unwrap(model).modules():
        if is_swapped(module):
            unswap_(module)
    return model


# --------------------------------------------------------------------------------------------------
# Rules
# --------------------------------------------------------------------------------------------------


def _unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside ``torch.compile`` and data-parallel wrappers."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"backsketch acts on a torch.nn.Module; got {type(model).__name__}")
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model._modules["_orig_mod"]  # type: ignore[assignment]
        else:
            return model


def _normalise(rules: Rules) -> list[tuple[Pattern, Sketch | None]]:
    rules = getattr(rules, "rules", rules)
    if isinstance(rules, Sketch):
        return [("", rules)]
    if not isinstance(rules, Mapping) or not rules:
        raise TypeError(
            "rules must be a sketch such as bs.Rows(keep=0.25), a plan, or a non-empty mapping from "
            f"pattern to sketch; got {rules!r}"
        )
    problems = []
    for pattern, sketch in rules.items():
        if not isinstance(pattern, str) and not (
            isinstance(pattern, type) and issubclass(pattern, nn.Module)
        ):
            problems.append(f"{pattern!r} is neither a name pattern nor a module type")
        if sketch is not None and not isinstance(sketch, Sketch):
            hint = "; turn text into a sketch with bs.parse" if isinstance(sketch, str) else ""
            problems.append(f"{_show(pattern)}: {sketch!r} is not a sketch{hint}")
    if problems:
        raise TypeError("rules: " + "; ".join(problems))
    return list(rules.items())


def _show(pattern: Pattern) -> str:
    return (
        repr(pattern) if isinstance(pattern, str) else getattr(pattern, "__name__", repr(pattern))
    )


def _matches(pattern: Pattern, name: str, module: nn.Module) -> bool:
    if isinstance(pattern, type):
        return isinstance(module, pattern)
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return fnmatch.fnmatchcase(name, pattern)


# --------------------------------------------------------------------------------------------------
# Resolution
# --------------------------------------------------------------------------------------------------


@dataclass
class _Resolution:
    sites: list[Site] = field(default_factory=list)
    swaps: list[tuple[nn.Module, Adapter, Sketch]] = field(default_factory=list)


def _resolve(model: nn.Module, patterns: list[tuple[Pattern, Sketch | None]]) -> _Resolution:
    """Decide for every layer, without touching any."""
    tree = _Tree(model)
    problems = [
        _no_match(pattern, tree)
        for pattern, _ in patterns
        if not any(_matches(pattern, name, module) for name, module in tree.named)
    ]
    resolution = _Resolution()
    outcomes: dict[int, list[str | None]] = {i: [] for i in range(len(patterns))}
    for name, module, adapter in tree.layers():
        index = tree.first_rule(module, patterns)
        site = Site(name, type(module).__name__, None)
        resolution.sites.append(site)
        if index is None:
            site.reason = "no rule matches it"
            continue
        sketch = patterns[index][1]
        assert sketch is None or isinstance(sketch, Estimator)
        if sketch is None or sketch.is_exact():
            site.reason = f"left exact by {'a rule' if sketch is None else sketch}"
            outcomes[index].append(None)
            continue
        site.reason = tree.owner_reason(module) or refusal(module, sketch) or ""
        outcomes[index].append(site.reason or None)
        if not site.reason:
            _fill(site, module, adapter, sketch)
            resolution.swaps.append((module, adapter, sketch))
    problems += _without_effect(patterns, outcomes, tree)
    if problems:
        raise ValueError("sketch_: " + "\n  ".join(["nothing was changed, because", *problems]))
    return resolution


def _fill(site: Site, module: nn.Module, adapter: Adapter, sketch: Estimator) -> None:
    site.sketch, site.work, site.saved = sketch, sketch.work(), sketch.saved()
    size = sum(weight.numel() for _, weight in adapter.weights(module))
    if size < _SMALL_WEIGHT:
        site.reason = "small: expect no gain in time"


def _without_effect(
    patterns: list[tuple[Pattern, Sketch | None]],
    outcomes: dict[int, list[str | None]],
    tree: _Tree,
) -> list[str]:
    problems = []
    for i, (pattern, sketch) in enumerate(patterns):
        matched = [(n, m) for n, m in tree.named if _matches(pattern, n, m)]
        if sketch is None or not matched or None in outcomes[i]:
            continue
        if outcomes[i]:
            reasons = "; ".join(sorted({reason for reason in outcomes[i] if reason}))
            problems.append(
                f"{_show(pattern)}: {type(sketch).__name__} cannot act there: {reasons}"
            )
            continue
        below = [m for _, top in matched for m in top.modules() if adapter_of(m)]
        if below:
            problems.append(
                f"{_show(pattern)} has no effect: earlier patterns match all of its layers"
            )
        else:
            name, module = matched[0]
            reason = refusal(module, sketch) if isinstance(sketch, Estimator) else ""
            where = f"{name or 'the model'} and all below it" if list(module.children()) else name
            problems.append(f"{_show(pattern)}: no layer to sketch in {where}: {reason}")
    return problems


def _no_match(pattern: Pattern, tree: _Tree) -> str:
    if isinstance(pattern, type):
        kinds = sorted({type(m).__name__ for _, m in tree.named})
        return f"no module is a {pattern.__name__}; the model has {', '.join(kinds)}"
    names = [name for name, _ in tree.named if name]
    near = (
        difflib.get_close_matches(pattern.removeprefix("re:"), names, n=4, cutoff=0.4) or names[:4]
    )
    return f"pattern {pattern!r} matches no module; near names: {', '.join(near) or '(none)'}"


class _Tree:
    """The modules of a model with all their names: a shared module has several."""

    def __init__(self, model: nn.Module) -> None:
        self.named = list(model.named_modules(remove_duplicate=False))
        self.lookup = dict(self.named)
        self.names: dict[int, list[str]] = {}
        for name, module in self.named:
            self.names.setdefault(id(module), []).append(name)

    def layers(self) -> list[tuple[str, nn.Module, Adapter]]:
        """Every layer of a known kind, once, under its first name."""
        found = []
        for name, module in self.named:
            adapter = adapter_of(module)
            if adapter is not None and self.names[id(module)][0] == name:
                found.append((name, module, adapter))
        return found

    def chain(self, name: str) -> list[tuple[str, nn.Module]]:
        """The module of that name and all above it, up to the model."""
        parts = name.split(".") if name else []
        above = [".".join(parts[:i]) for i in range(len(parts), -1, -1)]
        return [(n, self.lookup[n]) for n in above]

    def first_rule(
        self, module: nn.Module, patterns: list[tuple[Pattern, Sketch | None]]
    ) -> int | None:
        """Index of the first pattern that matches the module, under any name, or one above it."""
        chain = [pair for name in self.names[id(module)] for pair in self.chain(name)]
        for i, (pattern, _) in enumerate(patterns):
            if any(_matches(pattern, name, m) for name, m in chain):
                return i
        return None

    def owner_reason(self, module: nn.Module) -> str | None:
        """Why a layer inside another known layer is not a site of its own."""
        for name in self.names[id(module)]:
            for above, parent in self.chain(name)[1:]:
                if adapter_of(parent) is not None:
                    kind = type(parent).__name__
                    return f"{kind} {above or '(the model)'!r} reads its weights itself: sketch that one"
        return None
