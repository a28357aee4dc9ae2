"""For Lightning's ``Trainer``: a callback."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn

from backsketch.integrations.session import Session
from backsketch.integrations.settings import Settings
from backsketch.report import Report

__all__ = ["SketchCallback"]


class SketchCallback(pl.Callback):
    """Sketches a ``LightningModule`` while ``Trainer.fit`` trains it; otherwise it is the plain module.

    Names in rules are those of the whole module, such as ``"model.layers.*"``. Validation is exact; checkpoints
    are those of the plain module and hold the random stream of the sketches and the state of the controller too.
    The logged numbers are those of :class:`backsketch.integrations.transformers.SketchCallback`.

    ``"auto"`` and the measurements for the log call ``training_step`` again, with ``self.log`` silent: it should
    change nothing else but what PyTorch keeps in buffers. The controller of ``target_extra_variance`` follows the
    module whose forward pass ``training_step`` calls.

    Args:
        sketch: ``"auto"`` (:class:`backsketch.Auto`), a sketch, its text such as ``"int8"``, rules (patterns and
            sketches or texts), a plan, or a function of the module that returns rules.
        target_extra_variance: a :class:`backsketch.Controller` moves the keeps to hold this; None leaves the keeps
            of given sketches as they are, and is 0.05 for ``"auto"``.
        strict: see :func:`backsketch.sketch_`.
        interval: optimizer steps between two measurements of the controller.
        seed: of the sketches; by default that of ``seed_everything``, else the stream is left where it is.
        measure: whether to measure for the log.

    Attributes:
        report: what was sketched in the last training; None where nothing was.
        reason: what ``"auto"`` has to say, of exact steps too.

    Raises:
        ValueError: an argument is wrong; when the training begins: the module is sketched already, a rule matches
            nothing; later: ``"auto"`` finds no loss to measure. Lightning itself refuses two such callbacks.
        TypeError: ``sketch`` is nothing of the above.

    Example:
        ``Trainer(callbacks=[SketchCallback("rows:keep=0.5")]).fit(module, data)``
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
        self._saved: Mapping[str, Any] | None = None
        self._is_new_step = True
        self._steps = 0
        self.report: Report | None = None
        self.reason = ""

    # --- the trainer's events -----------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()
        settings, found = self._settings, os.environ.get("PL_GLOBAL_SEED")
        if settings.seed is None and found is not None and self._saved is None:
            settings = Settings(**{**vars(settings), "seed": int(found)})
        total = trainer.estimated_stepping_batches
        steps = int(total) if total != float("inf") else -1
        self._steps = trainer.global_step
        self._session = Session(settings, pl_module, _loss, steps, self._saved, follow_calls=True)
        self._saved = None
        self._told()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._session is None:
            return
        if self._is_new_step:
            self._is_new_step = False
            self._session.before_step()
            self._told()
        self._session.saw((batch, batch_idx))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any
    ) -> None:
        # Several optimizers of one training step are one step of the controller.
        if self._session is not None and not self._is_new_step:
            self._is_new_step = True
            self._session.before_update()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        step = trainer.global_step
        if self._session is None or step == self._steps:
            return  # within an accumulation
        self._steps = step
        self._session.after_step()
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and step % every == 0:
            pl_module.log_dict(self._session.metrics.logged(step))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._stop()

    def _told(self) -> None:
        assert self._session is not None
        self.report, self.reason = self._session.report, self._session.reason

    def _stop(self) -> None:
        if self._session is not None:
            self._session.close()
        self._session, self._is_new_step = None, True

    # --- checkpoints --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {} if self._session is None else self._session.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict or None


def _loss(module: nn.Module, batch: Any) -> Tensor:
    """As the module computes it in training, scaled as in training, with nothing logged."""
    assert isinstance(module, pl.LightningModule)
    takes_index = len(inspect.signature(module.training_step).parameters) > 1
    precision = module.trainer.precision_plugin
    with _silent(module), precision.train_step_context():
        found: Any = module.training_step(*(batch if takes_index else batch[:1]))
    loss = found.get("loss") if isinstance(found, Mapping) else found
    if not isinstance(loss, Tensor):
        raise ValueError(
            "training_step returned no loss: with manual optimization nothing can be measured; give a sketch and "
            "measure=False"
        )
    scaler = getattr(precision, "scaler", None)
    return loss if scaler is None else loss * scaler.get_scale()


@contextmanager
def _silent(module: pl.LightningModule) -> Iterator[None]:
    """``self.log`` does nothing inside."""
    module.__dict__["log"] = module.__dict__["log_dict"] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del module.__dict__["log"], module.__dict__["log_dict"]
