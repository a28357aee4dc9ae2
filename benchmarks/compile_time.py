"""The first step of a compiled model, sketched against exact: seconds of the clock and of the processor.

    python benchmarks/compile_time.py --out results/compile_time.json

Each arm runs in a process of its own with empty caches of the compiler; the model is made, sketched and called in
eager mode before the clock starts. A step is forward and backward, under ``torch.compile(fullgraph=True)``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from int8 import residual_net
from torch import Tensor, nn
from torch.nn import functional as F

import backsketch as bs
from backsketch.models.vit import ViT

OUT = Path(__file__).resolve().parent.parent / "results" / "compile_time.json"
SKETCHES = ["exact", "rows:keep=0.5", "int8"]
Step = tuple[nn.Module, Callable[[nn.Module], Tensor]]


def llama() -> Step:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64, use_cache=False,
    )  # fmt: skip
    tokens = torch.randint(256, (4, 64))
    return LlamaForCausalLM(config), lambda model: model(input_ids=tokens, labels=tokens).loss


def vit() -> Step:
    model = ViT((3, 32, 32), 10, patch=4, dim=96, depth=4, heads=4, mlp_ratio=4, dropout=0.0)
    images, labels = torch.randn(16, 3, 32, 32), torch.randint(10, (16,))
    return model, lambda model: F.cross_entropy(model(images), labels)


def residual() -> Step:
    model, images, labels = residual_net(), torch.randn(8, 3, 32, 32), torch.randint(10, (8,))
    return model, lambda model: F.cross_entropy(model(images), labels)


MODELS: dict[str, Callable[[], Step]] = {"llama": llama, "vit": vit, "residual": residual}
WHAT = {
    "llama": "Llama of transformers, 2 layers, d 128",
    "vit": "ViT, 4 blocks, d 96",
    "residual": "residual network, 64 to 256 channels",
}


def processor_seconds() -> float:
    """Of this process and of those that it started and has waited for."""
    own, others = (
        resource.getrusage(resource.RUSAGE_SELF),
        resource.getrusage(resource.RUSAGE_CHILDREN),
    )
    return sum(usage.ru_utime + usage.ru_stime for usage in (own, others))


def first_step(model_name: str, sketch: str) -> dict[str, Any]:
    """Called in the arm's own process."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, loss_of = MODELS[model_name]()
    model.train()
    if sketch != "exact":
        bs.sketch_(model, bs.parse(sketch))
    loss_of(model).backward()
    compiled = torch.compile(model, fullgraph=True)
    found, steps = {}, []
    for _ in range(3):
        model.zero_grad()
        clock, processor = time.perf_counter(), processor_seconds()
        loss_of(compiled).backward()
        steps.append(time.perf_counter() - clock)
        found.setdefault("processor_s", round(processor_seconds() - processor, 2))
    return {"first_s": round(steps[0], 2), **found, "third_s": round(steps[2], 4)}


def arm(model: str, sketch: str) -> dict[str, Any]:
    """The first step in a new process, without what earlier compilations left."""
    with tempfile.TemporaryDirectory() as folder:
        env = {
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": folder,
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
        }
        done = subprocess.run(
            [sys.executable, __file__, "--model", model, "--sketch", sketch, "--here"],
            env=env, capture_output=True, text=True, check=True,
        )  # fmt: skip
    return {
        "model": model,
        "what": WHAT[model],
        "sketch": sketch,
        **json.loads(done.stdout.splitlines()[-1]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, action="append")
    parser.add_argument("--sketch", action="append")
    parser.add_argument("--here", action="store_true", help="one arm, in this process")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    models, sketches = options.model or list(MODELS), options.sketch or SKETCHES
    if options.here:
        print(json.dumps(first_step(models[0], sketches[0])))
        return
    content = json.loads(options.out.read_text()) if options.out.exists() else {"rows": []}
    for model in models:
        for sketch in sketches:
            row = arm(model, sketch)
            print(json.dumps(row), flush=True)
            others = [r for r in content["rows"] if (r["model"], r["sketch"]) != (model, sketch)]
            content = {
                "versions": {"torch": torch.__version__, "python": platform.python_version()}
            }
            content["rows"] = [*others, row]
            options.out.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
