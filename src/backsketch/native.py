"""C++ sources that the machine's own compiler turns into a library on first use, kept in a cache.

Nothing is compiled at import time. Without a compiler, or with ``BACKSKETCH_NATIVE=0`` in the environment,
every user of a source has a slower twin in Python.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shutil
import stat
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["Source"]

# No contraction into fused multiply-adds: results are those of the twin in Python, bit for bit.
_FLAGS = (
    "-O3", "-std=c++17", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
    "-shared", "-fPIC",
)  # fmt: skip


class Source:
    """A C++ file, with the headers that it includes, compiled or taken from the cache once in a process.

    A cached library is loaded if it and its folder belong to the user, nobody else can write to them, and
    its content has the digest in its name. Otherwise it is compiled anew; where there is no such folder, in
    a temporary one.

    Args:
        path: the file.
        flags: for the compiler, beside the common ones.
    """

    def __init__(self, path: Path, *flags: str) -> None:
        self.path, self.flags = path, (*_FLAGS, *flags)
        self.tried = False
        self._lock = threading.Lock()
        self._library: ctypes.CDLL | None = None
        self._reason = "not needed so far"

    def library(self) -> ctypes.CDLL | None:
        """The compiled functions, None where that is impossible."""
        if not self.tried:
            with self._lock:
                if not self.tried:
                    self._library, self._reason = self._load()
                    self.tried = True
        return self._library

    def why_not(self) -> str:
        """Why :meth:`library` is None; empty if it is not."""
        return "" if self._library else self._reason

    def _load(self) -> tuple[ctypes.CDLL | None, str]:
        if os.environ.get("BACKSKETCH_NATIVE", "1") == "0":
            return None, "switched off by BACKSKETCH_NATIVE=0"
        named = os.environ.get("CXX")
        compiler = shutil.which(named) if named else _first("c++", "g++", "clang++")
        if compiler is None:
            return None, "there is no C++ compiler"
        failure: Exception = OSError("no folder to compile in")
        for place in (_cache, _temporary):
            try:
                with place() as folder:
                    return self._checked(ctypes.CDLL(str(self._compiled(compiler, folder))))
            except (
                OSError
            ) as error:  # of this place: unusable, full, or nothing there may be executed
                failure = error
            except subprocess.SubprocessError as error:
                failure = error
                break
        detail: Any = getattr(failure, "stderr", None) or failure
        return None, f"{compiler} failed: {str(detail).strip()[:500]}"

    def _checked(self, library: ctypes.CDLL) -> tuple[ctypes.CDLL | None, str]:
        """The library, or None where it lacks a function that the source defines."""
        functions = re.findall(
            r"^\w[\w *]*\b(backsketch_\w+)\(", self.path.read_text(), re.MULTILINE
        )
        missing = [name for name in functions if not hasattr(library, name)]
        if missing:
            return None, f"the compiled {self.path.name} lacks {', '.join(missing)}"
        return library, ""

    def _compiled(self, compiler: str, folder: Path) -> Path:
        """The shared library for this source, compiler and processor, from ``folder`` or made there."""
        version = subprocess.run(
            [compiler, "--version"], capture_output=True, text=True, check=True, timeout=30
        ).stdout
        words = (*_texts(self.path), " ".join(self.flags), compiler, version, _processor())
        name = _digest("\0".join(words).encode())
        for path in folder.glob(f"{name}-*.so"):
            if _is_intact(path):
                return path
            path.unlink(missing_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / "made.so"
            subprocess.run(
                [compiler, *self.flags, str(self.path), "-o", str(made)],
                capture_output=True, text=True, check=True, timeout=120,
            )  # fmt: skip
            made.chmod(0o700)
            path = folder / f"{name}-{_digest(made.read_bytes())}.so"
            os.replace(made, path)  # atomic: two processes may do this at the same time
        return path


def _texts(path: Path) -> list[str]:
    """The texts of a source and of the headers that it includes, in any depth."""
    text = path.read_text()
    headers = re.findall(r'^#include "(.+)"$', text, re.MULTILINE)
    return [text, *(inner for name in headers for inner in _texts(path.parent / name))]


# Where libraries are kept: what lies there is executed ---------------------------------------------


@contextmanager
def _cache() -> Iterator[Path]:
    """A folder of the user's own that lasts; OSError where there is none that only he can write to."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache"))
    if not base.is_absolute():
        raise OSError(f"the cache folder {str(base)!r} is not an absolute path")
    folder = base / "backsketch"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not _is_own(folder.stat()):
        raise OSError(f"{folder} belongs to somebody else")
    if not _is_private(folder.stat()):
        folder.chmod(0o700)
        for path in folder.glob("*.so"):  # anybody may have put them there
            path.unlink(missing_ok=True)
    yield folder


@contextmanager
def _temporary() -> Iterator[Path]:
    """A private folder that is gone as soon as what was made in it is loaded."""
    with tempfile.TemporaryDirectory(prefix="backsketch-") as folder:
        yield Path(folder)


def _is_intact(path: Path) -> bool:
    """Whether a library is the user's own, is a plain file and has the digest that its name ends with."""
    info = path.lstat()
    if not (stat.S_ISREG(info.st_mode) and _is_own(info) and _is_private(info)):
        return False
    return path.stem.endswith("-" + _digest(path.read_bytes()))


def _is_own(info: os.stat_result) -> bool:
    return not hasattr(os, "getuid") or info.st_uid == os.getuid()


def _is_private(info: os.stat_result) -> bool:
    """Whether nobody else can write to it."""
    return os.name != "posix" or not info.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:24]


def _first(*names: str) -> str | None:
    return next(filter(None, map(shutil.which, names)), None)


def _processor() -> str:
    """What ``-march=native`` depends on: homes are shared between machines."""
    try:
        info = Path("/proc/cpuinfo").read_text()
        flags = [row for row in info.splitlines() if row.startswith(("flags", "Features"))]
        return platform.machine() + flags[0]
    except (OSError, IndexError):
        return platform.machine() + platform.node()
