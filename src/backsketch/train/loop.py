"""One run: a model, exact or sketched, trained from a configuration, stoppable after any step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

import backsketch as bs
from backsketch import models
from backsketch.train import measure
from backsketch.train.auto import AUTO, Auto
from backsketch.train.batches import DROPOUT, Batch, Batches, stream
from backsketch.train.checkpoint import load_checkpoint, save_checkpoint
from backsketch.train.clock import StepClock
from backsketch.train.config import TrainConfig
from backsketch.train.errors import TrainError
from backsketch.train.history import Evaluation, History
from backsketch.train.images import ImageData
from backsketch.train.interrupt import Interrupted, StopRequest
from backsketch.train.progress import TrainProgress
from backsketch.train.setup import make_optimizer, make_schedule
from backsketch.train.sketches import parse_rules
from backsketch.train.state import misfit, random_state, restore, state_of

CHECK_STOP_EVERY = 10  # steps between agreements of several processes on whether to stop
SHOW_LOSS_EVERY = 20  # steps between readings of the loss on a GPU
VARIANCE_BATCHES = 6
VARIANCE_TIMES = 4


class Trainer:
    """A model in training.

    Two trainers of the same configuration, one exact and one sketched, start from the same weights
    and see the same batches, augmentation and dropout.

    Args:
        job: the configuration of the job.
        data: in memory.
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
        data: ImageData,
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
        self.batches = Batches(
            data, config, accelerator.device, accelerator.process_index, accelerator.num_processes
        )
        self.core = self._build().to(accelerator.device)
        optimizer = make_optimizer(self.core, config)
        self.total_steps = config.epochs * self.batches.steps_per_epoch
        self.auto = Auto(self.total_steps) if config.sketch == AUTO else None
        self.schedule = make_schedule(optimizer, config, self.total_steps)
        self.cost = self._cost()
        self.model, self.optimizer = accelerator.prepare(self.core, optimizer)
        # Under mixed precision accelerate puts a forward pass on the instance, past which no later sketch is seen:
        # autocast is around the calls instead.
        self.core.__dict__.pop("forward", None)
        torch.manual_seed(stream(config.seed, DROPOUT, accelerator.process_index).initial_seed())
        if self.sketched:
            bs.seed(config.seed)
        self.epoch, self.step = 0, 0  # step counts within the epoch
        self.history = History()

    def fit(self, progress: TrainProgress, stop: StopRequest) -> None:
        """Train to the end, with evaluations as configured and a checkpoint after every epoch.

        Raises:
            Interrupted: a stop was requested; the checkpoint holds the step that it came in.
        """
        name = "sketched" if self.sketched else "exact"
        progress.start(name, self.total_steps, len(self.history.losses), self.config.epochs)
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
            self.cost = self._cost(self.auto.mean_arithmetic(self))

    def evaluate(self) -> Evaluation:
        """Accuracy and loss on the whole test split, over all processes."""
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.accelerator.device)
        with torch.no_grad():
            for batch in self.batches.test():
                with self.accelerator.autocast():
                    logits = self.model(batch.images).float()
                sums[0] += (logits.argmax(1) == batch.labels).sum()
                sums[1] += F.cross_entropy(logits, batch.labels, reduction="sum")
        self.model.train()
        correct, loss = self.accelerator.reduce(sums, "sum").tolist()
        count, seconds = len(self.data.test_labels), self.history.train_seconds
        return Evaluation(
            self.epoch, len(self.history.losses), seconds, correct / count, loss / count
        )

    def extra_variance(self) -> float | None:
        """Measured at the present weights; 0 for an exact run, None where it cannot be measured."""
        if not self.sketched:
            return 0.0
        batches = []
        for number in range(VARIANCE_BATCHES):
            epoch, step = divmod(number, self.batches.steps_per_epoch)
            batches.append(self.micro_batch(self.config.epochs + epoch, step))
        return measure.extra_variance(self.core, batches, self.loss)

    def last_epoch_loss(self) -> float:
        """Mean training loss over the last epoch's worth of steps."""
        return self.history.mean_loss(self.batches.steps_per_epoch)

    def save(self) -> None:
        """Write the checkpoint; every process must call this."""
        random = gather_object([random_state(self)])
        state = state_of(self, random)  # a controller gathers its scores for it, on every process
        if self.accelerator.is_main_process:
            save_checkpoint(self.checkpoint, state)

    def load(self) -> None:
        """Continue from the checkpoint.

        Raises:
            TrainError: it is missing, damaged, or of another configuration, dataset or number of
                processes; nothing has changed then.
        """
        state = load_checkpoint(self.checkpoint)
        if reason := misfit(self, state):
            raise TrainError(f"the checkpoint {self.checkpoint} does not fit this run: {reason}")
        restore(self, state)

    def _variance_epochs(self) -> set[int]:
        """Ends of epochs, spread over the run and the last among them."""
        spread = range(1, VARIANCE_TIMES + 1)
        return {math.ceil(self.config.epochs * i / VARIANCE_TIMES) for i in spread}

    def _build(self) -> nn.Module:
        config = self.config
        torch.manual_seed(config.seed)
        try:
            model = models.build(
                config.model, self.data.image_shape, self.data.num_classes, **config.model_options
            )
            if self.sketched and config.sketch != AUTO:
                self.report = bs.sketch_(model, parse_rules(config.sketch))
        except ValueError as error:  # both explain themselves to the user
            raise TrainError(str(error)) from error
        if self.report is not None and not self.report.sketched:
            raise TrainError(f"the sketch {config.sketch} applies to no layer of {config.model}")
        return model

    def _cost(self, arithmetic: float | None = None) -> dict[str, float]:
        """What a step costs; its arithmetic is measured at the present keeps where it is not given."""
        batch = self.micro_batch(0, 0)
        if arithmetic is None:
            arithmetic = 1.0
            if self.sketched:
                arithmetic = measure.backward_flops_ratio(self.core, batch, self.loss)
        saved = measure.saved_bytes(self.core, batch, self.loss)
        return {"backward_flops_ratio": arithmetic, "peak_saved_bytes": saved}

    def prove(self) -> None:
        """One measured pass: the regions of a restored run prove themselves before it goes on."""
        self.cost = self._cost()

    def micro_batch(self, epoch: int, step: int) -> Batch:
        """This process's first micro-batch of a step."""
        return next(self.batches.train(epoch, step))[0]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Loss as in training, scaled as in training, for measurements on the bare model."""
        with self.accelerator.autocast():
            loss = F.cross_entropy(model(batch.images).float(), batch.labels)
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
                self.auto.before(self)
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

    def _optimizer_step(self, micro_batches: list[Batch]) -> Tensor:
        """One update; returns the mean loss of this process's micro-batches."""
        total = torch.zeros((), device=self.accelerator.device)
        last = len(micro_batches) - 1
        for number, batch in enumerate(micro_batches):
            sync = nullcontext() if number == last else self.accelerator.no_sync(self.model)
            with sync:
                with self.accelerator.autocast():
                    logits = self.model(batch.images).float()
                loss = F.cross_entropy(logits, batch.labels) / len(micro_batches)
                self.accelerator.backward(loss)
            total += loss.detach()
        if self.auto is not None:
            self.auto.after()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if not self.accelerator.optimizer_step_was_skipped:
            self.schedule.step()
        return total

    def _should_stop(self, stop: StopRequest) -> bool:
        if self.accelerator.num_processes == 1:
            return stop.signum != 0
        if self.step % CHECK_STOP_EVERY and self.step < self.batches.steps_per_epoch:
            return False
        asked = torch.tensor([stop.signum], device=self.accelerator.device)
        stop.signum = int(self.accelerator.gather(asked).max())  # all stop at the same step
        return stop.signum != 0
