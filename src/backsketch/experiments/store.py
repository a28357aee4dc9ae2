"""Where results live: one small JSON per finished job, and one file per sweep that is committed.

``FOLDER/jobs/ID.json`` is written the moment a job ends, whole or not at all, so that a sweep that is
killed continues. When the sweep is complete they are gathered in ``FOLDER/sweep.json``: one file, readable
in a diff, instead of hundreds. A fresh clone that has only the latter finds every job finished. Results of jobs
that the configuration no longer names go to ``FOLDER/earlier.json``: no report shows them, and they come back with
their jobs.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backsketch.experiments.config import Job, SweepConfig, SweepError
from backsketch.files import write_whole

__all__ = ["Store", "Sweep"]

SWEEP, JOBS, EARLIER = "sweep.json", "jobs", "earlier.json"


class Store:
    """The results of one sweep on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def records(self) -> dict[str, dict[str, Any]]:
        """Every record by job id; a job's own file is newer than the gathered one."""
        found = [*self._listed(EARLIER), *self._listed(SWEEP)]
        found += [_read(path) for path in sorted((self.folder / JOBS).glob("*.json"))]
        return {record["id"]: record for record in found}

    def _listed(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / name
        return list(_read(path)["jobs"]) if path.is_file() else []

    def finished(self) -> set[str]:
        """Ids of the jobs that need not run again; failed ones are tried again."""
        return {i for i, record in self.records().items() if record["status"] == "done"}

    def is_gathered(self, config: SweepConfig) -> bool:
        """Whether ``sweep.json`` holds the jobs of this configuration and no others.

        It does not after a sweep was killed before its results were gathered, or under another configuration.
        """
        listed = {record["id"] for record in self._listed(SWEEP)}
        return listed == {job.id for job in config.jobs()} and not (self.folder / JOBS).is_dir()

    def save(self, job: Job, record: Mapping[str, Any]) -> None:
        """Write the outcome of a job."""
        head = {"id": job.id, "problem": job.problem, "options": dict(job.options)}
        write(self.folder / JOBS / f"{job.id}.json", {**head, **record})

    def gather(self, config: SweepConfig) -> None:
        """Write the records of a sweep's jobs into one file, those of other jobs aside, and drop single ones."""
        records = self.records()
        jobs = [records.pop(job.id) for job in config.jobs() if job.id in records]
        earlier = self.folder / EARLIER
        if records:
            write(earlier, {"name": config.name, "jobs": list(records.values())})
        write(self.folder / SWEEP, {**_head(config), "machine": machine(), "jobs": jobs})
        if not records:
            earlier.unlink(missing_ok=True)
        for path in (self.folder / JOBS).glob(
            "*.json*"
        ):  # and what a killed process left half written
            path.unlink()
        if (self.folder / JOBS).is_dir():
            (self.folder / JOBS).rmdir()

    def describe(self, config: SweepConfig) -> None:
        """Bring what a gathered sweep says of itself up to its configuration; jobs and machine stay."""
        path = self.folder / SWEEP
        content = _read(path)
        described = {**content, **_head(config)}
        if described != content:
            write(path, {**_head(config), "machine": content["machine"], "jobs": content["jobs"]})


def _head(config: SweepConfig) -> dict[str, Any]:
    head = {"name": config.name, "report": config.report, "about": config.about}
    return {**head, "settings": dict(config.settings)} if config.settings else head


@dataclass(frozen=True)
class Sweep:
    """A gathered sweep, as a report reads it."""

    name: str
    report: str
    about: str
    machine: Mapping[str, Any]
    jobs: tuple[Mapping[str, Any], ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> Sweep:
        """Read ``sweep.json``, or the folder that it is in.

        Raises:
            SweepError: there is none, or it is damaged.
        """
        path = path / SWEEP if path.is_dir() else path
        content = _read(path)
        try:
            sweep = cls(**{**content, "jobs": tuple(content["jobs"])})
            _check(sweep)
        except (KeyError, TypeError, ValueError) as error:
            raise SweepError(f"{path} is not the result of a sweep: {error}") from error
        return sweep

    def done(self, problem: str) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
        """``(options, result)`` of the finished jobs of a problem."""
        for job in self.jobs:
            if job["problem"] == problem and job["status"] == "done":
                yield job["options"], job["result"]

    @property
    def failed(self) -> list[Mapping[str, Any]]:
        """Records of the jobs that failed."""
        return [job for job in self.jobs if job["status"] == "failed"]


def _check(sweep: Sweep) -> None:
    for name, kind in (("name", str), ("report", str), ("about", str), ("machine", Mapping)):
        if not isinstance(value := getattr(sweep, name), kind):
            raise TypeError(f"{name} is {value!r}")
    if Path(sweep.name).name != sweep.name:  # figures are written under it
        raise ValueError(f"the name {sweep.name!r} is not one of a file")
    for job in sweep.jobs:
        if missing := {"id", "problem", "status", "options"} - set(job):
            raise ValueError(f"a job lacks {min(missing)!r}")
        if {"done": "result", "failed": "error"}.get(job["status"]) not in job:
            raise ValueError(f"job {job['id']!r} has no outcome")


def machine() -> dict[str, Any]:
    """What decides the numbers beside the options."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpus": os.cpu_count(),
        "architecture": platform.machine(),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON whole or not at all: a record per line, numbers that JSON lacks as null."""
    write_whole(path, f"{_lines(_plain(content))}\n".encode())


def _lines(content: dict[str, Any]) -> str:
    parts = []
    for key, value in content.items():
        text = json.dumps(value, allow_nan=False)
        if key == "jobs":
            text = "[\n" + ",\n".join(json.dumps(job, allow_nan=False) for job in value) + "\n]"
        parts.append(f"{json.dumps(key)}: {text}")
    return "{" + ",\n".join(parts) + "}"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        finite = value == value and abs(value) != float("inf")
        return float(f"{value:.6g}") if finite else None
    return value


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise SweepError(f"there is no {path}: run `backsketch sweep` first") from error
    except (OSError, ValueError) as error:  # not JSON, not text
        raise SweepError(f"{path} is damaged: {error}; remove it to run its jobs again") from error
    if not isinstance(content, dict):
        raise SweepError(f"{path} is not the result of a sweep")
    return content
