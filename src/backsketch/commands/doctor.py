"""``backsketch doctor``: what this machine has, and what that means for speed."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

import torch

__all__ = ["Finding", "doctor_command", "findings", "print_plainly"]

# What has a C++ source of its own, and where.
COMPILED = {
    "sampling": "backsketch.sampling.native",
    "layout": "backsketch.layout",
    "rounding": "backsketch.rounding.native",
    "products": "backsketch.products.native",
}
INTEGER_FLAGS = ("amx_int8", "avx512_vnni", "avx_vnni", "i8mm", "asimddp")
EXTRAS = {
    "train": ("accelerate", "datasets", "matplotlib", "scikit-learn", "typer"),
    "text": ("tokenizers", "transformers"),
    "transformers": ("accelerate", "transformers"),
    "lightning": ("lightning",),
    "cluster": ("distributed",),
}


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        what: it is about.
        found: on this machine.
        means: for speed; empty where it decides nothing.
        good: whether nothing better could be had here.
    """

    what: str
    found: str
    means: str = ""
    good: bool = True


def doctor_command() -> None:
    """Say what this machine has, and what that means for the speed of sketches."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_lines=False)
    for heading in ("", "found", "what it means"):
        table.add_column(heading)
    for finding in findings():
        style = None if finding.good else "yellow"
        table.add_row(*map(Text, (finding.what, finding.found, finding.means)), style=style)
    Console(soft_wrap=False).print(table)


def print_plainly() -> None:
    """The same where the packages of the command line are not installed."""
    for finding in findings():
        print(f"{finding.what}: {finding.found}" + (f" ({finding.means})" if finding.means else ""))


def findings() -> Iterator[Finding]:
    """All lines of the report, in order."""
    for line in LINES:
        yield from line()


def _versions() -> Iterator[Finding]:
    ours, python = package_version("backsketch"), platform.python_version()
    yield Finding("versions", f"backsketch {ours}, torch {torch.__version__}, Python {python}")


def _processor() -> Iterator[Finding]:
    kind = torch.backends.cpu.get_cpu_capability()
    yield Finding("processor", f"{platform.machine()}, {os.cpu_count()} cores, {kind}")
    flags = [flag for flag in INTEGER_FLAGS if flag in _flags()]
    if flags:
        means = "integer products are several times as fast as float32: int8 pays on the CPU"
    else:
        means = "integer products have no instructions of their own: int8 saves bytes, not time"
    yield Finding("8-bit products", ", ".join(flags) or "none", means, bool(flags))


def _threads() -> Iterator[Finding]:
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    policy = os.environ.get("OMP_WAIT_POLICY", "not set")
    means = "all cores are used" if threads >= cores else "fewer than the cores: see --threads"
    yield Finding("threads", f"{threads} of PyTorch, OMP_WAIT_POLICY {policy}", means)


def _compiler() -> Iterator[Finding]:
    named = os.environ.get("CXX")
    found = next(
        filter(None, map(shutil.which, [named] if named else ["c++", "g++", "clang++"])), None
    )
    means = "" if found else "draws and roundings run in plain PyTorch: the same values, slower"
    yield Finding("C++ compiler", found or "none", means, found is not None)


def _kernels() -> Iterator[Finding]:
    for room, name in COMPILED.items():
        module = _module(name)
        source = getattr(module, "SOURCE", None)
        if source is None:
            continue
        works = source.library() is not None
        kernels = getattr(module, "library", lambda: None)() if works else None
        tiles = ", in matrix registers (AMX)" if getattr(kernels, "with_tiles", False) else ""
        yield Finding(
            f"compiled {room}",
            f"works{tiles}" if works else source.why_not(),
            "" if works else f"{room} runs in plain PyTorch: the same values, slower",
            works,
        )


def _cache() -> Iterator[Finding]:
    folder = _cache_folder()
    if not folder.exists():
        yield Finding("cache folder", f"{folder}, not made yet", "kernels compile on first use")
        return
    usable = os.access(folder, os.W_OK) and (not hasattr(os, "getuid") or _is_own(folder))
    means = "" if usable else "not yours or not writable: kernels compile anew in every process"
    count = len(list(folder.glob("*.so")))
    yield Finding("cache folder", f"{folder}, {count} libraries", means, usable)


def _gpu() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        yield Finding("CUDA", "none", "everything runs on the CPU")
        return
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        floats = "8-bit floats in hardware" if (major, minor) >= (8, 9) else "no 8-bit floats"
        name = torch.cuda.get_device_name(index)
        yield Finding(f"CUDA {index}", f"{name}, capability {major}.{minor}", floats)


def _extras() -> Iterator[Finding]:
    for extra, packages in EXTRAS.items():
        missing = [name for name in packages if package_version(name) == "not installed"]
        yield Finding(
            f"extra {extra}",
            f"{', '.join(missing)} missing" if missing else "all there",
            f'pip install "backsketch[{extra}]"' if missing else "",
            not missing or extra != "train",
        )


LINES: tuple[Callable[[], Iterator[Finding]], ...] = (
    _versions, _processor, _threads, _compiler, _kernels, _cache, _gpu, _extras,
)  # fmt: skip


def package_version(name: str) -> str:
    """The version of an installed package, or that it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _module(name: str) -> ModuleType | None:
    try:
        there = importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the package around it is missing
        return None
    return importlib.import_module(name) if there else None


def _flags() -> set[str]:
    """Instruction sets that the processor reports; empty where the system does not list them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    found = [line for line in lines if line.startswith(("flags", "Features"))]
    return set(found[0].split()) if found else set()


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "backsketch"


def _is_own(folder: Path) -> bool:
    return folder.stat().st_uid == os.getuid()
