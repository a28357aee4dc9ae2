"""The command line: the demonstration, one-sentence errors, Ctrl-C, missing extras."""

from __future__ import annotations

import json
import runpy
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("accelerate")
from PIL import Image
from typer.testing import CliRunner

import helpers
from backsketch import cli
from backsketch.commands import train as command
from backsketch.train import config, loop
from backsketch.train.checkpoint import load_checkpoint

QUICK = ["--widths", "16", "--batch-size", "64", "--epochs", "1", "--threads", "1"]

pytestmark = pytest.mark.usefixtures("elsewhere")


def invoke(*arguments: str):
    return helpers.invoke("train", *arguments)


@pytest.mark.pictures
@pytest.mark.fast_cases("60")
@pytest.mark.parametrize(("min_steps", "accuracy"), [(60, 0.9), (None, 0.95)], ids=["60", "all"])
def test_without_arguments_the_digits_are_trained_exactly_and_sketched(
    min_steps, accuracy, monkeypatch
):
    """With fewer steps of a narrower model than the command makes, or as it is."""
    if min_steps is not None:
        monkeypatch.setitem(command.DEMONSTRATION, "model_options", {"widths": [256] * 3})
        short = replace(config.RECIPES["mlp"], epochs=1, min_steps=min_steps)
        monkeypatch.setattr(config, "RECIPES", {**config.RECIPES, "mlp": short})
    done = invoke()
    assert done.exit_code == 0, done.output
    folder = Path("runs/mlp-digits-rows-keep=0.25")
    result = json.loads((folder / "result.json").read_text())
    assert result["test_accuracy"] > accuracy
    assert result["exact"]["test_accuracy"] > accuracy
    assert (folder / "plot.png").is_file()
    assert "rows:keep=0.25" in (folder / "sketch.txt").read_text()
    for said in ("exact", "sketched", "test accuracy", "extra variance", str(folder)):
        assert said in done.output


def test_with_arguments_nothing_is_compared_unless_asked(tmp_path):
    done = invoke(*QUICK, "--out", "one")
    assert done.exit_code == 0, done.output
    assert "exact" not in json.loads(Path("one/result.json").read_text())


def test_a_sketch_may_be_a_mapping():
    rules = '{"fc1": null, "": "rows:keep=0.5"}'
    done = invoke(*QUICK, "--sketch", rules)
    assert done.exit_code == 0, done.output
    folder = Path("runs/mlp-digits-fc1-null-rows-keep=0.5")
    assert json.loads((folder / "result.json").read_text())["config"]["sketch"] == rules
    (row,) = [line for line in (folder / "sketch.txt").read_text().splitlines() if "fc1" in line]
    assert "rows" not in row


def test_options_arrive_in_the_configuration():
    arguments = "--sketch none --optimizer sgd --lr 0.5 --schedule cosine --warmup 0.1 --seed 3"
    more = "--momentum 0.5 --no-nesterov --weight-decay 0 --grad-accumulation 2 --limit-train 200"
    done = invoke(*QUICK, *arguments.split(), *more.split(), "--augment", "--out", "o")
    assert done.exit_code == 0, done.output
    found = json.loads(Path("o/result.json").read_text())["config"]
    expected = {
        **{"sketch": "none", "optimizer": "sgd", "lr": 0.5, "schedule": "cosine", "seed": 3},
        **{"warmup": 0.1, "momentum": 0.5, "nesterov": False, "weight_decay": 0.0},
        **{"grad_accumulation": 2, "limit_train": 200, "augment": True, "epochs": 1},
        "model_options": {"widths": [16]},
    }
    assert {name: found[name] for name in expected} == expected


def test_a_model_pretrained_on_some_classes_is_tuned_on_all():
    done = invoke(*QUICK, "--sketch", "none", "--classes", "0,1,2,3,4,5,6,7", "--out", "eight")
    assert done.exit_code == 0, done.output
    eight = json.loads(Path("eight/result.json").read_text())
    assert eight["config"]["classes"] == [0, 1, 2, 3, 4, 5, 6, 7]
    done = invoke(*QUICK, "--sketch", "int8", "--init", "eight", "--out", "ten")
    assert done.exit_code == 0, done.output
    ten = json.loads(Path("ten/result.json").read_text())
    assert ten["data"]["num_train"] > eight["data"]["num_train"]
    done = invoke("--out", "eight", "--resume", "--classes", "0,1")
    assert done.exit_code == 2
    assert "it was made with classes = [0, 1, 2, 3, 4, 5, 6, 7], not [0, 1]" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--sketch nonsense:keep=0.5", "unknown sketch 'nonsense'"),
        ("--sketch automatic", "columns, elements, exact"),
        ("--sketch automatic", "or say auto, or none for exact training"),
        ("--sketch rows:keep=1.5", "keep"),
        ("--sketch rows:keep=0", "keep"),
        ("--classes 0,ten", "'0,ten' is not a list such as"),
        ("--classes 0,10", "classes must be in 0..9 of digits"),
        ("--init nowhere", "there is no checkpoint nowhere"),
        ('--sketch {"fc9":"rows:keep=0.5"}', "matches no module; near names: fc"),
        ('--sketch {"fc1":"rows:keep=0.5"', "is not a JSON object"),
        ("--sketch {}", "has no rules"),
        ("--evaluations 0", "evaluations must be positive"),
        ("--model resnet", "model must be one of mlp, bagnet, vit"),
        ("--model mlp --patch 4", "model mlp has no option 'patch'"),
        ("--model vit --patch 3", "not a whole number of 3x3 patches"),
        ("--data ./missing", "the data folder ./missing does not exist"),
        ("--epochs 0", "epochs must be positive"),
        ("--batch-size 5000", "larger than the 1348 train images"),
        ("--precision fp16 --device cpu", "fp16 needs a GPU"),
        ("--device quantum", "no device called 'quantum'"),
        ("--sketch none --compare", "nothing to compare"),
        ("--resume", "there is no checkpoint in"),
        ("--widths 12,x", "is not a list such as 512,512,512"),
    ],
)
def test_mistakes_get_one_sentence_and_leave_nothing_behind(tmp_path, arguments, message):
    done = invoke(*arguments.split())
    assert done.exit_code == 2, done.output
    assert message in " ".join(done.output.replace("│", " ").split())
    assert "Traceback" not in done.output
    assert not list(tmp_path.rglob("*.pt")) + list(tmp_path.rglob("result.json"))


def test_resume_refuses_other_options_and_a_damaged_checkpoint():
    assert invoke(*QUICK, "--out", "r").exit_code == 0
    done = invoke("--out", "r", "--resume", "--lr", "0.125")
    assert done.exit_code == 2
    assert "it was made with lr = 0.002, not 0.125" in done.output
    checkpoint = Path("r/checkpoint.pt")
    checkpoint.write_bytes(b"damaged")
    done = invoke("--out", "r", "--resume")
    assert done.exit_code == 2
    assert "is damaged or not a checkpoint" in done.output
    assert checkpoint.read_bytes() == b"damaged"


def test_ctrl_c_leaves_a_checkpoint_from_which_the_same_weights_are_reached(monkeypatch, capsys):
    """The signal comes after the first checkpoint; faults/test_killed.py has one at any time, to a process."""
    options = ["--widths", "8", "--batch-size", "512", "--epochs", "40", "--threads", "1"]
    checkpoint, save = Path("stopped/checkpoint.pt"), loop.save_checkpoint

    def interrupted(*arguments):
        save(*arguments)
        patch.setattr(loop, "save_checkpoint", save)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", interrupted)
        patch.setattr(sys, "argv", ["backsketch", "train", *options, "--out", "stopped"])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    errors = capsys.readouterr().err
    assert stopped.value.code == 130, errors
    assert "to continue here: backsketch train --out stopped --resume" in errors
    assert "Traceback" not in errors
    assert load_checkpoint(checkpoint)["epoch"] < 40
    assert invoke("--out", "stopped", "--resume").exit_code == 0
    assert invoke(*options, "--out", "whole").exit_code == 0
    expected = load_checkpoint(Path("whole/checkpoint.pt"))["model"]
    for name, tensor in load_checkpoint(checkpoint)["model"].items():
        assert torch.equal(tensor, expected[name]), name


def test_interruption_during_the_exact_run_resumes_the_comparison(monkeypatch):
    """The job is in every checkpoint, so even the exact run's alone brings back the whole job."""
    options = [*QUICK, "--compare", "--sketch", "rows:keep=0.5"]
    assert invoke(*options, "--out", "c").exit_code == 0
    whole = json.loads(Path("c/result.json").read_text())
    for name in ("checkpoint.pt", "result.json"):
        Path("c", name).unlink()
    assert invoke("--out", "c", "--resume").exit_code == 0
    again = json.loads(Path("c/result.json").read_text())
    assert again["train_loss"] == whole["train_loss"]
    assert again["exact"]["train_loss"] == whole["exact"]["train_loss"]


@pytest.mark.parametrize("package", ["typer", "accelerate", "datasets"])
def test_a_missing_package_is_named_with_its_remedy(monkeypatch, capsys, package):
    monkeypatch.setitem(sys.modules, package, None)
    for name in [m for m in sys.modules if m.startswith("backsketch.train")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "argv", ["backsketch", "train", "--data", "some/images"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    expected = f'backsketch: the command line needs {package}: pip install "backsketch[train]"\n'
    assert capsys.readouterr().err == expected


def test_core_imports_neither_the_extras_nor_the_compiler():
    code = "import sys, backsketch; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    left_out = {"typer", "rich", "datasets", "accelerate", "sklearn", "torch._dynamo"}
    assert not left_out & set(done.stdout.split())


def test_python_m_backsketch_is_the_same_command(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "backsketch.__main__", raising=False)  # other tests import it
    monkeypatch.setattr(sys, "argv", ["backsketch", "--version"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("backsketch", run_name="__main__", alter_sys=True)
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith("backsketch ")


def test_help_lists_the_contract():
    done = CliRunner().invoke(cli.make_app(), ["train", "--help"], terminal_width=120)
    assert done.exit_code == 0
    for option in ("--model", "--data", "--sketch", "--epochs", "--batch-size", "--lr", "--seed"):
        assert option in done.output
    for option in ("--device", "--out", "--resume", "--compare"):
        assert option in done.output


@pytest.mark.fast_cases("vit")
@pytest.mark.parametrize(
    ("model", "options"),
    [("vit", ["--dim", "32", "--depth", "2"]), ("bagnet", ["--width", "8"])],
    ids=["vit", "bagnet"],
)
def test_image_models_learn_a_folder_of_pictures(tmp_path, model, options):
    """Two classes of noise, reddish and bluish: what any model that trains must tell apart."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 64), ("test", 32)):
        for channel, name in ((0, "red"), (2, "blue")):
            (folder := tmp_path / "pictures" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 200, (16, 16, 3), dtype=np.uint8)
                pixels[..., channel] += 50
                Image.fromarray(pixels).save(folder / f"{number}.png")
    done = invoke(
        *("--model", model, "--data", "pictures", "--epochs", "14", "--batch-size", "32"),
        *("--sketch", "rows:keep=0.5", "--device", "cpu", "--out", "o", *options),
    )
    assert done.exit_code == 0, done.output
    result = json.loads(Path("o/result.json").read_text())
    assert result["test_accuracy"] > 0.9
    assert 0 < result["backward_flops_ratio"] < 0.7


def test_a_profile_is_printed_with_its_plan_and_saved(tmp_path):
    out = tmp_path / "profile.json"
    done = CliRunner().invoke(
        cli.make_app(), ["profile", "--batch-size", "64", "--steps", "20", "--out", str(out)]
    )
    assert done.exit_code == 0, done.output
    assert "(model)" in done.output
    assert "the plan for time:" in done.output
    assert "time to a target" in done.output
    assert [site["name"] for site in json.loads(out.read_text())["sites"]] == [""]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_objective_is_named():
    done = CliRunner().invoke(cli.make_app(), ["profile", "--steps", "0", "--objective", "speed"])
    assert done.exit_code == 2
    assert "objective must be one of" in done.output
