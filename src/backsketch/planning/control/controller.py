"""``bs.Controller``: keeps the extra variance where it should be while a model trains."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from backsketch.planning.control.arguments import called_module, check
from backsketch.planning.control.calibration import Measured, Unmeasurable, measure, over_ranks
from backsketch.planning.control.costs import StepCosts
from backsketch.planning.control.decision import BAND, Choice, choose_keeps, reason_to_move
from backsketch.planning.control.estimate import Estimate
from backsketch.planning.control.looks import Looks
from backsketch.planning.control.ranks import summed
from backsketch.planning.control.schedule import Schedule
from backsketch.planning.control.sites import movable_sites, weight_layers
from backsketch.planning.measure.replay import Recorder
from backsketch.planning.profiling.families import FINE_LADDER
from backsketch.planning.profiling.records import ProfileData
from backsketch.regions import state_of
from backsketch.rules import unwrap
from backsketch.theory.advice import effective_batch, learning_rate_factor

__all__ = ["Change", "Controller"]

_ATTEMPTS = 3
_ISOLATED_AT_ONCE = 8
_DRAWS = 3  # of several sites together in a measurement: their factor drifts, so that few measurements count
_COMPILED_PLANS = 8  # Dynamo's recompile limit


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

    def __str__(self) -> str:
        moved = [
            f"{name or '(model)'} {old:g} -> {self.after[name]:g}"
            for name, old in self.before.items()
            if self.after[name] != old
        ]
        return f"step {self.step}: {self.reason}" + (f" ({', '.join(moved)})" if moved else "")


class Controller:
    r"""Moves the keeps of a sketched model during training.

    With a target the step is as cheap as it can be at about that extra variance; without one the time to a
    target loss, :math:`\rho = c(1+\beta(1+\omega))/(1+\beta)`, is the least. Where that is exact training, the
    sites are made exact and :attr:`log` says why.

    :meth:`step` needs no loss function. Of some optimizer steps, chosen one ahead, it records the model's
    arguments and the cotangents of its outputs, and replays them: exactly in two halves of the batch, which
    shows SGD's own variance and the noise scale (:mod:`backsketch.planning.control.calibration`), and sketched.
    Between them it follows the row scores that the regions' backward passes compute anyway
    (:mod:`backsketch.planning.control.estimate`). Replays are dense in the first steps and take about
    ``overhead`` of the time from then on.

    Args:
        model: sketched by :func:`backsketch.sketch_`, in the form that is called: give the result of
            ``torch.compile`` if that is what you call. Sites without a keep (``Quantized``) stay as they are.
        target_extra_variance: :math:`\omega` in units of SGD's variance at this batch size; None minimises
            :math:`\rho`.
        profile: measured seconds of the sites (:func:`backsketch.profile`); otherwise their arithmetic is
            counted.
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
        self._sites = movable_sites(self._model)
        check(target_extra_variance, warmup, finish, total_steps, interval, overhead, max_plans)
        if not self._sites:
            raise ValueError(
                "Controller: the model has no sketch with a keep to move; call bs.sketch_(model, ...) first, with "
                "regions, masks, or estimators such as bs.Rows"
            )
        self._called = called_module(model)
        if max_plans is None and self._called is not self._model:
            max_plans = _COMPILED_PLANS
        self.target = target_extra_variance
        self._max_plans = max_plans
        self._costs = None if profile is None else StepCosts.from_profile(profile, self._sites)
        exact_from = None if not finish or total_steps is None else total_steps - finish
        self._schedule = Schedule(warmup, exact_from, interval, overhead)
        ladder = sorted({*FINE_LADDER, *(s.keep for s in self._sites)}, reverse=True)
        whole = len(self._sites) == 1 and not (self._sites[0].name or self._sites[0].is_layer)
        self._estimate = Estimate(tuple(ladder), len(self._sites), whole)
        self._looks = Looks(self._sites, ladder)
        self._recorder: Recorder | None = None
        self._keeps = tuple(s.keep for s in self._sites)
        self._visited = [self._keeps]
        self._log: list[Change] = []
        self._refusal = ""
        self._failures = self._replicas = self._turn = 0
        self._closed = False
        if warmup:
            self._move((1.0,) * len(self._sites), f"exact warm-up of {warmup} steps")
        self._arm()

    # --- what it says ---------------------------------------------------------------------------

    @property
    def keeps(self) -> dict[str, float]:
        """Name of the module -> the keep in force; 1 is exact."""
        return self._named(self._keeps)

    @property
    def log(self) -> tuple[Change, ...]:
        """Every change and every refusal, in order."""
        return tuple(self._log)

    @property
    def extra_variance(self) -> float | None:
        """The present estimate of ω at the keeps in force; None before the first measurement."""
        if all(k == 1 for k in self._keeps):
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
        omega = self.extra_variance
        if not omega:
            return (
                "the gradients are exact: the learning rate that suits exact training stays right"
            )
        beta = self._estimate.noise_scale
        sgd, adam = (learning_rate_factor(omega, name) for name in ("sgd", "adam"))
        now = learning_rate_factor(omega, "sgd", beta)
        return (
            f"your effective batch is now {self.effective_batch:.2f} of nominal (extra variance {omega:.2f}); "
            f"multiply a learning rate that was tuned for exact training by {sgd:.2f} for SGD where noise "
            f"dominates ({now:.2f} at the present noise scale {beta:.2g}), by {adam:.2f} for Adam"
        )

    def __str__(self) -> str:
        rows = [
            f"{s.name or '(model)':<32} keep {k:<5g} ω {self._estimate.variance(i, k) if k < 1 else 0:.4f}"
            for i, (s, k) in enumerate(zip(self._sites, self._keeps))
        ]
        goal = "least time to a target" if self.target is None else f"target {self.target:g}"
        last = [str(self._log[-1])] if self._log else []
        return "\n".join([f"after {self._schedule.steps} steps, {goal}", *rows, self.advice, *last])

    # --- what it does ---------------------------------------------------------------------------

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
            self._move((1.0,) * len(self._sites), "exact finish")
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

    # --- measuring ------------------------------------------------------------------------------

    def _look(self) -> None:
        """Take the row scores of the last backward passes into account."""
        self._check_sites()
        self._schedule.looked()
        self._estimate.follow(self._looks.take(self._device), self._schedule.steps)

    def _replay(self, recorder: Recorder) -> None:
        """Measure a recorded step, and decide."""
        schedule = self._schedule
        start = schedule.clock()
        self._recorder = None
        recorder.close()
        self._look()
        # The plan in force is what has to be right; where that is exact, what it would be otherwise.
        is_exact = all(k == 1 for k in self._keeps)
        probe = tuple(s.keep for s in self._sites) if is_exact else self._keeps
        isolated = self._next_isolated()
        measured, reason = None, ""
        try:
            measured = measure(
                self._model,
                recorder,
                self._sites,
                probe,
                isolated,
                self._estimate.ladder,
                schedule.steps,
                self._costs is None,
                _DRAWS if len(self._sites) > 1 else 1,
            )
        except Unmeasurable as problem:
            reason = str(problem)
        finally:
            self._apply(self._keeps)
            self._looks.forget()
        total, replicas = self._shared(measured, recorder.count, start)
        if total is None:
            self._failed(reason or "a gradient was not finite, or SGD's own variance is zero")
            return
        self._failures = 0
        if self._costs is None:
            self._costs = StepCosts.from_work(total.work, self._sites)
        # At least: passes of others between two steps look like micro-batches.
        self._replicas = min(self._replicas or replicas, replicas)
        self._estimate.update(total, probe, isolated, self._replicas, schedule.steps)
        self._decide()

    def _next_isolated(self) -> dict[int, float]:
        """Sites to measure by themselves, and at which keep: new ones first, a few at once, then in turn."""
        n = len(self._sites)
        if n == 1:
            return {}
        new = [i for i in range(n) if not self._estimate.weights[i].terms]
        chosen = new[:_ISOLATED_AT_ONCE] or [self._turn % n]
        self._turn += 0 if new else 1
        keeps = [(i, self._keeps[i]) for i in chosen]
        return {i: self._sites[i].keep if k == 1 else k for i, k in keeps}

    def _shared(
        self, measured: Measured | None, count: int, start: float
    ) -> tuple[Measured | None, int]:
        """The sums over all ranks, and micro-batches in all; the next replay is set by their mean times."""
        now = self._schedule.clock()
        rows = [now - start, self._schedule.seconds_per_step(start), float(count)]
        ranks, (used, per_step, replicas) = summed(rows, self._device)
        layers = list(weight_layers(self._model))
        keeps = len(self._estimate.ladder)
        total = over_ranks(measured, len(self._sites), keeps, layers, self._device)
        self._schedule.replayed(used / ranks, per_step / ranks)
        return total, max(round(replicas), 1)

    def _failed(self, reason: str) -> None:
        self._failures += 1
        if self._estimate.is_known:
            return
        self._schedule.retry()
        if self._failures == _ATTEMPTS:
            self._refuse(f"nothing can be measured: {reason}")

    # --- deciding -------------------------------------------------------------------------------

    def _decide(self) -> None:
        if self._schedule.is_exact_phase or self._costs is None or not self._estimate.is_known:
            return
        situation = self._estimate, self._costs, self._sites
        now_exact = all(k == 1 for k in self._keeps)
        choice = choose_keeps(*situation, self._fixed(), self.target, now_exact)
        if choice.refusal:
            self._refuse(choice.refusal)
            return
        self._refusal = ""
        keeps = self._among_visited(choice, self._costs)
        if keeps == self._keeps:
            return
        if reason := reason_to_move(*situation, self._keeps, keeps, self.target):
            self._move(keeps, reason)

    def _among_visited(self, choice: Choice, costs: StepCosts) -> tuple[float, ...]:
        """The choice, or the best of the plans used before where no new one is allowed."""
        limit = self._max_plans
        if limit is None or choice.keeps in self._visited or len(self._visited) < limit:
            return choice.keeps
        goal = math.inf if self.target is None else BAND[1] * self.target
        fitting = [k for k in self._visited if self._estimate.total(k) <= goal]
        if not fitting:
            return min(self._visited, key=self._estimate.total)
        wanted = 0.0 if self.target is not None else choice.cost
        return min(fitting, key=lambda k: abs(costs.step(self._sites, k) - wanted))

    def _fixed(self) -> dict[int, str]:
        """Sites that run exactly whatever their keep, on one of the ranks at least: the others wait for it."""
        found = {}
        for i, site in enumerate(self._sites):
            if site.is_region and (state := state_of(site.module)).status == "exact":
                found[i] = f"{site.name or 'the model'} runs exactly: {state.reason}"
        _, are = summed([float(i in found) for i in range(len(self._sites))], self._device)
        return {
            i: found.get(i, "a region runs exactly on another rank") for i, n in enumerate(are) if n
        }

    def _refuse(self, reason: str) -> None:
        """Everything exact; the log says so when the kind of reason is new."""
        exact = (1.0,) * len(self._sites)
        if self._keeps != exact or not self._refusal:
            self._refusal = reason
            self._move(exact, f"exact: {reason}")

    def _move(self, keeps: tuple[float, ...], reason: str) -> None:
        before, self._keeps = self._keeps, keeps
        self._apply(keeps)
        if keeps not in self._visited:
            self._visited.append(keeps)
        known = self._estimate.is_known
        omega = self._estimate.total(keeps) if known else None
        beta = self._estimate.noise_scale if known else None
        named = self._named(before), self._named(keeps)
        self._log.append(Change(self._schedule.steps, reason, *named, omega, beta))

    def _apply(self, keeps: Sequence[float]) -> None:
        for site, keep in zip(self._sites, keeps):
            site.set_keep(keep)

    def _check_sites(self) -> None:
        for site, keep in zip(self._sites, self._keeps):
            if not site.has_keep(keep):
                raise RuntimeError(
                    f"Controller.step: the sketch of {site.name or 'the model'} was changed or removed by someone "
                    "else; close this controller and make a new one after bs.sketch_"
                )

    def _named(self, keeps: Sequence[float]) -> dict[str, float]:
        return {site.name: keep for site, keep in zip(self._sites, keeps)}

    @property
    def _device(self) -> torch.device:
        return next((p.device for p in self._model.parameters()), torch.device("cpu"))

    # --- state ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that later decisions depend on, as plain data that ``torch.save`` and JSON hold.

        It changes nothing, and a run that resumes is the run that went on. To be called between two optimizer
        steps, and by every one of several ranks: it gathers their scores since the last look.
        """
        costs = self._costs
        return {
            **self._identity(),
            **self._schedule.state_dict(),
            "replicas": self._replicas,
            "turn": self._turn,
            "failures": self._failures,
            "refusal": self._refusal,
            "keeps": list(self._keeps),
            "visited": [list(keeps) for keeps in self._visited],
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
        self._replicas, self._turn = state["replicas"], state["turn"]
        self._failures, self._refusal = state["failures"], state["refusal"]
        self._keeps = tuple(state["keeps"])
        self._visited = [tuple(keeps) for keeps in state["visited"]]
        self._estimate.load_state_dict(state["estimate"])
        if state["costs"] is not None:
            fixed, live, tiny = state["costs"]
            self._costs = StepCosts(tuple(fixed), tuple(live), tiny)
        self._log = [Change(**change) for change in state["log"]]
        self._apply(self._keeps)
        self._disarm()
        self._looks.load(state.get("traces", []))
        self._arm()

    def _identity(self) -> dict[str, Any]:
        """What a state must have been made with."""
        sites = [site.name for site in self._sites]
        return {"sites": sites, "target": self.target, "ladder": list(self._estimate.ladder)}
