"""A small language model: the step under sketches over the exact one, and what the sketches add to the variance.

    python benchmarks/gpt.py time --data tinyshakespeare/input.txt --threads 2
    python benchmarks/gpt.py lora --data tinyshakespeare/input.txt --dim 512
    python benchmarks/gpt.py variance --data tinyshakespeare/input.txt

A step is forward, backward and AdamW; arms take turns, ratios are medians. The extra variance is measured at the
start and after some exact steps, as `backsketch train` measures it. In the part lora all weights are frozen but
adapters of rank 8 on every linear layer of the blocks (`peft`).
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import time
from functools import partial
from pathlib import Path

import torch
from int8 import interleaved, rows_of

import backsketch as bs
from backsketch.planning.measure import step as measure
from backsketch.train import TextData, data_of
from backsketch.train.config import parse_rules, resolve
from backsketch.train.setup import make_optimizer, make_schedule

ARMS = {
    "int8": "int8",
    "regions in int8 at blocks": '{"head": "int8", "blocks.*": "region:keep=1.0,arithmetic=int8"}',
    "int8, exact head": '{"blocks.*": "int8"}',
    "int8, head rows 0.25": '{"head": "int8:sketch=(rows:keep=0.25)", "blocks.*": "int8"}',
    "int8, rows 0.5": "int8:sketch=(rows:keep=0.5)",
    "head rows 0.25": '{"head": "rows:keep=0.25"}',
    "MLP regions 0.5": '{"blocks.*.mlp": "region:keep=0.5,row_dims=2"}',
    "rows 0.5": "rows:keep=0.5",
}

LORA_ARMS = {
    "int8 at frozen layers": '{"*.base_layer": "int8"}',
    "int8 at frozen layers and head": '{"*.base_layer": "int8", "*.head": "int8"}',
    "int8, rows 0.5 at frozen layers": '{"*.base_layer": "int8:sketch=(rows:keep=0.5)", "*.head": "int8"}',
    "regions in int8 at blocks": '{"*.blocks.?": "region:keep=1.0,arithmetic=int8", "*.head": "int8"}',
}


def problem(arguments: argparse.Namespace) -> tuple[TextData, dict]:
    """The text and the options of its model."""
    options = {
        "model": "gpt", "data": str(arguments.data), "tokenizer": arguments.tokenizer,
        "batch_size": arguments.batch_size, "sketch": "none", "device": "cpu", "lr": 1e-3,
        "model_options": {
            "dim": arguments.dim, "depth": arguments.depth, "context": arguments.context,
        },
    }  # fmt: skip
    return data_of(options), options


def made(
    data: TextData, options: dict, sketch: str | None, lora: bool = False
) -> tuple[torch.nn.Module, object]:
    """The same model for every arm, and its optimizer."""
    torch.manual_seed(0)
    config = resolve(options, num_train=data.num_train)
    model = data.build(config)
    if lora:
        from peft import LoraConfig, get_peft_model

        layers = ["qkv", "proj", "fc1", "fc2"]
        model = get_peft_model(model, LoraConfig(r=8, target_modules=layers))
    if sketch is not None:
        bs.sketch_(model, parse_rules(sketch))
    return model, make_optimizer(model, config)


def times(arguments: argparse.Namespace) -> list[dict]:
    data, options = problem(arguments)
    batches = data.batches(resolve(options, num_train=data.num_train), torch.device("cpu"), 0, 1)
    (batch,) = next(batches.train(0))
    arms, more = {}, {}
    lora = arguments.part == "lora"
    for name, sketch in {"exact": None, **(LORA_ARMS if lora else ARMS)}.items():
        if not re.search(arguments.only, name) and sketch is not None:
            continue
        model, optimizer = made(data, options, sketch, lora)

        def step(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            data.loss(model, batch).backward()
            optimizer.step()

        arms[name] = partial(step)
        saved = measure.saved_bytes(model, batch, data.loss)
        more[name] = {"saved_mib": round(saved / 2**20, 1)}
    return rows_of(_what(arguments), interleaved(arms, arguments.repeats, time.perf_counter), more)


def variances(arguments: argparse.Namespace) -> list[dict]:
    data, options = problem(arguments)
    config = resolve({**options, "epochs": 1}, num_train=data.num_train)
    batches = data.batches(config, torch.device("cpu"), 0, 1)
    model, optimizer = made(data, options, None)
    schedule = make_schedule(optimizer, config, arguments.steps + 1)
    rows = []
    for phase, steps in (("at the start", 0), ("after training", arguments.steps)):
        for _, (batch,) in zip(range(steps), batches.train(0)):
            optimizer.zero_grad()
            loss = data.loss(model, batch)
            loss.backward()
            optimizer.step()
            schedule.step()
        looks = [b for _, (b,) in zip(range(arguments.repeats), batches.train(1))]
        for name, sketch in ARMS.items():
            if re.search(arguments.only, name):
                bs.sketch_(model, parse_rules(sketch))
                omega = measure.extra_variance(model, looks, data.loss)
                bs.restore_(model)
                loss = float(data.loss(model, looks[0]).detach())
                rows.append({
                    "what": _what(arguments), "phase": phase, "steps": steps, "loss": round(loss, 3),
                    "sketch": name, "rules": sketch, "extra_variance": omega,
                })  # fmt: skip
                print(rows[-1], flush=True)
    return rows


def _what(arguments: argparse.Namespace) -> str:
    return (
        f"gpt d {arguments.dim}, {arguments.depth} blocks, context {arguments.context}, "
        f"{arguments.tokenizer}, batch {arguments.batch_size}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["time", "lora", "variance"])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", default="bpe:1024")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=100, help="exact ones before the second look")
    parser.add_argument("--only", default="", help="arms whose name this expression finds")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("results/gpt"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = {"time": times, "lora": times, "variance": variances}[arguments.part](arguments)
    timed = "" if arguments.part == "variance" else f"_{arguments.threads}threads"
    name = f"{arguments.part}{timed}"
    command = (
        f"python benchmarks/gpt.py {arguments.part} --data tinyshakespeare/input.txt "
        f"--dim {arguments.dim} --batch-size {arguments.batch_size} --steps {arguments.steps} "
        f"--threads {arguments.threads} --repeats {arguments.repeats}"
        + (f" --only '{arguments.only}'" if arguments.only else "")
    )
    result = {
        "command": command,
        "clock": "perf_counter",
        "device": f"{platform.machine()}, AVX-512 VNNI: {not bs.products.why_slow()}",
        "torch": torch.__version__,
        "repeats": arguments.repeats,
        "rows": rows,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
