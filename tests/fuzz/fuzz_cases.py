"""Random cases: a module, a sketch for it and how it is trained; each is a function of one integer."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from fuzz_modules import LEAVES, STRUCTURES, WITHOUT_WEIGHTS, Node

import backsketch as bs
from backsketch.estimators.base import registered

Rules = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Case:
    """Everything that a run depends on; its ``repr`` makes it again."""

    domain: str
    nodes: tuple[Node, ...]
    rules: Rules
    """Pattern and text of each sketch; see :func:`backsketch.parse`."""
    dtype: str = "float32"
    """``float32``, ``bfloat16``, or ``autocast``: float32 under bfloat16 autocast."""
    output: str = "tensor"
    batch: int = 6
    micro_batches: int = 1
    channels_last: bool = False
    seed: int = 0


def case_of(seed: int) -> Case:
    """The case that belongs to an integer."""
    rng = random.Random(seed)
    domain = rng.choice(sorted(LEAVES))
    nodes = tuple(_node(rng, domain) for _ in range(rng.choice((1, 2, 2, 3))))
    return Case(
        domain,
        nodes,
        _rules(rng, len(nodes)),
        rng.choice(("float32", "float32", "bfloat16", "autocast")),
        rng.choice(("tensor", "tuple", "dict")),
        rng.choice((6, 9)),
        rng.choice((1, 1, 2)),
        domain == "images" and rng.random() < 0.5,
        seed,
    )


# Modules --------------------------------------------------------------------------------------------


def _node(rng: random.Random, domain: str, depth: int = 2) -> Node:
    """A layer, or a structure of at most two levels around layers."""
    if depth == 0 or rng.random() < 0.45:
        return Node(rng.choice(sorted(LEAVES[domain] if rng.random() < 0.8 else WITHOUT_WEIGHTS)))
    kind = rng.choice(sorted(STRUCTURES))
    return Node(kind, tuple(_node(rng, domain, depth - 1) for _ in range(STRUCTURES[kind][0])))


# Sketches -------------------------------------------------------------------------------------------

# What the fields of a sketch may be; "name.field" goes before "field".
_FIELDS = {
    "keep": (0.9, 0.75, 0.5, 0.4),
    "bits": (8, 4, 2),
    "group_size": (64, 8),
    "design": ("systematic", "permuted", "independent"),
    "scores": ("l2", "optimal", "l1", "uniform"),
    "method": ("svd", "subspace"),
    "kind": ("rademacher", "srht"),
    "save": (False, True),
    "region.save": ("int8", "int4"),
    "region.keep": (1.0, 1.0, 0.75, 0.5, 0.4),
    "row_dims": (1, 1, 2),
    "mode": ("recompute", "save"),
    "arithmetic": ("exact", "int8"),
}
_HOLDS_A_SKETCH = ("sketch", "grad_input", "grad_weight")

_LAYERS = sorted(n for n, c in registered().items() if issubclass(c, bs.Estimator) and n != "exact")
_SUBMODULES = sorted(n for n, c in registered().items() if not issubclass(c, bs.Estimator))


def _rules(rng: random.Random, blocks: int) -> Rules:
    """A sketch for one block or the whole model, one for every layer, or both."""
    one = (f"blocks.{rng.randrange(blocks)}", _sketch(rng, [*_LAYERS, *_SUBMODULES, *_SUBMODULES]))
    if rng.random() < 0.1:
        one = ("", _sketch(rng, _SUBMODULES))
    every = ("*", _sketch(rng, _LAYERS))
    return rng.choice(((one,), (every,), (one, every)))


def _sketch(rng: random.Random, names: list[str], depth: int = 1) -> str:
    """The text of a sketch of one of the names, drawn again where it is exact or its class refuses the options."""
    name = rng.choice(names)
    cls = registered()[name]
    arguments = {f.name: _value(rng, name, f, depth) for f in dataclasses.fields(cls)}
    try:
        sketch = cls(**{n: v for n, v in arguments.items() if v is not dataclasses.MISSING})
    except ValueError:
        return _sketch(rng, names, depth)
    return _sketch(rng, names, depth) if sketch.is_exact() else str(sketch)


def _value(rng: random.Random, name: str, field: dataclasses.Field, depth: int) -> object:
    """A value, or MISSING for the default of the field."""
    required = field.default is dataclasses.MISSING
    if not required and rng.random() < 0.5:
        return dataclasses.MISSING
    if field.name in _HOLDS_A_SKETCH:
        return bs.parse(_sketch(rng, _LAYERS, 0)) if depth else dataclasses.MISSING
    choices = _FIELDS.get(f"{name}.{field.name}", _FIELDS.get(field.name))
    if choices is None:
        raise LookupError(f"the fuzzer knows no values for {name}.{field.name}: add it to _FIELDS")
    return rng.choice(choices)


# Shrinking ------------------------------------------------------------------------------------------


def smaller(case: Case) -> Iterator[Case]:
    """Cases that leave out one thing each."""
    for i, node in enumerate(case.nodes):
        before, after = case.nodes[:i], case.nodes[i + 1 :]
        if before or after:
            yield replace(case, nodes=before + after, rules=_without(case.rules, i))
        for child in node.children:
            yield replace(case, nodes=(*before, child, *after))
    for i in range(len(case.rules)):
        if len(case.rules) > 1:
            yield replace(case, rules=case.rules[:i] + case.rules[i + 1 :])
    plain = Case(case.domain, case.nodes, case.rules, batch=case.batch, seed=case.seed)
    for field in ("output", "micro_batches", "channels_last", "dtype"):
        if getattr(case, field) != getattr(plain, field):
            yield replace(case, **{field: getattr(plain, field)})


def _without(rules: Rules, block: int) -> Rules:
    """The rules when a block is gone: later blocks move up, a rule for this block goes to its neighbour."""

    def moved(pattern: str) -> str:
        name, _, number = pattern.partition(".")
        if not number:
            return pattern
        return f"{name}.{max(0, int(number) - (int(number) >= block))}"

    return tuple((moved(pattern), text) for pattern, text in rules)
