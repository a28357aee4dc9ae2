"""C++ sources that the machine's own compiler turns into a library on first use, kept in a cache.

Nothing is compiled at import time. Without a compiler, or with ``BACKSKETCH_NATIVE=0`` in the environment,
every user of a source has a slower twin in Python.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

__all__ = ["Source"]

# No contraction into fused multiply-adds: results are those of the twin in Python, bit for bit.
_FLAGS = (
    "-O3", "-std=c++17", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
    "-shared", "-fPIC",
)  # fmt: skip


class Source:
    """One C++ file: compiled at most once in a process, whatever came of it.

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
        try:
            return ctypes.CDLL(str(self._compiled(compiler))), ""
        except (OSError, subprocess.SubprocessError) as error:
            detail: Any = getattr(error, "stderr", None) or error
            return None, f"{compiler} failed: {str(detail).strip()[:500]}"

    def _compiled(self, compiler: str) -> Path:
        """The shared library for this source, compiler and processor."""
        version = subprocess.run(
            [compiler, "--version"], capture_output=True, text=True, check=True, timeout=30
        ).stdout
        words = (self.path.read_text(), " ".join(self.flags), compiler, version, _processor())
        name = hashlib.sha256("\0".join(words).encode()).hexdigest()[:24] + ".so"
        folder = _cache()
        path = folder / name
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                made = Path(scratch) / name
                subprocess.run(
                    [compiler, *self.flags, str(self.path), "-o", str(made)],
                    capture_output=True, text=True, check=True, timeout=120,
                )  # fmt: skip
                os.replace(made, path)  # atomic: two processes may do this at the same time
        return path


def _first(*names: str) -> str | None:
    return next(filter(None, map(shutil.which, names)), None)


def _cache() -> Path:
    """A folder of the user's own: what lies there is executed."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(base) / "backsketch"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=folder):
            return folder
    except OSError:
        return Path(tempfile.mkdtemp(prefix="backsketch-"))


def _processor() -> str:
    """What ``-march=native`` depends on: homes are shared between machines."""
    try:
        info = Path("/proc/cpuinfo").read_text()
        flags = [row for row in info.splitlines() if row.startswith(("flags", "Features"))]
        return platform.machine() + flags[0]
    except (OSError, IndexError):
        return platform.machine() + platform.node()
