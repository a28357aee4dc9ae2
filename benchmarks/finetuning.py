"""What sketches add to the variance while a language model is fine-tuned, beside the same while it is pretrained.

    python benchmarks/finetuning.py --data tinyshakespeare/input.txt

A GPT is trained exactly on the first half of a text and fine-tuned exactly on the second half, at a third of
the learning rate. At the start and at the end of both, on batches of the half that is trained on: kappa of the
tokens at the head (how unequal the norms of their gradients are; 1 is all alike), SGD's noise scale, and the
extra variance of sketches, as `backsketch train` measures it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import backsketch as bs
from backsketch.planning.measure.errors import extra_variance
from backsketch.theory import kappa
from backsketch.train import TextData, data_of
from backsketch.train.config import parse_rules, resolve
from backsketch.train.setup import make_optimizer, make_schedule

HEAD = ' "": "int8"}'
ARMS = {
    "int8": "int8",
    "int8, head rows 0.5": '{"head": "int8:sketch=(rows:keep=0.5)",' + HEAD,
    "int8, head rows 0.25": '{"head": "int8:sketch=(rows:keep=0.25)",' + HEAD,
    "int8, head rows 0.1": '{"head": "int8:sketch=(rows:keep=0.1)",' + HEAD,
    "8-bit MLP regions 0.5": '{"blocks.*.mlp": "region:keep=0.5,row_dims=2,arithmetic=int8",'
    + HEAD,
    "8-bit MLP regions 0.25": '{"blocks.*.mlp": "region:keep=0.25,row_dims=2,arithmetic=int8",'
    + HEAD,
    "rows 0.5": "rows:keep=0.5",
    "rows 0.25": "rows:keep=0.25",
}


def halves(text: Path, tokenizer: str, options: dict, folder: Path) -> Iterator[TextData]:
    """The data of each half; the tokenizer is that of the first."""
    whole = text.read_text()
    for number, part in enumerate((whole[: len(whole) // 2], whole[len(whole) // 2 :])):
        path = folder / f"half{number}.txt"
        path.write_text(part)
        data = data_of({**options, "data": str(path), "tokenizer": tokenizer})
        if not number:
            data.tokenizer.save(folder)
            tokenizer = str(folder / "tokenizer.json")
        yield data


def train(data: TextData, model: torch.nn.Module, options: dict) -> float:
    """Exact training with the recipe of the command; the test loss."""
    config = resolve(options, num_train=data.num_train)
    batches = data.batches(config, torch.device("cpu"), 0, 1)
    optimizer = make_optimizer(model, config)
    schedule = make_schedule(optimizer, config, batches.steps_per_epoch * config.epochs)
    for epoch in range(config.epochs):
        for (batch,) in batches.train(epoch):
            optimizer.zero_grad()
            data.loss(model, batch).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        losses = [data.loss(model, b) for _, b in zip(range(8), batches.test())]
    return float(torch.stack(losses).mean())


def looks(data: TextData, model: torch.nn.Module, options: dict, count: int) -> dict[str, Any]:
    """Kappa, noise scale and the extra variance of each arm."""
    config = resolve(options, num_train=data.num_train)
    batches = data.batches(config, torch.device("cpu"), 0, 1)
    seen = [b for _, (b,) in zip(range(count), batches.train(9))]
    found: dict[str, Any] = {"kappa": kappa(_scores(model, seen[0])), "extra_variance": {}}
    for name, rules in ARMS.items():
        bs.sketch_(model, parse_rules(rules))
        noise = extra_variance(model, seen, data.loss, 1)
        bs.restore_(model)
        found["noise_scale"] = noise.sums.noise_scale
        found["extra_variance"][name] = noise.omega
    return found


@torch.no_grad()
def _scores(model: Any, batch: Any) -> torch.Tensor:
    """The norm of each token's part in the gradient of the head."""
    kept: list[torch.Tensor] = []
    handle = model.head.register_forward_pre_hook(
        lambda _, args: kept.append(args[0].flatten(0, -2))
    )
    logits = model(batch.tokens).flatten(0, -2)
    handle.remove()
    p = logits.softmax(-1)
    p[torch.arange(len(p)), batch.targets.flatten()] -= 1
    return p.norm(dim=1) * kept[0].norm(dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", default="bpe:1024")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--epochs", type=int, nargs=2, default=(4, 2), help="of each half")
    parser.add_argument("--batches", type=int, default=6, help="on which a look is taken")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("results/gpt/finetuning.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    options = {
        "model": "gpt", "batch_size": arguments.batch_size, "sketch": "none", "device": "cpu",
        "model_options": {
            "dim": arguments.dim, "depth": arguments.depth, "context": arguments.context,
        },
    }  # fmt: skip
    rows: list[dict[str, Any]] = []
    model = None
    with tempfile.TemporaryDirectory() as folder:
        parts = halves(arguments.data, arguments.tokenizer, options, Path(folder))
        phases = zip(("pretraining", "fine-tuning"), parts, arguments.epochs, (1e-3, 3e-4))
        for name, data, epochs, lr in phases:
            run = {**options, "data": "text", "epochs": epochs, "lr": lr}
            run["tokenizer"] = arguments.tokenizer
            model = model or data.build(resolve(run, num_train=data.num_train))
            for when in ("start", "end"):
                loss = train(data, model, run) if when == "end" else None
                row = {"phase": name, "when": when, "test_loss": loss}
                rows.append(row | looks(data, model, run, arguments.batches))
                print(rows[-1], flush=True)
    what = (
        f"gpt d {arguments.dim}, {arguments.depth} blocks, context {arguments.context}, "
        f"{arguments.tokenizer}, batch {arguments.batch_size}"
    )
    result = {
        "command": "python benchmarks/finetuning.py --data tinyshakespeare/input.txt",
        "what": what,
        "torch": torch.__version__,
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
