"""Equal-cost sweeps: the training and step-time problems, their resumption, and the tables made of them."""

from __future__ import annotations

import math
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("typer")

from backsketch import models
from backsketch.experiments import Store, SweepError, run_sweep
from backsketch.experiments.bench import checkpointed
from backsketch.experiments.problems import step_time, training
from backsketch.experiments.report import report
from backsketch.experiments.store import SWEEP, Sweep, write
from backsketch.experiments.views import equal_cost, headline, paper
from backsketch.experiments.views.arms import (
    Goal,
    arms,
    best_exact,
    ends_level,
    reached,
    relative_step,
    relative_time,
)
from backsketch.train.images import ImageData
from helpers import quiet

SMALL = {"model_options": {"widths": [16]}}
FIXED = {"model": "mlp", "data": "digits", "limit": 256, "batch_size": 64, "train": SMALL}
TINY = {
    "report": "equal_cost",
    "workers": 0,
    "settings": {"target": 0.2},
    "parts": [
        {
            "problem": "training",
            "fixed": {**FIXED, "epochs": 2, "evaluations": 2},
            "grid": [
                {"arm": ["exact"], "lr": [0.01, 0.02]},
                {"arm": ["rows"], "sketch": ["rows:keep=0.5"], "lr": [0.02]},
                {"arm": ["by hand"], "sketch": [{"fc1": None, "": "rows:keep=0.5"}], "lr": [0.02]},
            ],
        },
        {
            "problem": "step_time",
            "fixed": {
                **{k: FIXED[k] for k in ("model", "data", "limit", "train")},
                "rounds": 3,
                "arms": {
                    "exact": {"batch_size": 64},
                    "checkpointing": {"batch_size": 64, "checkpoint": [""]},
                    "rows": {"batch_size": 64, "sketch": "rows:keep=0.5"},
                },
            },
        },
    ],
}


def without_times(record):
    result = dict(record["result"])
    if "arms" in result:
        result["arms"] = {name: arm["saved_bytes"] for name, arm in result["arms"].items()}
    return {k: v for k, v in result.items() if k != "seconds"}


def test_a_killed_sweep_continues_to_the_same_records(config, tmp_path, monkeypatch):
    run_sweep(config, tmp_path / "whole", console=quiet())
    save, saved = Store.save, []

    def interrupted(self, job, record):
        if len(saved) == 2:
            raise KeyboardInterrupt
        saved.append(job)
        save(self, job, record)

    monkeypatch.setattr(Store, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(config, tmp_path / "cut", console=quiet())
    assert len(Store(tmp_path / "cut" / "tiny").finished()) == 2
    monkeypatch.setattr(Store, "save", save)
    assert run_sweep(config, tmp_path / "cut", console=quiet()) == []
    whole, cut = (Store(tmp_path / name / "tiny").records() for name in ("whole", "cut"))
    assert whole.keys() == cut.keys() == {job.id for job in config.jobs()}
    for name, record in whole.items():
        assert without_times(record) == without_times(cut[name])
    # And what was written makes a report.
    report([tmp_path / "cut"], tmp_path / "page.html", quiet())
    assert (tmp_path / "cut" / "tiny" / "tiny.png").stat().st_size < 300_000
    assert "checkpointing" in (tmp_path / "page.html").read_text()


def test_a_record_tells_the_run():
    job = training.Training("x", epochs=2, evaluations=3, lr=0.01, sketch="rows:keep=0.5", **FIXED)
    found = training.run(job)
    assert found["evaluations"]["step"] == [1, 2, 4, 5, 6, 8]
    assert found["accuracy"] == found["evaluations"]["accuracy"][-1]
    assert (found["steps"], found["batch_size"], found["lr"]) == (8, 64, 0.01)
    assert found["backward_flops_ratio"] == pytest.approx(0.5)
    products = 2 * 32 * (64 * 16 + 2 * 16 * 10)  # 32 of 64 rows; the first layer has no grad_input
    assert found["backward_flops"] == products
    assert min(found["extra_variance"].values()) > 0
    exact = training.run(replace(job, sketch="none"))
    assert exact["extra_variance"] == {"1": 0.0, "2": 0.0}
    assert min(exact["noise_scale"].values()) > 0
    assert exact["curve"]["train_loss"][0] == found["curve"]["train_loss"][0]  # the same start


def test_changing_the_words_runs_nothing(config, tmp_path, monkeypatch):
    run_sweep(config, tmp_path, console=quiet())
    before = Store(tmp_path / "tiny").records()
    monkeypatch.setattr(Store, "save", lambda *a: pytest.fail("a job ran"))
    run_sweep(replace(config, about="new", settings={"target": 0.3}), tmp_path, console=quiet())
    sweep = Sweep.load(tmp_path / "tiny")
    assert (sweep.about, sweep.settings) == ("new", {"target": 0.3})
    assert Store(tmp_path / "tiny").records() == before


def test_checkpointing_changes_neither_model_nor_gradients():
    model = models.build("vit", (3, 8, 8), 4, dim=32, depth=2)
    x, y = torch.randn(5, 3, 8, 8), torch.arange(5) % 4
    names = list(model.state_dict())
    for patterns in (["blocks.*"], [""]):
        other = checkpointed(model, patterns)
        grads = [
            torch.autograd.grad(F.cross_entropy(m(x), y), list(model.parameters()))
            for m in (model, other)
        ]
        assert all(torch.equal(a, b) for a, b in zip(*grads))
        assert list(model.state_dict()) == names


def test_step_times_are_of_whole_steps_and_checkpointing_saves_bytes():
    fixed = {"model": "vit", "data": "digits", "limit": 64, "rounds": 3}
    made = step_time.StepTime(
        arms={
            "exact": {"batch_size": 16},
            "checkpoint": {"batch_size": 16, "checkpoint": ["blocks.*"]},
        },
        train={"model_options": {"dim": 32, "depth": 2}},
        **fixed,
    )
    found = step_time.run(made)["arms"]
    for arm in found.values():
        low, high = arm["quartiles"]
        assert 0 < low <= arm["seconds"] <= high
        assert sum(arm[part] for part in step_time.PARTS) == pytest.approx(arm["seconds"], rel=0.5)
    assert found["checkpoint"]["saved_bytes"] < 0.5 * found["exact"]["saved_bytes"]


def test_step_times_are_those_of_the_precision_that_is_trained_in(monkeypatch):
    seen = []

    def watched(self, model, batch):
        seen.append(torch.is_autocast_enabled("cpu"))
        return F.cross_entropy(model(batch.images).float(), batch.labels)

    monkeypatch.setattr(ImageData, "loss", watched)
    arms = {"half": {"batch_size": 64, "train": {**SMALL, "precision": "bf16"}}}
    options = {key: FIXED[key] for key in ("model", "data", "limit")}
    step_time.run(step_time.StepTime(**options, arms=arms, rounds=2))
    assert seen
    assert all(seen)


def test_a_compiled_arm_compiles_the_model_that_it_times(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    options = {key: FIXED[key] for key in ("model", "data", "limit")}
    arms = {name: {"batch_size": 64, "train": SMALL} for name in ("plain", "compiled")}
    arms["compiled"]["compile"] = True
    step_time.run(step_time.StepTime(**options, arms=arms, rounds=2))
    assert len(compiled) == 1


# The tables, from records whose answers are known ------------------------------------------------------------


def made_run(arm, sketch, *, speed, seed=0, lr=0.1, batch_size=10, omega=0.0, beta=1.0, top=0.99):
    """Accuracy rises by ``speed`` a step up to ``top``, in looks of 10 steps."""
    steps = list(range(10, 101, 10))
    accuracy = [min(speed * s, top) for s in steps]
    options = {"arm": arm, "sketch": sketch, "seed": seed, "lr": lr, "batch_size": batch_size}
    result = {
        "evaluations": {"step": steps, "accuracy": accuracy, "loss": accuracy},
        "curve": {"step": steps, "train_loss": [1 / s for s in steps]},
        "accuracy": accuracy[-1],
        "steps": 100,
        "seconds": 100.0 if sketch == "none" else 50.0,
        **{"batch_size": batch_size, "lr": lr, "epochs": 2},
        **{"saved_bytes": 2**20, "backward_flops_ratio": 0.5, "backward_flops": 10**9},
        "extra_variance": {"1": omega, "2": omega},
        "noise_scale": {"1": beta, "2": None} if sketch == "none" else {},
    }
    head = {"id": f"{arm}{seed}{lr}", "problem": "training", "status": "done"}
    return {**head, "options": options, "result": result}


def made_sweep(*jobs, **settings):
    return Sweep("made", "equal_cost", "", {}, jobs, {"target": 0.5, **settings})


def example():
    return made_sweep(
        made_run("exact", "none", speed=0.010),
        made_run("exact", "none", speed=0.012, lr=0.2),
        made_run("exact", "none", speed=0.015, lr=0.2, seed=1),
        made_run("exact", "none", speed=0.020, lr=0.1, seed=1),  # better, but not on the first seed
        made_run("rows", "rows:keep=0.5", speed=0.010, lr=0.2, omega=0.5),
        made_run("rows", "rows:keep=0.5", speed=0.010, lr=0.2, omega=0.5, seed=1),
        made_run("weak", "elements:keep=0.5", speed=0.001, lr=0.2, omega=2.0),
    )


def test_arms_use_the_rate_that_was_best_on_the_first_seed():
    exact, rows, weak = arms(example())
    assert (exact.lr, len(exact.runs)) == (0.2, 2)
    assert exact.steps == pytest.approx({0: 0.5 / 0.012, 1: 0.5 / 0.015})
    assert best_exact([exact, rows, weak], exact.model) is exact
    assert weak.seconds is None
    # 50 steps of half a second against 41.7 and 33.3 steps of one, seed by seed.
    mean, error = relative_time(rows, exact)
    assert mean == pytest.approx((25 * 0.012 / 0.5 + 25 * 0.015 / 0.5) / 2)
    assert error == pytest.approx((25 * 0.015 / 0.5 - 25 * 0.012 / 0.5) / 2)
    assert relative_time(weak, exact) is None


def test_the_best_exact_arm_is_best_on_the_seeds_that_all_have():
    """An arm with one seed must not win because the further seeds of another one are slow."""
    several, one = arms(
        made_sweep(
            made_run("several", "none", speed=0.012),
            made_run("several", "none", speed=0.008, seed=1),
            made_run("one", "none", speed=0.011, batch_size=20),
        )
    )
    assert best_exact([several, one], several.model) is several


def test_autocast_is_neither_exact_nor_sketched():
    """It is compared with the best exact arm, which it is not, and has a bar of its own."""
    fast = made_run("autocast", "none", speed=0.030, lr=0.2)
    fast["options"]["train"] = {"precision": "bf16"}
    found = arms(made_sweep(*example().jobs[:2], fast))
    exact, autocast = found
    assert autocast.model == exact.model
    assert not autocast.is_exact
    assert not autocast.is_sketched
    assert best_exact(found, exact.model) is exact
    best = headline.best_of_kinds(found, exact.model)
    assert best["bf16 autocast"][0] is autocast
    assert best["bf16 autocast"][1] == pytest.approx(0.4)
    whole = made_sweep(*example().jobs[:2], fast)
    assert [row[0] for row in equal_cost.page(whole).tables[1].rows] == []


def test_targets_are_met_between_looks():
    run = made_run("x", "none", speed=0.013)["result"]
    assert reached(run, Goal(0.5)) == pytest.approx(0.5 / 0.013)
    assert reached(run, Goal(0.992)) is None


def test_the_terms_of_rho():
    found = arms(example())
    terms = equal_cost.terms(found[1], found)
    assert (terms.cost, terms.multiplier) == (0.5, 1.5)
    assert terms.noise == 0.75  # β is 1, then lost in the noise: 1/2 and 1
    assert terms.steps == pytest.approx(1 + 0.5 * 0.75)
    assert terms.rho == pytest.approx(0.5 * 1.375)
    assert terms.measured_steps == pytest.approx((50 * 0.012 / 0.5 + 50 * 0.015 / 0.5) / 2)
    assert equal_cost.terms(found[2], found).measured is None


def test_quiet_step_times_win_and_checkpointing_makes_the_exact_steps():
    entry = {"seconds": 0.25, "quartiles": [0.2, 0.3], "saved_bytes": 7}
    arms_timed = {
        "exact": {"batch_size": 10},
        "checkpointing": {"batch_size": 10, "checkpoint": ["blocks.*"]},
        "rows, compiled": {"batch_size": 10, "sketch": "rows:keep=0.5", "compile": True},
    }
    timed = {
        **{"exact": entry, "checkpointing": {**entry, "seconds": 0.4}},
        "rows, compiled": {**entry, "seconds": 0.1},
    }
    job = {
        **{"id": "t", "problem": "step_time", "status": "done", "options": {"arms": arms_timed}},
        "result": {"arms": timed},
    }
    exact, checkpointing, rows, compiled, _ = arms(made_sweep(*example().jobs, job))
    assert (exact.quiet, exact.step_seconds) == (True, 0.25)
    assert (rows.quiet, rows.step_seconds) == (False, 0.5)
    assert checkpointing.steps == exact.steps
    assert (checkpointing.step_seconds, checkpointing.saved_bytes) == (0.4, 7)
    assert best_exact([checkpointing, exact], exact.model) is exact
    assert (compiled.steps, compiled.step_seconds) == (rows.steps, 0.1)
    assert compiled.is_sketched
    assert relative_step(compiled, exact) == 0.4
    comparison = equal_cost.page(made_sweep(*example().jobs, job)).tables[0]
    told = {row[0]: row[comparison.header.index("step")] for row in comparison.rows}
    assert (told["exact"], told["rows"]) == ("250.0 ms", "500.0 ms †")
    assert "quiet machine; †: of its own runs" in comparison.title
    # Half a second against one, by the clock that both have.
    assert relative_step(rows, exact) == 0.5


def test_the_page_says_who_arrived():
    page = equal_cost.page(example())
    comparison, analysis, steps = page.tables
    assert not steps.rows  # nothing was timed
    assert comparison.title.endswith("of the runs themselves")
    cells = {row[0]: dict(zip(comparison.header, row)) for row in comparison.rows}
    assert cells["weak"]["steps to target"] == "1 of 1 missed"
    assert cells["weak"]["over best exact"] == ""
    assert cells["exact"]["over best exact"] == "1.00 ± 0.00"
    assert cells["rows"]["steps to target"] == "50 ± 0"
    assert cells["rows"]["time to target"] == "25.0 ± 0.0 s"
    assert [row[0] for row in analysis.rows] == ["rows", "weak"]
    assert analysis.rows[1][-2] == "not reached"
    with pytest.raises(SweepError, match="needs a target"):
        equal_cost.page(replace(example(), settings={}))
    with pytest.raises(SweepError, match="no training run"):
        equal_cost.page(made_sweep())


def test_the_headline_has_the_best_arm_of_each_kind_that_arrived_with_as_many_seeds():
    region = "region:keep=0.5"
    sweep = made_sweep(
        *example().jobs,
        made_run("lucky", "rows:keep=0.25", speed=0.030),  # one seed
        made_run("region", region, speed=0.012, lr=0.2),
        made_run("region", region, speed=0.015, lr=0.2, seed=1),
        *(made_run("int8", "int8", speed=0.012, lr=0.2, seed=seed) for seed in (0, 1)),
        *(made_run("both", f"{region},arithmetic=int8", speed=0.03, seed=seed) for seed in (0, 1)),
        *(made_run("never", "auto", speed=0.001, seed=seed) for seed in (0, 1)),
    )
    found = arms(sweep)
    best = headline.best_of_kinds(found, found[0].model)
    assert {name: arm.name for name, (arm, _, _) in best.items()} == {
        "best exact": "exact", "rows": "rows", "regions": "region",
        "8 bits": "int8", "8 bits in regions": "both",
    }  # fmt: skip
    assert best["regions"][1] == pytest.approx(0.5)
    (axes,) = headline.figure([sweep, example()]).axes
    heights = sorted(round(bar.get_height(), 3) for bar in axes.patches)
    expected = [best[name][1] for name in best] + [1.0, best["rows"][1]]
    assert heights == pytest.approx(sorted(expected), abs=1e-3)


def test_an_arm_that_ends_worse_wins_only_where_none_ends_level():
    sweep = made_sweep(
        *(made_run("exact", "none", speed=0.012, seed=seed) for seed in (0, 1)),
        *(made_run("fast", "rows:keep=0.1", speed=0.02, top=0.7, seed=seed) for seed in (0, 1)),
        *(made_run("level", "rows:keep=0.5", speed=0.01, seed=seed) for seed in (0, 1)),
        *(made_run("8 bits", "int8", speed=0.02, top=0.7, seed=seed) for seed in (0, 1)),
    )
    found = arms(sweep)
    best = headline.best_of_kinds(found, found[0].model)
    assert best["rows"][0].name == "level"
    assert best["8 bits"][0].name == "8 bits"
    (axes,) = headline.figure([sweep]).axes
    assert [bar.get_hatch() for bar in axes.patches] == [None, None, headline.WORSE]


def test_an_arm_that_diverged_does_not_end_level():
    sweep = made_sweep(
        *(made_run(name, "none", speed=0.012, seed=seed) for name in "ab" for seed in (0, 1)),
    )
    sweep.jobs[-1]["result"]["evaluations"]["accuracy"][-1] = None
    one, other = arms(sweep)
    assert ends_level(one, one)
    assert not ends_level(one, other)
    assert not ends_level(other, one)


def test_several_comparisons_get_a_figure_together(tmp_path):
    for name in ("one", "two"):
        write(tmp_path / name / SWEEP, asdict(replace(example(), name=name)))
    written = report([tmp_path], tmp_path / "page.html", quiet())
    assert tmp_path / "equal_cost.png" in written
    assert (tmp_path / "page.html").read_text().count("data:image/png") == 3


def test_the_experiments_of_the_paper():
    jobs = [
        made_run("paper", sketch, speed=speed, seed=seed)
        for sketch, speed in (("none", 0.009), ("rows:keep=0.5", 0.008), ("rows:keep=0.1", 0.004))
        for seed in (0, 1)
    ]
    (table,) = paper.page(made_sweep(*jobs)).tables
    assert table.header[1:] == ("keep 0.5", "keep 0.1")
    assert table.rows[0] == ("exact", "90.00 ± 0.00", "90.00 ± 0.00")
    assert table.rows[1] == ("rows", "80.00 ± 0.00 (0)", "40.00 ± 0.00 (0)")
    with pytest.raises(SweepError, match="no exact run"):
        paper.page(made_sweep(*jobs[2:]))
    assert math.isnan(paper.mean_error([1.0])[1])
