"""``bs.Controller``: keeps the extra variance where it should be while a model trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from torch import nn

from backsketch.planning.control.arguments import called_module, check
from backsketch.planning.control.calibration import Measured, Unmeasurable, measure, over_ranks
from backsketch.planning.control.costs import StepCosts
from backsketch.planning.control.decision import Refused, Situation
from backsketch.planning.control.estimate import Estimate
from backsketch.planning.control.log import REFUSAL, Change, plans_of
from backsketch.planning.control.looks import Looks
from backsketch.planning.control.ranks import gathered
from backsketch.planning.control.schedule import Schedule
from backsketch.planning.control.sites import movable_sites, set_keeps
from backsketch.planning.measure.replay import Recorder
from backsketch.planning.profiling.families import FINE_LADDER
from backsketch.planning.profiling.records import ProfileData
from backsketch.regions import state_of
from backsketch.rules import unwrap
from backsketch.theory.advice import effective_batch, in_words

__all__ = ["Change", "Controller"]

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
        target_extra_variance: float | None = 0.05,
        *,
        profile: ProfileData | None = None,
        warmup: int = 0,
        finish: int = 0,
        total_steps: int | None = None,
        interval: int | None = None,
        overhead: float = 0.01,
        max_plans: int | None = None,
    ) -> None:
        self._model = unwrap(model)
        self._sites = sites = movable_sites(self._model)
        check(
            sites, target_extra_variance, warmup, finish, total_steps, interval, overhead, max_plans
        )
        self._called = called_module(model)
        if max_plans is None and self._called is not self._model:
            max_plans = _COMPILED_PLANS
        self.target, self._max_plans = target_extra_variance, max_plans
        self._costs = None if profile is None else StepCosts.from_profile(profile, sites)
        exact_from = total_steps - finish if finish and total_steps is not None else None
        self._schedule = Schedule(warmup, exact_from, interval, overhead)
        self._keeps, self._exact = tuple(s.keep for s in sites), (1.0,) * len(sites)
        ladder = sorted({*FINE_LADDER, *self._keeps}, reverse=True)
        is_whole_model = len(sites) == 1 and not (sites[0].name or sites[0].is_layer)
        self._estimate = Estimate(tuple(ladder), len(sites), is_whole_model)
        self._looks = Looks(sites, ladder)
        self._recorder: Recorder | None = None
        self._log: list[Change] = []
        self._closed = False
        if warmup:
            self._move(self._exact, f"exact warm-up of {warmup} steps")
        self._arm()

    @property
    def keeps(self) -> dict[str, float]:
        """Name of the module -> the keep in force; 1 is exact."""
        return {site.name: keep for site, keep in zip(self._sites, self._keeps)}

    @property
    def log(self) -> tuple[Change, ...]:
        """Every change and every refusal, in order."""
        return tuple(self._log)

    @property
    def extra_variance(self) -> float | None:
        """The present estimate of ω at the keeps in force; None before the first measurement."""
        if self._keeps == self._exact:
            return 0.0
        return self._estimate.total(self._keeps) if self._estimate.is_known else None

    @property
    def noise_scale(self) -> float | None:
        """The present estimate of β of an optimizer step; None before the first measurement."""
        return self._estimate.noise_scale if self._estimate.is_known else None

    @property
    def effective_batch(self) -> float:
        """The fraction of the batch whose exact gradient is as noisy; 1 before the first measurement."""
        return effective_batch(self.extra_variance or 0.0)

    @property
    def advice(self) -> str:
        """What the present noise means for the learning rate, in words."""
        return in_words(self.extra_variance or 0.0, self._estimate.noise_scale)

    def __str__(self) -> str:
        rows = [
            f"{s.name or '(model)':<32} keep {k:<5g} ω {self._estimate.variance(i, k) if k < 1 else 0:.4f}"
            for i, (s, k) in enumerate(zip(self._sites, self._keeps))
        ]
        goal = "least time to a target" if self.target is None else f"target {self.target:g}"
        head = f"after {self._schedule.steps} steps, {goal}"
        return "\n".join([head, *rows, self.advice, *map(str, self._log[-1:])])

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
        if self._recorder is not None:
            self._replay(self._recorder)
        elif schedule.looks_now:
            self._look()
            self._decide()
        if schedule.steps == schedule.exact_from:
            self._move(self._exact, "exact finish")
            self._disarm()
        self._arm()

    def skip(self) -> None:
        """Forget what a step showed that is not to be looked at, in place of :meth:`step`."""
        self._disarm()
        self._arm()

    def close(self) -> None:
        """Remove its hooks; the keeps stay as they are."""
        self._closed = True
        self._disarm()
        self._looks.close()

    def __enter__(self) -> Controller:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _arm(self) -> None:
        """Hooks for the next step, where it is one to look at."""
        if self._recorder is not None:
            return
        if self._schedule.replays_next:
            self._recorder = Recorder(self._called)
        elif self._schedule.looks_next and self._called is self._model:  # none inside compiled code
            self._looks.watch(self._keeps)

    def _disarm(self) -> None:
        """Remove all hooks, and forget what was seen with them and without."""
        self._looks.forget()
        if self._recorder is not None:
            self._recorder.close()
            self._recorder = None

    def _look(self) -> None:
        """Take the row scores of the last backward passes into account."""
        for site, keep in zip(self._sites, self._keeps):
            if not site.has_keep(keep):
                raise RuntimeError(
                    f"Controller.step: the sketch of {site.name or 'the model'} was changed or removed by someone "
                    "else; close this controller and make a new one after bs.sketch_"
                )
        self._schedule.looked()
        self._estimate.follow(self._looks.take(), self._schedule.steps)

    def _replay(self, recorder: Recorder) -> None:
        """Measure a recorded step, take the other ranks' measurements into account, and decide."""
        schedule, estimate = self._schedule, self._estimate
        start = schedule.clock()
        self._recorder = None
        recorder.close()
        self._look()
        # The plan in force is what has to be right; where that is exact, what it would be otherwise.
        base = tuple(s.keep for s in self._sites)
        probe = base if self._keeps == self._exact else self._keeps
        isolated = {i: base[i] if probe[i] == 1 else probe[i] for i in estimate.next_isolated()}
        measured, reason = self._measure(recorder, probe, isolated)
        seconds = schedule.clock() - start, schedule.seconds_per_step(start)
        found, counts, used, per_step = zip(*gathered((measured, recorder.count, *seconds)))
        schedule.replayed(fmean(used), fmean(per_step))
        total = over_ranks(found)
        if total is not None:
            schedule.retries = 0
            self._costs = self._costs or StepCosts.from_work(total.work, self._sites)
            estimate.update(total, probe, isolated, max(sum(counts), 1), schedule.steps)
            self._decide()
        elif not estimate.is_known:
            schedule.retry()
            if schedule.retries >= _ATTEMPTS:
                self._refuse(f"nothing can be measured: {reason}")

    def _measure(
        self, recorder: Recorder, keeps: Sequence[float], isolated: Mapping[int, float]
    ) -> tuple[Measured | None, str]:
        """What a replay shows, or why it shows nothing; the sites are as before afterwards."""
        model, sites, ladder = self._model, self._sites, self._estimate.ladder
        name, with_work = self._schedule.steps, self._costs is None
        try:
            found = measure(model, recorder, sites, keeps, isolated, ladder, name, with_work)
            return found, "a gradient was not finite, or SGD's own variance is zero"
        except Unmeasurable as problem:
            return None, str(problem)
        finally:
            set_keeps(sites, self._keeps)
            self._looks.forget()

    def _decide(self) -> None:
        if self._schedule.is_exact_phase or self._costs is None or not self._estimate.is_known:
            return
        plans, most = plans_of(self._log, self.keeps), self._max_plans
        among = plans if most is not None and len(plans) >= most else ()
        situation = Situation(
            self._estimate, self._costs, self._sites, self._fixed(), self.target, self._keeps, among
        )
        try:
            keeps, reason = situation.decide()
        except Refused as problem:
            self._refuse(str(problem))
            return
        if reason:
            self._move(keeps, reason)

    def _fixed(self) -> dict[int, str]:
        """Sites that run exactly whatever their keep, on one of the ranks at least: the others wait for it."""
        found = {}
        for i, site in enumerate(self._sites):
            if site.is_region and (state := state_of(site.module)).status == "exact":
                found[i] = f"{site.name or 'the model'} runs exactly: {state.reason}"
        return {i: reason for of_rank in gathered(found) for i, reason in of_rank.items()}

    def _refuse(self, reason: str) -> None:
        """Everything exact; the log says so where its last line is no refusal."""
        if not (self._log and self._log[-1].is_refusal):
            self._move(self._exact, REFUSAL + reason)

    def _move(self, keeps: tuple[float, ...], reason: str) -> None:
        before, self._keeps = self.keeps, keeps
        set_keeps(self._sites, keeps)
        noise = self.extra_variance, self.noise_scale
        self._log.append(Change(self._schedule.steps, reason, before, self.keeps, *noise))

    def state_dict(self) -> dict[str, Any]:
        """All that later decisions depend on, as plain data that ``torch.save`` and JSON hold.

        It changes nothing, and a run that resumes is the run that went on. To be called between two optimizer
        steps, and by every one of several ranks: it gathers their scores since the last look.
        """
        costs = self._costs
        return {
            **self._identity(),
            **self._schedule.state_dict(),
            "keeps": list(self._keeps),
            "estimate": self._estimate.state_dict(),
            "costs": None if costs is None else [list(costs.fixed), list(costs.live), costs.tiny],
            "traces": self._looks.state(),
            "log": [asdict(change) for change in self._log],
        }

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
        self._schedule.load_state_dict(state)
        self._estimate.load_state_dict(state["estimate"])
        if state["costs"] is not None:
            fixed, live, tiny = state["costs"]
            self._costs = StepCosts(tuple(fixed), tuple(live), tiny)
        self._log = [Change(**change) for change in state["log"]]
        self._keeps = tuple(state["keeps"])
        set_keeps(self._sites, self._keeps)
        self._disarm()
        self._looks.load(state.get("traces", []))
        self._arm()

    def _identity(self) -> dict[str, Any]:
        """What a state must have been made with."""
        sites = [site.name for site in self._sites]
        return {"sites": sites, "target": self.target, "ladder": list(self._estimate.ladder)}
