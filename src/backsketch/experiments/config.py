"""What a sweep is: parts, each a problem with a grid of options, expanded into jobs with stable names."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from backsketch.files import UserError

__all__ = ["Job", "SweepConfig", "SweepError"]

_KEYS = {"report", "parts", "workers", "threads", "about", "settings"}
_PART_KEYS = {"problem", "fixed", "grid"}


class SweepError(UserError):
    """A sweep or a result that cannot be used."""


@dataclass(frozen=True)
class Job:
    """One run: a problem and its options. Equal jobs have equal ids, in every process and version.

    Attributes:
        problem: a name in the registry of problems.
        options: plain values.
        label: the options that vary in the sweep, for people.
    """

    problem: str
    options: Mapping[str, Any]
    label: str = ""

    @property
    def id(self) -> str:
        """A file name: the label made safe, and eight digits of a hash of all options."""
        text = json.dumps([self.problem, self.options], sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        slug = re.sub(r"[^\w.=]+", "-", self.label).strip("-")[:80]
        return f"{slug or self.problem}-{digest}"


@dataclass(frozen=True)
class SweepConfig:
    """A sweep, from a JSON file.

    Args:
        name: of the result folder; the file's name.
        report: which view ``backsketch report`` makes of it.
        parts: a list of ``{"problem": name, "fixed": {option: value}, "grid": {option: [values]}}``. A grid is
            the product of its lists; a list of grids is their union.
        workers: processes; 0 runs the jobs in this one.
        threads: of PyTorch in each process.
        about: a sentence for the report.
        settings: what the view is told, such as a target accuracy; no job depends on it.

    Raises:
        SweepError: a field, a problem or an option that does not exist.
    """

    name: str
    report: str
    parts: Sequence[Mapping[str, Any]]
    workers: int = 2
    threads: int = 1
    about: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.workers < 0 or self.threads < 1:
            raise SweepError(f"{self.name}: workers must be at least 0 and threads at least 1")
        if not self.parts:
            raise SweepError(f"{self.name}: there are no parts, so there is nothing to run")
        self.jobs()

    @classmethod
    def load(cls, path: Path) -> SweepConfig:
        """Read a configuration.

        Raises:
            SweepError: no such file, not JSON, or not a sweep.
        """
        try:
            content = json.loads(path.read_text())
        except OSError as error:
            raise SweepError(f"cannot read {path}: {error.strerror}") from error
        except ValueError as error:  # not text, too
            raise SweepError(f"{path} is not JSON: {error}") from error
        if not isinstance(content, dict):
            raise SweepError(f"{path} must hold an object with {', '.join(sorted(_KEYS))}")
        if unknown := set(content) - _KEYS:
            raise SweepError(f"{path}: unknown field {min(unknown)!r}; known: {sorted(_KEYS)}")
        if missing := {"report", "parts"} - set(content):
            raise SweepError(f"{path} lacks {min(missing)!r}")
        try:
            return cls(name=path.stem, **content)
        except (TypeError, AttributeError) as error:
            raise SweepError(f"{path} has a field of a wrong kind: {error}") from error

    def jobs(self) -> list[Job]:
        """Every job once, in the order of the file."""
        found: dict[str, Job] = {}
        for number, part in enumerate(self.parts):
            for job in _expand(part, f"{self.name}, part {number}"):
                found.setdefault(job.id, job)
        return list(found.values())


def _expand(part: Mapping[str, Any], where: str) -> list[Job]:
    from backsketch.experiments.problems import PROBLEMS

    if unknown := set(part) - _PART_KEYS:
        raise SweepError(f"{where}: unknown field {min(unknown)!r}; known: {sorted(_PART_KEYS)}")
    name = str(part.get("problem"))
    if name not in PROBLEMS:
        raise SweepError(f"{where}: problem must be one of {', '.join(PROBLEMS)}; got {name!r}")
    known = {option.name for option in fields(PROBLEMS[name].options)}
    grids = part.get("grid", {})
    jobs = []
    for grid in [grids] if isinstance(grids, Mapping) else grids:
        for values in itertools.product(*(_listed(v, k, where) for k, v in grid.items())):
            varied = dict(zip(grid, values))
            options = {**part.get("fixed", {}), **varied}
            if unknown := set(options) - known:
                raise SweepError(
                    f"{where}: {name} has no option {min(unknown)!r}; it has {', '.join(sorted(known))}"
                )
            label = " ".join([name, *(f"{k}={v}" for k, v in varied.items())])
            jobs.append(Job(name, options, label))
    return jobs


def _listed(values: Any, key: str, where: str) -> list[Any]:
    if not isinstance(values, list) or not values:
        raise SweepError(f"{where}: the grid of {key!r} must be a non-empty list; got {values!r}")
    return values
