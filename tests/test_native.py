"""What is loaded from the cache of compiled libraries, and what happens where it cannot be trusted."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import backsketch.native

COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
pytestmark = pytest.mark.skipif(
    os.name != "posix" or COMPILER is None, reason="needs a C++ compiler on a POSIX system"
)

GOOD = 'extern "C" {\nint backsketch_answer(int x) { return x + 1; }\n}\n'
PLANTED = GOOD.replace("x + 1", "666")

# A process of its own for each load: a path is loaded once in a process, whatever becomes of the file.
LOAD = """
import importlib.util, pathlib, sys
spec = importlib.util.spec_from_file_location("native", sys.argv[1])
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
source = native.Source(pathlib.Path(sys.argv[2]))
library = source.library()
print(library.backsketch_answer(1) if library else source.why_not())
"""


@dataclass
class User:
    """Somebody with a home, a source to compile and a folder for temporary files."""

    home: Path
    source: Path
    temporary: Path

    def answer(self, **environment: str) -> str:
        """What the library returns, or why there is none."""
        found = {"XDG_CACHE_HOME": str(self.home), "TMPDIR": str(self.temporary), **environment}
        command = [sys.executable, "-c", LOAD, backsketch.native.__file__, str(self.source)]
        done = subprocess.run(
            command, env={**os.environ, **found}, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    @property
    def cache(self) -> Path:
        return self.home / "backsketch"

    @property
    def kept(self) -> Path:
        (path,) = self.cache.iterdir()
        return path

    def plant(self, content: bytes, mode: int = 0o700) -> None:
        """Put a file in the place of the library that is kept."""
        path = self.kept
        path.unlink()
        path.write_bytes(content)
        path.chmod(mode)


@pytest.fixture
def user(tmp_path) -> User:
    user = User(tmp_path / "home", tmp_path / "answer.cpp", tmp_path / "tmp")
    user.source.write_text(GOOD)
    user.temporary.mkdir()
    return user


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> bytes:
    """A library that answers wrongly."""
    folder = tmp_path_factory.mktemp("planted")
    (folder / "planted.cpp").write_text(PLANTED)
    command = [
        COMPILER,
        "-shared",
        "-fPIC",
        str(folder / "planted.cpp"),
        "-o",
        str(folder / "p.so"),
    ]
    subprocess.run(command, check=True)
    return (folder / "p.so").read_bytes()


def test_a_library_is_compiled_once_and_kept_where_only_its_user_can_write(user):
    assert user.answer() == "2"
    assert user.cache.stat().st_mode & 0o777 == 0o700
    assert user.kept.stat().st_mode & 0o777 == 0o700
    made = user.kept.stat().st_mtime_ns
    assert user.answer() == "2"
    assert user.kept.stat().st_mtime_ns == made


@pytest.mark.parametrize("what", ["empty", "truncated", "planted"])
def test_a_library_that_is_not_what_was_compiled_is_made_anew(user, planted, what):
    user.answer()
    whole = user.kept.read_bytes()
    user.plant({"empty": b"", "truncated": whole[: len(whole) // 2], "planted": planted}[what])
    assert user.answer() == "2"
    assert user.kept.read_bytes() == whole


def named_truthfully(user: User, content: bytes) -> Path:
    """Where a library of that content would be kept."""
    key = user.kept.stem.partition("-")[0]
    return user.cache / f"{key}-{backsketch.native._digest(content)}.so"


def test_a_library_that_others_can_write_to_is_made_anew(user, planted):
    user.answer()
    path = named_truthfully(user, planted)
    user.kept.unlink()
    path.write_bytes(planted)
    path.chmod(0o777)
    assert user.answer() == "2"
    assert not path.exists()


def test_nothing_in_a_folder_that_others_can_write_to_is_loaded(user, planted):
    user.answer()
    path = named_truthfully(user, planted)
    user.kept.unlink()
    path.write_bytes(planted)
    path.chmod(0o700)
    user.cache.chmod(0o777)
    assert user.answer() == "2"
    assert user.cache.stat().st_mode & 0o777 == 0o700
    assert not path.exists()


@pytest.mark.skipif(
    not hasattr(os, "getuid") or os.getuid() != 0, reason="only root gives files away"
)
@pytest.mark.parametrize("what", ["folder", "file"])
def test_nothing_that_belongs_to_somebody_else_is_loaded(user, planted, what):
    user.answer()
    path = named_truthfully(user, planted)
    user.kept.unlink()
    path.write_bytes(planted)
    path.chmod(0o700)
    os.chown(user.cache if what == "folder" else path, 65534, 65534)
    assert user.answer() == "2"
    assert path.exists() == (what == "folder")


@pytest.mark.parametrize("what", ["a file", "relative"])
def test_without_a_usable_home_the_library_is_made_in_a_private_place_that_is_gone_afterwards(
    user, what, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    user.home.write_text("")
    before = sorted(tmp_path.rglob("*"))
    assert user.answer(XDG_CACHE_HOME="home" if what == "relative" else str(user.home)) == "2"
    assert sorted(tmp_path.rglob("*")) == before


def test_a_library_without_the_functions_of_its_source_is_not_used(user):
    user.source.write_text("#ifdef NEVER\n" + GOOD + "#endif\n")
    assert "lacks backsketch_answer" in user.answer()


def test_a_source_that_does_not_compile_is_named_and_leaves_nothing(user):
    user.source.write_text("nonsense")
    assert "failed" in user.answer()
    assert not list(user.cache.iterdir())
    assert not list(user.temporary.iterdir())
