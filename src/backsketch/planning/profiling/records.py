"""What a profile holds: plain numbers, which save to JSON and load from it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from backsketch.planning.profiling.families import IN_8_BITS, REGIONS

__all__ = ["MaskOption", "Option", "ProfileData", "SiteProfile", "Trial"]

P = TypeVar("P", bound="ProfileData")


@dataclass(frozen=True)
class Option:
    """One sketch at one site, relative to leaving it exact.

    ``fixed_seconds + live_seconds`` is the change of a step's time; the second part shrinks with the
    fraction of rows that a mask above leaves, if the sketch is ``nested``: if it keeps a fraction of those
    rows, not of all. ``variance`` is in units of SGD's at this batch size, ``masked`` the same below each of
    the profile's masks. ``error_seconds`` is the standard error of the change of time.
    """

    family: str
    keep: float
    rules: Mapping[str, str]
    fixed_seconds: float
    live_seconds: float
    variance: float
    saved_bytes: int
    nested: bool = True
    masked: tuple[float, ...] = ()
    error_seconds: float = 0.0

    @property
    def is_region(self) -> bool:
        """Whether its noise travels on to the sites below."""
        return self.family in REGIONS

    @property
    def in_8_bits(self) -> bool:
        """Whether its matrix products are those of 8-bit integers."""
        return self.family in IN_8_BITS

    def seconds(self, live: float = 1.0) -> float:
        """Change of a step's time below a mask that keeps a fraction ``live`` of the rows."""
        share = live if self.nested else min(1.0, live / self.keep)
        return self.fixed_seconds + self.live_seconds * share


@dataclass(frozen=True)
class SiteProfile:
    """A site and what can be put there.

    ``arriving``: by how much a unit of extra variance at another site, in a region there, adds to the errors made
    here, relative. ``backward_seconds``: of its exact backward pass; None where it was not measured.
    """

    name: str
    kind: str
    row_dims: int | None
    layers: tuple[str, ...]
    options: tuple[Option, ...]
    arriving: Mapping[str, float] = field(default_factory=dict)
    backward_seconds: float | None = None

    def seconds(self, option: Option, live: float = 1.0) -> float:
        """Change of a step's time by an option here, which saves no more than the part that is not computed."""
        if self.backward_seconds is None:
            return option.seconds(live)
        left_out = 1.0 if option.keep == 1 else 1 - option.keep * live
        return max(option.seconds(live), -self.backward_seconds * left_out)


@dataclass(frozen=True)
class MaskOption:
    """A mask on the model's output; ``growth`` is the second moment of the cotangents below it."""

    keep: float
    variance: float
    growth: float


@dataclass(frozen=True)
class Trial:
    """What a whole plan was measured to take of an exact step, with the standard error, and to add in variance."""

    rules: Mapping[str, str]
    time_ratio: float
    time_error: float
    extra_variance: float


@dataclass(frozen=True)
class ProfileData:
    """Time, bytes and extra variance per site, and SGD's own noise.

    Attributes:
        sites: with their options.
        masks: masks on the output, empty where the output is not one tensor.
        step_seconds: an exact step, forward and backward, without the optimizer.
        saved_bytes: what an exact step keeps for the backward.
        noise_scale: SGD's variance over the squared norm of the mean gradient.
        sgd_variance: of the minibatch gradient.
        device: where it was measured.
        torch: the version of PyTorch.
        forward_seconds: of the exact step, which no sketch saves; None where it was not measured.
        trials: plans that were measured as a whole.
    """

    sites: tuple[SiteProfile, ...]
    masks: tuple[MaskOption, ...]
    step_seconds: float
    saved_bytes: int
    noise_scale: float
    sgd_variance: float
    device: str
    torch: str
    forward_seconds: float | None = None
    trials: tuple[Trial, ...] = ()

    @property
    def least_ratio(self) -> float:
        """The part of an exact step that no sketch saves: the forward pass, a third where it was not measured."""
        if self.forward_seconds is None:
            return 1 / 3
        return min(self.forward_seconds / self.step_seconds, 1.0)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls: type[P], plain: Mapping[str, Any]) -> P:
        """The inverse of :meth:`to_dict`."""
        sites = tuple(
            SiteProfile(
                **{
                    **site,
                    "layers": tuple(site["layers"]),
                    "options": tuple(
                        Option(**{**o, "masked": tuple(o.get("masked", ()))})
                        for o in site["options"]
                    ),
                }
            )
            for site in plain["sites"]
        )
        masks = tuple(MaskOption(**mask) for mask in plain["masks"])
        trials = tuple(Trial(**trial) for trial in plain.get("trials", ()))
        return cls(**{**plain, "sites": sites, "masks": masks, "trials": trials})

    def save(self, path: str | Path) -> None:
        """Write JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls: type[P], path: str | Path) -> P:
        """Read what :meth:`save` wrote."""
        return cls.from_dict(json.loads(Path(path).read_text()))

    def __str__(self) -> str:
        lines = [
            f"exact step {1e3 * self.step_seconds:.1f} ms, {self.saved_bytes / 2**20:.1f} MiB saved, noise scale "
            f"{self.noise_scale:.3g} ({self.device}, torch {self.torch})",
            f"{'site':<28} {'sketch':<12} {'keep':>5} {'step':>8} {'ω':>8} {'saved MiB':>10}",
        ]
        for site in self.sites:
            for option in site.options:
                if option.keep in (0.5, 1.0):
                    lines.append(
                        f"{site.name or '(model)':<28} {option.family:<12} {option.keep:>5g} "
                        f"{100 * option.seconds() / self.step_seconds:>+7.1f}% {option.variance:>8.4f} "
                        f"{option.saved_bytes / 2**20:>+10.2f}"
                    )
        for mask in self.masks:
            if mask.keep in (0.7, 0.5):
                lines.append(
                    f"{'(output)':<28} {'mask':<12} {mask.keep:>5g} {'':>8} {mask.variance:>8.4f}"
                )
        return "\n".join(lines)
