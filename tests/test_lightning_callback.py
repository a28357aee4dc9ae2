"""The callback for Lightning: what it sketches, logs, saves, continues and refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import backsketch as bs
from backsketch.nn.swap import is_swapped
from helpers import same_weights
from steering import Clock, steered_auto

pytestmark = pytest.mark.filterwarnings("ignore")  # its own, about workers, loggers and devices
pl = pytest.importorskip("lightning.pytorch")

from backsketch.integrations.lightning import SketchCallback  # noqa: E402


class Module(pl.LightningModule):
    """A part of it is called, as in most."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 4))
        self.loss = nn.CrossEntropyLoss()
        self.seen: list[tuple[bool, int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append((self.training, sum(map(is_swapped, self.modules()))))
        loss = self.loss(self.model(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        assert not self.training
        self.log("val", self.loss(self.model(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def data() -> Any:
    g = torch.Generator().manual_seed(3)
    x = torch.randn(128, 16, generator=g)
    return torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, x[:, :4].argmax(1)), batch_size=16
    )


class Logged(pl.Callback):
    def __init__(self) -> None:
        self.lines: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        found = {k: float(v) for k, v in trainer.logged_metrics.items()}
        if "backsketch/arithmetic" in found:
            self.lines.append(found)


def fit(
    folder: Path, *callbacks: Any, module: Any = None, resume: Any = None, validate: bool = False,
    **options: Any,
) -> Any:  # fmt: skip
    torch.manual_seed(0)
    module = module or Module()
    given = {
        "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "max_epochs": 2,
        "enable_model_summary": False, "enable_checkpointing": False, "log_every_n_steps": 4, **options,
    }  # fmt: skip
    trainer = pl.Trainer(default_root_dir=folder, callbacks=list(callbacks), **given)
    trainer.fit(module, data(), data() if validate else None, ckpt_path=resume)
    return module


def test_a_module_is_sketched_while_it_trains_and_plain_afterwards(tmp_path):
    callback, logged = SketchCallback("rows:keep=0.5"), Logged()
    module = fit(tmp_path, callback, logged, validate=True)
    assert set(module.seen) == {(True, 2)}
    assert not any(map(is_swapped, module.modules()))
    assert len(callback.report.sketched) == 2
    line = logged.lines[-1]
    assert line["backsketch/arithmetic"] == pytest.approx(0.5)
    assert line["backsketch/saved_bytes"] > 0
    assert line["backsketch/extra_variance"] > 0
    assert line["backsketch/changes"] == 0


def test_measurements_leave_the_training_and_its_log_alone(tmp_path):
    models = [
        fit(tmp_path, SketchCallback("rows:keep=0.5", seed=0, measure=m)) for m in (True, False)
    ]
    assert same_weights(*models)
    assert "log" not in vars(models[0])


def checkpoints(folder: Path) -> Any:
    return pl.callbacks.ModelCheckpoint(folder, "{epoch}", save_top_k=-1)


@pytest.mark.parametrize("controlled", [False, True])
def test_a_training_that_resumes_is_the_one_that_went_on(tmp_path, controlled):
    target = 0.05 if controlled else None
    make = lambda: SketchCallback("rows:keep=0.5", target, interval=3)  # noqa: E731
    whole = fit(tmp_path, make(), checkpoints(tmp_path), enable_checkpointing=True)
    bs.seed(7)
    resumed = fit(tmp_path, make(), resume=tmp_path / "epoch=0.ckpt")
    assert same_weights(whole, resumed)
    plain = Module()
    found = torch.load(tmp_path / "epoch=1.ckpt", weights_only=False)
    plain.load_state_dict(found["state_dict"])
    assert same_weights(plain, whole)


def test_without_the_stream_a_resumed_training_differs(tmp_path, monkeypatch):
    """The mutation of the test above."""
    make = lambda: SketchCallback("rows:keep=0.5")  # noqa: E731
    whole = fit(tmp_path, make(), checkpoints(tmp_path), enable_checkpointing=True)
    monkeypatch.setattr("backsketch.integrations.session.set_rng_state", lambda state: None)
    assert not same_weights(whole, fit(tmp_path, make(), resume=tmp_path / "epoch=0.ckpt"))


def test_a_controller_follows_the_part_that_is_called(tmp_path):
    logged = Logged()
    fit(tmp_path, SketchCallback("rows:keep=0.25", 0.02, interval=2), logged, log_every_n_steps=1)
    assert logged.lines[-1]["backsketch/changes"] >= 1
    assert logged.lines[-1]["backsketch/extra_variance"] < 0.1


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Timed(Module):
    """Its steps move a clock; it has a branch that is worth a sketch."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        branch = nn.Sequential(nn.Linear(160, 160), nn.ReLU(), nn.Linear(160, 160))
        self.model = nn.Sequential(nn.Linear(16, 160), Residual(branch), nn.Linear(160, 4))

    def forward(self, x: Tensor) -> Tensor:
        self.clock.pass_of(self)
        return self.model(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append((self.training, sum(map(is_swapped, self.modules()))))
        return self.loss(self(batch[0]), batch[1])


class Kept(pl.Callback):
    """What a callback's session was at the end."""

    def __init__(self, callback: SketchCallback) -> None:
        self.callback, self.auto = callback, None

    def on_train_end(self, trainer: Any, module: Any) -> None:
        self.auto = self.callback._session.auto


def fit_auto(folder: Path, clock: Clock, *callbacks: Any, **options: Any) -> tuple[Any, Any]:
    """32 steps of 0.5 or 1 second; returns the module and what chose its sketches."""
    torch.manual_seed(0)
    callback = SketchCallback(seed=0, measure=False)
    kept = Kept(callback)
    module = fit(folder, kept, callback, *callbacks, module=Timed(clock), max_epochs=4, **options)
    return module, kept.auto


def test_auto_is_that_of_the_library(tmp_path):
    with steered_auto("save") as clock:
        module, auto = fit_auto(tmp_path, clock)
    assert auto.profile_seconds == 40
    assert auto.guard.pays
    assert auto.controller.keeps
    assert [sites for _, sites in module.seen][-1] > 0
    assert not any(map(is_swapped, module.modules()))


def test_auto_in_a_short_run_has_no_time_for_a_profile(tmp_path):
    with steered_auto("save", share=0.03) as clock:
        module, auto = fit_auto(tmp_path, clock)
    assert auto.rules == {}
    assert "a profile would take" in auto.reason
    assert {sites for _, sites in module.seen} == {0}


def test_auto_that_resumes_is_the_one_that_went_on(tmp_path):
    with steered_auto("save") as clock:
        whole, auto = fit_auto(tmp_path, clock, checkpoints(tmp_path), enable_checkpointing=True)
        for epoch in (0, 2):  # within a trial, and under a controller
            bs.seed(7)
            resumed, again = fit_auto(tmp_path, clock, resume=tmp_path / f"epoch={epoch}.ckpt")
            assert same_weights(whole, resumed)
            assert again.rules == auto.rules
            assert again.result()["log"] == auto.result()["log"]


def test_accumulation_is_one_step_of_the_controller(tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(bs.Controller, "step", lambda self: steps.append(1))
    fit(tmp_path, SketchCallback("rows:keep=0.5", 0.05, measure=False), accumulate_grad_batches=4)
    assert len(steps) == 2 * 8 // 4 - 1  # the first shows what is called


def test_a_module_that_is_sketched_already_is_refused(tmp_path):
    module = Module()
    bs.sketch_(module, bs.Rows(keep=0.5))
    with pytest.raises(ValueError, match="sketched already"):
        fit(tmp_path, SketchCallback("int8"), module=module)


def test_two_callbacks_are_refused(tmp_path):
    with pytest.raises(
        RuntimeError, match="more than one stateful callback of type `SketchCallback`"
    ):
        fit(tmp_path, SketchCallback("int8"), SketchCallback("int8"))


def test_a_rule_that_matches_nothing_is_refused(tmp_path):
    module = Module()
    with pytest.raises(ValueError, match="matches no module"):
        fit(tmp_path, SketchCallback({"blocks.*": "int8"}), module=module)
    assert not any(map(is_swapped, module.modules()))


class Manual(Module):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(self.model(batch[0]), batch[1]))
        optimizer.step()


def test_a_loss_that_cannot_be_found_is_said(tmp_path):
    module = Manual()
    with steered_auto("save") as clock:
        module.model.register_forward_pre_hook(lambda model, args: clock.pass_of(model))
        with pytest.raises(ValueError, match="training_step returned no loss"):
            fit(tmp_path, SketchCallback(), module=module)
    fit(tmp_path, SketchCallback("rows:keep=0.5", measure=False), module=Manual())
