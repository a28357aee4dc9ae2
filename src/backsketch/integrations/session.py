"""One training under a callback: sketched, controlled and measured, whatever the trainer is."""

from __future__ import annotations

import base64
import json
import warnings
import zlib
from collections import deque
from collections.abc import Mapping
from typing import Any

from torch import nn

from backsketch.convert import restore_, sketch_
from backsketch.integrations.calls import Outermost
from backsketch.integrations.metrics import Metrics
from backsketch.integrations.settings import Settings
from backsketch.nn.swap import is_swapped
from backsketch.planning import Auto, Controller
from backsketch.planning.auto.proposals import PROFILE_BATCHES
from backsketch.planning.control.ranks import gathered, own
from backsketch.planning.control.sites import movable_sites
from backsketch.planning.measure.passes import LossFn
from backsketch.planning.measure.recorder import unseen
from backsketch.planning.measure.step import warm
from backsketch.report import Report
from backsketch.rules import unwrap
from backsketch.sampling import get_rng_state, seed, set_rng_state

__all__ = ["Session"]


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
        auto: that chooses the sketches; None where they were given.
        batches: the last ones that the loss function was called with.

    Raises:
        ValueError: the model is sketched already, or a rule matches nothing.
    """

    def __init__(
        self,
        settings: Settings,
        model: nn.Module,
        loss_fn: LossFn[Any],
        total_steps: int,
        state: Mapping[str, Any] | None = None,
        follow_calls: bool = False,
    ) -> None:
        self.settings, self.loss_fn = settings, loss_fn
        self.called, self.model = model, unwrap(model)
        self.auto: Auto | None = None
        self._report: Report | None = None
        self._controller: Controller | None = None
        self._calls = Outermost(self.model) if follow_calls else None
        self.batches: deque[Any] = deque(maxlen=PROFILE_BATCHES)
        self._is_warm = True
        self.metrics = Metrics(self)
        self._refuse_sketched()
        if settings.seed is not None:
            seed(settings.seed)
        if settings.is_auto:
            self.auto = self._made_auto(total_steps if total_steps > 0 else None)
        else:
            self._sketch(settings.rules(self.model))
        if state is not None:
            self._resume(state)

    def _made_auto(self, total_steps: int | None) -> Auto:
        """What is called is told later, where that is not known yet."""
        target = self.settings.target
        assert target is not None
        return Auto(
            self.called,
            self.batches,
            self.loss_fn,
            total_steps,
            target_extra_variance=target,
            interval=self.settings.interval,
        )

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
        is_exact = self.auto is not None and self.auto.is_exact
        if not (self._is_warm or is_exact):
            # Regions are captured now, as they would have been in the run that went on.
            self._is_warm = True
            with unseen(self.model):
                warm(self.model, batch, self.loss_fn)

    def before_step(self) -> None:
        """To be called before each optimizer step's first batch.

        Raises:
            ValueError: ``"auto"`` is to measure the trainer's loss, and cannot.
        """
        if self.auto is None:
            return
        try:
            self.auto.step()
        except ValueError as error:
            if len(self.batches) < PROFILE_BATCHES:
                raise ValueError(
                    f"SketchCallback: 'auto' needs the loss of {PROFILE_BATCHES} batches and saw "
                    f"{len(self.batches)}: this trainer does not compute its loss where others do. Give a sketch, "
                    "such as sketch='int8'"
                ) from error
            raise ValueError(
                "SketchCallback: 'auto' could not measure the trainer's loss; give a sketch instead, such as "
                f"sketch='int8'. {error}"
            ) from error

    def before_update(self) -> None:
        """To be called once for each optimizer step, between the backward pass and the update."""
        if self._calls is not None:
            self._follow(self._calls)
        elif self._controller is not None:
            self._controller.step()
        if self.auto is not None:
            self.auto.control()

    def after_step(self) -> None:
        """To be called at the end of each optimizer step, before anything is logged, looked at or saved."""
        if self.auto is not None:
            self.auto.stop()

    def close(self) -> None:
        """The model becomes the plain one."""
        if self._calls is not None:
            self._calls.close()
        for part in (self._controller, self.auto):
            if part is not None:
                part.close()
        restore_(self.model)

    # --- what is sketched -------------------------------------------------------------------------

    @property
    def report(self) -> Report | None:
        """Of the sketches; None where the steps are exact."""
        return self._report if self.auto is None else self.auto.report

    @property
    def controller(self) -> Controller | None:
        """None where no keep is to be moved."""
        return self._controller if self.auto is None else self.auto.controller

    @property
    def reason(self) -> str:
        """What ``"auto"`` has to say."""
        return "" if self.auto is None else self.auto.reason

    @property
    def rules(self) -> dict[str, str] | None:
        """The given sketches by the names of their modules, as texts; None for ``"auto"``."""
        if self._report is None:
            return None
        return {site.name: str(site.sketch) for site in self._report if site.sketch is not None}

    def _sketch(self, rules: Any) -> None:
        self._report = sketch_(self.model, rules, strict=self.settings.strict)
        if self.settings.target is not None and not movable_sites(self.model):
            restore_(self.model)
            raise ValueError(
                "SketchCallback: target_extra_variance needs a sketch with a keep to move, such as "
                "'rows:keep=0.5'; leave it out"
            )
        if self._calls is None:
            self._control()

    def _follow(self, calls: Outermost) -> None:
        """The first step has shown what is called."""
        self._found(calls.close() or "")
        self._control()

    def _found(self, name: str) -> None:
        self._calls, self.called = None, self.model.get_submodule(name)
        if self.auto is not None:
            self.auto.called = self.called

    def _control(self) -> None:
        if self.auto is None and self.settings.target is not None:
            settings = self.settings
            self._controller = Controller(self.called, settings.target, interval=settings.interval)

    # --- what a checkpoint holds ------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the training depends on, plain data; every one of several ranks must call this."""
        auto, control = self.auto, self._controller
        return {
            "rules": self.rules,
            "auto": None if auto is None else _packed(auto.state_dict()),
            "controller": None if control is None else _packed(control.state_dict()),
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
        if self._calls is not None and state["called"] is not None:
            self._calls.close()
            self._found(state["called"])
            self._control()
        if self.auto is not None:
            if state["auto"] is not None:
                self.auto.load_state_dict(_unpacked(state["auto"]))
        elif self.rules != state["rules"]:
            warnings.warn(
                "SketchCallback: the checkpoint was made with other sketches; the training goes on with those "
                "that were given now",
                stacklevel=2,
            )
        elif self._controller is not None and state["controller"] is not None:
            self._controller.load_state_dict(_unpacked(state["controller"]))
        self._is_warm = self.report is None
        self.metrics.load_state_dict(state["metrics"])
        stream = own(state["random"])
        if stream is not None:
            set_rng_state(stream)


def _packed(state: Any) -> str:
    """Plain data as a short text: row scores are many numbers."""
    return base64.b85encode(zlib.compress(json.dumps(state).encode())).decode()


def _unpacked(text: str) -> Any:
    return json.loads(zlib.decompress(base64.b85decode(text)))
