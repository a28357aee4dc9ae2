"""Everything that is registered has its proof test, its mutation, its page and its contract with planning.

The tests elsewhere run over the tables of ``cases.py``, ``chain_cases.py`` and ``mutations.py``. Here the
registries are asked what exists, so that an addition that is in none of the tables fails by name.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import backsketch as bs
from backsketch.estimators.base import Estimator, Sketch, registered
from backsketch.nn import registry
from backsketch.ops import reference
from cases import ADAPTED, ESTIMATORS, FAMILIES, INHERITED, linear
from chain_cases import CHAIN, made
from helpers import ROOT
from mutations import MUTATIONS, mutation_of

PAGES = ROOT / "docs" / "estimators"
SOURCE = Path(bs.__file__).parent
PACKAGES = ("estimators", "nn", "regions/oprules")
"""Packages whose files register something, which they do once they are imported."""
HOOKS = {"chooses", "needs_forward_seed", "saves_memory", "needs_pairs", "needs_rows"}
"""What planning and the layers ask an estimator and the base classes answer, rightly or not."""


def sketches() -> dict[str, type[Sketch]]:
    """The registered sketches that belong to the package, not to a test."""
    return {n: c for n, c in registered().items() if c.__module__.startswith("backsketch.")}


def estimators() -> dict[str, type[Estimator]]:
    """The registered estimators of layers."""
    return {n: c for n, c in sketches().items() if issubclass(c, Estimator)}


def imported_by(file: Path) -> set[str]:
    """Modules, and what is taken from them, of the ``from ... import`` lines that run with the file."""
    found = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def not_imported(folder: Path) -> list[str]:
    """Files of a package that nothing imports when the package is imported, so that they register nothing."""
    package = ".".join(folder.relative_to(SOURCE.parent).parts)
    files = {f"{package}.{file.stem}": file for file in folder.glob("[!_]*.py")}
    reached, todo = set(), [folder / "__init__.py"]
    while todo:
        new = (imported_by(todo.pop()) & {*files}) - reached
        reached |= new
        todo += [files[name] for name in new]
    return sorted(files[name].name for name in {*files} - reached)


def hooks_set_by(cls: type[Estimator]) -> set[str]:
    """The hooks that an estimator sets, itself or in a base class of its own."""
    own = [base for base in cls.__mro__ if base not in (Estimator, Sketch)]
    return {hook for hook in HOOKS if any(hook in vars(base) for base in own)}


def missing_in_lists(cls: type[Sketch]) -> list[str]:
    """Which lists of all sketches leave one out."""
    lacks = []
    if f"::: backsketch.{cls.__name__}\n" not in (ROOT / "docs" / "api.md").read_text():
        lacks.append("an entry in docs/api.md")
    table = (ROOT / "README.md").read_text().split("## The estimators")[1].split("```")[0]
    if f"`{cls.__name__}(" not in table:
        lacks.append("a row in the table of estimators in README.md")
    return lacks


def missing_of_estimator(name: str, cls: type[Estimator]) -> list[str]:
    """What an estimator lacks before it is finished, in words."""
    lacks = []
    if cls is not bs.Exact:
        if cls not in {type(e) for e in ESTIMATORS}:
            lacks.append("a proof test: a row in ESTIMATORS of tests/cases.py")
        if cls not in {type(e) for e in FAMILIES}:
            lacks.append("the expensive tests: a row in FAMILIES of tests/cases.py")
        if cls not in reference._TWINS:
            lacks.append("a slow twin: a row in _TWINS of ops/reference.py")
        if cls not in MUTATIONS:
            lacks.append("a mutation: a row in MUTATIONS of tests/mutations.py")
    unsaid = HOOKS - hooks_set_by(cls) - INHERITED.get(cls, set())
    if unsaid:
        hooks = ", ".join(sorted(unsaid))
        lacks.append(f"hooks: set {hooks}, or name them in INHERITED of tests/cases.py")
    if not (PAGES / f"{name}.md").is_file():
        lacks.append(f"a page: docs/estimators/{name}.md")
    elif f"({name}.md)" not in (PAGES / "README.md").read_text():
        lacks.append("a row in docs/estimators/README.md")
    if f" estimators/{name}.md" not in (ROOT / "mkdocs.yml").read_text():
        lacks.append("an entry in mkdocs.yml")
    lacks += missing_in_lists(cls)
    if getattr(bs, cls.__name__, None) is not cls:
        lacks.append("an export in backsketch/__init__.py")
    if not (cls.__doc__ or "").strip():
        lacks.append("a docstring")
    return lacks


def missing_of_layer(adapter: registry.Adapter) -> list[str]:
    """What a layer kind lacks before it is finished, in words."""
    if adapter.for_savers:
        if any(isinstance(m, adapter.kind) for name in CHAIN for m in made(name)[0].modules()):
            return []
        return ["a proof test: a row in CHAIN of tests/chain_cases.py"]
    lacks = []
    if adapter.kind not in ADAPTED:
        lacks.append("a proof test: a row in ADAPTED of tests/cases.py")
    if f"nn.{adapter.kind.__name__}" not in (PAGES / "README.md").read_text():
        lacks.append("its rows and columns in docs/estimators/README.md")
    return lacks


@pytest.mark.parametrize("package", PACKAGES)
def test_every_file_is_imported_with_its_package(package):
    lacks = not_imported(SOURCE / package)
    assert not lacks, f"src/backsketch/{package}/__init__.py does not import {', '.join(lacks)}"


def test_a_file_that_nothing_imports_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.SOURCE", tmp_path)
    package = tmp_path.name
    for name, text in {
        "__init__": f"from {package} import first as first",
        "first": f"from {package}.second import x",
        "second": "x = 1",
        "third": f"from {package}.first import x",
    }.items():
        (tmp_path / f"{name}.py").write_text(text)
    assert not_imported(tmp_path) == ["third.py"]


@pytest.mark.parametrize("name", estimators())
def test_an_estimator_is_finished(name):
    lacks = missing_of_estimator(name, estimators()[name])
    assert not lacks, "; ".join(lacks)


@pytest.mark.parametrize("kind", registry._ADAPTERS, ids=lambda kind: kind.__name__)
def test_a_layer_kind_is_finished(kind):
    lacks = missing_of_layer(registry._ADAPTERS[kind])
    assert not lacks, "; ".join(lacks)


@pytest.mark.parametrize("sketch", sorted(set(sketches()) - set(estimators())))
def test_what_is_no_estimator_has_its_section_in_the_page_of_regions(sketch):
    cls = sketches()[sketch]
    assert f"bs.{cls.__name__}" in (ROOT / "docs" / "regions.md").read_text()
    lacks = missing_in_lists(cls)
    assert not lacks, "; ".join(lacks)


@pytest.mark.parametrize("name", registry._FOREIGN)
def test_a_layer_kind_of_another_library_has_its_row_in_the_page_of_estimators(name):
    rows = re.findall(r"^\|([^|]*)\|", (PAGES / "README.md").read_text(), re.M)
    assert any(name in row for row in rows), f"docs/estimators/README.md has no row for {name}"


def test_an_unfinished_estimator_is_told_what_it_lacks():
    @dataclasses.dataclass(frozen=True)
    class Unfinished(Estimator):
        keep: float = 0.5

    Unfinished.__doc__ = ""
    lacks = missing_of_estimator("unfinished", Unfinished)
    assert [text.split(":")[0] for text in lacks] == [
        "a proof test",
        "the expensive tests",
        "a slow twin",
        "a mutation",
        "hooks",
        "a page",
        "an entry in mkdocs.yml",
        "an entry in docs/api.md",
        "a row in the table of estimators in README.md",
        "an export in backsketch/__init__.py",
        "a docstring",
    ]


def test_an_unfinished_layer_kind_is_told_what_it_lacks():
    lacks = missing_of_layer(registry.Adapter(nn.PReLU, registry.Swapped))
    assert lacks == [
        "a proof test: a row in ADAPTED of tests/cases.py",
        "its rows and columns in docs/estimators/README.md",
    ]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_an_estimator_says_what_planning_needs(estimator):
    """Arithmetic, bytes, text and a closed form or the reason why there is none."""
    assert all(0 < part <= 1 for part in estimator.work())
    assert estimator.saved() > 0
    assert estimator.saves_memory == (estimator.saved() < 1)
    assert bs.parse(str(estimator)) == estimator
    layer = linear()
    known = [
        _or_none(estimator.input_variance, layer.op, layer.g, layer.weight),
        _or_none(estimator.weight_variance, layer.op, layer.g, layer.x),
    ]
    assert all(v is None or (float(v) >= 0 and v.dtype == torch.float64) for v in known)


@pytest.mark.parametrize("cls", INHERITED, ids=lambda cls: cls.__name__)
def test_no_hook_is_both_set_and_inherited(cls):
    assert not INHERITED[cls] & hooks_set_by(cls)
    assert INHERITED[cls] <= HOOKS


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_an_estimator_needs_a_forward_seed_where_what_it_stores_is_random(estimator):
    layer = linear()
    x, op = layer.x, layer.op
    kept = [estimator.store(op, x, torch.tensor(seed)) for seed in (1, 2)]
    changes = any(not torch.equal(a, b) for a, b in zip(*kept))
    assert estimator.needs_forward_seed == changes


def _or_none(closed_form: Callable[..., torch.Tensor], *tensors: object) -> torch.Tensor | None:
    """The closed form, or None where the estimator says that it has none."""
    try:
        return closed_form(*tensors)
    except ValueError as error:
        if "no closed" not in str(error):
            raise
        return None


@pytest.mark.parametrize("estimator", [e for e in FAMILIES if not isinstance(e, bs.Split)], ids=str)
def test_a_mutation_breaks_the_estimator(estimator, monkeypatch):
    layer = nn.Linear(5, 4)
    bs.sketch_(layer, estimator)
    mutation_of(estimator)(monkeypatch)
    with pytest.raises(AssertionError, match="is biased"):
        bs.testing.check_unbiased(layer, torch.randn(7, 5), draws=120)


@pytest.mark.parametrize("kind", [bs.nn.LinearCrossEntropy], ids=lambda kind: kind.__name__)
def test_a_layer_kind_is_unbiased_and_its_mutation_noticed(kind, monkeypatch):
    """``test_layer_kinds.py`` does this for the other kinds in ``ADAPTED``."""
    build: Callable[[], nn.Module]
    build, inputs = ADAPTED[kind]
    for mutated in (False, True):
        module = build()
        bs.sketch_(module, bs.Rows(keep=0.5))
        if not mutated:
            bs.testing.check_unbiased(module, *inputs(), draws=120)
            continue
        mutation_of(bs.Rows(keep=0.5))(monkeypatch)
        with pytest.raises(AssertionError, match="is biased"):
            bs.testing.check_unbiased(module, *inputs(), draws=120)
