"""``backsketch bench``: what a sketch costs and saves, beside what a sceptic would use instead.

Every variant takes its turn in every round of one process, so that a slow minute of the machine is shared;
figures are medians over the rounds, and ratios are medians of the ratio *within* a round.
"""

from __future__ import annotations

import copy
import fnmatch
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from backsketch.convert import sketch_
from backsketch.estimators import parse
from backsketch.memory import kept_by

__all__ = ["BenchConfig", "BenchRow", "checkpointed", "clock_of", "run_bench", "table"]


@dataclass(frozen=True)
class BenchConfig:
    """One benchmark.

    Args:
        name: of the result file.
        model: a name that :func:`backsketch.models.build` knows, with ``options``.
        image_shape, batch_size: of the random batch.
        rules: pattern to sketch text, in which ``{keep}`` is replaced by each of ``keeps``.
        keeps: fractions to try.
        checkpoint: patterns of the submodules that the activation-checkpointing variant checkpoints.
        compile: whether every variant runs under ``torch.compile``, the exact one included.
        threads: PyTorch's threads; 0 leaves them alone.
        repeats: rounds that count, after three that do not.
        clock: ``"wall"``, or ``"cpu"`` for the processor time of this process: meant for one thread on a
            machine that others use, too.
    """

    name: str
    model: str = "vit"
    options: Mapping[str, Any] = field(default_factory=dict)
    image_shape: tuple[int, int, int] = (3, 32, 32)
    batch_size: int = 64
    rules: Mapping[str, str] = field(default_factory=lambda: {"": "region:keep={keep}"})
    keeps: tuple[float, ...] = (0.5, 0.25, 0.1)
    checkpoint: tuple[str, ...] = ()
    compile: bool = False
    threads: int = 0
    repeats: int = 15
    device: str = "cpu"
    clock: Literal["wall", "cpu"] = "wall"

    def __post_init__(self) -> None:
        if self.repeats < 1 or self.batch_size < 1:
            raise ValueError(f"bench {self.name}: repeats and batch_size must be at least 1")
        if self.clock not in ("wall", "cpu"):
            raise ValueError(
                f"bench {self.name}: clock must be 'wall' or 'cpu', got {self.clock!r}"
            )
        if not self.keeps or not all(0 < k <= 1 for k in self.keeps):
            raise ValueError(f"bench {self.name}: keeps must lie in (0, 1], got {self.keeps}")

    @classmethod
    def load(cls, path: Path) -> BenchConfig:
        """Read a JSON file of the fields above; its name is the default ``name``.

        Raises:
            ValueError: a field that does not exist.
        """
        fields = {"name": path.stem, **json.loads(path.read_text())}
        unknown = set(fields) - set(cls.__dataclass_fields__)
        if unknown:
            known = ", ".join(cls.__dataclass_fields__)
            raise ValueError(f"{path.name}: unknown fields {sorted(unknown)}; there are {known}")
        for name in ("keeps", "image_shape", "checkpoint"):
            if name in fields:
                fields[name] = tuple(fields[name])
        return cls(**fields)


@dataclass
class BenchRow:
    """One variant. Times in milliseconds; ``B`` is step time minus the same variant's forward time.

    ``over_exact`` is step over exact step, ``backward`` is ``B`` over the exact ``B``, ``ideal`` the step
    over ``forward + keep * B(exact)`` (None where that means nothing), ``saved`` the saved bytes over
    the exact ones.
    """

    variant: str
    keep: float
    forward_ms: float
    step_ms: float
    over_exact: float
    backward: float
    ideal: float | None
    saved_bytes: int
    saved: float
    regions: str = ""


@dataclass
class _Variant:
    name: str
    keep: float
    model: nn.Module
    batch: tuple[Tensor, Tensor]
    call: Callable[[Tensor], Tensor]
    now: Callable[[], float]
    is_sketch: bool = False
    forward: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)

    def run(self) -> tuple[float, float]:
        """Seconds of the forward pass with its loss, and of the whole step."""
        x, y = self.batch
        self.model.zero_grad()
        start = self.now()
        loss = F.cross_entropy(self.call(x), y)
        middle = self.now()
        loss.backward()
        return middle - start, self.now() - start


def clock_of(clock: str, device: str) -> Callable[[], float]:
    """A clock, ``"wall"`` or ``"cpu"`` time, that waits for what a GPU still has to do."""
    read = time.process_time if clock == "cpu" else time.perf_counter
    if torch.device(device).type != "cuda":
        return read

    def synchronized() -> float:
        torch.cuda.synchronize(device)
        return read()

    return synchronized


def run_bench(
    config: BenchConfig, progress: Callable[[str], None] = lambda _: None
) -> list[BenchRow]:
    """Measure every variant of a configuration.

    Args:
        config: what to measure.
        progress: is told what is being done.

    Returns:
        Rows: exact, sketched at keep 1, each keep, the exact model on a smaller batch of each size,
        activation checkpointing, and the compiled exact model.
    """
    before = torch.get_num_threads()
    if config.threads:
        torch.set_num_threads(config.threads)
    try:
        variants = _variants(config)
        for variant in variants:
            progress(f"preparing {variant.name}")
            for _ in range(3):
                variant.run()
        for i in range(config.repeats):
            progress(f"round {i + 1} of {config.repeats}")
            for variant in variants[i % len(variants) :] + variants[: i % len(variants)]:
                forward, step = variant.run()
                variant.forward.append(forward)
                variant.step.append(step)
        return _rows(variants)
    finally:
        torch.set_num_threads(before)


def _variants(config: BenchConfig) -> list[_Variant]:
    from backsketch.models import build

    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build(config.model, config.image_shape, 10, **config.options).to(config.device)
    x = torch.randn(config.batch_size, *config.image_shape, generator=generator)
    y = torch.randint(10, (config.batch_size,), generator=generator)
    batch = (x.to(config.device), y.to(config.device))
    now = clock_of(config.clock, config.device)

    def variant(name: str, keep: float, made: nn.Module, sketch: bool = False) -> _Variant:
        call = torch.compile(made) if config.compile else made
        return _Variant(name, keep, made, batch, call, now, sketch)

    variants = [variant("exact", 1.0, model)]
    for keep in (1.0, *config.keeps):
        sketched = copy.deepcopy(model)
        rules = {p: parse(text.format(keep=keep)) for p, text in config.rules.items()}
        sketch_(sketched, rules)
        variants.append(variant(f"keep {keep:g}", keep, sketched, True))
    for keep in config.keeps:
        small = variant(f"batch x{keep:g}", keep, copy.deepcopy(model))
        n = max(1, round(keep * config.batch_size))
        small.batch = (batch[0][:n], batch[1][:n])
        variants.append(small)
    if config.checkpoint:
        variants.append(variant("checkpoint", 1.0, checkpointed(model, config.checkpoint)))
    if not config.compile:
        other = copy.deepcopy(model)
        variants.append(_Variant("compiled exact", 1.0, other, batch, torch.compile(other), now))
    return variants


class _Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


def checkpointed(model: nn.Module, patterns: Sequence[str]) -> nn.Module:
    """The model with the submodules that match under activation checkpointing, on the same parameters.

    Args:
        model: left as it is.
        patterns: globs on qualified names, of which the outermost matches count; ``""`` is the model itself.
    """
    # The memo makes the copy share what is not a module.
    memo = {id(t): t for t in (*model.parameters(), *model.buffers())}
    model = copy.deepcopy(model, memo)
    if "" in patterns:
        return _Checkpointed(model)
    wrapped: list[str] = []
    for name in [n for n, _ in model.named_modules()]:
        inside = any(name.startswith(f"{above}.") for above in wrapped)
        if not inside and any(fnmatch.fnmatchcase(name, p) for p in patterns):
            wrapped.append(name)
            parent, _, leaf = name.rpartition(".")
            inner = _Checkpointed(model.get_submodule(name))
            setattr(model.get_submodule(parent), leaf, inner)
    return model


def _rows(variants: Sequence[_Variant]) -> list[BenchRow]:
    exact = variants[0]
    exact_backward = [s - f for s, f in zip(exact.step, exact.forward)]
    exact_bytes = _bytes(exact)
    rows = []
    for v in variants:
        backward = [s - f for s, f in zip(v.step, v.forward)]
        ideal = [f + v.keep * b for f, b in zip(exact.forward, exact_backward)]
        size = _bytes(v)
        rows.append(
            BenchRow(
                v.name,
                v.keep,
                1e3 * statistics.median(v.forward),
                1e3 * statistics.median(v.step),
                _ratio(v.step, exact.step),
                _ratio(backward, exact_backward),
                _ratio(v.step, ideal) if v.is_sketch else None,
                size,
                size / max(exact_bytes, 1),
                _status(v.model) if v.is_sketch else "",
            )
        )
    return rows


def _bytes(v: _Variant) -> int:
    def forward() -> Tensor:
        return F.cross_entropy(v.call(v.batch[0]), v.batch[1])

    return kept_by(v.model, forward, hook=v.call is v.model).total


def _ratio(a: Sequence[float], b: Sequence[float]) -> float:
    return statistics.median(x / y for x, y in zip(a, b))


def _status(model: nn.Module) -> str:
    from backsketch.regions import RegionModule, state_of

    states = [state_of(m) for m in model.modules() if isinstance(m, RegionModule)]
    exact = [s for s in states if s.status == "exact"]
    active = sum(s.status == "active" for s in states)
    return f"{active} active" + (f", {len(exact)} exact: {exact[0].reason}" if exact else "")


def table(config: BenchConfig, rows: Sequence[BenchRow]) -> str:
    """The rows as text, with baseline, sizes and device in the heading."""
    head = (
        f"{config.name}: {config.model} {dict(config.options)}, batch {config.batch_size} x "
        f"{tuple(config.image_shape)}, {config.device}, {config.threads or torch.get_num_threads()} threads, "
        f"{'torch.compile' if config.compile else 'eager'}, {config.clock} time, "
        f"median of {config.repeats} interleaved rounds\n"
        f"rules: {dict(config.rules)}"
    )
    columns = (
        "variant",
        "forward ms",
        "step ms",
        "step/exact",
        "B/B(1)",
        "step/ideal",
        "saved MiB",
        "saved",
    )
    body = [
        (
            row.variant,
            f"{row.forward_ms:.1f}",
            f"{row.step_ms:.1f}",
            f"{row.over_exact:.3f}",
            f"{row.backward:.3f}",
            "" if row.ideal is None else f"{row.ideal:.3f}",
            f"{row.saved_bytes / 2**20:.1f}",
            f"{row.saved:.3f}",
        )
        for row in rows
    ]
    widths = [max(len(r[i]) for r in (columns, *body)) for i in range(len(columns))]
    lines = ["  ".join(c.rjust(w) for c, w in zip(r, widths)) for r in (columns, *body)]
    return "\n".join([head, *lines])


def as_json(config: BenchConfig, rows: Sequence[BenchRow]) -> dict[str, Any]:
    """What is written under ``results/``."""
    return {
        "config": asdict(config),
        "machine": {"cpus": os.cpu_count(), "architecture": platform.machine()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "rows": [asdict(row) for row in rows],
    }
