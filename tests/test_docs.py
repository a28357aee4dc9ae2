"""The tables of README and docs are those of the committed results; the examples run."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import pkgutil
from pathlib import Path

import pytest

import backsketch

ROOT = Path(__file__).resolve().parents[1]


def load_tables():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_those_of_the_results(tmp_path):
    tables = load_tables()
    assert tables.stale() == []
    # The mutation: another number in a table is noticed.
    page = (ROOT / "docs" / "estimators" / "README.md").read_text()
    line = next(row for row in page.splitlines() if row.startswith("| rows, optimal |"))
    assert tables.filled(page.replace(line, line + " 0.5 |")) == page


def test_a_number_in_a_sentence_is_a_cell_of_a_table():
    tables = load_tables()
    where = "depth | grad_weight only | network"
    assert tables.value(where) == "plain"
    sentence = f"It is <!-- value: {where} -->plain<!-- end -->, as said."
    assert tables.filled(sentence.replace("plain", "other")) == sentence
    with pytest.raises(ValueError, match="no cell"):
        tables.value("depth | grad_weight only | nothing")


@pytest.mark.parametrize(
    "name", [m.name for m in pkgutil.walk_packages(backsketch.__path__, "backsketch.")]
)
def test_the_examples_in_the_docstrings_run(name):
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


def test_relative_links_lead_somewhere():
    tables = load_tables()
    import re

    for page in tables.pages():
        for link in re.findall(r"\]\((?!http|#)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page}: {link}"


def test_importing_the_library_does_not_import_the_compiler():
    import subprocess
    import sys

    code = "import sys, backsketch; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_fresh_clone_makes_the_committed_figures(tmp_path):
    pytest.importorskip("matplotlib")
    import numpy as np
    from PIL import Image
    from rich.console import Console

    from backsketch.experiments.report import report

    for source in (ROOT / "results").glob("*/sweep.json"):
        copy = tmp_path / source.parent.name / source.name
        copy.parent.mkdir()
        copy.write_bytes(source.read_bytes())
    made = [path for path in report([tmp_path], None, Console(quiet=True)) if path.suffix == ".png"]
    committed = sorted((ROOT / "results").glob("*/*.png"))
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
