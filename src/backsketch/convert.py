"""``sketch_`` and ``restore_``: which module gets which sketch, decided before anything changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from backsketch import regions
from backsketch.estimators import Estimator, Int8
from backsketch.nn.registry import Adapter, adapter_of, advice, inherent, refusal
from backsketch.nn.swap import is_swapped, swap_, unswap_
from backsketch.products import why_slow
from backsketch.regions import Mask, Region
from backsketch.report import Report, Site
from backsketch.rules import Patterns, Tree, matches, no_match, normalise, show, unwrap

__all__ = ["restore_", "sketch_"]

_LARGE_SHARE = 0.01  # of the parameters: position tables and the like stay below, and are no layers

_TABLES = (nn.Embedding, nn.EmbeddingBag)

Outcomes = dict[int, list[str | None]]  # per rule and site: None where it took effect, else why not


def sketch_(model: nn.Module, rules: Any, *, strict: bool = False) -> Report:
    """Sketch the backward pass of ``model``, in place.

    Args:
        model: any module. Its parameters, state_dict keys, hooks and identity stay what they are; an
            optimizer built before keeps working.
        rules: one sketch for the whole model, or a mapping from pattern to sketch, None meaning exact.
            A pattern is a glob on the qualified name (``"blocks.*.mlp"``; ``""`` is the model itself),
            ``"re:..."`` a regular expression that must match the whole name, a module type, or a filter
            ``(name, module) -> bool``. The first match wins. A layer estimator goes to every supported layer at
            or below the modules that its pattern matches; a region or a mask to the topmost modules that match,
            and the layers inside a region belong to it. Rules describe the whole model: a second call replaces
            the first.
        strict: a layer that a rule reaches and its sketch cannot act on is an error, instead of a row in the
            report that gives the reason. Modules of kinds that the library does not know are no layers: the
            report counts them.

    Returns:
        A :class:`~backsketch.report.Report`: one row a site, sketched or left exact with the reason.

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
    model = unwrap(model)
    patterns = normalise(rules)
    before = [(m, type(m), dict(m.__dict__)) for m in model.modules() if is_swapped(m)]
    for swapped, _, _ in before:
        unswap_(swapped)
    try:
        resolution = _resolve(model, patterns, strict)
    except Exception:
        for swapped, cls, attributes in before:
            swapped.__class__ = cls
            swapped.__dict__.update(attributes)
        raise
    report = Report(resolution.sites, **_left_out(model, resolution))
    for site, module in resolution.changes:
        _apply(site, module)
    return report


def restore_(model: nn.Module) -> nn.Module:
    """Give ``model`` back its own classes, exactly as before :func:`sketch_`; returns ``model``.

    A model that is not sketched is left as it is.
    """
    for module in unwrap(model).modules():
        if is_swapped(module):
            unswap_(module)
            regions.forget(module)
    return model


def _apply(site: Site, module: nn.Module) -> None:
    if isinstance(site.sketch, Estimator):
        adapter = adapter_of(module)
        assert adapter is not None
        swap_(module, adapter.mixin, site.sketch)
    else:
        assert isinstance(site.sketch, Region | Mask)
        site.state = regions.attach(module, site.sketch, site.name)


@dataclass
class _Resolution:
    """The rows of the report, and which of them change a module."""

    sites: list[Site] = field(default_factory=list)
    changes: list[tuple[Site, nn.Module]] = field(default_factory=list)

    def add(self, site: Site, module: nn.Module) -> None:
        self.sites.append(site)
        if site.sketch is not None:
            self.changes.append((site, module))


def _left_out(model: nn.Module, resolution: _Resolution) -> dict[str, Any]:
    """What no site stands for: modules with matrices of unknown kinds, their arithmetic, functions and norms."""
    covered = [m for m in model.modules() if adapter_of(m) or isinstance(m, _TABLES)]
    covered += [module for site, module in resolution.changes if isinstance(site.sketch, Region)]
    inside = {id(below) for module in covered for below in module.modules()}
    outside = [m for m in model.modules() if id(m) not in inside]
    products = sum(_products(_matrices(m)) for m in outside)
    return {
        "unknown": _unknown(model, outside),
        "unknown_products": products,
        "without": _without_place(outside),
    }


def _unknown(model: nn.Module, outside: list[nn.Module]) -> str:
    """The modules with matrices of their own that no adapter, no known layer and no region covers."""
    sizes = {m: sum(map(Tensor.numel, _matrices(m))) for m in outside}
    unknown = [m for m, size in sizes.items() if size]
    total = sum(p.numel() for p in model.parameters() if not is_lazy(p))
    share = sum(sizes.values()) / max(total, 1)
    if share < _LARGE_SHARE:
        return ""
    reasons = {f"{_kind(m)}: {reason}" for m in unknown if (reason := inherent(m))}
    return "; ".join(
        [_counted(unknown), f"{100 * share:.0f} % of the parameters", *sorted(reasons)]
    )


def _without_place(outside: list[nn.Module]) -> str:
    """Attention as a function, and norms of other libraries: a saver of memory has no module to act on there."""
    attentions = [m for m in outside if "Attention" in _kind(m) and _has_layers(m)]
    norms = [m for m in outside if "Norm" in _kind(m) and list(m.parameters(recurse=False))]
    parts = [f"attention as a function in {_counted(attentions)}"] if attentions else []
    return ", ".join([*parts, _counted(norms)] if norms else parts)


def _has_layers(module: nn.Module) -> bool:
    return any(adapter_of(child) for child in module.children())


def _kind(module: nn.Module) -> str:
    return type(module).__name__


def _counted(modules: list[nn.Module]) -> str:
    counts = Counter(map(_kind, modules))
    return ", ".join(f"{count} {kind}" for kind, count in counts.most_common())


def _products(weights: Iterable[Tensor]) -> int:
    """Multiplications of a backward pass for one row: one product for the input, one for a trainable weight."""
    return sum(w.numel() * (1 + w.requires_grad) for w in weights)


def _matrices(module: nn.Module) -> list[Tensor]:
    own = [p for p in module.parameters(recurse=False) if not is_lazy(p) and p.is_floating_point()]
    # A leading 1 is broadcast over the batch: position embeddings and class tokens, not weights.
    return [p for p in own if p.dim() > 1 and len(p) > 1]


def _resolve(model: nn.Module, patterns: Patterns, strict: bool) -> _Resolution:
    """Decide for every site, without touching any."""
    tree = Tree(model)
    problems = [
        no_match(pattern, tree)
        for pattern, _ in patterns
        if not any(matches(pattern, name, module) for name, module in tree.named)
    ]
    outcomes: Outcomes = {i: [] for i in range(len(patterns))}
    resolution = _Resolution()
    claimed = _resolve_modules(tree, patterns, outcomes, resolution)
    _resolve_layers(tree, patterns, outcomes, resolution, claimed)
    problems += _without_effect(patterns, outcomes, tree)
    problems += [] if problems or not strict else _refused(resolution)
    if problems:
        raise ValueError("sketch_: " + "\n  ".join(["nothing was changed, because", *problems]))
    resolution.sites.sort(key=lambda site: tree.order[site.name])
    return resolution


def _resolve_modules(
    tree: Tree, patterns: Patterns, outcomes: Outcomes, resolution: _Resolution
) -> set[int]:
    """Regions and masks; returns the ids of the modules that are no longer free for a layer sketch."""
    claimed: set[int] = set()
    for name, module in tree.unique():
        index = tree.direct_rule(module, patterns)
        sketch = None if index is None else patterns[index][1]
        if index is None or not isinstance(sketch, Region | Mask):
            continue
        if not tree.is_topmost(name, patterns, index):
            continue
        site = Site(name, type(module).__name__, None)
        if sketch.is_exact():
            site.reason = f"left exact by {sketch}"
            outcomes[index].append(None)
        else:
            site.reason = regions.refusal(module, sketch) or ""
            outcomes[index].append(site.reason or None)
            site.refused = bool(site.reason)
            if not site.reason:
                _fill_module(site, module, sketch)
                claimed |= (
                    {id(m) for m in module.modules()} if isinstance(sketch, Region) else set()
                )
                claimed.add(id(module))
        resolution.add(site, module)
    return claimed


def _fill_module(site: Site, module: nn.Module, sketch: Region | Mask) -> None:
    site.sketch = sketch
    if isinstance(sketch, Mask):
        site.reason = "drops rows of the cotangent for all that is before it"
        return
    site.work = (sketch.keep, sketch.keep)
    inside = [p for m in module.modules() if not isinstance(m, _TABLES) for p in _matrices(m)]
    site.products = _products(inside)
    site.frozen = bool(inside) and not any(p.requires_grad for p in inside)
    if sketch.arithmetic == "int8":
        of_input, of_weight = Int8().work()
        site.work = (sketch.keep * of_input, sketch.keep * of_weight)
        site.reason = _why_slow(module)
    if sketch.mode == "recompute":
        site.saved = None  # its inputs only: what part of it all that is depends on the module


def _why_slow(module: nn.Module) -> str:
    devices = {p.device for p in module.parameters()}
    slow = next(filter(None, map(why_slow, devices)), "")
    return f"expect no gain in time: {slow}" if slow else ""


def _resolve_layers(
    tree: Tree,
    patterns: Patterns,
    outcomes: Outcomes,
    resolution: _Resolution,
    claimed: set[int],
) -> None:
    for name, module, adapter in tree.layers():
        if id(module) in claimed:
            continue
        index = tree.first_rule(module, patterns)
        sketch = None if index is None else patterns[index][1]
        if adapter.for_savers and not _is_site(module, adapter, patterns, index):
            continue
        site = Site(name, type(module).__name__, None)
        owner = tree.owner_reason(module)
        if owner is None:
            _count(site, module, adapter)
        if index is None:
            site.reason = "no rule matches it"
        elif sketch is None:
            site.reason = "left exact by a rule"
            outcomes[index].append(None)
        elif not isinstance(sketch, Estimator):
            site.reason = f"left exact with the module that {sketch} is for"
        elif sketch.is_exact():
            site.reason = f"left exact by {sketch}"
            outcomes[index].append(None)
        else:
            site.reason = owner or refusal(module, sketch) or ""
            site.refused = owner is None and bool(site.reason)
            outcomes[index].append(site.reason or None)
            if not site.reason:
                _fill(site, module, adapter, sketch)
        resolution.add(site, module)


def _count(site: Site, module: nn.Module, adapter: Adapter) -> None:
    """How much backward arithmetic the layer has, and whether its weights are frozen."""
    if any(is_lazy(p) for p in module.parameters(recurse=False)):
        return
    with torch.enable_grad():  # views of a weight need a gradient where the weight does
        weights = [weight for _, weight in adapter.weights(module)]
    site.products = _products(weights)
    site.frozen = bool(weights) and not any(w.requires_grad for w in weights)


def _is_site(module: nn.Module, adapter: Adapter, patterns: Patterns, index: int | None) -> bool:
    """Whether an activation or a norm belongs in the report: only where a saver could act there."""
    sketch = None if index is None else patterns[index][1]
    if not isinstance(sketch, Estimator) or not sketch.saves_memory or adapter.keeps is None:
        return False
    return not sketch.is_exact() and adapter.keeps(module, sketch) is not None


def _fill(site: Site, module: nn.Module, adapter: Adapter, sketch: Estimator) -> None:
    site.sketch = sketch
    if adapter.keeps is not None:
        site.saved, site.reason = adapter.keeps(module, sketch), adapter.note
        return
    site.work, site.saved = sketch.work(), sketch.saved()
    site.reason = advice(module, sketch)


def _refused(resolution: _Resolution) -> list[str]:
    return [
        f"{site.name or '(model)'} would stay exact (strict=True): {site.reason}"
        for site in resolution.sites
        if site.refused
    ]


def _without_effect(patterns: Patterns, outcomes: Outcomes, tree: Tree) -> list[str]:
    problems = []
    for i, (pattern, sketch) in enumerate(patterns):
        matched = [(n, m) for n, m in tree.named if matches(pattern, n, m)]
        if sketch is None or not matched or None in outcomes[i]:
            continue
        if outcomes[i]:
            reasons = "; ".join(sorted({reason for reason in outcomes[i] if reason}))
            problems.append(f"{show(pattern)}: {type(sketch).__name__} cannot act there: {reasons}")
            continue
        known = [adapter_of(m) for _, top in matched for m in top.modules()]
        below = [adapter for adapter in known if adapter and not adapter.for_savers]
        if below:
            problems.append(
                f"{show(pattern)} has no effect: earlier patterns match all of its layers"
            )
        else:
            name, module = matched[0]
            reason = refusal(module, sketch) if isinstance(sketch, Estimator) else ""
            where = f"{name or 'the model'} and all below it" if list(module.children()) else name
            problems.append(f"{show(pattern)}: no layer to sketch in {where}: {reason}")
    return problems
