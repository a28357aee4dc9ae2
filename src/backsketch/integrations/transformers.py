"""For ``transformers.Trainer``: a callback, and a preset that picks the blocks of a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer_callback import DefaultFlowCallback, ExportableState

from backsketch.estimators import Sketch, parse
from backsketch.integrations.session import Session
from backsketch.integrations.settings import Settings
from backsketch.report import Report

__all__ = ["SketchCallback", "blocks"]


def blocks(sketch: Sketch | str) -> Callable[[nn.Module], dict[str, Sketch]]:
    """A preset: the sketch goes to the blocks of a transformer, the rest of the model stays exact.

    Args:
        sketch: what each block gets: a layer estimator goes to its layers, a region to the block as a whole.

    Returns:
        A function of the model that makes rules, for :class:`SketchCallback`, or for
        ``bs.sketch_(model, blocks("rows:keep=0.5")(model))``.
    """
    chosen = parse(sketch) if isinstance(sketch, str) else sketch

    def rules(model: nn.Module) -> dict[str, Sketch]:
        found = _blocks_of(model)
        if not found:
            raise ValueError(
                f"blocks: {type(model).__name__} has no layers of the transformers library"
            )
        return dict.fromkeys(found, chosen)

    return rules


def _blocks_of(model: nn.Module) -> list[str]:
    """Names of the innermost layers that can be checkpointed: a stage of layers is no block."""
    kinds = [n for n, m in model.named_modules() if isinstance(m, GradientCheckpointingLayer)]
    return [name for name in kinds if not any(other.startswith(f"{name}.") for other in kinds)]


class SketchCallback(TrainerCallback, ExportableState):
    """Sketches a model while a ``transformers.Trainer`` trains it; before and afterwards it is the plain model.

    Evaluation is exact, ``save_pretrained`` writes the plain model at any time, accumulation and several processes
    need nothing special. Checkpoints hold the random stream of the sketches and the state of the controller, in
    ``trainer_state.json``, so that ``train(resume_from_checkpoint=...)`` is the training that was not interrupted.

    Into the log go, beside the loss: ``backsketch/arithmetic`` (products of matrices of a backward pass, over
    those of an exact one), ``backsketch/saved_bytes`` (kept for the backward pass of a batch; ``_ratio``: over
    exact), ``backsketch/extra_variance`` (over SGD's own), ``backsketch/changes`` (of the keeps so far),
    ``backsketch/effective_batch``.

    Args:
        sketch: ``"auto"`` is :class:`backsketch.Auto` on the trainer's own batches and loss; or a sketch, its text
            such as ``"int8"``, rules (patterns and sketches or texts), a plan, or a function of the model that
            returns rules (:func:`blocks`).
        target_extra_variance: a :class:`backsketch.Controller` moves the keeps to hold this; None leaves the keeps
            of given sketches as they are, and is 0.05 for ``"auto"``.
        strict: see :func:`backsketch.sketch_`.
        interval: optimizer steps between two measurements of the controller.
        seed: of the sketches; by default that of the training arguments.
        measure: whether to measure for the log, which takes some passes when it is first written and when keeps
            moved.

    Attributes:
        report: what was sketched in the last training; None where nothing was.
        reason: what ``"auto"`` has to say, of exact steps too.

    Raises:
        ValueError: an argument is wrong; when the training begins: the model is sketched already, a rule matches
            nothing, or there are two such callbacks; later: ``"auto"`` is to measure the loss and finds none.
        TypeError: ``sketch`` is nothing of the above.

    Example:
        ``Trainer(model, args, train_dataset=data, callbacks=[SketchCallback("int8")]).train()``
    """

    def __init__(
        self,
        sketch: Any = "auto",
        target_extra_variance: float | None = None,
        *,
        strict: bool = False,
        interval: int = 300,
        seed: int | None = None,
        measure: bool = True,
    ) -> None:
        self._settings = Settings(sketch, target_extra_variance, strict, interval, seed, measure)
        self._session: Session | None = None
        self._watched: _Watched | None = None
        self._snapshot: dict[str, Any] | None = None
        self.saved: dict[str, Any] | None = None
        self.report: Report | None = None
        self.reason = ""

    # --- the trainer's events -----------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = _calling_trainer()
        self._stop()  # a training that was broken off
        self._be_alone(trainer)
        self._go_before_the_loggers(trainer)
        settings = self._settings
        if settings.seed is None and state.global_step == 0:
            settings = Settings(**{**vars(settings), "seed": args.seed})
        saved = self._saved(state)
        self._watched = _Watched(trainer)
        try:
            self._session = Session(
                settings, trainer.model_wrapped, self._watched.loss, state.max_steps, saved
            )
        except BaseException:
            self._stop()
            raise
        self._watched.session = self._session
        self._told()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._session is not None:
            self._session.before_step()
            self._told()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._session is not None:
            self._session.before_update()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._session is not None:
            self._session.after_step()
        self._keep(args, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._keep(args, control)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self._session is None or logs is None or "loss" not in logs:
            return
        found = self._session.metrics.logged(state.global_step)
        logs.update(found)
        state.log_history[-1].update(found)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stop()

    def _told(self) -> None:
        assert self._session is not None
        self.report, self.reason = self._session.report, self._session.reason

    def _stop(self) -> None:
        if self._watched is not None:
            self._watched.remove()
        if self._session is not None:
            self._session.close()
        self._watched = self._session = self._snapshot = self.saved = None

    # --- its place among the callbacks --------------------------------------------------------------

    def _be_alone(self, trainer: Trainer) -> None:
        others = [cb for cb in trainer.callback_handler.callbacks if isinstance(cb, SketchCallback)]
        if len(others) > 1:
            raise ValueError(
                f"SketchCallback: this trainer has {len(others)} of them; one takes rules for all of the model: "
                "SketchCallback({'pattern': 'rows:keep=0.5', 'another': 'int8'})"
            )

    def _go_before_the_loggers(self, trainer: Trainer) -> None:
        """Loggers are called in order: what comes after them they do not see."""
        callbacks = trainer.callback_handler.callbacks
        flow = [i for i, cb in enumerate(callbacks) if isinstance(cb, DefaultFlowCallback)]
        place = flow[0] + 1 if flow else 0
        if callbacks.index(self) > place:
            callbacks.remove(self)
            callbacks.insert(place, self)

    # --- checkpoints --------------------------------------------------------------------------------

    def _keep(self, args: Any, control: Any) -> None:
        """Of several ranks, one alone is asked for its state: it is gathered here, where all of them are."""
        may_save = control.should_save or (args.save_strategy == "best" and control.should_evaluate)
        if self._session is not None and args.world_size > 1 and may_save:
            self._snapshot = self._session.state_dict()

    def state(self) -> dict[str, Any]:
        """For ``trainer_state.json``."""
        saved = self._snapshot
        if saved is None and self._session is not None:
            saved = self._session.state_dict()
        return {"args": self._arguments(), "attributes": {"saved": saved}}

    def _arguments(self) -> dict[str, Any]:
        """With which the trainer would make this callback again: plain data."""
        given = dict(vars(self._settings))
        if not self._settings.is_auto:
            rules = None if self._session is None else self._session.rules
            given["sketch"] = rules if rules else given["sketch"]
            if not isinstance(given["sketch"], dict):
                given["sketch"] = (
                    str(given["sketch"]) if isinstance(given["sketch"], str | Sketch) else "auto"
                )
        return given

    def _saved(self, state: Any) -> dict[str, Any] | None:
        """Of the checkpoint that the trainer resumes from, put here by the trainer or still in its state."""
        if self.saved is not None:
            return self.saved
        found = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        if not isinstance(found, Mapping):
            return None
        saved: dict[str, Any] | None = found["attributes"]["saved"]
        return saved


class _Watched:
    """The loss of a trainer, looked at while it trains: its batches, and how it is computed from them."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._compute = trainer.compute_loss
        self.session: Session | None = None
        trainer.__dict__["compute_loss"] = self._computed

    def remove(self) -> None:
        """Give the trainer its own method back."""
        self._trainer.__dict__.pop("compute_loss", None)

    def _computed(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training and self.session is not None:
            # A copy: the loss function may take the labels out.
            self.session.saw((dict(inputs), args, kwargs))
        return self._compute(model, inputs, *args, **kwargs)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """As in training, scaled as in training."""
        inputs, args, kwargs = batch
        found = self._compute(model, dict(inputs), *args, **kwargs)
        loss: Tensor = found[0] if isinstance(found, tuple) else found
        scaler = getattr(self._trainer.accelerator, "scaler", None)
        return loss if scaler is None else loss * scaler.get_scale()


def _calling_trainer() -> Trainer:
    """The trainer whose event this is; the interface of callbacks does not tell."""
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer):
            return owner
        frame = frame.f_back
    raise RuntimeError("SketchCallback: its events are to be called by a transformers.Trainer")
