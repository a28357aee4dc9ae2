"""Training: batches, schedules, exact resume, checkpoints, measurements, results."""

from __future__ import annotations

import io
import itertools
import json
import random
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("accelerate")
pytest.importorskip("rich")
from rich.console import Console

import backsketch as bs
from backsketch import models
from backsketch.nn.swap import is_swapped
from backsketch.planning.auto import proposals
from backsketch.planning.auto.proposals import Proposal
from backsketch.planning.measure import step as measure
from backsketch.train import ImageData, Interrupted, TrainError, train
from backsketch.train.checkpoint import load_checkpoint
from backsketch.train.config import RECIPES, TrainConfig, mismatch, resolve
from backsketch.train.errors import StopRequest
from backsketch.train.images import Batches, crop_and_flip, stream
from backsketch.train.loop import Trainer
from backsketch.train.result import curve, result_of, write_json
from backsketch.train.setup import SCHEDULES, make_accelerator, make_optimizer, make_schedule
from backsketch.train.show import TrainProgress, automatic
from helpers import quiet
from steering import steered

CPU = torch.device("cpu")
SMALL = {"model_options": {"widths": [16]}, "batch_size": 64, "device": "cpu"}


def toy(count: int = 96, channels: int = 3, size: int = 8, seed: int = 0) -> ImageData:
    """Images whose class is the brightest quadrant, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=generator)
    pixels = torch.randint(0, 128, (count, channels, size, size), generator=generator)
    half = size // 2
    for image, label in zip(pixels, labels.tolist()):
        row, column = divmod(label, 2)
        image[:, row * half : (row + 1) * half, column * half : (column + 1) * half] += 100
    pixels = pixels.to(torch.uint8)
    return ImageData("toy", pixels[:-32], labels[:-32], pixels[-32:], labels[-32:], 4, "test")


def config(data: ImageData, **options) -> TrainConfig:
    options = {"batch_size": 16, "epochs": 3, "device": "cpu", "sketch": "none", **options}
    return resolve(options, num_train=data.num_train, image_shape=data.image_shape)


def silent() -> TrainProgress:
    return TrainProgress(quiet(), enabled=False)


class StopAfter(TrainProgress):
    """Asks for a stop once so many steps are done, as Ctrl-C in that step would."""

    def __init__(self, steps: int, stop: StopRequest):
        super().__init__(quiet(), enabled=False)
        self.left, self.request = steps, stop

    def step(self, loss: float | None) -> None:
        super().step(loss)
        self.left -= 1
        if self.left == 0:
            self.request.signum = 2


def fit(trainer: Trainer) -> Trainer:
    trainer.fit(silent(), StopRequest())
    return trainer


def trainer_of(job: TrainConfig, data: ImageData, checkpoint: Path, **options) -> Trainer:
    return Trainer(job, data, make_accelerator("cpu", job.precision), checkpoint, **options)


class TestConfig:
    @pytest.mark.parametrize("model", RECIPES)
    def test_defaults_come_from_the_recipe(self, model):
        recipe = RECIPES[model]
        made = resolve({"model": model}, num_train=50_000, image_shape=(3, 32, 32))
        assert (made.epochs, made.batch_size) == (recipe.epochs, recipe.batch_size)
        assert (made.lr, made.weight_decay) == recipe.rates[made.optimizer]
        assert made.augment

    def test_small_data_is_trained_for_enough_steps(self):
        made = resolve({}, num_train=640, image_shape=(1, 8, 8))
        assert made.epochs * (640 // made.batch_size) >= RECIPES["mlp"].min_steps
        assert not made.augment

    def test_what_is_given_wins(self):
        given = {"epochs": 2, "lr": 0.5, "optimizer": "sgd", "augment": True, "seed": 7}
        made = resolve(given, num_train=640, image_shape=(1, 8, 8))
        assert {name: getattr(made, name) for name in given} == given
        assert made.nesterov

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"model": "resnet"}, "model must be one of mlp, bagnet, vit"),
            ({"optimizer": "lion"}, "optimizer must be one of adamw, sgd"),
            ({"schedule": "linear"}, "schedule must be one of"),
            ({"precision": "fp8"}, "precision must be one of fp32, bf16, fp16"),
            ({"epochs": 0}, "epochs must be positive"),
            ({"lr": -1.0}, "lr must be positive"),
            ({"lr": float("nan")}, "lr must be positive"),
            ({"threads": 0}, "threads must be positive"),
            ({"warmup": 1.0}, r"warmup must be in \[0, 1\)"),
            ({"nesterov": True}, "nesterov needs the sgd optimizer"),
            ({"sketch": "none", "compare": True}, "nothing to compare"),
            ({"epoch": 3}, "there is no option 'epoch'"),
        ],
    )
    def test_nonsense_is_refused(self, options, message):
        with pytest.raises(TrainError, match=message):
            resolve(options, num_train=640, image_shape=(1, 8, 8))

    def test_mismatch_names_the_option_and_ignores_the_device(self):
        saved = resolve({"lr": 0.1}, num_train=640, image_shape=(1, 8, 8)).as_dict()
        assert mismatch(saved, {"lr": 0.1, "device": "cuda"}) is None
        assert mismatch(saved, {"lr": 0.2}) == "it was made with lr = 0.1, not 0.2"


class TestSchedules:
    @pytest.mark.parametrize("name", SCHEDULES)
    @pytest.mark.parametrize("warmup", [0.0, 0.01, 0.1, 0.3])
    @pytest.mark.parametrize("steps", [1, 2, 10, 100])
    def test_rise_to_the_peak_at_the_end_of_the_warm_up_and_never_rise_again(
        self, name, warmup, steps
    ):
        job = config(toy(), schedule=name, warmup=warmup, lr=0.5)
        optimizer = make_optimizer(torch.nn.Linear(3, 2), job)
        schedule = make_schedule(optimizer, job, steps)
        rates = []
        for _ in range(steps):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        peak = rates.index(max(rates))
        assert abs(peak - warmup * steps) <= 1
        assert rates[peak] == pytest.approx(0.5, rel=0.5 if steps < 10 else 0.03)
        assert all(a < b for a, b in pairwise(rates[: peak + 1]))
        assert all(a >= b > 0 for a, b in pairwise(rates[peak:]))
        if steps == 100:
            assert rates[-1] < 0.001 or name == "constant"


class TestBatches:
    def test_an_epoch_shows_each_image_at_most_once_and_the_next_another_order(self):
        data = toy(channels=1)
        data = replace(data, train_labels=torch.arange(64))
        batches = Batches(data, config(data), CPU, 0, 1)
        first, second = (
            torch.cat([micro.labels for step in batches.train(epoch) for micro in step])
            for epoch in (0, 1)
        )
        assert sorted(first.tolist()) == list(range(64))
        assert first.tolist() != second.tolist()

    def test_pixels_are_normalised_by_the_train_split(self):
        data = toy(channels=3)
        step = next(Batches(data, config(data, batch_size=64, augment=False), CPU, 0, 1).train(0))
        pixels = step[0].images.transpose(0, 1).flatten(1)
        torch.testing.assert_close(pixels.mean(1), torch.zeros(3), atol=1e-4, rtol=0)
        torch.testing.assert_close(pixels.std(1), torch.ones(3), atol=1e-3, rtol=0)

    @pytest.mark.parametrize(("world", "accumulation"), [(1, 4), (2, 1), (2, 2)])
    def test_processes_and_micro_batches_share_the_same_batch(self, world, accumulation):
        data = toy()
        whole = Batches(data, config(data), CPU, 0, 1)
        job = config(data, grad_accumulation=accumulation)
        shares = [Batches(data, job, CPU, rank, world) for rank in range(world)]
        for (expected,), *parts in zip(whole.train(1), *(share.train(1) for share in shares)):
            order = [part[micro] for micro in range(accumulation) for part in parts]
            assert torch.equal(torch.cat([p.images for p in order]), expected.images)
            assert torch.equal(torch.cat([p.labels for p in order]), expected.labels)
        assert sum(len(b.labels) for share in shares for b in share.test()) == 32

    def test_starting_late_continues_the_same_epoch(self):
        data = toy()
        batches = Batches(data, config(data), CPU, 0, 1)
        late = [micro.images for step in batches.train(2, 3) for micro in step]
        whole = [micro.images for step in batches.train(2) for micro in step]
        assert all(torch.equal(a, b) for a, b in zip(whole[3:], late, strict=True))

    def test_batches_that_cannot_be_made_are_refused(self):
        data = toy()
        with pytest.raises(TrainError, match="larger than the 64 train images"):
            Batches(data, config(data, batch_size=65), CPU, 0, 1)
        with pytest.raises(TrainError, match="does not divide into 6 equal parts"):
            Batches(data, config(data, grad_accumulation=3), CPU, 0, 2)

    def test_crop_and_flip_agrees_with_padding_and_slicing(self):
        images = torch.randint(0, 256, (40, 3, 16, 24), dtype=torch.uint8)
        draws = torch.rand(40, 3, generator=stream(0, 1))
        expected = []
        for image, (y, x, flip) in zip(images, draws.tolist()):
            padded = F.pad(image.float()[None], (3, 3, 2, 2), mode="reflect")[0]
            top, left = int(y * 5), int(x * 7)
            crop = padded[:, top : top + 16, left : left + 24]
            expected.append(crop.flip(2) if flip < 0.5 else crop)
        assert torch.equal(crop_and_flip(images, draws).float(), torch.stack(expected))


class TestResume:
    CASES = (
        ("mlp", {"widths": [16]}, "rows:keep=0.5", {}),
        ("bagnet", {"width": 4}, "rows:keep=0.5", {"optimizer": "sgd"}),
        ("vit", {"dim": 32, "depth": 1, "dropout": 0.2}, "rows:keep=0.5", {"grad_accumulation": 2}),
        ("vit", {"dim": 32, "depth": 1, "dropout": 0.2}, "none", {"precision": "bf16"}),
    )

    @pytest.mark.fast_cases("mlp", "vit")
    @pytest.mark.parametrize(("model", "options", "sketch", "extra"), CASES)
    @pytest.mark.parametrize("stop_at", [4, 6], ids=["between epochs", "within an epoch"])
    def test_a_stopped_run_ends_with_the_same_weights(
        self, tmp_path, model, options, sketch, extra, stop_at
    ):
        data = toy()
        job = config(data, model=model, model_options=options, sketch=sketch, **extra)
        whole = fit(trainer_of(job, data, tmp_path / "whole.pt"))

        stop = StopRequest()
        stopped = trainer_of(job, data, tmp_path / "stopped.pt")
        with pytest.raises(Interrupted) as caught:
            stopped.fit(StopAfter(stop_at, stop), stop)
        assert caught.value.exit_code == 130
        resumed = trainer_of(job, data, tmp_path / "stopped.pt")
        resumed.load()
        assert len(resumed.history.losses) == stop_at
        fit(resumed)

        assert resumed.history.losses == whole.history.losses
        expected = whole.core.state_dict()
        for name, tensor in resumed.core.state_dict().items():
            assert torch.equal(tensor, expected[name]), name

    def test_the_exact_run_starts_as_the_sketched_one(self, tmp_path):
        data = toy()
        small = {"dim": 32, "depth": 1, "dropout": 0.1}
        job = config(data, model="vit", sketch="rows:keep=0.5", model_options=small)
        exact = fit(trainer_of(job, data, tmp_path / "e.pt", exact=True))
        sketched = fit(trainer_of(job, data, tmp_path / "s.pt"))
        assert exact.history.losses[0] == sketched.history.losses[0]
        assert exact.history.losses[2] != sketched.history.losses[2]

    @pytest.mark.fast_cases("between")
    @pytest.mark.parametrize("stop_at", [2, 3, 4], ids=["at a look", "between", "at the end"])
    def test_looking_more_often_changes_nothing_else(self, tmp_path, stop_at):
        data = toy()  # 4 steps an epoch
        job = config(data, sketch="rows:keep=0.5")
        once = fit(trainer_of(job, data, tmp_path / "once.pt"))
        stop, often = StopRequest(), replace(job, evaluations=3)
        with pytest.raises(Interrupted):
            trainer_of(often, data, tmp_path / "often.pt").fit(StopAfter(stop_at, stop), stop)
        trainer = trainer_of(often, data, tmp_path / "often.pt")
        trainer.load()
        fit(trainer)
        assert [e.step for e in trainer.history.evaluations] == [1, 2, 4, 5, 6, 8, 9, 10, 12]
        assert trainer.history.losses == once.history.losses
        assert trainer.history.evaluations[-1].loss == once.history.evaluations[-1].loss

    def test_accumulation_changes_nothing_but_rounding(self, tmp_path):
        data = toy()
        runs = [
            fit(trainer_of(config(data, grad_accumulation=n), data, tmp_path / f"{n}.pt"))
            for n in (1, 4)
        ]
        assert runs[0].history.losses == pytest.approx(runs[1].history.losses, rel=1e-4)


class TestCheckpoints:
    @pytest.fixture
    def trainer(self, tmp_path):
        data = toy()
        return fit(trainer_of(config(data, epochs=1), data, tmp_path / "checkpoint.pt"))

    @pytest.mark.parametrize("damage", ["truncated", "text", "another file", "empty"])
    def test_a_damaged_file_is_refused_and_left_alone(self, trainer, damage):
        path = trainer.checkpoint
        before = {k: v.clone() for k, v in trainer.core.state_dict().items()}
        if damage == "another file":
            torch.save({"weights": torch.zeros(3)}, path)
        else:
            content = path.read_bytes()
            kept = {"truncated": content[: len(content) // 2], "text": b"hello", "empty": b""}
            path.write_bytes(kept[damage])
        content = path.read_bytes()
        with pytest.raises(TrainError, match="not a checkpoint"):
            trainer.load()
        assert path.read_bytes() == content
        assert all(torch.equal(before[k], v) for k, v in trainer.core.state_dict().items())

    def test_another_configuration_is_refused_by_name(self, trainer):
        other = replace(trainer.job, lr=0.125)
        with pytest.raises(TrainError, match=r"does not fit this run: it was made with lr"):
            trainer_of(other, trainer.data, trainer.checkpoint).load()

    def test_other_data_are_refused(self, trainer):
        other = toy(count=112)
        with pytest.raises(TrainError, match="it was made with the data"):
            trainer_of(trainer.job, other, trainer.checkpoint).load()

    def test_reading_runs_no_code(self, tmp_path):
        class Evil:
            def __reduce__(self):
                return (Path.touch, (tmp_path / "ran",))

        torch.save({"format": Evil()}, tmp_path / "evil.pt")
        with pytest.raises(TrainError, match="damaged or not a checkpoint"):
            load_checkpoint(tmp_path / "evil.pt")
        assert not (tmp_path / "ran").exists()


def _loss(model, batch):
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def _batch(seed: int, shape: tuple[int, ...] = (3, 8, 8), count: int = 16):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(count, *shape, generator=generator),
        torch.randint(4, (count,), generator=generator),
    )


class TestMeasure:
    def test_backward_flops_of_an_mlp_are_its_matrix_products(self):
        model = models.mlp(192, 4, widths=(32, 16))
        grad_weights = 2 * 16 * (192 * 32 + 32 * 16 + 16 * 4)
        grad_inputs = 2 * 16 * (32 * 16 + 16 * 4)
        assert measure.backward_flops(model, _batch(0), _loss) == grad_weights + grad_inputs

    def test_attention_is_counted(self):
        model = models.vit((3, 8, 8), 4, patch=2, dim=32, depth=1)
        counted = measure.backward_flops(model, _batch(0), _loss)
        images = 16
        attention = images * 4 * 2 * 16 * 16 * 32  # four products of 16 x 16 tokens x 32 channels
        linear = images * 16 * 2 * (12 + 2 * 12 * 32) * 32 + images * 2 * 2 * 32 * 4
        assert counted == attention + linear

    def test_rows_cut_the_arithmetic_to_what_is_kept(self):
        model = models.mlp(192, 4, widths=(32, 16))
        bs.sketch_(model, bs.Rows(keep=0.25))
        assert measure.backward_flops_ratio(model, _batch(0), _loss) == pytest.approx(0.25)

    def test_saved_bytes_are_inputs_activations_and_log_probabilities(self):
        model = models.mlp(192, 4, widths=(32,))
        floats = 16 * (192 + 32 + 4)  # input, ReLU's own output, log softmax
        labels, weight = 16 * 8, 4  # and the total weight of the loss
        assert measure.saved_bytes(model, _batch(0), _loss) == 4 * floats + labels + weight

    def test_extra_variance_matches_the_closed_form_of_elements(self):
        """One layer: `E‖err‖² = (1/p - 1) Σ_ij G_ij² ‖x_i‖²` for the weights, 0 for the bias."""
        keep, batches = 0.5, [_batch(seed) for seed in range(3)]
        model = models.mlp(192, 4, widths=())
        errors, grads = [], []
        for images, labels in batches:
            logits = model(images)
            loss = F.cross_entropy(logits, labels)
            (cotangent,) = torch.autograd.grad(loss, logits, retain_graph=True)
            squares = images.flatten(1).square().sum(1, keepdim=True)
            errors.append((1 / keep - 1) * (cotangent.square() * squares).sum().item())
            grads.append(
                torch.cat([g.flatten() for g in torch.autograd.grad(loss, model.parameters())])
            )
        variance = torch.stack(grads).var(dim=0).sum().item()
        expected = sum(errors) / len(errors) / variance
        bs.seed(0)
        bs.sketch_(model, bs.Elements(keep=keep))
        measured = measure.extra_variance(model, batches, _loss, draws=200)
        assert measured == pytest.approx(expected, rel=0.05)

    def test_extra_variance_needs_two_batches(self):
        with pytest.raises(ValueError, match="needs two batches, got 1"):
            measure.extra_variance(models.mlp(192, 4), [_batch(0)], _loss)

    def test_dropout_does_not_count_as_extra_variance(self):
        model = models.vit((3, 8, 8), 4, dim=32, depth=1, dropout=0.5)
        bs.sketch_(model, bs.Rows(keep=1.0))
        measured = measure.extra_variance(model, [_batch(0), _batch(1)], _loss)
        assert measured == pytest.approx(0, abs=1e-9)

    def test_measuring_leaves_no_trace(self):
        model = models.build("bagnet", (3, 8, 8), 4, width=4)
        bs.sketch_(model, bs.Rows(keep=0.5))
        model.eval()
        model.stages[0].train()
        modes = [m.training for m in model.modules()]
        state = {k: v.clone() for k, v in model.state_dict().items()}
        random, sketch_random = torch.get_rng_state(), str(bs.get_rng_state())
        measure.backward_flops_ratio(model, _batch(0), _loss)
        measure.saved_bytes(model, _batch(0), _loss)
        measure.extra_variance(model, [_batch(0), _batch(1)], _loss)
        assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
        assert torch.equal(random, torch.get_rng_state())
        assert sketch_random == str(bs.get_rng_state())
        assert [m.training for m in model.modules()] == modes
        assert all(p.grad is None for p in model.parameters())


class TestTrain:
    KEYS = (
        *("test_accuracy", "train_loss", "steps", "wall_seconds", "train_seconds"),
        *("step_seconds_median", "backward_flops_ratio", "peak_saved_bytes", "extra_variance"),
        *("config", "versions"),
    )

    @pytest.mark.pictures
    def test_compared_run_writes_everything_and_learns(self, tmp_path):
        options = {**SMALL, "epochs": 8, "compare": True, "sketch": "rows:keep=0.5"}
        before = torch.get_rng_state()
        returned = train(options, out=tmp_path, console=Console(quiet=True))
        assert torch.equal(before, torch.get_rng_state())
        result = json.loads((tmp_path / "result.json").read_text())
        assert result == json.loads(json.dumps(returned))
        for run in (result, result["exact"]):
            assert set(self.KEYS) <= set(run)
            assert run["steps"] == 8 * (1348 // 64)
            assert run["test_accuracy"] > 0.6
            assert run["wall_seconds"] > run["train_seconds"] > 0
        assert result["backward_flops_ratio"] == pytest.approx(0.5)
        assert result["exact"]["backward_flops_ratio"] == 1
        assert result["extra_variance"] > 0
        assert result["exact"]["extra_variance"] == 0
        assert result["config"]["sketch"] == "rows:keep=0.5"
        assert result["exact"]["config"]["sketch"] == "none"
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")

    def test_resume_of_a_finished_run_trains_no_further(self, tmp_path):
        options = {**SMALL, "epochs": 1, "sketch": "none"}
        first = train(options, out=tmp_path, console=Console(quiet=True))
        again = train({}, out=tmp_path, resume=True, console=Console(quiet=True))
        for key in ("steps", "test_accuracy", "train_loss", "config"):
            assert first[key] == again[key]

    def test_a_fresh_run_sets_an_unfinished_one_aside(self, tmp_path):
        (tmp_path / "checkpoint.pt").write_bytes(b"a day of work")
        train({**SMALL, "epochs": 1, "sketch": "none"}, out=tmp_path, console=Console(quiet=True))
        assert (tmp_path / "checkpoint.old.pt").read_bytes() == b"a day of work"

    def test_bf16_trains(self, tmp_path):
        options = {**SMALL, "epochs": 4, "precision": "bf16", "sketch": "rows:keep=0.5"}
        result = train(options, out=tmp_path, console=Console(quiet=True))
        assert result["test_accuracy"] > 0.4
        assert result["extra_variance"] > 0

    def test_divergence_is_said_and_the_json_stays_valid(self, tmp_path):
        options = {**SMALL, "epochs": 1, "sketch": "none", "optimizer": "sgd", "lr": 1e30}
        result = train(options, out=tmp_path, console=Console(quiet=True))
        assert result["diverged"]
        assert json.loads((tmp_path / "result.json").read_text())["train_loss"] is None

    def test_curve_is_short_and_ends_at_the_last_step(self, tmp_path):
        data = toy()
        history = fit(trainer_of(config(data), data, tmp_path / "c.pt")).history
        history.losses, history.step_seconds = [1.0, 3.0] * 500, [0.5] * 1000
        drawn = curve(history)
        assert len(drawn["step"]) == 400
        assert (drawn["step"][-1], drawn["seconds"][-1]) == (1000, 500)

    def test_json_is_written_whole_or_not_at_all(self, tmp_path):
        write_json(tmp_path / "r.json", {"a": [1.0, float("inf")]})
        assert json.loads((tmp_path / "r.json").read_text()) == {"a": [1.0, None]}
        with pytest.raises(TypeError):
            write_json(tmp_path / "r.json", {"a": object()})
        assert json.loads((tmp_path / "r.json").read_text()) == {"a": [1.0, None]}


class TestAuto:
    def job(self, data, **options):
        """32 steps, of which the first is exact."""
        widths = {"widths": [64, 64]}
        return config(data, sketch="auto", model_options=widths, epochs=8, **options)

    def fitted(self, path, family, **steering) -> Trainer:
        data = toy()
        with steered(family, **steering) as clock:
            return fit(trainer_of(self.job(data), data, path, now=clock))

    def test_sketches_are_found_and_controlled(self, tmp_path):
        trainer, data = self.fitted(tmp_path / "c.pt", "save"), toy()
        exact = fit(trainer_of(self.job(data), data, tmp_path / "e.pt", exact=True))
        assert trainer.history.losses[0] == exact.history.losses[0]
        found = result_of(trainer, 0.0)["auto"]
        assert list(found["plan"]) == [""]
        assert found["plan"][""].startswith("region:")
        assert trainer.history.train_seconds > found["profile_seconds"] > 0
        assert found["keeps"].keys() == {""}
        assert found["advice"] in automatic({"auto": found})
        assert json.dumps(found)

    @pytest.mark.fast_cases(
        *("1-save-exact first", "13-save-8 bits first"),
        *("3-quantized-8 bits first", "24-quantized-exact first"),
    )
    @pytest.mark.parametrize("in_8_bits", [False, True], ids=["exact first", "8 bits first"])
    @pytest.mark.parametrize("family", ["save", "quantized"])
    @pytest.mark.parametrize("stop_at", [1, 2, 3, 13, 24])
    def test_a_stopped_run_ends_with_the_same_weights(self, tmp_path, family, stop_at, in_8_bits):
        data = toy()
        with steered(family, in_8_bits=in_8_bits) as clock:
            whole = fit(trainer_of(self.job(data), data, tmp_path / "whole.pt", now=clock))
            stop = StopRequest()
            stopped = trainer_of(self.job(data), data, tmp_path / "stopped.pt", now=clock)
            with pytest.raises(Interrupted):
                stopped.fit(StopAfter(stop_at, stop), stop)
            resumed = trainer_of(self.job(data), data, tmp_path / "stopped.pt", now=clock)
            resumed.load()
            fit(resumed)
        assert resumed.auto.rules == whole.auto.rules != {}
        assert resumed.auto.result().get("log") == whole.auto.result().get("log")
        assert resumed.history.losses == whole.history.losses
        expected = whole.core.state_dict()
        for name, tensor in resumed.core.state_dict().items():
            assert torch.equal(tensor, expected[name]), name

    def test_no_clock_of_the_machine_tells_in_a_steered_profile(self, monkeypatch):
        data, rng, found = toy(), random.Random(0), []
        job = self.job(data)
        model, batches = data.build(job), [b for b, *_ in data.batches(job, CPU, 0, 1).train(0)]
        for slowest in (1e-4, 1e-2, 1.0):
            later = itertools.accumulate(slowest * rng.random() ** 4 for _ in range(10**6))
            monkeypatch.setattr(time, "perf_counter", later.__next__)
            monkeypatch.setattr(time, "thread_time", later.__next__)
            with steered("save"):
                found.append(proposals.profile(model, batches, data.loss, progress=False).to_dict())
        assert found[0] == found[1] == found[2]

    def test_a_finished_run_that_is_resumed_tells_the_same(self, tmp_path):
        whole, data = self.fitted(tmp_path / "c.pt", "save"), toy()
        again = trainer_of(self.job(data), data, tmp_path / "c.pt")
        again.load()
        fit(again)
        assert again.cost == whole.cost
        assert result_of(again, 0.0)["auto"] == result_of(whole, 0.0)["auto"]

    @pytest.mark.parametrize("in_8_bits", [False, True])
    def test_a_run_whose_sketched_steps_are_slower_goes_back_to_exact_ones(
        self, tmp_path, in_8_bits
    ):
        data = toy()
        with steered("save", sketched=1.25, in_8_bits=in_8_bits) as clock:
            job = replace(self.job(data), epochs=12)  # 48 steps: time for both trials
            found = fit(trainer_of(job, data, tmp_path / "c.pt", now=clock))
        auto = result_of(found, 0.0)["auto"]
        assert auto["plan"] == {}
        assert "back to exact steps: a sketched step takes 1.25 ± 0.00" in auto["reason"]
        assert found.history.step_seconds[-3:] == [1.0, 1.0, 1.0]
        assert not any(is_swapped(m) for m in found.core.modules())
        assert auto["reason"] in automatic({"auto": auto})

    def test_a_short_run_has_time_for_8_bit_products_and_for_no_profile(self, tmp_path):
        found = self.fitted(tmp_path / "c.pt", "save", in_8_bits=True, share=0.03)
        auto = result_of(found, 0.0)["auto"]
        assert set(auto["plan"].values()) == {"int8"}
        assert auto["measured_ratio"] == 0.5
        assert (auto["profile_seconds"], auto["spent_seconds"]) == (0.0, 0.0)
        assert auto["budget_seconds"] == pytest.approx(0.03 * 32)
        assert "a profile would take about 1e+02 s, over 3% of the 32 s" in auto["reason"]
        assert found.history.step_seconds[-3:] == [0.5, 0.5, 0.5]
        assert sum(found.history.step_seconds) < 32

    def test_when_the_budget_is_spent_the_keeps_stay(self, tmp_path, monkeypatch):
        data, step = toy(), bs.Controller.step
        with steered("save", share=0.83) as clock:

            def slow(controller):
                clock.now += 2.0
                step(controller)

            monkeypatch.setattr(bs.Controller, "step", slow)
            job = replace(self.job(data), epochs=32)  # 128 steps: 106 s for a profile and replays
            found = fit(trainer_of(job, data, tmp_path / "c.pt", now=clock))
        auto = result_of(found, 0.0)["auto"]
        assert "the keeps stay since step" in auto["reason"]
        assert auto["spent_seconds"] >= auto["budget_seconds"] > auto["profile_seconds"] == 40
        assert auto["spent_seconds"] < auto["budget_seconds"] + 20 * 2.0

    def under_a_region(self, path, keep: float, **options):
        data = toy()
        trainer = trainer_of(self.job(data, **options), data, path)
        trainer.auto._apply(Proposal({"": f"region:keep={keep}"}, "for a test"))
        trainer.auto._control_keeps(None)
        trainer.measure_cost()
        return trainer

    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    def test_a_region_over_the_model_acts_under_mixed_precision(self, tmp_path, precision):
        trainer = self.under_a_region(tmp_path / "c.pt", 0.25, precision=precision)
        assert trainer.cost["backward_flops_ratio"] < 0.3

    def test_arithmetic_is_the_mean_over_the_steps_and_not_that_at_the_end(self, tmp_path):
        trainer = self.under_a_region(tmp_path / "c.pt", 0.25)
        at_the_end = trainer.cost["backward_flops_ratio"]
        auto = trainer.auto
        auto.steps = 12  # three of them exact
        for keep in [1.0] * 5 + [0.25] * 4:
            auto.usage.add(auto.rules, {"": keep})
        mean = auto.mean_arithmetic(trainer.batch_of(0))
        assert mean == pytest.approx((8 + 4 * at_the_end) / 12)
        assert trainer.auto.controller.keeps == {"": 0.25}
        trainer.measure_cost()
        assert trainer.cost["backward_flops_ratio"] == at_the_end

    def test_a_tiny_model_is_trained_exactly_and_says_so(self, tmp_path):
        console = Console(record=True, file=io.StringIO(), width=500)
        options = {**SMALL, "epochs": 1, "sketch": "auto"}
        result = train(options, out=tmp_path / "auto", console=console)
        exact = train({**options, "sketch": "none"}, out=tmp_path / "exact", console=console)
        assert result["auto"]["plan"] == {}
        assert result["train_loss"] == exact["train_loss"]
        assert (
            f"trained exactly (profile {result['auto']['profile_seconds']:.1f} s): no"
            in console.export_text()
        )


@pytest.mark.slow
def test_two_processes_make_the_same_exact_model_as_one(tmp_path):
    options = ["--epochs=2", "--batch-size=64", "--widths=16", "--device=cpu", "--compare"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, "-m", "backsketch.cli", "train", *options, "--out", str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    one = {**SMALL, "epochs": 2, "sketch": "none"}
    train(one, out=tmp_path / "one", console=Console(quiet=True))
    two = load_checkpoint(tmp_path / "two" / "exact.pt")
    assert two["processes"] == 2
    assert len(two["random"]) == 2
    for name, expected in load_checkpoint(tmp_path / "one" / "checkpoint.pt")["model"].items():
        torch.testing.assert_close(two["model"][name], expected, rtol=1e-3, atol=1e-4)
    assert json.loads((tmp_path / "two" / "result.json").read_text())["processes"] == 2
