"""The log of a controller: every change of the keeps and every refusal, with its reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["REFUSAL", "Change", "plans_of"]

REFUSAL = "exact: "
"""How the reason of a refusal begins."""


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
        return self.reason.startswith(REFUSAL)

    def __str__(self) -> str:
        moved = [
            f"{name or '(model)'} {old:g} -> {self.after[name]:g}"
            for name, old in self.before.items()
            if self.after[name] != old
        ]
        return f"step {self.step}: {self.reason}" + (f" ({', '.join(moved)})" if moved else "")


def plans_of(log: Sequence[Change], keeps: Mapping[str, float]) -> list[tuple[float, ...]]:
    """The different sets of keeps that were used so far, in order; ``keeps`` are those in force."""
    used = [c.before for c in log[:1]] + [c.after for c in log]
    return list(dict.fromkeys(tuple(plan.values()) for plan in used or [keeps]))
