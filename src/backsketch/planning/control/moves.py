"""The keeps in force under a controller, and its log: every change and every refusal, with the reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from backsketch.planning.control.estimate import Estimate
from backsketch.planning.control.sites import MovableSite, set_keeps

__all__ = ["Change", "Keeps", "Moves"]

Keeps = tuple[float, ...]
"""Of all sites, in their order."""

_REFUSAL = "exact: "  # how the reason of a refusal begins


@dataclass(frozen=True)
class Change:
    """One line of the log: what was changed, after which optimizer step, and why.

    ``extra_variance`` is what is expected at the keeps ``after``; None where nothing was measured yet.
    """

    step: int
    reason: str
    before: Mapping[str, float]
    after: Mapping[str, float]
    extra_variance: float | None
    noise_scale: float | None

    @property
    def is_refusal(self) -> bool:
        """Whether all sites were made exact because no sketch pays."""
        return self.reason.startswith(_REFUSAL)

    def __str__(self) -> str:
        moved = [
            f"{name or '(model)'} {old:g} -> {self.after[name]:g}"
            for name, old in self.before.items()
            if self.after[name] != old
        ]
        return f"step {self.step}: {self.reason}" + (f" ({', '.join(moved)})" if moved else "")


class Moves:
    """Moves the keeps of a model's sites, and notes every move.

    Args:
        sites: all of them.
        estimate: of the extra variance, for the log.

    Attributes:
        keeps: in force.
        log: of the moves so far.
    """

    def __init__(self, sites: Sequence[MovableSite], estimate: Estimate) -> None:
        self._sites, self._estimate = sites, estimate
        self.keeps: Keeps = tuple(site.keep for site in sites)
        self.log: list[Change] = []

    @property
    def by_name(self) -> dict[str, float]:
        """Name of the module -> the keep in force."""
        return {site.name: keep for site, keep in zip(self._sites, self.keeps)}

    @property
    def extra_variance(self) -> float | None:
        """At the keeps in force; None before the first measurement."""
        if min(self.keeps) == 1:
            return 0.0
        return self._estimate.total(self.keeps) if self._estimate.is_known else None

    @property
    def plans(self) -> list[Keeps]:
        """The different keeps that were used so far, in order."""
        used = [c.before for c in self.log[:1]] + [c.after for c in self.log]
        return list(dict.fromkeys(tuple(plan.values()) for plan in used or [self.by_name]))

    def move(self, keeps: Keeps, reason: str, step: int) -> None:
        """Set all keeps, after an optimizer step."""
        before, self.keeps = self.by_name, keeps
        set_keeps(self._sites, keeps)
        beta = self._estimate.noise_scale if self._estimate.is_known else None
        change = Change(step, reason, before, self.by_name, self.extra_variance, beta)
        self.log.append(change)

    def go_exact(self, reason: str, step: int) -> None:
        """All sites become exact."""
        self.move((1.0,) * len(self._sites), reason, step)

    def refuse(self, reason: str, step: int) -> None:
        """All sites become exact since no sketch pays; noted once, until something else is."""
        if not (self.log and self.log[-1].is_refusal):
            self.go_exact(_REFUSAL + reason, step)

    def check(self) -> None:
        """The sites are as they were left, else a ``RuntimeError``."""
        for site, keep in zip(self._sites, self.keeps):
            if not site.has_keep(keep):
                raise RuntimeError(
                    f"Controller.step: the sketch of {site.name or 'the model'} was changed or removed by someone "
                    "else; close this controller and make a new one after bs.sketch_"
                )

    def state_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"keeps": list(self.keeps), "log": [asdict(change) for change in self.log]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.log = [Change(**change) for change in state["log"]]
        self.keeps = tuple(state["keeps"])
        set_keeps(self._sites, self.keeps)
