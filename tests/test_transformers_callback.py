"""The callback for ``transformers.Trainer``: what it sketches, logs, saves, continues and refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import backsketch as bs
from backsketch.nn.swap import is_swapped
from backsketch.planning.measure import recorder
from helpers import same_weights
from steering import Clock, steered_auto

transformers = pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("accelerate")

from backsketch.integrations.transformers import SketchCallback, blocks  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
TOKENS = 12


def gpt2(dropout: float = 0.1) -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=40, n_positions=TOKENS, n_embd=64, n_layer=2, n_head=2,
        bos_token_id=0, eos_token_id=0, loss_type="ForCausalLM",
        attn_pdrop=dropout, embd_pdrop=dropout, resid_pdrop=dropout,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=128, max_position_embeddings=TOKENS, num_labels=3,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def examples(model: nn.Module) -> list[dict[str, Tensor]]:
    tokens = torch.randint(40, (48, TOKENS), generator=torch.Generator().manual_seed(1))
    if isinstance(model, transformers.GPT2LMHeadModel):
        return [{"input_ids": row, "labels": row} for row in tokens]
    return [{"input_ids": row, "labels": row[0] % 3} for row in tokens]


def made(
    folder: Path, *callbacks: Any, build: Any = gpt2, trainer: Any = None, **options: Any
) -> Any:
    """A trainer of a new small model."""
    torch.manual_seed(0)
    model = build() if callable(build) and not isinstance(build, nn.Module) else build
    given = {
        "use_cpu": True, "report_to": [], "disable_tqdm": True, "max_steps": 4, "logging_steps": 2,
        "per_device_train_batch_size": 8, "save_strategy": "no", "learning_rate": 1e-3, **options,
    }  # fmt: skip
    args = transformers.TrainingArguments(str(folder), **given)
    kind = trainer or transformers.Trainer
    data = examples(model)
    return kind(model, args, train_dataset=data, eval_dataset=data, callbacks=list(callbacks))


def logged(trainer: Any, name: str) -> list[float]:
    return [line[name] for line in trainer.state.log_history if name in line]


class Seen(transformers.TrainerCallback):
    """What the model was in training and in evaluation, and what a logger is given."""

    def __init__(self) -> None:
        self.training: list[int] = []
        self.logs: list[dict[str, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.training.append(sum(map(is_swapped, model.modules())))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.logs.append(dict(logs))


def test_a_model_is_sketched_while_it_trains_and_plain_before_and_afterwards(tmp_path):
    seen, callback = Seen(), SketchCallback("rows:keep=0.5")
    trainer = made(tmp_path, seen, callback)
    types = [type(m) for m in trainer.model.modules()]
    trainer.train()
    assert seen.training == [9] * 4  # four layers a block, and the head
    assert [type(m) for m in trainer.model.modules()] == types
    assert len(callback.report.sketched) == 9
    assert "compute_loss" not in vars(trainer)


def test_a_logger_that_came_first_sees_the_numbers(tmp_path):
    seen = Seen()
    trainer = made(tmp_path, seen, SketchCallback({"transformer.*": "rows:keep=0.5"}))
    trainer.train()
    with_loss = [line for line in seen.logs if "loss" in line]
    assert [line["backsketch/arithmetic"] for line in with_loss] == logged(
        trainer, "backsketch/arithmetic"
    )
    arithmetic = with_loss[-1]["backsketch/arithmetic"]
    # Two products a weight: all of the blocks at a half, the head and attention's two products exact.
    blocks_, head, attention = 2 * 12 * 64**2, 40 * 64, 2 * 2 * TOKENS * 64
    assert arithmetic == pytest.approx(1 - blocks_ / 2 / (blocks_ + head + attention), rel=1e-6)
    assert with_loss[-1]["backsketch/saved_bytes"] > 1000
    assert with_loss[-1]["backsketch/extra_variance"] > 0
    assert with_loss[-1]["backsketch/changes"] == 0


def test_memory_savers_show_in_the_log(tmp_path):
    trainer = made(tmp_path, SketchCallback("quantized:bits=4"), max_steps=2)
    trainer.train()
    assert logged(trainer, "backsketch/saved_bytes_ratio")[-1] < 0.8
    assert logged(trainer, "backsketch/arithmetic") == [1.0]


def test_without_measurements_the_stream_and_the_steps_are_the_same(tmp_path):
    found = []
    for measure in (True, False):
        trainer = made(tmp_path, SketchCallback("rows:keep=0.5", measure=measure))
        trainer.train()
        found.append(trainer.model)
    assert same_weights(*found)
    assert logged(trainer, "backsketch/saved_bytes") == []
    exact = made(tmp_path)
    exact.train()
    assert not same_weights(exact.model, found[0])


@pytest.mark.fast_cases("1-gpt2", "2-bert")
@pytest.mark.parametrize("build", [gpt2, bert])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_training_that_resumes_is_the_one_that_went_on(tmp_path, build, accumulation):
    options = {
        "save_strategy": "steps",
        "save_steps": 2,
        "gradient_accumulation_steps": accumulation,
    }
    whole = made(tmp_path, SketchCallback("rows:keep=0.5"), build=build, **options)
    whole.train()
    resumed = made(tmp_path, SketchCallback("rows:keep=0.5"), build=build, **options)
    bs.seed(7)  # another process has another stream
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same_weights(whole.model, resumed.model)
    assert logged(whole, "loss")[-1] == pytest.approx(logged(resumed, "loss")[-1])


def test_without_the_stream_a_resumed_training_differs(tmp_path, monkeypatch):
    """The mutation of the test above."""
    options = {"save_strategy": "steps", "save_steps": 2}
    whole = made(tmp_path, SketchCallback("rows:keep=0.5"), **options)
    whole.train()
    monkeypatch.setattr("backsketch.integrations.session.set_rng_state", lambda state: None)
    resumed = made(tmp_path, SketchCallback("rows:keep=0.5"), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert not same_weights(whole.model, resumed.model)


@pytest.mark.slow
@pytest.mark.parametrize("restored", [False, True])
def test_regions_and_their_controller_resume_bit_for_bit(tmp_path, restored):
    options = {
        "save_strategy": "steps", "save_steps": 3, "max_steps": 6,
        "restore_callback_states_from_checkpoint": restored,
    }  # fmt: skip
    make = lambda: SketchCallback(blocks("region:keep=0.5"), 0.05, interval=2)  # noqa: E731
    whole = made(tmp_path, make(), **options)
    whole.train()
    assert logged(whole, "backsketch/extra_variance")[-1] > 0
    resumed = made(tmp_path, make(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same_weights(whole.model, resumed.model)
    name = "backsketch/extra_variance"
    assert logged(whole, name)[-1] == logged(resumed, name)[-1]


def test_other_sketches_than_those_of_the_checkpoint_are_said_aloud(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    made(tmp_path, SketchCallback("rows:keep=0.5"), **options).train()
    other = made(tmp_path, SketchCallback("rows:keep=0.75"), **options)
    with pytest.warns(UserWarning, match="made with other sketches"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_evaluation_is_exact_and_draws_nothing(tmp_path):
    # Without dropout: making a loader for the evaluation draws from PyTorch's stream.
    build = lambda: gpt2(0.0)  # noqa: E731
    evaluated = {"eval_strategy": "steps", "eval_steps": 1}
    trainer = made(tmp_path, SketchCallback("rows:keep=0.5"), build=build, **evaluated)
    trainer.train()
    without = made(tmp_path, SketchCallback("rows:keep=0.5"), build=build)
    without.train()
    assert same_weights(trainer.model, without.model)


LOADS = """
import sys, torch, transformers
for folder in sys.argv[1:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == model.config.architectures[0] == "GPT2LMHeadModel", model.config.architectures
    print(float(model.eval()(torch.arange(12)[None]).logits.detach().double().square().sum()))
assert not any(name.startswith("backsketch") for name in sys.modules)
"""


def test_what_is_saved_loads_without_this_library(tmp_path):
    expected, folders = [], []
    for name, sketch in (("products", "int8"), ("mask", {"lm_head": "mask:keep=0.5"})):
        callback = SketchCallback(sketch, measure=False)
        saved = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
        trainer = made(tmp_path / name, callback, **saved)
        trainer.train()
        folders.append(str(tmp_path / name / "checkpoint-2"))
        logits = trainer.model.eval()(torch.arange(12)[None]).logits.detach()
        expected.append(float(logits.double().square().sum()))
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOADS, *folders],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-800:]
    assert [float(line) for line in run.stdout.split()] == pytest.approx(expected, rel=1e-6)


def test_a_sketched_model_class_keeps_the_name_that_it_writes(tmp_path):
    model = gpt2()
    bs.sketch_(model, {"": bs.Region(keep=0.5)})
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [
        "GPT2LMHeadModel"
    ]


# Auto and control ------------------------------------------------------------------------------------


def test_a_controller_moves_the_keeps_of_a_model_that_returns_its_loss(tmp_path):
    callback = SketchCallback({"transformer.h.*": "rows:keep=0.5"}, 0.02, interval=2)
    trainer = made(tmp_path, callback, build=gpt2, gradient_accumulation_steps=2)
    trainer.train()
    assert logged(trainer, "backsketch/changes")[-1] >= 1
    assert 0 < logged(trainer, "backsketch/extra_variance")[-1] < 0.1
    assert 0.9 < logged(trainer, "backsketch/effective_batch")[-1] < 1
    assert logged(trainer, "backsketch/arithmetic")[-1] > 0.6  # the keeps rose


@pytest.mark.slow
def test_auto_profiles_on_the_trainers_own_batches_and_loss(tmp_path):
    class Doubled(transformers.Trainer):
        calls = 0

        def compute_loss(self, model: Any, inputs: Any, **options: Any) -> Any:
            Doubled.calls += 1
            assert inputs["labels"].shape == (8, TOKENS)
            return 2 * super().compute_loss(model, inputs, **options)

    callback = SketchCallback()
    with steered_auto("save") as clock:
        trainer = timed(made(tmp_path, callback, trainer=Doubled), clock)
        trainer.train()
    assert Doubled.calls > 10
    assert callback.reason
    assert len(logged(trainer, "backsketch/arithmetic")) == 2


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=TOKENS, loss_type="ForCausalLM",
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("build", [gpt2, llama])
def test_a_decoder_that_fills_its_cache_can_be_profiled(build):
    """Outside of a Trainer, which switches the cache off, it is on."""
    model = build()
    assert model.config.use_cache
    tokens = torch.randint(40, (4, 4, TOKENS))
    batches = [{"input_ids": rows, "labels": rows} for rows in tokens]
    found = bs.profile(model, batches, lambda model, batch: model(**batch).loss)
    assert found.sites


def test_a_cache_that_is_kept_is_noticed(monkeypatch):
    monkeypatch.setattr(recorder, "_is_cache", lambda value: False)
    with pytest.raises(RuntimeError, match="second time"):
        test_a_decoder_that_fills_its_cache_can_be_profiled(gpt2)


def test_reentrant_checkpoints_are_measured_too(tmp_path):
    options = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    }
    trainer = made(tmp_path, SketchCallback("rows:keep=0.5"), **options)
    trainer.train()
    assert all(0.5 < share < 1 for share in logged(trainer, "backsketch/arithmetic"))


def timed(trainer: Any, clock: Clock) -> Any:
    """The trainer, whose passes move a clock."""
    trainer.model.register_forward_pre_hook(lambda model, args: clock.pass_of(model))
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize("build", [gpt2, bert])
def test_auto_that_resumes_is_the_one_that_went_on(tmp_path, build):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 28, "logging_steps": 4}
    with steered_auto("save") as clock:
        whole = timed(made(tmp_path, SketchCallback(), build=build, **options), clock)
        whole.train()
        assert logged(whole, "backsketch/effective_batch")  # there is a controller
        for step in (10, 22):
            bs.seed(7)
            resumed = timed(made(tmp_path, SketchCallback(), build=build, **options), clock)
            resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
            assert same_weights(whole.model, resumed.model)


@pytest.mark.parametrize("overflows", [False, True])
def test_a_gradient_scaler_is_no_obstacle(tmp_path, overflows):
    """Of half precision; its first scale may be too large, and the step is left out then."""
    trainer = made(tmp_path, SketchCallback("rows:keep=0.5", 0.05, interval=2), max_steps=6)
    scale = 2.0 ** (127 if overflows else 10)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", scale, backoff_factor=2.0**-117)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    after = list(trainer.model.parameters())
    assert all(bool(p.isfinite().all()) for p in after)
    assert not all(torch.equal(p, q) for p, q in zip(before, after))
    assert 0 < logged(trainer, "backsketch/extra_variance")[-1] < 1


# What is refused -------------------------------------------------------------------------------------


def test_a_model_that_is_sketched_already_is_refused_and_left_alone(tmp_path):
    trainer = made(tmp_path, SketchCallback("rows:keep=0.5"))
    bs.sketch_(trainer.model, bs.Rows(keep=0.25))
    with pytest.raises(
        ValueError, match=r"sketched already \(transformer.h.0.attn.c_attn and 8 others\)"
    ):
        trainer.train()
    assert sum(map(is_swapped, trainer.model.modules())) == 9
    bs.restore_(trainer.model)
    trainer.train()


@pytest.mark.filterwarnings("ignore")
def test_two_callbacks_are_refused(tmp_path):
    trainer = made(tmp_path, SketchCallback("int8"), SketchCallback("rows:keep=0.5"))
    with pytest.raises(ValueError, match="has 2 of them; one takes rules for all"):
        trainer.train()
    assert not any(map(is_swapped, trainer.model.modules()))


def test_a_rule_that_matches_nothing_is_refused(tmp_path):
    trainer = made(tmp_path, SketchCallback({"transformer.layers.*": "int8"}))
    with pytest.raises(ValueError, match="matches no module; near names: transformer"):
        trainer.train()
    assert "compute_loss" not in vars(trainer)


def test_auto_without_a_loss_says_so(tmp_path):
    class Own(transformers.Trainer):
        def training_step(self, model: Any, inputs: Any, *args: Any) -> Tensor:
            loss = model(**inputs).loss
            loss.backward()
            return loss.detach()

    with steered_auto("save") as clock:
        trainer = timed(made(tmp_path, SketchCallback(), trainer=Own), clock)
        with pytest.raises(ValueError, match="'auto' needs the loss of 2 batches and saw 0"):
            trainer.train()
    assert not any(map(is_swapped, trainer.model.modules()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sketch": "rows:kep=0.5"}, "kep"),
        ({"sketch": {"": "roes:keep=0.5"}}, "unknown sketch"),
        ({"target_extra_variance": -1}, "target_extra_variance must be positive"),
        ({"interval": 0}, "interval must be a whole number"),
        ({"seed": 0.5}, "seed must be"),
    ],
)
def test_arguments_are_checked_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        SketchCallback(**arguments)


def test_a_sketch_of_a_wrong_kind_is_a_type_error():
    with pytest.raises(TypeError, match="sketch must be 'auto'"):
        SketchCallback(0.5)


def test_a_target_needs_a_keep(tmp_path):
    trainer = made(tmp_path, SketchCallback("int8", 0.05))
    with pytest.raises(ValueError, match="needs a sketch with a keep to move"):
        trainer.train()
    assert not any(map(is_swapped, trainer.model.modules()))


def test_after_an_error_the_same_trainer_trains_again(tmp_path):
    class Broken(transformers.TrainerCallback):
        on = True

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if self.on:
                raise KeyboardInterrupt

    broken = Broken()
    trainer = made(tmp_path, SketchCallback("rows:keep=0.5", measure=False), broken)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    broken.on = False
    trainer.train()
    assert not any(map(is_swapped, trainer.model.modules()))


# The preset ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "names"), [(gpt2, "transformer.h"), (bert, "bert.encoder.layer")]
)
def test_the_preset_picks_the_blocks(build, names):
    model = build()
    rules = blocks("region:keep=0.5")(model)
    assert list(rules) == [f"{names}.{i}" for i in range(2)]
    assert len(bs.sketch_(model, rules).sketched) == 2
    with pytest.raises(ValueError, match="has no layers of the transformers library"):
        blocks("int8")(nn.Linear(2, 2))


# Several processes -----------------------------------------------------------------------------------

RANKS = """
import hashlib, sys, torch
sys.path.insert(0, sys.argv[2])
from pathlib import Path
import test_transformers_callback as t
folder = Path(sys.argv[1])
make = lambda: t.SketchCallback({"transformer.h.*": "rows:keep=0.5"}, 0.05, interval=2)
options = {"save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 4}
whole = t.made(folder, make(), **options)
whole.train()
resumed = t.made(folder, make(), **options)
resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
parameters = torch.cat([p.detach().flatten() for p in whole.model.parameters()])
digest = hashlib.sha256(parameters.numpy().tobytes()).hexdigest()
print("found", t.same_weights(whole.model, resumed.model), digest)
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_have_one_model_and_resume_bit_for_bit(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    run = subprocess.run(
        [
            sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone",
            "--nproc-per-node", "2", str(script), str(tmp_path), str(Path(__file__).parent),
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    found = [line for line in run.stdout.splitlines() if line.startswith("found")]
    assert len(found) == 2
    assert len(set(found)) == 1
    assert found[0].startswith("found True")
