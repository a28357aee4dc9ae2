"""The tables of README and docs are those of the committed results; the examples run."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import runpy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import backsketch
from helpers import ROOT, script

TABLES = "benchmarks/tables.py"


def test_the_tables_are_those_of_the_results(tmp_path):
    tables = script(TABLES)
    assert tables.stale() == []
    # The mutation: another number in a table is noticed.
    page = (ROOT / "docs" / "estimators" / "README.md").read_text()
    line = next(row for row in page.splitlines() if row.startswith("| rows, optimal |"))
    assert tables.filled(page.replace(line, line + " 0.5 |")) == page


def test_sentences_hold_no_generated_numbers_and_fit_a_screen():
    for page in script(TABLES).pages():
        text = page.read_text()
        assert "<!-- value" not in text, page
        prose = re.sub(r"```.*?```", "", text, flags=re.S).splitlines()
        long = [line for line in prose if len(line) > 180 and not line.startswith("|")]
        assert long == [], page


def blocks(page: Path) -> str:
    """The python blocks of a page in order, as they would be pasted, at the lines where they stand."""
    lines, inside = [], False
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            inside = line == "```python"
            line = ""
        lines.append(line if inside else "")
    return "\n".join(lines)


PAGES = [
    p for p in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))] if blocks(p).strip()
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_python_blocks_of_a_page_run_when_pasted_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with needed_by(page.read_text()):
        exec(compile(blocks(page), str(page), "exec"), {"__name__": "__main__"})


@contextmanager
def needed_by(text: str) -> Iterator[None]:
    """Skips where a package that a page or an example names is missing; those may warn of what they like."""
    names = [
        n for line in re.findall(r"(?:<!--|#) needs: ([\w, ]+)", text) for n in line.split(", ")
    ]
    with warnings.catch_warnings():
        if names:
            warnings.simplefilter("ignore")
        for name in names:
            pytest.importorskip(name.strip())
        yield


def test_a_block_that_lacks_a_name_is_noticed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("Text.\n\n```python\nprint(undefined)\n```\n")
    with pytest.raises(NameError, match="undefined"):
        exec(compile(blocks(page), str(page), "exec"), {})


EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_runs(example, tmp_path, monkeypatch):
    assert len(example.read_text().splitlines()) < 60
    monkeypatch.chdir(tmp_path)
    with needed_by(example.read_text()):
        runpy.run_path(str(example), run_name="__main__")


@pytest.mark.parametrize(
    "name", [m.name for m in pkgutil.walk_packages(backsketch.__path__, "backsketch.")]
)
def test_the_examples_in_the_docstrings_run(name):
    if name.endswith(".triton_kernels"):
        pytest.importorskip("triton", reason="Triton comes with PyTorch for CUDA")
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


def test_relative_links_lead_somewhere():
    tables = script(TABLES)
    for page in tables.pages():
        for link in re.findall(r"\]\((?!http|#)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page}: {link}"


@pytest.mark.fast_cases("some")
@pytest.mark.parametrize("sweeps", [("equal_cost_*", "depth"), ("*",)], ids=["some", "all"])
def test_a_fresh_clone_makes_the_committed_figures(tmp_path, sweeps):
    pytest.importorskip("matplotlib")
    import numpy as np
    from PIL import Image
    from rich.console import Console

    from backsketch.experiments.report import HEADLINE, report

    names = {path.name for name in sweeps for path in (ROOT / "results").glob(name)}
    for source in (ROOT / "results").glob("*/sweep.json"):
        if source.parent.name not in names:
            continue
        copy = tmp_path / source.parent.name / source.name
        copy.parent.mkdir()
        copy.write_bytes(source.read_bytes())
    made = [path for path in report([tmp_path], None, Console(quiet=True)) if path.suffix == ".png"]
    committed = [
        path
        for path in sorted((ROOT / "results").rglob("*.png"))
        if path.parent.name in names or path.stem == HEADLINE
    ]
    assert sorted(p.relative_to(tmp_path) for p in made) == [
        p.relative_to(ROOT / "results") for p in committed
    ]
    for path in committed:
        assert path.stat().st_size < 300_000, path
        ours, theirs = (
            np.asarray(Image.open(p).convert("L"), dtype=float)
            for p in (path, tmp_path / path.relative_to(ROOT / "results"))
        )
        assert ours.shape == theirs.shape, path
        assert abs(ours - theirs).mean() < 1, (
            path
        )  # of 255; other versions draw letters differently
