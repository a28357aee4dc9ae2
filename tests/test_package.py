"""The package that users install: every source file is in the wheel, and the extras that the pages name exist."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "backsketch"
BUILD = "import setuptools.build_meta as build; build.build_wheel('dist')"


def sources(folder: Path) -> set[str]:
    """Paths of the files that belong to the package: no caches of Python."""
    return {
        path.relative_to(folder.parent).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def wheel(folder: Path) -> zipfile.ZipFile:
    """The wheel that is built from a copy in ``folder``."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(
        SOURCE, folder / "src" / "backsketch", ignore=shutil.ignore_patterns("__pycache__")
    )
    built = subprocess.run(
        [sys.executable, "-c", BUILD], cwd=folder, capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr[-800:]
    (found,) = (folder / "dist").glob("*.whl")
    return zipfile.ZipFile(found)


def test_the_wheel_holds_every_file_of_the_package(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    with wheel(tmp_path) as built:
        packed = {name for name in built.namelist() if name.startswith("backsketch/")}
        (metadata,) = (name for name in built.namelist() if name.endswith("/METADATA"))
        extras = {
            line.split()[1]
            for line in built.read(metadata).decode().splitlines()
            if line.startswith("Provides-Extra:")
        }
    assert packed == sources(SOURCE)
    assert {Path(name).suffix for name in packed} >= {".py", ".cpp", ".h", ".typed"}
    assert extras >= {"train", "text", "transformers", "lightning", "docs"}
