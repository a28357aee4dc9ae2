"""One training under a callback: sketched, profiled, controlled and measured, whatever the trainer is."""

from __future__ import annotations

import base64
import json
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from backsketch.convert import restore_, sketch_
from backsketch.estimators import parse
from backsketch.integrations.calls import Outermost
from backsketch.integrations.metrics import Metrics
from backsketch.integrations.settings import Settings
from backsketch.nn.swap import is_swapped
from backsketch.planning import Controller, Profile, auto_plan, profile
from backsketch.planning.control.ranks import gathered, own
from backsketch.planning.control.sites import movable_sites
from backsketch.planning.measure.recorder import unseen
from backsketch.planning.measure.step import warm
from backsketch.report import Report
from backsketch.rules import unwrap
from backsketch.sampling import get_rng_state, seed, set_rng_state

__all__ = ["Session"]

_BATCHES = 2
_MOST_EXACT = 50

LossFn = Callable[[nn.Module, Any], Tensor]


class Session:
    """What a callback does in a training, between its first step and its last.

    Args:
        settings: what the user asked for.
        model: as it is called, in the trainer's wrappers.
        loss_fn: ``loss_fn(model, batch)`` is the trainer's own loss of what :meth:`saw` was given.
        total_steps: optimizer steps of the training; negative where nobody knows.
        state: of :meth:`state_dict`, to continue from.
        follow_calls: the trainer calls a part of the model, or the model by another method: a controller waits
            until the first step has shown what is called.

    Attributes:
        report: of the sketches; None before the profile of ``"auto"``, and where that found exact training best.
        controller: None where no keep is to be moved.
        reason: what the plan of ``"auto"`` said.

    Raises:
        ValueError: the model is sketched already, or a rule matches nothing.
    """

    def __init__(
        self,
        settings: Settings,
        model: nn.Module,
        loss_fn: LossFn,
        total_steps: int,
        state: Mapping[str, Any] | None = None,
        follow_calls: bool = False,
    ) -> None:
        self.settings, self.loss_fn = settings, loss_fn
        self.called, self.model = model, unwrap(model)
        self.report: Report | None = None
        self.controller: Controller | None = None
        self.reason = ""
        self._calls = Outermost(self.model) if follow_calls else None
        self._profile: Profile | None = None
        self.batches: deque[Any] = deque(maxlen=_BATCHES)
        self._is_chosen = not settings.is_auto
        self._exact_first = min(max(total_steps // 50, 2), _MOST_EXACT)
        self._is_warm = True
        self.metrics = Metrics(self)
        self._refuse_sketched()
        if settings.seed is not None:
            seed(settings.seed)
        if state is not None:
            self._resume(state)
        elif not settings.is_auto:
            self._sketch(settings.rules(self.model))

    def _refuse_sketched(self) -> None:
        names = [name for name, module in self.model.named_modules() if is_swapped(module)]
        if names:
            raise ValueError(
                f"SketchCallback: the model is sketched already ({names[0] or 'the model itself'}"
                f"{f' and {len(names) - 1} others' if len(names) > 1 else ''}): by bs.sketch_, or by another "
                "SketchCallback. Call bs.restore_(model), or leave the callback out; the sketches work without it"
            )

    # --- in the training loop ---------------------------------------------------------------------

    def saw(self, batch: Any) -> None:
        """To be called with what the loss function takes, before each forward pass of the training."""
        self.batches.append(batch)
        if (
            not self._is_warm
        ):  # regions are captured now, as they would have been in the run that went on
            self._is_warm = True
            with unseen(self.model):
                warm(self.model, batch, self.loss_fn)

    def before_step(self, step: int) -> None:
        """To be called before each optimizer step's first batch; ``step`` counts those that were made."""
        if not self._is_chosen and step >= self._exact_first:
            self._choose()

    def before_update(self) -> None:
        """To be called once for each optimizer step, between the backward pass and the update."""
        if self.controller is not None:
            self.controller.step()
        elif self._calls is not None and self.report is not None:
            found = self._calls.close()
            self._calls = None
            self.called = self.model.get_submodule(found or "")
            self._control()

    def close(self) -> None:
        """The model becomes the plain one."""
        if self._calls is not None:
            self._calls.close()
        if self.controller is not None:
            self.controller.close()
        restore_(self.model)

    # --- what to sketch ---------------------------------------------------------------------------

    def _choose(self) -> None:
        """Profile the model on the last batches, and take the plan that follows."""
        if len(self.batches) < _BATCHES:
            raise ValueError(
                f"SketchCallback: 'auto' needs the loss of {_BATCHES} batches and saw {len(self.batches)}: this "
                "trainer does not compute its loss where others do. Give a sketch, such as sketch='int8'"
            )
        found: Profile | None = None
        try:
            found = profile(self.model, list(self.batches), self.loss_fn, progress=False)
            plan = auto_plan(found)
            rules, reason = dict(plan.texts), plan.reason or str(plan.predicted)
        except ValueError as error:
            if "nothing to sketch" not in str(error):
                raise ValueError(
                    "SketchCallback: 'auto' could not measure the trainer's loss; give a sketch instead, such as "
                    f"sketch='int8'. {error}"
                ) from error
            rules, reason = {}, str(error)
        # Times differ between processes: all take those of the first.
        rules, self.reason, found = gathered((rules, reason, found))[0]
        self._is_chosen = True
        if rules:
            self._sketch({pattern: parse(text) for pattern, text in rules.items()}, found)

    def _sketch(self, rules: Any, found: Profile | None = None) -> None:
        self.report = sketch_(self.model, rules, strict=self.settings.strict)
        self._profile = found
        if self._calls is None:
            self._control()

    def _control(self) -> None:
        if self.settings.target is None:
            return
        if movable_sites(self.model):
            self.controller = Controller(
                self.called,
                self.settings.target,
                profile=self._profile,
                interval=self.settings.interval,
            )
        elif not self.settings.is_auto:
            restore_(self.model)
            raise ValueError(
                "SketchCallback: target_extra_variance needs a sketch with a keep to move, such as "
                "'rows:keep=0.5'; leave it out"
            )

    # --- what a checkpoint holds ------------------------------------------------------------------

    @property
    def rules(self) -> dict[str, str] | None:
        """The sketches by the names of their modules, as texts; None while ``"auto"`` has not decided."""
        if not self._is_chosen:
            return None
        if self.report is None:
            return {}
        return {site.name: str(site.sketch) for site in self.report if site.sketch is not None}

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the training depends on, plain data; every one of several ranks must call this."""
        control = None if self.controller is None else _packed(self.controller.state_dict())
        return {
            "rules": self.rules,
            "reason": self.reason,
            "controller": control,
            "called": self._name_of_called(),
            "random": gathered(get_rng_state()),
            "metrics": self.metrics.state_dict(),
        }

    def _name_of_called(self) -> str | None:
        """None where the first step has not shown it."""
        if self._calls is not None:
            return None
        return next((n for n, m in self.model.named_modules() if m is self.called), "")

    def _resume(self, state: Mapping[str, Any]) -> None:
        rules = state["rules"]
        if self._calls is not None and state["called"] is not None:
            self._calls.close()
            self._calls, self.called = None, self.model.get_submodule(state["called"])
        if self.settings.is_auto and rules is not None:
            self._is_chosen, self.reason = True, state["reason"]
            if rules:
                self._sketch({pattern: parse(text) for pattern, text in rules.items()})
        elif not self.settings.is_auto:
            self._sketch(self.settings.rules(self.model))
            if self.rules != rules:
                warnings.warn(
                    "SketchCallback: the checkpoint was made with other sketches; the training goes on with those "
                    "that were given now",
                    stacklevel=2,
                )
        self._is_warm = self.report is None
        if self.controller is not None and state["controller"] is not None and self.rules == rules:
            self.controller.load_state_dict(_unpacked(state["controller"]))
        self.metrics.load_state_dict(state["metrics"])
        stream = own(state["random"])
        if stream is not None:
            set_rng_state(stream)


def _packed(state: Any) -> str:
    """Plain data as a short text: row scores are many numbers."""
    return base64.b85encode(zlib.compress(json.dumps(state).encode())).decode()


def _unpacked(text: str) -> Any:
    return json.loads(zlib.decompress(base64.b85decode(text)))
