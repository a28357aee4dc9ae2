"""Random cases: a module, a sketch for it and how it is trained, as strategies for hypothesis."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass

from fuzz_modules import LEAVES, STRUCTURES, Node
from hypothesis import strategies as st

import backsketch as bs
from backsketch.estimators.base import registered

KEEPS = (0.9, 0.75, 0.5, 0.4)
DOMAINS = ("vectors", "tokens", "images")


@dataclass(frozen=True)
class Case:
    """Everything that a run depends on; its ``repr`` makes it again."""

    domain: str
    nodes: tuple[Node, ...]
    rules: tuple[tuple[str, str], ...]
    """Pattern and text of each sketch; see :func:`backsketch.parse`."""
    dtype: str = "float32"
    """``float32``, ``bfloat16``, or ``autocast``: float32 under bfloat16 autocast."""
    output: str = "tensor"
    batch: int = 6
    micro_batches: int = 1
    channels_last: bool = False
    seed: int = 0


# Sketches -------------------------------------------------------------------------------------------

_FIELDS = {
    "keep": st.sampled_from(KEEPS),
    "bits": st.sampled_from((8, 4, 2)),
    "group_size": st.sampled_from((64, 8)),
    "design": st.sampled_from(("systematic", "permuted", "independent")),
    "scores": st.sampled_from(("l2", "optimal", "l1", "uniform")),
    "method": st.sampled_from(("svd", "subspace")),
    "kind": st.sampled_from(("rademacher", "srht")),
    "save": st.booleans(),
    "row_dims": st.sampled_from((1, 2)),
    "mode": st.sampled_from(("recompute", "save")),
}
_INNER = ("sketch", "grad_input", "grad_weight")  # fields that hold an estimator or None
_LAYERS = sorted(
    name for name, cls in registered().items() if issubclass(cls, bs.Estimator) and name != "exact"
)
_SUBMODULES = sorted(
    name for name, cls in registered().items() if not issubclass(cls, bs.Estimator)
)


@st.composite
def sketches(draw: st.DrawFn, names: tuple[str, ...], depth: int = 1) -> str:
    """The text of a sketch of one of the names. A sketch that its class refuses is drawn without options."""
    name = draw(st.sampled_from(names))
    cls = registered()[name]
    arguments, needed = {}, {}
    for field in dataclasses.fields(cls):
        required = field.default is dataclasses.MISSING
        if field.name in _INNER:
            if depth and draw(st.booleans()):
                arguments[field.name] = bs.parse(draw(sketches(tuple(_LAYERS), 0)))
        elif field.name in _FIELDS and (required or draw(st.booleans())):
            arguments[field.name] = draw(_FIELDS[field.name])
            if required:
                needed[field.name] = arguments[field.name]
        elif required:
            raise LookupError(
                f"the fuzzer knows no values for {name}.{field.name}: add it to _FIELDS in "
                f"{inspect.getsourcefile(sketches)}"
            )
    try:
        return str(cls(**arguments))
    except ValueError:
        return str(cls(**needed))


@st.composite
def rules(draw: st.DrawFn, blocks: int) -> tuple[tuple[str, str], ...]:
    """Up to two rules: a sketch for one block first, then one for every layer."""
    chosen = []
    if draw(st.booleans()):
        names = tuple(_LAYERS + _SUBMODULES)
        chosen.append((f"blocks.{draw(st.integers(0, blocks - 1))}", draw(sketches(names))))
    if not chosen or draw(st.booleans()):
        chosen.append(("*", draw(sketches(tuple(_LAYERS)))))
    return tuple(chosen)


# Modules --------------------------------------------------------------------------------------------


def nodes(domain: str) -> st.SearchStrategy[Node]:
    """Layers, and structures of at most two levels around them."""
    leaf = st.sampled_from(sorted(LEAVES[domain])).map(Node)

    def around(inner: st.SearchStrategy[Node]) -> st.SearchStrategy[Node]:
        return st.sampled_from(sorted(STRUCTURES)).flatmap(
            lambda kind: st.tuples(*[inner] * STRUCTURES[kind][0]).map(lambda c: Node(kind, c))
        )

    once = around(leaf)
    return st.one_of(leaf, leaf, once, once, around(once))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A whole case."""
    domain = draw(st.sampled_from(DOMAINS))
    body = tuple(draw(st.lists(nodes(domain), min_size=1, max_size=3)))
    return Case(
        domain,
        body,
        draw(rules(len(body))),
        draw(st.sampled_from(("float32", "float32", "bfloat16", "autocast"))),
        draw(st.sampled_from(("tensor", "tuple", "dict"))),
        draw(st.sampled_from((6, 9))),
        draw(st.sampled_from((1, 1, 2))),
        domain == "images" and draw(st.booleans()),
        draw(st.integers(0, 999)),
    )
