"""``--sketch auto``: some exact steps, a profile of the model as it is then, and a controller from there on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list

import backsketch as bs
from backsketch.planning.record import Option, SlotProfile
from backsketch.planning.sites import Site, find_sites
from backsketch.train import measure

if TYPE_CHECKING:
    from backsketch.train.loop import Trainer

__all__ = ["AUTO", "Auto"]

AUTO = "auto"
PROFILE_BATCHES = 2  # the controller measures the noise again, and goes on measuring it
INTERVAL = 300  # steps between its replays; a number, so that a resumed run is the same run
TARGET = 0.05
_START = 0.5  # the keep that a place begins with
_LEAST = 0.02  # of a step's time, to be saved at a place


class Auto:
    """Finds and controls the sketches of one run.

    Attributes:
        target: extra variance that the controller aims at.
        rules: pattern to text of a sketch; empty where the run is exact, None before the profile.
        reason: why it is exact, or what the plan said.
        seconds: what the profile took; they are part of the training's.
        steps_at: how many steps were made at which keeps of the sketched places, the exact first ones apart.
    """

    def __init__(self, total_steps: int) -> None:
        # All of Dynamo comes in with it: seconds that belong to the preparation, not to the training.
        from backsketch.regions import capture  # noqa: F401

        self.start = min(max(total_steps // 50, 1), 50)
        self.target = TARGET
        self.rules: dict[str, str] | None = None
        self.reason = ""
        self.seconds = 0.0
        self.steps_at: Counter[tuple[float, ...]] = Counter()
        self.controller: bs.Controller | None = None

    def before(self, trainer: Trainer) -> None:
        """To be called before every step; the one after the warm-up begins with the profile."""
        steps = trainer.epoch * trainer.batches.steps_per_epoch + trainer.step
        if self.rules is None and steps >= self.start:
            began = trainer.now()
            self._choose(trainer)
            self.seconds = trainer.now() - began

    def after(self) -> None:
        """To be called between the backward pass and the optimizer's step."""
        if self.rules:
            self.steps_at[self._keeps()] += 1
        if self.controller is not None:
            self.controller.step()

    def mean_arithmetic(self, trainer: Trainer) -> float:
        """Matrix products of the backward passes over those of exact ones, the mean over the steps of the run."""
        core, batch = trainer.core, trainer.micro_batch(0, 0)
        with bs.exact(core):
            exact = measure.backward_flops(core, batch, trainer.loss)
        steps = len(trainer.history.losses)
        arithmetic = float(steps - self.steps_at.total())
        sites, now = find_sites(core), self._keeps()
        for keeps, count in self.steps_at.items():
            _set(sites, keeps)
            arithmetic += count * measure.backward_flops(core, batch, trainer.loss) / exact
        _set(sites, now)
        return arithmetic / steps

    def _keeps(self) -> tuple[float, ...]:
        return () if self.controller is None else tuple(self.controller.keeps.values())

    def _choose(self, trainer: Trainer) -> None:
        last = trainer.batches.steps_per_epoch
        steps = [(trainer.step + i) % last for i in range(PROFILE_BATCHES)]
        batches = [trainer.micro_batch(trainer.epoch, step) for step in steps]
        profile = None
        try:
            profile = bs.profile(trainer.core, batches, trainer.loss, progress=False)
            rules, reason = _structure(profile)
        except ValueError as error:  # nothing to sketch, say
            rules, reason = {}, str(error)
        # Times differ between processes: all take those of the first.
        (found,) = broadcast_object_list([(rules, reason, profile)])
        self.rules, self.reason, profile = found
        if self.rules:
            self._apply(trainer, profile)

    def _apply(self, trainer: Trainer, profile: bs.Profile | None) -> None:
        assert self.rules is not None
        bs.sketch_(trainer.core, {pattern: bs.parse(text) for pattern, text in self.rules.items()})
        if find_sites(trainer.core):  # rounding has no keep to move
            self.controller = bs.Controller(
                trainer.model, self.target, profile=profile, interval=INTERVAL
            )

    def result(self) -> dict[str, Any]:
        """What there is to tell, with plain values."""
        found: dict[str, Any] = {
            "plan": self.rules or {},
            "reason": self.reason,
            "profile_seconds": self.seconds,
            "exact_steps_before": self.start,
        }
        if self.controller is not None:
            control = self.controller
            found |= {"keeps": control.keeps, "log": [str(change) for change in control.log]}
            found |= {"estimated_extra_variance": control.extra_variance, "advice": control.advice}
        return found

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the run depends on."""
        control = self.controller
        return {
            "rules": self.rules,
            "reason": self.reason,
            "seconds": self.seconds,
            "steps_at": [[list(keeps), count] for keeps, count in self.steps_at.items()],
            "controller": None if control is None else control.state_dict(),
        }

    def load_state_dict(self, trainer: Trainer, state: Mapping[str, Any]) -> None:
        """Continue; the regions prove themselves at once, as they had in the run that was saved."""
        self.rules, self.reason, self.seconds = (state[k] for k in ("rules", "reason", "seconds"))
        self.steps_at = Counter({tuple(keeps): count for keeps, count in state.get("steps_at", [])})
        if self.rules:
            self._apply(trainer, None)
            trainer.prove()
        if self.controller is not None:
            self.controller.load_state_dict(state["controller"])


def _set(sites: Sequence[Site], keeps: Sequence[float]) -> None:
    for site, keep in zip(sites, keeps):  # none where nothing can be moved
        site.set_keep(keep)


def _structure(profile: bs.Profile) -> tuple[dict[str, str], str]:
    """The profile's plan; where that is exact, the sketches that save time, to be switched on later."""
    plan = profile.plan()
    if not plan.is_exact:
        return dict(plan.texts), str(plan.predicted)
    rules: dict[str, str] = {}
    for slot in profile.slots:
        found = _fastest(slot)
        if found is not None and found.seconds() < -_LEAST * profile.step_seconds:
            rules |= next(
                o.rules for o in slot.options if (o.family, o.keep) == (found.family, _START)
            )
    if not rules:
        return {}, f"no sketch saves time on this device; {plan.reason}"
    return rules, f"at first {plan.reason}"


def _fastest(slot: SlotProfile) -> Option | None:
    # Recomputing saves bytes; where it seems to save more time than saving, that is noise.
    keeps = [o for o in slot.options if o.keep < _START and o.family != "recompute"]
    return min(keeps, key=lambda o: o.seconds(), default=None)
