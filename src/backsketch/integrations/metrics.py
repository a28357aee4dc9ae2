"""The numbers that a callback puts into the log of a trainer; their names begin with ``backsketch/``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from backsketch.arithmetic import Arithmetic, backward_arithmetic
from backsketch.estimators import Estimator
from backsketch.nn.swap import exact, sketch_of
from backsketch.planning.measure.recorder import unseen
from backsketch.planning.measure.step import extra_variance, saved_bytes
from backsketch.regions import Region
from backsketch.report import Report

if TYPE_CHECKING:
    from backsketch.integrations.session import Session

__all__ = ["Metrics", "backward_ratio"]

_EVERY = 500  # optimizer steps between two measurements of a noise that no controller follows: ten passes
_PREFIX = "backsketch/"


class Metrics:
    """Measures a session's model at the times when a trainer logs.

    ``arithmetic`` is counted once and then follows the keeps; bytes are measured anew when a keep moved, and the
    extra variance, where no controller estimates it, at most every 500 steps.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._counted: Arithmetic | None = None
        self._report: Report | None = None  # that was counted for
        self._keeps: dict[str, str] | None = None
        self._bytes: tuple[int, int] | None = None  # exact, sketched
        self._noise: float | None = None
        self._measured_at: int | None = None

    def logged(self, step: int) -> dict[str, float]:
        """The numbers after a step."""
        session = self._session
        if session.report is None or not session.batches:
            return {_PREFIX + "arithmetic": 1.0, _PREFIX + "changes": 0.0}
        found: dict[str, float] = {}
        if session.settings.measure:
            with unseen(session.model):
                self._measure(step)
        if self._counted is not None:
            found["arithmetic"] = backward_ratio(session.model, session.report, self._counted)
        if self._bytes is not None:
            exact, sketched = self._bytes
            found |= {"saved_bytes": float(sketched), "saved_bytes_ratio": sketched / max(exact, 1)}
        control = session.controller
        noise = self._noise if control is None else control.extra_variance
        if noise is not None:
            found["extra_variance"] = noise
        found["changes"] = 0.0 if control is None else float(len(control.log))
        if control is not None:
            found["effective_batch"] = control.effective_batch
        return {_PREFIX + name: value for name, value in found.items()}

    def _measure(self, step: int) -> None:
        session, batch = self._session, self._session.batches[-1]
        model, loss_fn = session.model, session.loss_fn
        if self._counted is None or session.report is not self._report:
            self._report = session.report
            assert session.report is not None
            names = [site.name for site in session.report if site.products]
            try:
                self._counted = backward_arithmetic(model, lambda: loss_fn(model, batch), names)
            except torch.OutOfMemoryError:  # attention is counted in its dense form
                self._counted = _by_weights(session.report)
        keeps = _in_force(model, session.report)
        if keeps != self._keeps:
            self._keeps = keeps
            with exact(model):
                before = saved_bytes(model, batch, loss_fn)
            self._bytes = before, saved_bytes(model, batch, loss_fn)
        is_due = self._measured_at is None or step >= self._measured_at + _EVERY
        if session.controller is None and is_due and len(session.batches) > 1:
            self._measured_at = step
            self._noise = extra_variance(model, list(session.batches), loss_fn)

    def state_dict(self) -> dict[str, Any]:
        """When the noise was measured, and what it was."""
        return {"noise": self._noise, "measured_at": self._measured_at}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._noise, self._measured_at = state["noise"], state["measured_at"]


def backward_ratio(model: nn.Module, report: Report, counted: Arithmetic) -> float:
    """Arithmetic of a backward pass with the sketches in force, over that of an exact one.

    Args:
        model: sketched.
        report: of its sketches.
        counted: of the exact pass, in all and by site.
    """
    spared = 0.0
    for site in report.sketched:
        sketch = sketch_of(model.get_submodule(site.name))
        work = (1.0, 1.0)
        if isinstance(sketch, Estimator):
            work = sketch.work()
        elif isinstance(sketch, Region):
            work = (sketch.keep, sketch.keep)
        left = work[0] if site.frozen else sum(work) / 2
        spared += counted.modules.get(site.name, 0) * (1 - left)
    return 1 - spared / max(counted.total, 1)


def _by_weights(report: Report) -> Arithmetic:
    """The same from the sizes of the weights, each used once a row."""
    sites = {site.name: site.products for site in report}
    return Arithmetic(sum(sites.values()) + report.unknown_products, sites)


def _in_force(model: nn.Module, report: Report | None) -> dict[str, str]:
    sites = [] if report is None else report.sketched
    return {site.name: str(sketch_of(model.get_submodule(site.name))) for site in sites}
