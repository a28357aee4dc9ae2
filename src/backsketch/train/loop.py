"""A trainer: one model, exact or sketched, trained from a configuration, stoppable after any step."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

import backsketch as bs
from backsketch.planning.measure import step as measure
from backsketch.train.checkpoint import (
    CHECKPOINT,
    load_checkpoint,
    random_state,
    save_checkpoint,
    set_random_state,
)
from backsketch.train.config import AUTO, TrainConfig, mismatch, parse_rules
from backsketch.train.errors import Interrupted, StopRequest, TrainError
from backsketch.train.history import Evaluation, History, StepClock
from backsketch.train.order import DROPOUT, stream
from backsketch.train.setup import make_optimizer, make_schedule
from backsketch.train.show import TrainProgress, metric_of

__all__ = ["Batches", "Data", "Trainer"]

CHECK_STOP_EVERY = 10  # steps between agreements of several processes on whether to stop
SHOW_LOSS_EVERY = 20  # steps between readings of the loss on a GPU
VARIANCE_BATCHES = 6
VARIANCE_TIMES = 4


class Batches(Protocol):
    """Batches of one process; `train` is a pure function of the seed, the epoch and the step."""

    steps_per_epoch: int

    def train(self, epoch: int, first_step: int = 0) -> Iterator[list[Any]]:
        """The optimizer steps of an epoch, each a list of this process's micro-batches."""

    def test(self) -> Iterator[Any]:
        """This process's share of the test split."""


class Data(Protocol):
    """What a trainer asks of its data. What a batch is, only the data know.

    Attributes:
        num_test: how many items `score` counts over the whole test split.
    """

    @property
    def num_test(self) -> int: ...

    def summary(self) -> dict[str, Any]:
        """Plain values for `result.json`, and what a checkpoint must agree with."""

    def build(self, config: TrainConfig) -> nn.Module:
        """A new model that fits the data; ValueError with the reason where it cannot."""

    def batches(self, config: TrainConfig, device: torch.device, rank: int, world: int) -> Batches:
        """The batches of one process."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Mean loss of a batch."""

    def score(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """How many items of a test batch are predicted correctly, and the sum of their losses."""

    def outcome(self, config: TrainConfig, core: nn.Module, history: History) -> dict[str, Any]:
        """What `result.json` says of a finished run beyond what all runs have, plain values."""

    def keep(self, out: Path) -> None:
        """Write what a run's results need to be read with, before the first step."""

    def keep_model(self, core: nn.Module, out: Path) -> None:
        """Write the trained model for others to read, beside the checkpoint; `core` may lose its sketch."""


class Trainer:
    """A model in training.

    Two trainers of the same configuration, one exact and one sketched, start from the same weights
    and see the same batches, augmentation and dropout.

    Args:
        job: the configuration of the job.
        data: images in memory, or anything else with the methods of `Data`.
        accelerator: device, precision, processes.
        checkpoint: the file that the run writes and resumes from.
        exact: train without the sketch of the job, as the run that is compared with.
        now: the clock of the steps on a CPU.

    Raises:
        TrainError: the model does not fit the data, the sketch does not parse or does not fit.
    """

    def __init__(
        self,
        job: TrainConfig,
        data: Data,
        accelerator: Accelerator,
        checkpoint: Path,
        *,
        exact: bool = False,
        now: Callable[[], float] = time.perf_counter,
    ):
        config = replace(job, sketch="none", compare=False) if exact else job
        self.job, self.config, self.data = job, config, data
        self.accelerator, self.checkpoint, self.now = accelerator, checkpoint, now
        self.sketched = config.sketch != "none"
        self.report: bs.Report | None = None
        self.batches = data.batches(
            config, accelerator.device, accelerator.process_index, accelerator.num_processes
        )
        self.core = self._build().to(accelerator.device)
        optimizer = make_optimizer(self.core, config)
        self.total_steps = config.epochs * self.batches.steps_per_epoch
        self.schedule = make_schedule(optimizer, config, self.total_steps)
        self.cost = self._cost()
        self.model, self.optimizer = accelerator.prepare(self.core, optimizer)
        # Under mixed precision accelerate puts a forward pass on the instance, past which no later sketch is seen:
        # autocast is around the calls instead.
        self.core.__dict__.pop("forward", None)
        torch.manual_seed(stream(config.seed, DROPOUT, accelerator.process_index).initial_seed())
        if self.sketched:
            bs.seed(config.seed)
        self.auto: bs.Auto | None = None
        if config.sketch == AUTO:
            batches = Upcoming(self)
            self.auto = bs.Auto(self.model, batches, self.loss, self.total_steps, clock=now)
        self.epoch, self.step = 0, 0  # step counts within the epoch
        self.history = History()

    @property
    def steps(self) -> int:
        """Optimizer steps so far."""
        return self.epoch * self.batches.steps_per_epoch + self.step

    def fit(self, progress: TrainProgress, stop: StopRequest) -> None:
        """Train to the end, with evaluations as configured and a checkpoint after every epoch.

        Raises:
            Interrupted: a stop was requested; the checkpoint holds the step that it came in.
        """
        stop.wait_for_steps()
        name = "sketched" if self.sketched else "exact"
        progress.start(
            name,
            self.total_steps,
            len(self.history.losses),
            self.config.epochs,
            metric_of(self.config.model),
        )
        while self.epoch < self.config.epochs:
            began = time.perf_counter()
            due = self._next_evaluation()
            stopped = self._train_until(due, progress, stop)
            ended = self.step == self.batches.steps_per_epoch
            if ended:
                self.epoch, self.step = self.epoch + 1, 0
            if ended or self.step == due:
                self.history.evaluations.append(self.evaluate())
            if ended and self.epoch in self._variance_epochs():
                self.history.extra_variances[self.epoch] = self.extra_variance()
            if ended:
                progress.epoch(self.history.evaluations[-1], self.last_epoch_loss())
            self.history.wall_seconds += time.perf_counter() - began
            if ended or stopped:
                self.save()
            if stopped and self.epoch < self.config.epochs:
                raise Interrupted(self.checkpoint, stop.signum)
        if self.auto is not None:
            self.cost = self._cost(self.auto.mean_arithmetic(self.batch_of(0)))

    def evaluate(self) -> Evaluation:
        """Accuracy and loss on the whole test split, over all processes."""
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.accelerator.device)
        with torch.no_grad():
            for batch in self.batches.test():
                with self.accelerator.autocast():
                    sums += torch.stack([s.double() for s in self.data.score(self.model, batch)])
        self.model.train()
        correct, loss = self.accelerator.reduce(sums, "sum").tolist()
        count, seconds = self.data.num_test, self.history.train_seconds
        return Evaluation(
            self.epoch, len(self.history.losses), seconds, correct / count, loss / count
        )

    def extra_variance(self) -> float | None:
        """Measured at the present weights; 0 where steps are exact, None where it cannot be measured."""
        if not self.sketched or (self.auto is not None and not self.auto.rules):
            return 0.0
        # Beyond the last step of the run: an order that training does not use.
        batches = [self.batch_of(self.total_steps + i) for i in range(VARIANCE_BATCHES)]
        return measure.extra_variance(self.core, batches, self.loss)

    def last_epoch_loss(self) -> float:
        """Mean training loss over the last epoch's worth of steps."""
        return self.history.mean_loss(self.batches.steps_per_epoch)

    def save(self) -> None:
        """Write the checkpoint; every process must call this."""
        state = self.state_dict()
        if self.accelerator.is_main_process:
            save_checkpoint(self.checkpoint, state)

    def load(self) -> None:
        """Continue from the checkpoint.

        Raises:
            TrainError: it is missing, damaged, changed, or of another configuration, dataset or number of
                processes; the file stays as it is.
        """
        state = load_checkpoint(self.checkpoint)
        if reason := self._misfit(state):
            raise TrainError(f"the checkpoint {self.checkpoint} does not fit this run: {reason}")
        try:
            self.load_state_dict(state)
        except Exception as error:  # each part has exceptions of its own
            told = str(error).strip().splitlines() or [type(error).__name__]
            raise TrainError(
                f"the checkpoint {self.checkpoint} cannot be continued: {told[0]}"
            ) from error

    def start_from(self, where: Path) -> None:
        """Begin with the weights of an earlier run, in its folder.

        Raises:
            TrainError: there are none, or they are those of another model.
        """
        weights = load_checkpoint(where / CHECKPOINT)["model"]
        try:
            self.core.load_state_dict(weights)
        except RuntimeError as error:
            told = str(error).strip().splitlines()
            raise TrainError(
                f"the weights of {where} do not fit the model {self.config.model}: {told[-1].strip()}"
            ) from error
        tied: dict[int, str] = {}
        for name, value in self.core.state_dict().items():
            other = tied.setdefault(value.data_ptr(), name) if value.numel() else name
            if other != name and not _same(weights[name], weights[other]):
                raise TrainError(
                    f"the weights of {where} do not fit the model {self.config.model}: in it {name} is one "
                    f"tensor with {other}, and there they differ"
                )

    def state_dict(self) -> dict[str, Any]:
        """All that a run must remember to continue exactly; every process must call this.

        The order of the data and its augmentation need no state: they follow from the seed, the epoch
        and the step. It is one file, not accelerate's `save_state`: that writes several files, so that a
        process killed between two of them leaves a mixture of two steps, and its random states can
        only be read by unpickling.
        """
        random = random_state(self.accelerator.device, self.sketched)
        scaler = self.accelerator.scaler
        return {
            "config": self.job.as_dict(),
            "sketched": self.sketched,
            "data": self.data.summary(),
            "processes": self.accelerator.num_processes,
            "model": self.core.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.schedule.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "random": gather_object([random]),
            "history": self.history.state_dict(),
            # A controller gathers its scores for this, on every process.
            "auto": None if self.auto is None else self.auto.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state that fits this trainer."""
        self.core.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["scheduler"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step = state["epoch"], state["step"]
        self.history = History.from_state(state["history"])
        if self.auto is not None:
            self.auto.load_state_dict(state["auto"])
        set_random_state(self.accelerator.device, state["random"][self.accelerator.process_index])

    def _misfit(self, state: Mapping[str, Any]) -> str | None:
        """Why this trainer cannot continue from a state, in words; None where it can."""
        processes, data = self.accelerator.num_processes, self.data.summary()
        if reason := mismatch(state["config"], self.job.as_dict()):
            return reason
        if state["sketched"] != self.sketched:
            return "one is exact and the other is sketched"
        if state["data"] != data:
            return f"it was made with the data {state['data']}, not {data}"
        if state["processes"] != processes:
            return f"it was made with {state['processes']} processes, not {processes}"
        for name, ours in (("scaler", self.accelerator.scaler), ("auto", self.auto)):
            if (state[name] is None) != (ours is None):
                return f"its {name!r} belongs to another kind of run"
        if set(state["scheduler"]) != set(self.schedule.state_dict()):
            return "its 'scheduler' belongs to another kind of schedule"
        return self._misplaced(state["epoch"], state["step"], state["history"])

    def _misplaced(self, epoch: int, step: int, history: Mapping[str, Any]) -> str | None:
        """Why a run cannot be at this point, with this history."""
        epochs, steps = self.config.epochs, self.batches.steps_per_epoch
        if not ((0 <= epoch < epochs and 0 <= step < steps) or (epoch, step) == (epochs, 0)):
            return f"it is at epoch {epoch}, step {step} of {epochs} epochs of {steps} steps"
        done = epoch * steps + step
        for name in ("losses", "step_seconds"):
            if len(history.get(name, ())) != done:
                return f"its history has {len(history.get(name, ()))} {name} for {done} steps"
        return None

    def _variance_epochs(self) -> set[int]:
        """Ends of epochs, spread over the run and the last among them."""
        spread = range(1, VARIANCE_TIMES + 1)
        return {math.ceil(self.config.epochs * i / VARIANCE_TIMES) for i in spread}

    def _build(self) -> nn.Module:
        config = self.config
        torch.manual_seed(config.seed)
        try:
            model = self.data.build(config)
            if self.sketched and config.sketch != AUTO:
                self.report = bs.sketch_(model, parse_rules(config.sketch))
        except ValueError as error:  # both explain themselves to the user
            raise TrainError(str(error)) from error
        if self.report is not None and not self.report.sketched:
            raise TrainError(f"the sketch {config.sketch} applies to no layer of {config.model}")
        return model

    def _cost(self, arithmetic: float | None = None) -> dict[str, float]:
        """What a step costs; its arithmetic is measured at the present keeps where it is not given."""
        batch = self.batch_of(0)
        if arithmetic is None:
            arithmetic = 1.0
            if self.sketched:
                arithmetic = measure.backward_flops_ratio(self.core, batch, self.loss)
        saved = measure.saved_bytes(self.core, batch, self.loss)
        return {"backward_flops_ratio": arithmetic, "peak_saved_bytes": saved}

    def measure_cost(self) -> None:
        """Run one measured pass, in which the regions of the model are captured and verified."""
        self.cost = self._cost()

    def batch_of(self, step: int) -> Any:
        """This process's first micro-batch of a step, counted from the start of the run."""
        return next(self.batches.train(*divmod(step, self.batches.steps_per_epoch)))[0]

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Loss as in training, scaled as in training, for measurements on the bare model."""
        with self.accelerator.autocast():
            loss = self.data.loss(model, batch)
        scaler = self.accelerator.scaler
        return loss if scaler is None else loss * scaler.get_scale()

    def _next_evaluation(self) -> int:
        """The step of this epoch after which the test split is looked at next."""
        steps, times = self.batches.steps_per_epoch, self.config.evaluations
        return next(s for i in range(times) if (s := steps * (i + 1) // times) > self.step)

    def _train_until(self, due: int, progress: TrainProgress, stop: StopRequest) -> bool:
        """Steps to a step of the epoch or to a stop; returns whether there was one."""
        self.model.train()
        clock, losses, stopped = StepClock(self.accelerator.device, self.now), [], False
        for micro_batches in self.batches.train(self.epoch, self.step):
            if self.auto is not None:
                self.auto.step()
            losses.append(self._optimizer_step(micro_batches))
            clock.tick()
            self.step += 1
            wait_free = self.accelerator.device.type == "cpu" or self.step % SHOW_LOSS_EVERY == 0
            progress.step(float(losses[-1]) if wait_free else None)
            if (stopped := self._should_stop(stop)) or self.step == due:
                break
        mean = self.accelerator.reduce(torch.stack(losses), "mean") if losses else torch.empty(0)
        self.history.losses += mean.tolist()
        self.history.step_seconds += clock.seconds()
        return stopped

    def _optimizer_step(self, micro_batches: list[Any]) -> Tensor:
        """One update; returns the mean loss of this process's micro-batches."""
        total = torch.zeros((), device=self.accelerator.device)
        last = len(micro_batches) - 1
        for number, batch in enumerate(micro_batches):
            sync = nullcontext() if number == last else self.accelerator.no_sync(self.model)
            with sync:
                with self.accelerator.autocast():
                    loss = self.data.loss(self.model, batch) / len(micro_batches)
                self.accelerator.backward(loss)
            total += loss.detach()
        if self.auto is not None:
            self.auto.control()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if not self.accelerator.optimizer_step_was_skipped:
            self.schedule.step()
        if self.auto is not None:
            self.auto.stop()
        return total

    def _should_stop(self, stop: StopRequest) -> bool:
        if self.accelerator.num_processes == 1:
            return stop.signum != 0
        if self.step % CHECK_STOP_EVERY and self.step < self.batches.steps_per_epoch:
            return False
        asked = torch.tensor([stop.signum], device=self.accelerator.device)
        stop.signum = int(self.accelerator.gather(asked).max())  # all stop at the same step
        return stop.signum != 0


class Upcoming:
    """The next batches of a trainer, one of each step, beyond the end of the run too."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def __iter__(self) -> Iterator[Any]:
        return map(self._trainer.batch_of, itertools.count(self._trainer.steps))


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same entries, NaN being one."""
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
