"""``bs.Controller``: keeps the extra variance where it should be while a model trains."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from backsketch.planning.control.calibration import Measured, Unmeasurable, measure, over_ranks
from backsketch.planning.control.decision import Choice, Costs, choose_keeps
from backsketch.planning.control.estimate import Estimate
from backsketch.planning.control.ranks import gathered, own, summed
from backsketch.planning.control.sites import Site, Spread, Watch, find_sites, spread, weight_layers
from backsketch.planning.measure.replay import Recorder
from backsketch.planning.profiling.families import FINE_LADDER
from backsketch.planning.profiling.records import Profile
from backsketch.regions import Region, ignore_scores, record_scores, state_of
from backsketch.rules import unwrap
from backsketch.theory.advice import effective_batch, learning_rate_factor

__all__ = ["Change", "Controller"]

_LOOKS = 20  # steps between two looks at the row scores, fewer at the start
_BAND = (0.75, 1.25)  # of the target, within which a change must save something
_WORTH = 0.02  # of a step's cost
_TRACED = 2**20  # rows
_ATTEMPTS = 3
_ALONE_AT_ONCE = 8
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
        profile: Profile | None = None,
        warmup: int = 0,
        finish: int = 0,
        total_steps: int | None = None,
        interval: int | None = None,
        overhead: float = 0.01,
        max_plans: int | None = None,
    ) -> None:
        self._model = unwrap(model)
        self._sites = find_sites(self._model)
        _check(target_extra_variance, warmup, finish, total_steps, interval, overhead, max_plans)
        if not self._sites:
            raise ValueError(
                "Controller: the model has no sketch with a keep to move; call bs.sketch_(model, ...) first, with "
                "regions, masks, or estimators such as bs.Rows"
            )
        self._called = _called(model)
        if max_plans is None and self._called is not self._model:
            max_plans = _COMPILED_PLANS
        self.target = target_extra_variance
        self._warmup, self._total = warmup, total_steps
        self._exact_from = None if not finish or total_steps is None else total_steps - finish
        self._interval, self._overhead, self._max_plans = interval, overhead, max_plans
        self._costs = None if profile is None else Costs.from_profile(profile, self._sites)
        ladder = sorted({*FINE_LADDER, *(s.keep for s in self._sites)}, reverse=True)
        whole = len(self._sites) == 1 and not (self._sites[0].name or self._sites[0].is_layer)
        self._estimate = Estimate(tuple(ladder), len(self._sites), whole)
        self._steps, self._due, self._gap = 0, max(warmup, 1), 1
        self._failures, self._spent, self._look = 0, 0.0, 0
        self._began: float | None = None
        self._first = 0  # step at which the clock began
        self._refusal = ""
        self._keeps = tuple(s.keep for s in self._sites)
        self._visited = [self._keeps]
        self._log: list[Change] = []
        self._recorder: Recorder | None = None
        self._watches: dict[int, Watch] = {}
        self._traces: dict[int, deque[torch.Tensor]] = {}
        for i, site in enumerate(self._sites):
            self._trace(site, i, _LOOKS)
        self._replicas = self._turn = 0
        self._closed = False
        if warmup:
            self._move((1.0,) * len(self._sites), f"exact warm-up of {warmup} steps")
        self._rearm()

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
        return "\n".join([f"after {self._steps} steps, {goal}", *rows, self.advice, *last])

    # --- what it does ---------------------------------------------------------------------------

    def step(self) -> None:
        """To be called once per optimizer step, after the backward pass; best before ``optimizer.step()``.

        Of several ranks, every one calls it: what is measured is summed, so that all have the same keeps.

        Raises:
            RuntimeError: after :meth:`close`, or if the model was restored or sketched anew since.
        """
        if self._closed:
            raise RuntimeError("Controller.step: this controller is closed")
        if self._began is None:
            self._began, self._first = time.perf_counter(), self._steps
        self._steps += 1
        if self._recorder is not None:
            self._calibrate(self._recorder)
        elif self._steps >= self._look and not self._is_exact_phase:
            self._follow()
            self._decide()
        if self._steps == self._exact_from:
            self._move((1.0,) * len(self._sites), "exact finish")
            self._disarm()
        self._rearm()

    def close(self) -> None:
        """Remove its hooks; the keeps stay as they are."""
        self._closed = True
        self._disarm()
        for i in self._traces:
            ignore_scores(self._sites[i].module)

    def __enter__(self) -> Controller:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def _is_exact_phase(self) -> bool:
        return self._steps < self._warmup or self._is_finishing

    @property
    def _is_finishing(self) -> bool:
        return self._exact_from is not None and self._steps >= self._exact_from

    def _rearm(self) -> None:
        """Hooks for the next step, where it is one to look at."""
        if self._recorder is not None or self._is_finishing:
            return
        if self._steps + 1 >= self._due:
            self._recorder = Recorder(self._called)
        elif self._steps + 1 >= self._look and not self._is_exact_phase:
            self._watch()

    def _disarm(self) -> None:
        """Remove all hooks, and forget what was seen with them and without."""
        for watch in self._watches.values():
            watch.close()
        self._watches.clear()
        for trace in self._traces.values():
            trace.clear()
        if self._recorder is not None:
            self._recorder.close()
            self._recorder = None

    # --- measuring ------------------------------------------------------------------------------

    def _calibrate(self, recorder: Recorder) -> None:
        start = time.perf_counter()
        self._recorder = None
        recorder.close()
        self._follow()
        # The plan in force is what has to be right; where that is exact, what it would be otherwise.
        is_exact = all(k == 1 for k in self._keeps)
        probe = tuple(s.keep for s in self._sites) if is_exact else self._keeps
        alone = self._next_alone()
        measured, reason = None, ""
        try:
            measured = measure(
                self._model,
                recorder,
                self._sites,
                probe,
                alone,
                self._estimate.ladder,
                self._steps,
                self._costs is None,
                _DRAWS if len(self._sites) > 1 else 1,
            )
        except Unmeasurable as problem:
            reason = str(problem)
        finally:
            self._apply(self._keeps)
            for trace in self._traces.values():
                trace.clear()
        seconds = time.perf_counter() - start
        total, replicas, per_step, seconds = self._shared(measured, recorder.count, seconds)
        self._spent += seconds
        self._schedule(seconds, per_step)
        if total is None:
            if not self._estimate.is_known:
                self._gap, self._due = 1, self._steps + 1
            self._failed(reason or "a gradient was not finite, or SGD's own variance is zero")
            return
        self._failures = 0
        if self._costs is None:
            self._costs = Costs.from_work(total.work, self._sites)
        # At least: passes of others between two steps look like micro-batches.
        self._replicas = min(self._replicas or replicas, replicas)
        self._estimate.update(total, probe, alone, self._replicas, self._steps)
        self._decide()

    def _next_alone(self) -> dict[int, float]:
        """Sites to measure alone, and at which keep: those that never were, a few at once, then in turn."""
        n = len(self._sites)
        if n == 1:
            return {}
        new = [i for i in range(n) if not self._estimate.weights[i].terms]
        chosen = new[:_ALONE_AT_ONCE] or [self._turn % n]
        self._turn += 0 if new else 1
        keeps = [(i, self._keeps[i]) for i in chosen]
        return {i: self._sites[i].keep if k == 1 else k for i, k in keeps}

    def _shared(
        self, measured: Measured | None, count: int, seconds: float
    ) -> tuple[Measured | None, int, float, float]:
        """The sums over all ranks, micro-batches in all, seconds per step and of this measurement."""
        assert self._began is not None
        elapsed = time.perf_counter() - self._began - seconds - self._spent
        rows = [seconds, max(elapsed, 0.0) / (self._steps - self._first), float(count)]
        ranks, (used, per_step, replicas) = summed(rows, self._device)
        total = over_ranks(
            measured,
            len(self._sites),
            len(self._estimate.ladder),
            list(weight_layers(self._model)),
            self._device,
        )
        return total, max(round(replicas), 1), per_step / ranks, used / ranks

    def _schedule(self, seconds: float, per_step: float) -> None:
        """Steps to the next measurement: twice the last gap, until that is the interval."""
        most = self._interval
        if most is None:
            most = math.ceil(seconds / max(self._overhead * per_step, 1e-9))
        self._gap = max(1, min(2 * self._gap, most))
        self._due = self._steps + self._gap

    def _failed(self, reason: str) -> None:
        self._failures += 1
        if self._failures == _ATTEMPTS and not self._estimate.is_known:
            self._refuse(f"nothing can be measured: {reason}")

    def _follow(self) -> None:
        """Take the row scores of the last backward passes into account."""
        self._check_sites()
        self._look = self._steps + min(_LOOKS, 1 + (self._steps - self._warmup) // 40)
        width = 2 + len(self._estimate.ladder)
        rows: list[float] = []
        for i in range(len(self._sites)):
            found = self._seen(i)
            rows += [found.count, found.energy, *found.errors] if found else [0.0] * width
        self._watches.clear()
        _, rows = summed(rows, self._device)
        spreads = {}
        for i in range(len(self._sites)):
            count, energy, *errors = rows[i * width : (i + 1) * width]
            if math.isfinite(energy + sum(errors)):
                spreads[i] = Spread(tuple(errors), energy, max(round(count), 1))
        self._estimate.follow(spreads, self._steps)

    def _seen(self, index: int) -> Spread | None:
        """What the last backward passes showed of a site: the scores that it traced, or those of a hook."""
        site, ladder = self._sites[index], self._estimate.ladder
        if index in self._watches:
            self._watches[index].close()
            return self._watches[index].spread(ladder)
        trace = self._traces.get(index)
        if not trace:
            return None
        last = trace[-1]
        scores = torch.stack([t.to(last) for t in trace if t.shape == last.shape])
        trace.clear()
        length = min(max(_TRACED // last.shape[0], 1), _LOOKS)
        if trace.maxlen != length:
            self._trace(site, index, length)
        return spread(scores, ladder)

    def _trace(self, site: Site, index: int, length: int) -> None:
        if isinstance(site.base, Region):
            self._traces[index] = record_scores(site.module, length)

    def _watch(self) -> None:
        """Hooks for one step where no region computes scores; none inside a compiled model."""
        if self._called is self._model and not self._watches:
            for i, (site, keep) in enumerate(zip(self._sites, self._keeps)):
                if keep == 1 or not isinstance(site.base, Region):
                    self._watches[i] = Watch(site)

    # --- deciding -------------------------------------------------------------------------------

    def _decide(self) -> None:
        if self._steps < self._warmup or self._is_finishing or self._costs is None:
            return
        if not self._estimate.is_known:
            return
        now_exact = all(k == 1 for k in self._keeps)
        choice = choose_keeps(
            self._estimate, self._costs, self._sites, self._fixed(), self.target, now_exact
        )
        if choice.refusal:
            self._refuse(choice.refusal)
            return
        self._refusal = ""
        keeps = self._among_visited(choice)
        if keeps == self._keeps:
            return
        if reason := self._reason(keeps, now_exact):
            self._move(keeps, reason)

    def _reason(self, keeps: tuple[float, ...], now_exact: bool) -> str:
        """Why these keeps are worth a change; empty where they are not."""
        assert self._costs is not None
        if now_exact:
            return "sketches pay"
        omega, then = self._estimate.total(self._keeps), self._estimate.total(keeps)
        cost, less = (self._costs.step(self._sites, k) for k in (self._keeps, keeps))
        if self.target is not None:
            low, high = (f * self.target for f in _BAND)
            if not low <= omega <= high and abs(then - self.target) < abs(omega - self.target):
                return f"extra variance {omega:.3f} left the band {low:.3g} to {high:.3g}"
        else:
            beta = self._estimate.noise_scale
            pays = [
                c * (v if math.isinf(beta) else (1 + beta * v) / (1 + beta))
                for c, v in ((cost, 1 + omega), (less, 1 + then))
            ]
            if pays[0] - pays[1] >= _WORTH:
                return f"time to a target falls from {pays[0]:.3f} to {pays[1]:.3f} of exact"
            return ""
        if cost - less >= _WORTH:
            return f"a step costs {less:.3f} of exact instead of {cost:.3f}"
        return ""

    def _among_visited(self, choice: Choice) -> tuple[float, ...]:
        """The choice, or the best of the plans used before where no new one is allowed."""
        assert self._costs is not None
        limit = self._max_plans
        if limit is None or choice.keeps in self._visited or len(self._visited) < limit:
            return choice.keeps
        goal = math.inf if self.target is None else _BAND[1] * self.target
        fitting = [k for k in self._visited if self._estimate.total(k) <= goal]
        costs, sites = self._costs, self._sites
        if not fitting:
            return min(self._visited, key=self._estimate.total)
        if self.target is not None:
            return min(fitting, key=lambda k: costs.step(sites, k))
        return min(fitting, key=lambda k: abs(costs.step(sites, k) - choice.cost))

    def _fixed(self) -> dict[int, str]:
        """Sites that run exactly whatever their keep, on one of the ranks at least: the others wait for it."""
        found = {}
        for i, site in enumerate(self._sites):
            if isinstance(site.base, Region) and (state := state_of(site.module)).status == "exact":
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
        self._log.append(
            Change(
                self._steps,
                reason,
                self._named(before),
                self._named(keeps),
                self._estimate.total(keeps) if known else None,
                self._estimate.noise_scale if known else None,
            )
        )

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
        traces = [[i, t.maxlen, [s.tolist() for s in t]] for i, t in self._traces.items()]
        return {
            "sites": [site.name for site in self._sites],
            "target": self.target,
            "ladder": list(self._estimate.ladder),
            "steps": self._steps,
            "due": self._due,
            "gap": self._gap,
            "look": self._look,
            "replicas": self._replicas,
            "turn": self._turn,
            "failures": self._failures,
            "refusal": self._refusal,
            "keeps": list(self._keeps),
            "visited": [list(keeps) for keeps in self._visited],
            "estimate": self._estimate.state_dict(),
            "costs": None if costs is None else [list(costs.fixed), list(costs.live), costs.tiny],
            "traces": gathered(traces),
            "log": [asdict(change) for change in self._log],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`, on a model that was sketched by the same rules.

        With another number of ranks the scores since the last look are forgotten.

        Raises:
            ValueError: it belongs to other sites or another target; nothing is changed then.
        """
        mine = {
            "sites": [site.name for site in self._sites],
            "target": self.target,
            "ladder": list(self._estimate.ladder),
        }
        for key, value in mine.items():
            if state.get(key) != value:
                raise ValueError(
                    f"Controller.load_state_dict: made with {key} {state.get(key)}, not {value}"
                )
        self._steps, self._due, self._gap = state["steps"], state["due"], state["gap"]
        self._look, self._replicas, self._turn = (state[k] for k in ("look", "replicas", "turn"))
        self._failures, self._refusal = state["failures"], state["refusal"]
        self._keeps = tuple(state["keeps"])
        self._visited = [tuple(keeps) for keeps in state["visited"]]
        self._estimate.load_state_dict(state["estimate"])
        if state["costs"] is not None:
            fixed, live, tiny = state["costs"]
            self._costs = Costs(tuple(fixed), tuple(live), tiny)
        self._log = [Change(**change) for change in state["log"]]
        self._began, self._spent = None, 0.0
        self._apply(self._keeps)
        self._disarm()
        for index, length, vectors in own(state.get("traces", [])) or []:
            self._trace(self._sites[index], index, length)
            if (trace := self._traces.get(index)) is not None:
                # In float64, which holds them exactly whatever type they had.
                trace.extend(torch.tensor(v, dtype=torch.float64) for v in vectors)
        self._rearm()


def _called(model: nn.Module) -> nn.Module:
    """The module whose calls can be recorded: the compiled one where there is one, else the user's own."""
    while "_orig_mod" not in model._modules:
        inner = model._modules.get("module")
        if not isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            break
        assert inner is not None
        model = inner
    if getattr(model, "_compiled_call_impl", None) is not None:
        raise ValueError(
            "Controller: the model was compiled in place by model.compile(), which hides its calls; use "
            "model = torch.compile(model) and give that to the controller"
        )
    return model


def _check(
    target: Any, warmup: Any, finish: Any, total: Any, interval: Any, overhead: Any, plans: Any
) -> None:
    def number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool)

    problems = []
    if target is not None and not (number(target) and 0 < target < math.inf):
        problems.append(f"target_extra_variance must be positive, or None; got {target!r}")
    counts = {"warmup": (warmup, 0), "finish": (finish, 0), "total_steps": (total, 1)}
    counts |= {"interval": (interval, 1), "max_plans": (plans, 1)}
    for name, (value, least) in counts.items():
        optional = value is None and name not in ("warmup", "finish")
        if not optional and not (number(value) and value == int(value) and value >= least):
            problems.append(f"{name} must be a whole number of at least {least}; got {value!r}")
    if not (number(overhead) and 0 < overhead < 1):
        problems.append(f"overhead must lie in (0, 1); got {overhead!r}")
    if not problems and finish and (total is None or warmup + finish > total):
        problems.append(
            f"finish needs total_steps, of at least warmup + finish; got total_steps={total!r}"
        )
    if problems:
        raise ValueError("Controller: " + "; ".join(problems))
