"""What a plan is expected to cost, or was measured to."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CAUTION", "CostEstimate"]

CAUTION = 2.0
"""Standard errors of a timing by which a sketch has to win: the best of many noisy timings is too good."""


@dataclass(frozen=True)
class CostEstimate:
    """What a plan costs.

    Attributes:
        time_ratio: of a step, exact = 1.
        extra_variance: in units of SGD's.
        saved_bytes: kept for the backward.
        rho: time to a target relative to exact training.
        smaller_batch: the best fraction of the batch, and its own rho.
        standard_error: of ``extra_variance`` over batches and draws, where that was measured.
        time_error: the standard error of ``time_ratio``.
    """

    time_ratio: float
    extra_variance: float
    saved_bytes: int
    rho: float
    smaller_batch: tuple[float, float] = (1.0, 1.0)
    standard_error: float = 0.0
    time_error: float = 0.0

    @property
    def cautious_ratio(self) -> float:
        """``time_ratio`` if a step takes as long as the timings leave possible."""
        return self.time_ratio + CAUTION * self.time_error

    @property
    def cautious_rho(self) -> float:
        """``rho`` for such a step."""
        return self.rho * self.cautious_ratio / self.time_ratio if self.time_ratio else self.rho

    def __str__(self) -> str:
        return (
            f"a step takes {self.time_ratio:.2f} of exact, extra variance {self.extra_variance:.3f} of SGD's, "
            f"{self.saved_bytes / 2**20:.1f} MiB saved; time to a target {self.rho:.2f} of exact"
        )
