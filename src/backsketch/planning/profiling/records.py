"""What a profile holds: plain numbers, which save to JSON and load from it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from backsketch.planning.plan.plan import Plan

__all__ = ["MaskOption", "Option", "Profile", "SlotProfile"]


@dataclass(frozen=True)
class Option:
    """One sketch at one slot, relative to leaving it exact.

    ``fixed_seconds + live_seconds`` is the change of a step's time; the second part shrinks with the
    fraction of rows that a mask above leaves, if the sketch is ``nested``: if it keeps a fraction of those
    rows, not of all. ``variance`` is in units of SGD's at this batch size, ``masked`` the same below each of
    the profile's masks.
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

    @property
    def is_region(self) -> bool:
        """Whether its noise travels on to the places below."""
        return self.family in ("save", "recompute")

    def seconds(self, live: float = 1.0) -> float:
        """Change of a step's time below a mask that keeps a fraction ``live`` of the rows."""
        share = live if self.nested else min(1.0, live / self.keep)
        return self.fixed_seconds + self.live_seconds * share


@dataclass(frozen=True)
class SlotProfile:
    """A place and what can be put there.

    ``arriving``: by how much a unit of extra variance at another place, in a region there, adds to the errors made
    here, relative.
    """

    name: str
    kind: str
    row_dims: int | None
    layers: tuple[str, ...]
    options: tuple[Option, ...]
    arriving: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class MaskOption:
    """A mask on the model's output; ``growth`` is the second moment of the cotangents below it."""

    keep: float
    variance: float
    growth: float


@dataclass(frozen=True)
class Profile:
    """Time, bytes and extra variance per place, and SGD's own noise.

    Attributes:
        slots: places with their options.
        masks: masks on the output, empty where the output is not one tensor.
        step_seconds: an exact step, forward and backward, without the optimizer.
        saved_bytes: what an exact step keeps for the backward.
        noise_scale: SGD's variance over the squared norm of the mean gradient.
        sgd_variance: of the minibatch gradient.
        device: where it was measured.
        torch: the version of PyTorch.
    """

    slots: tuple[SlotProfile, ...]
    masks: tuple[MaskOption, ...]
    step_seconds: float
    saved_bytes: int
    noise_scale: float
    sgd_variance: float
    device: str
    torch: str

    def plan(
        self,
        objective: str = "time",
        max_extra_variance: float | None = None,
        max_saved_bytes: float | None = None,
        max_time: float | None = None,
    ) -> Plan:
        """Choose a sketch for every place.

        Args:
            objective: ``"time"`` minimises the predicted time to a target relative to exact training
                (:func:`backsketch.theory.time_to_target_ratio`); ``"memory"`` the saved bytes;
                ``"variance"`` the extra variance, for which a limit on time or bytes is needed.
            max_extra_variance: at most this, in units of SGD's variance. For ``"memory"`` 0.1 by default.
            max_saved_bytes: at most this many bytes.
            max_time: a step takes at most this fraction of an exact one. For ``"memory"`` 1.1 by default.

        Returns:
            A :class:`Plan`, the exact one where nothing beats exact training or a smaller batch.

        Raises:
            ValueError: an unknown objective, a limit that is not positive, limits that no plan meets.
        """
        from backsketch.planning.plan.plan import make_plan

        return make_plan(self, objective, max_extra_variance, max_saved_bytes, max_time)

    def predict(self, rules: Mapping[str, object]) -> Plan:
        """The plan that these rules are, with its bill.

        Args:
            rules: patterns and sketches as a plan spells them (``plan.texts``): a place with one of its options
                for each, and ``""`` for a mask on the output.

        Raises:
            ValueError: a rule is none of the profile's options.

        Example:
            ``profile.predict({"": "mask:keep=0.8", "blocks.0.mlp": "region:keep=0.5,row_dims=2"}).predicted``
        """
        from backsketch.planning.plan.plan import plan_of

        return plan_of(self, rules)

    def plot(self, plan: Plan | None = None) -> Figure:
        """A matplotlib figure: time against extra variance, a line over the keeps for each place.

        Args:
            plan: its choices are marked.

        Raises:
            ModuleNotFoundError: matplotlib is missing; it is in the extra ``backsketch[train]``.
        """
        from backsketch.planning.plots.profile import plot_profile

        return plot_profile(self, plan)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Profile:
        """The inverse of :meth:`to_dict`."""
        slots = tuple(
            SlotProfile(
                **{
                    **slot,
                    "layers": tuple(slot["layers"]),
                    "options": tuple(
                        Option(**{**o, "masked": tuple(o.get("masked", ()))})
                        for o in slot["options"]
                    ),
                }
            )
            for slot in plain["slots"]
        )
        masks = tuple(MaskOption(**mask) for mask in plain["masks"])
        return cls(**{**plain, "slots": slots, "masks": masks})

    def save(self, path: str | Path) -> None:
        """Write JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read what :meth:`save` wrote."""
        return cls.from_dict(json.loads(Path(path).read_text()))

    def __str__(self) -> str:
        lines = [
            f"exact step {1e3 * self.step_seconds:.1f} ms, {self.saved_bytes / 2**20:.1f} MiB saved, noise scale "
            f"{self.noise_scale:.3g} ({self.device}, torch {self.torch})",
            f"{'place':<28} {'sketch':<12} {'keep':>5} {'step':>8} {'ω':>8} {'saved MiB':>10}",
        ]
        for slot in self.slots:
            for option in slot.options:
                if option.keep in (0.5, 1.0):
                    lines.append(
                        f"{slot.name or '(model)':<28} {option.family:<12} {option.keep:>5g} "
                        f"{100 * option.seconds() / self.step_seconds:>+7.1f}% {option.variance:>8.4f} "
                        f"{option.saved_bytes / 2**20:>+10.2f}"
                    )
        for mask in self.masks:
            if mask.keep in (0.7, 0.5):
                lines.append(
                    f"{'(output)':<28} {'mask':<12} {mask.keep:>5g} {'':>8} {mask.variance:>8.4f}"
                )
        return "\n".join(lines)
