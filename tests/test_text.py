"""Language models in `backsketch train`: text, tokenizers, batches, resume, results, errors."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("accelerate")
pytest.importorskip("typer")

import backsketch as bs
import helpers
from backsketch import models
from backsketch.experiments import SweepConfig, run_sweep
from backsketch.experiments.report import report
from backsketch.planning.measure import step as measure
from backsketch.train import Interrupted, TextData, TrainError, train
from backsketch.train.checkpoint import load_checkpoint
from backsketch.train.config import TrainConfig, resolve
from backsketch.train.errors import StopRequest
from backsketch.train.loop import Trainer
from backsketch.train.setup import make_accelerator
from backsketch.train.show import TrainProgress
from backsketch.train.text import load_text
from backsketch.train.texts import read_texts
from backsketch.train.tokens import Bytes, tokenizer_of
from helpers import ROOT, quiet

CPU = torch.device("cpu")
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "and",
    "then",
    "it",
    "rests",
]


def written(count: int = 1500, seed: int = 0) -> str:
    """Lines of words in which a word decides most of the next one."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(2, (count,), generator=generator).tolist()
    place, text = 0, []
    for number, draw in enumerate(draws):
        place = (place + 1 + 5 * draw) % len(WORDS)
        text.append(WORDS[place] + ("\n" if number % 9 == 8 else " "))
    return "".join(text)


@pytest.fixture
def text(tmp_path) -> str:
    (path := tmp_path / "input.txt").write_text(written())
    return str(path)


SMALL = {"dim": 32, "depth": 1, "context": 16}


def options_of(text: str, **more) -> dict:
    return {
        "model": "gpt", "data": text, "sketch": "none", "device": "cpu", "epochs": 1,
        "model_options": SMALL, "batch_size": 16, **more,
    }  # fmt: skip


def made(text: str, **more) -> tuple[TrainConfig, TextData]:
    options = options_of(text, **more)
    data = load_text(options)
    return resolve(options, num_train=data.num_train), data


def trainer_of(job: TrainConfig, data: TextData, checkpoint: Path, **options) -> Trainer:
    return Trainer(job, data, make_accelerator("cpu", job.precision), checkpoint, **options)


def fit(trainer: Trainer) -> Trainer:
    trainer.fit(TrainProgress(quiet(), enabled=False), StopRequest())
    return trainer


# --------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------


def test_a_file_is_divided_by_position(text):
    found = read_texts(text)
    assert found.train + found.test == written()
    assert len(found.test) == int(0.1 * len(written()))


def test_a_folder_has_its_own_splits_and_order(tmp_path):
    for name, content in (("b.txt", "second"), ("a.txt", "first\n"), ("valid.txt", "held out")):
        (tmp_path / name).write_text(content)
    found = read_texts(str(tmp_path))
    assert (found.train, found.test, found.test_split) == ("first\nsecond\n", "held out\n", "valid")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_the_text_column_of_a_dataset_is_found_by_its_type(tmp_path, suffix):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"id": [1, 2, 3], "body": ["one", "two", "three"]})
    path = str(tmp_path / f"data{suffix}")
    {".jsonl": rows.to_json, ".csv": rows.to_csv, ".parquet": rows.to_parquet}[suffix](path)
    found = read_texts(path)
    assert found.train + found.test == "one\ntwo\nthree\n"


def test_tinyshakespeare(shared_data):
    path = shared_data / "tinyshakespeare/input.txt"
    if not path.is_file():
        pytest.skip("needs the file tinyshakespeare/input.txt, which is not in the repository")
    data = load_text({"model": "gpt", "data": str(path.parent)})
    assert len(data.train_tokens) + len(data.test_tokens) == 1_115_394


# --------------------------------------------------------------------------------------------------
# Tokens
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["bytes", "bpe:300"])
def test_every_text_comes_back(spec):
    if spec != "bytes":
        pytest.importorskip("tokenizers")
    tokenizer = tokenizer_of(spec, written())
    for wanted in (written(50, seed=1), "naïve ☃ – \t\n\n  x", ""):
        tokens = tokenizer.encode(wanted)
        assert tokens.dtype == torch.int32
        assert tokenizer.decode(tokens.tolist()) == wanted
        assert not len(tokens) or int(tokens.max()) < tokenizer.size


def test_byte_pairs_are_learnt_shorter_and_stored(tmp_path):
    pytest.importorskip("tokenizers")
    learnt = tokenizer_of("bpe:300", written())
    assert learnt.size == 300
    assert len(learnt.encode(written())) < 0.5 * len(Bytes().encode(written()))
    learnt.save(tmp_path)
    for spec in (str(tmp_path), str(tmp_path / "tokenizer.json")):
        again = tokenizer_of(spec, "")
        assert again.identity == learnt.identity
        assert torch.equal(again.encode("the lazy dog"), learnt.encode("the lazy dog"))


# --------------------------------------------------------------------------------------------------
# Batches
# --------------------------------------------------------------------------------------------------


def test_targets_are_the_next_tokens_and_an_epoch_shows_each_place_at_most_once(text):
    job, data = made(text)
    for epoch in (0, 1):
        seen = []
        for (batch,) in data.batches(job, CPU, 0, 1).train(epoch):
            assert batch.tokens.shape == batch.targets.shape == (16, 16)
            assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
            seen += [bytes(row.tolist()).decode() for row in batch.tokens]
        assert all(row in read_texts(text).train for row in seen)
        assert sum(map(len, seen)) > 0.95 * len(data.train_tokens) - 16 * 16


def test_epochs_are_cut_at_offsets_of_their_own(text):
    job, data = made(text)
    batches = data.batches(job, CPU, 0, 1)
    first = [next(batches.train(epoch))[0].tokens for epoch in (0, 1, 0)]
    assert torch.equal(first[0], first[2])
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize(("world", "accumulation"), [(2, 1), (1, 4), (2, 2)])
def test_processes_and_micro_batches_share_the_same_batch(text, world, accumulation):
    job, data = made(text, grad_accumulation=accumulation)
    whole = next(data.batches(made(text)[0], CPU, 0, 1).train(2, 3))[0].tokens
    parts = [
        batch.tokens
        for rank in range(world)
        for batch in next(data.batches(job, CPU, rank, world).train(2, 3))
    ]
    assert sorted(torch.cat(parts).tolist()) == sorted(whole.tolist())


def test_the_test_text_counts_whole_and_once(text):
    job, data = made(text)
    model = data.build(job).eval()
    sums = torch.zeros(2, dtype=torch.float64)
    for rank in range(2):
        for batch in data.batches(job, CPU, rank, 2).test():
            sums += torch.stack([s.double() for s in data.score(model, batch)])
    expected, tokens = 0.0, data.test_tokens.long()
    for start in range(0, data.num_test, 16):
        row = tokens[start : start + 17]
        expected += F.cross_entropy(model(row[None, :-1])[0], row[1:], reduction="sum").item()
    assert sums[1].item() == pytest.approx(expected, rel=1e-4)
    assert 0 <= sums[0].item() <= data.num_test


def test_a_limit_counts_tokens(text):
    _, data = made(text, limit_train=100)
    assert len(data.train_tokens) == 100
    assert data.num_train == 99 // 16 - 1


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


def run(text: str, out: Path, **more) -> dict:
    return train(options_of(text, **more), out=out, console=quiet())


@pytest.mark.pictures
def test_it_learns_and_says_so(text, tmp_path):
    result = run(text, tmp_path / "r", sketch="int8", epochs=16, lr=1e-2, compare=True)
    assert result["test_loss"] < 2.0 < math.log(256)
    assert result["perplexity"] == pytest.approx(math.exp(result["test_loss"]))
    steps = result["step_seconds_median"]
    assert result["tokens_per_second"] == pytest.approx(16 * 16 / steps)
    assert result["sample"].startswith(read_texts(text).test[:16])
    assert len(result["sample"]) > 30
    assert abs(result["test_loss"] - result["exact"]["test_loss"]) < 0.1
    assert 0 < result["extra_variance"] < 0.1
    assert json.loads((tmp_path / "r/result.json").read_text())["perplexity"] > 1
    assert (tmp_path / "r/plot.png").is_file()


def test_its_weights_load_into_the_plain_model(text, tmp_path):
    run(text, tmp_path / "r", sketch='{"head": "rows:keep=0.5", "": "int8"}')
    state = torch.load(tmp_path / "r/checkpoint.pt", weights_only=True)["model"]
    model = models.gpt(256, **SMALL)
    model.load_state_dict(state)
    assert type(model.head).__name__ == "LinearCrossEntropy"


@pytest.mark.parametrize(
    ("sketch", "more"),
    [
        ('{"head": "int8:sketch=(rows:keep=0.5)", "": "rows:keep=0.5"}', {"grad_accumulation": 2}),
        ("int8", {"precision": "bf16"}),
        ("none", {"tokenizer": "bpe:300"}),
    ],
)
def test_a_stopped_run_ends_with_the_same_weights(text, tmp_path, sketch, more):
    if "tokenizer" in more:
        pytest.importorskip("tokenizers")
    job, data = made(text, sketch=sketch, limit_train=1200, epochs=2, **more)
    whole = fit(trainer_of(job, data, tmp_path / "whole.pt"))
    stop = StopRequest()

    class Stops(TrainProgress):
        def step(self, loss):
            super().step(loss)
            stop.signum = 2 if len(self.losses) == 3 else 0
            self.losses.append(loss)

    progress = Stops(quiet(), enabled=False)
    progress.losses = []
    with pytest.raises(Interrupted):
        trainer_of(job, data, tmp_path / "stopped.pt").fit(progress, stop)
    resumed = trainer_of(job, data, tmp_path / "stopped.pt")
    resumed.load()
    assert len(resumed.history.losses) == 4
    fit(resumed)
    assert resumed.history.losses == whole.history.losses
    expected = whole.core.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in resumed.core.state_dict().items())


def test_a_stored_tokenizer_is_used_again(text, tmp_path):
    pytest.importorskip("tokenizers")
    first = run(text, tmp_path / "r", tokenizer="bpe:300")
    again = train({}, out=tmp_path / "r", resume=True, console=quiet())
    assert first["test_loss"] == again["test_loss"]
    assert first["data"]["vocabulary"] == 300
    run(text, tmp_path / "r")
    assert not (tmp_path / "r/tokenizer.json").exists()


def test_a_run_is_continued_where_some_of_its_model_options_are_named(text, tmp_path):
    run(text, tmp_path / "r")
    more = {"out": tmp_path / "r", "resume": True, "console": quiet()}
    again = train({"model_options": {"dim": 32}}, **more)
    assert again["config"]["model_options"] == SMALL
    with pytest.raises(TrainError, match="it was made with model_options"):
        train({"model_options": {"dim": 64}}, **more)


def test_a_run_starts_from_another_ones_weights_model_and_tokenizer(text, tmp_path):
    pytest.importorskip("tokenizers")
    first = run(text, tmp_path / "a", tokenizer="bpe:300", epochs=2)
    options = {"init": str(tmp_path / "a"), "data": text, "sketch": "int8", "device": "cpu"}
    more = {"epochs": 1, "batch_size": 16, "lr": 1e-12, "warmup": 0.0}
    second = train({**options, **more}, out=tmp_path / "b", console=quiet())
    assert second["config"]["model_options"] == SMALL
    assert second["test_loss"] == pytest.approx(first["test_loss"], rel=1e-4)


def test_arithmetic_of_the_head_and_of_bytes_is_counted(text):
    job, data = made(text)
    model, batch = data.build(job), next(data.batches(job, CPU, 0, 1).train(0))[0]
    exact = measure.backward_flops(model, batch, data.loss)
    head = 2 * 2 * 256 * 256 * 32
    for rules, units in (("rows:keep=0.25", 3 / 8), ("int8:sketch=(rows:keep=0.25)", 1.5 / 8)):
        bs.sketch_(model, {"head": bs.parse(rules)})
        expected = exact - head + head * units
        assert measure.backward_flops(model, batch, data.loss) == expected
        bs.restore_(model)
    bs.sketch_(model, bs.Int8())
    linear = head + 2 * 2 * 256 * 12 * 32 * 32  # all but the attention's own products
    assert measure.backward_flops(model, batch, data.loss) == exact - 0.75 * linear


# --------------------------------------------------------------------------------------------------
# Models of Hugging Face
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def llama(tmp_path) -> Path:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    config.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_a_configuration_is_trained_and_kept_for_from_pretrained(text, tmp_path, llama):
    from transformers import AutoModelForCausalLM

    options = {"model": f"hf:{llama}", "model_options": {"context": 16}, "limit_train": 1200}
    first = run(text, tmp_path / "r", sketch="int8:sketch=(rows:keep=0.5)", **options)
    assert first["config"]["model"] == f"hf:{llama}"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "r/model")
    state = load_checkpoint(tmp_path / "r/checkpoint.pt")["model"]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    options["model"] = f"hf:{tmp_path / 'r/model'}"
    again = run(text, tmp_path / "s", sketch="none", lr=1e-12, **options)
    assert again["test_loss"] == pytest.approx(first["test_loss"], rel=1e-4)


# --------------------------------------------------------------------------------------------------
# Sweeps
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_sweep(tmp_path, monkeypatch) -> SweepConfig:
    """The committed sweep with its arms, one rate each, on a little text and with a small model."""
    content = json.loads((ROOT / "benchmarks/sweeps/equal_cost_gpt.json").read_text())
    (folder := tmp_path / "data" / "tinyshakespeare").mkdir(parents=True)
    (folder / "input.txt").write_text(written())
    monkeypatch.setenv("BACKSKETCH_DATA", str(tmp_path / "data"))
    train = {"tokenizer": "bpe:300", "model_options": SMALL}
    runs, times = content["parts"]
    runs["fixed"] |= {"train": train, "limit": 1200, "limit_test": 200, "evaluations": 1}
    runs["grid"] = [
        {**grid, "lr": grid["lr"][:1], "batch_size": [8], "epochs": [1]}
        for grid in runs["grid"]
        if "auto" not in grid["sketch"]
    ]
    arms = {name: {**arm, "batch_size": 8} for name, arm in times["fixed"]["arms"].items()}
    times["fixed"] |= {"train": train, "limit": 1200, "rounds": 2, "arms": arms}
    content |= {"workers": 0, "settings": {"target_loss": 6.0}}
    (path := tmp_path / "tiny_gpt.json").write_text(json.dumps(content))
    return SweepConfig.load(path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler
def test_the_sweep_over_a_language_model_runs_and_is_reported(tiny_sweep, tmp_path):
    pytest.importorskip("tokenizers")
    assert run_sweep(tiny_sweep, tmp_path / "results", console=quiet()) == []
    report([tmp_path / "results"], tmp_path / "page.html", quiet())
    page = (tmp_path / "page.html").read_text()
    for said in ("a test loss of 6 nats", "final loss", "int8, batch 16"):
        assert said in page


# --------------------------------------------------------------------------------------------------
# Errors
# --------------------------------------------------------------------------------------------------


def invoke(*arguments: str):
    return helpers.invoke("train", "--model", "gpt", *arguments)


MISTAKES = [
    ("--data binary.txt", "binary.txt is not text in UTF-8"),
    ("--data zero.txt", "zero.txt is not text: it holds a zero byte"),
    ("--data empty.txt", "the text empty.txt is empty"),
    ("--data short.txt", "too few for a context of 128"),
    ("--data short.txt --context 0", "context must be positive"),
    ("--data numbers.csv", "the dataset numbers.csv has no text: its columns are a, b"),
    ("--data ./missing", "the data folder ./missing does not exist"),
    ("--data missing.txt", "there is no file missing.txt"),
    ("--data missing.jsonl", "there is no file missing.jsonl"),
    ("", "model gpt needs --data"),
    ("--data good.txt --tokenizer missing.json", "there is no tokenizer file missing.json"),
    ("--data good.txt --tokenizer short.txt", "cannot read the tokenizer short.txt"),
    ("--data good.txt --tokenizer bpe:12", "must name a vocabulary of at least 300"),
    ("--data good.txt --augment", "augment is for images"),
    ("--data good.txt --patch 4", "model gpt has no option 'patch'"),
    ("--data good.txt --limit-train 99999999", "the limit on training tokens must be in"),
    ("--data good.txt --batch-size 5000", "rows of train text"),
    ("--data good.txt --init nowhere", "there is no checkpoint nowhere/checkpoint.pt"),
    ("--data good.txt --model hf:nowhere.json", "there is no model 'nowhere.json'"),
    ("--data good.txt --model hf", "there is no model ''"),
    ("--data good.txt --model hf:broken", "cannot make the model hf:broken"),
    ("--data good.txt --model mlp", "good.txt is a file, and images are read from a folder"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistakes_get_one_sentence_and_leave_nothing_behind(
    tmp_path, monkeypatch, arguments, message
):
    pytest.importorskip("tokenizers")
    monkeypatch.chdir(tmp_path)
    Path("good.txt").write_text(written())
    Path("short.txt").write_text("too short")
    Path("empty.txt").write_text(" \n")
    Path("binary.txt").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(128, 256)))
    Path("zero.txt").write_bytes(b"abc\0def" * 100)
    Path("numbers.csv").write_text("a,b\n1,2\n3,4\n")
    Path("broken").mkdir()
    Path("broken/config.json").write_text('{"model_type": "llama", "num_hidden_layers": 1}')
    Path("broken/model.safetensors").write_bytes(b"no weights")
    before = set(tmp_path.rglob("*"))
    done = invoke(*arguments.split())
    assert done.exit_code == 2, done.output
    assert message in " ".join(done.output.replace("│", " ").split())
    assert "Traceback" not in done.output
    assert set(tmp_path.rglob("*")) - before <= {tmp_path / "runs"}


def test_weights_of_another_vocabulary_or_model_are_refused(text, tmp_path):
    run(text, tmp_path / "a", limit_train=800)
    more = {"data": text, "init": str(tmp_path / "a"), "device": "cpu"}
    with pytest.raises(TrainError, match="were made with vocabulary 256, not 300"):
        train({**more, "tokenizer": "bpe:300"}, out=tmp_path / "b", console=quiet())
    with pytest.raises(TrainError, match=r"are of gpt, not mlp"):
        train({**more, "model": "mlp"}, out=tmp_path / "b", console=quiet())
    with pytest.raises(TrainError, match="choose another --out"):
        train({**more, "batch_size": 8}, out=tmp_path / "a", console=quiet())
    assert not (tmp_path / "b").exists()
    with pytest.raises(TrainError, match="do not fit the model gpt"):
        train({**more, "model_options": {"dim": 64}}, out=tmp_path / "b", console=quiet())


def test_tied_weights_are_not_taken_from_untied_ones(text, tmp_path):
    run(text, tmp_path / "a", model_options={**SMALL, "tied": False})
    more = {"data": text, "init": str(tmp_path / "a"), "device": "cpu"}
    with pytest.raises(TrainError, match=r"head\.weight is one tensor with embed\.weight"):
        train({**more, "model_options": {"tied": True}}, out=tmp_path / "b", console=quiet())
