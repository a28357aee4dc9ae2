"""``bs.Controller``: keeps the extra variance where it should be while a model trains."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from torch import nn

from backsketch.planning.control.arguments import called_module, check
from backsketch.planning.control.costs import StepCosts
from backsketch.planning.control.decision import Situation
from backsketch.planning.control.moves import Change, Moves
from backsketch.planning.control.observer import Observer
from backsketch.planning.control.ranks import gathered
from backsketch.planning.control.schedule import Schedule
from backsketch.planning.control.sites import movable_sites
from backsketch.planning.profiling.records import ProfileData
from backsketch.rules import unwrap
from backsketch.theory.advice import effective_batch, in_words

__all__ = ["TARGET", "Change", "Controller"]

TARGET = 0.05  # extra variance
_ATTEMPTS = 3
_COMPILED_PLANS = 8  # Dynamo's recompile limit


class Controller:
    r"""Moves the keeps of a sketched model during training.

    With a target the step is as cheap as it can be at about that extra variance; without one the time to a
    target loss, :math:`\rho = c(1+\beta(1+\omega))/(1+\beta)`, is the least. Where that is exact training, the
    sites are made exact and :attr:`log` says why.

    :meth:`step` needs no loss function. Of some optimizer steps it records the model's arguments and the
    cotangents of its outputs, and replays them, exactly in two halves of the batch
    (:mod:`backsketch.planning.control.calibration`) and sketched; between them it follows the row scores of the
    regions (:mod:`backsketch.planning.control.estimate`). Replays are dense in the first steps and take about
    ``overhead`` of the time from then on.

    Args:
        model: sketched by :func:`backsketch.sketch_`, in the form that is called: give the result of
            ``torch.compile`` if that is what you call. Sites without a keep (``Quantized``) stay as they are.
        target_extra_variance: :math:`\omega` in units of SGD's variance at this batch size; None minimises
            :math:`\rho`.
        profile: measured seconds of the sites (:func:`backsketch.profile`); otherwise their arithmetic is counted.
        warmup: so many first optimizer steps are exact.
        finish: so many last optimizer steps are exact; needs ``total_steps``.
        total_steps: of the training.
        interval: optimizer steps between two replays after the first few; None takes it from measured times.
            With a number every decision is a function of the data and the seeds alone.
        overhead: share of the time for replays.
        max_plans: how many different sets of keeps may be used, beyond which earlier ones are chosen among;
            None is 8 for a compiled model, whose layer sketches recompile with every new keep, and no limit else.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: the model is not sketched or has no keep to move, or an argument is out of range. The model
            is left as it was.

    Example:
        >>> import torch, backsketch as bs
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
        >>> _ = bs.sketch_(model, bs.Region(keep=0.5))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> controller = bs.Controller(model, target_extra_variance=0.1)
        >>> for _ in range(3):
        ...     loss = model(torch.randn(128, 64)).square().mean()
        ...     loss.backward()
        ...     controller.step()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> 0 < controller.effective_batch <= 1
        True
    """

    def __init__(
        self,
        model: nn.Module,
        target_extra_variance: float | None = TARGET,
        *,
        profile: ProfileData | None = None,
        warmup: int = 0,
        finish: int = 0,
        total_steps: int | None = None,
        interval: int | None = None,
        overhead: float = 0.01,
        max_plans: int | None = None,
    ) -> None:
        own = unwrap(model)
        self._sites = sites = movable_sites(own)
        check(
            sites, target_extra_variance, warmup, finish, total_steps, interval, overhead, max_plans
        )
        called = called_module(model)
        if max_plans is None and called is not own:
            max_plans = _COMPILED_PLANS
        self.target, self._max_plans = target_extra_variance, max_plans
        exact_from = total_steps - finish if finish and total_steps is not None else None
        self._schedule = Schedule(warmup, exact_from, interval, overhead)
        costs = None if profile is None else StepCosts.from_profile(profile, sites)
        self._observer = Observer(own, called, sites, costs)
        self._moves = Moves(sites, self._observer.estimate)
        self._closed = False
        if warmup:
            self._moves.go_exact(f"exact warm-up of {warmup} steps", 0)
        self._arm()

    @property
    def keeps(self) -> dict[str, float]:
        """Name of the module -> the keep in force; 1 is exact."""
        return self._moves.by_name

    @property
    def log(self) -> tuple[Change, ...]:
        """Every change and every refusal, in order."""
        return tuple(self._moves.log)

    @property
    def extra_variance(self) -> float | None:
        """The present estimate of ω at the keeps in force; None before the first measurement."""
        return self._moves.extra_variance

    @property
    def noise_scale(self) -> float | None:
        """The present estimate of β of an optimizer step; None before the first measurement."""
        estimate = self._observer.estimate
        return estimate.noise_scale if estimate.is_known else None

    @property
    def effective_batch(self) -> float:
        """The fraction of the batch whose exact gradient is as noisy; 1 before the first measurement."""
        return effective_batch(self.extra_variance or 0.0)

    @property
    def advice(self) -> str:
        """What the present noise means for the learning rate, in words."""
        return in_words(self.extra_variance or 0.0, self._observer.estimate.noise_scale)

    def __str__(self) -> str:
        variance = self._observer.estimate.variance
        rows = [
            f"{name or '(model)':<32} keep {k:<5g} ω {variance(i, k) if k < 1 else 0:.4f}"
            for i, (name, k) in enumerate(self.keeps.items())
        ]
        goal = "least time to a target" if self.target is None else f"target {self.target:g}"
        head = f"after {self._schedule.steps} steps, {goal}"
        return "\n".join([head, *rows, self.advice, *map(str, self.log[-1:])])

    def step(self) -> None:
        """To be called once per optimizer step, after the backward pass; best before ``optimizer.step()``.

        Of several ranks, every one calls it: what is measured is summed, so that all have the same keeps.

        Raises:
            RuntimeError: after :meth:`close`, or if the model was restored or sketched anew since.
        """
        if self._closed:
            raise RuntimeError("Controller.step: this controller is closed")
        schedule = self._schedule
        schedule.step()
        if self._observer.is_recording:
            self._replay()
        elif schedule.looks_now:
            self._look()
            self._decide()
        if schedule.steps == schedule.exact_from:
            self._moves.go_exact("exact finish", schedule.steps)
            self._observer.forget()
        self._arm()

    def skip(self) -> None:
        """Forget what a step showed that is not to be looked at, in place of :meth:`step`."""
        self._observer.forget()
        self._arm()

    def close(self) -> None:
        """Remove its hooks; the keeps stay as they are."""
        self._closed = True
        self._observer.close()

    def __enter__(self) -> Controller:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _arm(self) -> None:
        """Hooks for the next step, where it is one to look at."""
        if self._observer.is_recording:
            return
        if self._schedule.replays_next:
            self._observer.record()
        elif self._schedule.looks_next:
            self._observer.watch(self._moves.keeps)

    def _look(self) -> None:
        self._moves.check()
        self._schedule.looked()
        self._observer.look(self._schedule.steps)

    def _replay(self) -> None:
        """Measure the recorded step, and decide."""
        schedule = self._schedule
        start = schedule.clock()
        per_step = schedule.seconds_per_step(start)
        self._look()
        reason = self._observer.replay(self._moves.keeps, schedule.steps)
        used, each = zip(*gathered((schedule.clock() - start, per_step)))
        schedule.replayed(fmean(used), fmean(each))
        if not reason:
            schedule.retries = 0
            self._decide()
        elif not self._observer.estimate.is_known:
            schedule.retry()
            if schedule.retries >= _ATTEMPTS:
                self._moves.refuse(f"nothing can be measured: {reason}", schedule.steps)

    def _decide(self) -> None:
        if not self._schedule.is_exact_phase:
            where = self._observer, self._moves, self._sites
            Situation(*where, self.target, self._max_plans).decide(self._schedule.steps)

    def state_dict(self) -> dict[str, Any]:
        """All that later decisions depend on, as plain data that ``torch.save`` and JSON hold.

        It changes nothing, and a run that resumes is the run that went on. To be called between two optimizer
        steps, and by every one of several ranks: it gathers their scores since the last look.
        """
        schedule, observer, moves = self._schedule, self._observer, self._moves
        parts = schedule.state_dict() | observer.state_dict() | moves.state_dict()
        return self._identity() | parts

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`, on a model that was sketched by the same rules.

        With another number of ranks the scores since the last look are forgotten.

        Raises:
            ValueError: it belongs to other sites or another target; nothing is changed then.
        """
        for key, value in self._identity().items():
            if state.get(key) != value:
                raise ValueError(
                    f"Controller.load_state_dict: made with {key} {state.get(key)}, not {value}"
                )
        for part in (self._schedule, self._moves, self._observer):
            part.load_state_dict(state)
        self._arm()

    def _identity(self) -> dict[str, Any]:
        """What a state must have been made with."""
        ladder = list(self._observer.estimate.ladder)
        return {"sites": list(self.keeps), "target": self.target, "ladder": ladder}
