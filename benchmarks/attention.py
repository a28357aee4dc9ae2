"""What sampling keys in the backward pass of attention could gain, on the tensors of a language model.

    python benchmarks/attention.py --data tinyshakespeare/input.txt --threads 1

The keys of each sequence and head are drawn, and one call of PyTorch's own backward kernel computes with these
alone: with the log-sum-exp and the output of all keys, and with ``-log(pi_j)`` added to the scores of key j, its
results are those of the drawn keys over their inclusion probabilities, hence unbiased in all three gradients:

    dQ_i = sum_j dS_ij K_j,   dK_j = sum_i dS_ij Q_i,   dV_j = sum_i P_ij dO_i,
    dS_ij = P_ij (dO_i V_j - dO_i O_i)

Key j enters one term of dQ, and dK_j and dV_j; the keys are drawn with the probabilities that make the variance
of the three together least, from their exact norms: what a practical score reaches at best. Its time counts the
gathers of keys and values, and neither scores nor draw.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
from int8 import interleaved
from torch import Tensor

import backsketch as bs
from backsketch.sampling import inclusion_probabilities
from backsketch.train import data_of
from backsketch.train.config import resolve
from backsketch.train.setup import make_optimizer

FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
KEEPS = 0.5, 0.25
DRAWS = 10


def recorded(model: torch.nn.Module, loss, monkey) -> list[tuple[Tensor, ...]]:
    """Queries, keys, values and cotangent of every attention in one pass."""
    found: list[tuple[Tensor, ...]] = []
    plain = monkey.scaled_dot_product_attention

    def watch(q: Tensor, k: Tensor, v: Tensor, *options) -> Tensor:
        y = plain(q, k, v, *options)
        y.register_hook(lambda g: found.append((q.detach(), k.detach(), v.detach(), g)))
        return y

    monkey.scaled_dot_product_attention = watch
    try:
        loss(model).backward()
    finally:
        monkey.scaled_dot_product_attention = plain
    return [tuple(t.contiguous() for t in tensors) for tensors in found]


def backward_of(q: Tensor, k: Tensor, v: Tensor, g: Tensor, index: Tensor | None, pi: Tensor):
    """Function that runs the backward kernel, on all keys or on those of ``index`` ``(b, h, kept)``."""
    out, lse = FORWARD(q, k, v, is_causal=True)
    if index is None:
        return lambda: BACKWARD(g, q, k, v, out, lse, 0.0, True)
    n = q.shape[-2]
    future = torch.arange(n)[:, None] < index[..., None, :]
    bias = -pi.gather(-1, index).log()[..., None, :].expand(*index.shape[:-1], n, index.shape[-1])
    mask = bias.masked_fill(future, float("-inf")).contiguous()
    at = index[..., None].expand(*index.shape, q.shape[-1])

    def step() -> tuple[Tensor, Tensor, Tensor]:
        few = k.gather(-2, at), v.gather(-2, at)
        dq, dk, dv = BACKWARD(g, q, *few, out, lse, 0.0, False, attn_mask=mask)
        scatter = lambda few: torch.zeros_like(k).scatter_(-2, at, few)  # noqa: E731
        return dq, scatter(dk), scatter(dv)

    return step


def scores_of(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Norm of what each key contributes to the three gradients, ``(b, h, n)``."""
    n, scale = q.shape[-2], q.shape[-1] ** -0.5
    s = (q @ k.mT * scale).masked_fill(torch.ones(n, n).triu(1).bool(), float("-inf"))
    p = s.softmax(-1)
    ds = p * (g @ v.mT - (g * (p @ v)).sum(-1, keepdim=True))
    to_q = ds.square().sum(-2) * k.square().sum(-1)
    to_k = (ds.mT @ q).square().sum(-1)
    to_v = (p.mT @ g).square().sum(-1)
    return ((to_q + to_k) * scale**2 + to_v).sqrt()


def drawn(scores: Tensor, keep: float) -> tuple[Tensor, Tensor]:
    """Indices of the kept keys of every head, and the inclusion probabilities of all."""
    flat = scores.flatten(0, -2)
    kept = max(1, round(keep * scores.shape[-1]))
    pi = torch.stack([inclusion_probabilities(row, kept) for row in flat])
    start = torch.rand(len(flat), 1)
    ticks = pi.cumsum(-1) - start  # systematic sampling
    chosen = ticks.ceil().diff(dim=-1, prepend=(-start).ceil()).clamp(0, 1)
    index = chosen.topk(kept, -1).indices.sort(-1).values
    return index.view(*scores.shape[:-1], kept), pi.view_as(scores).clamp_min(1e-12)


def relative_variance(tensors: tuple[Tensor, ...], keep: float) -> float:
    """``E|error|^2 / |gradient|^2`` of the gradients of queries, keys and values together."""
    scores, q = scores_of(*tensors), tensors[0]
    exact = backward_of(*tensors, None, scores)()
    size = sum(float(t.square().sum()) for t in exact)
    error = 0.0
    for _ in range(DRAWS):
        index, pi = drawn(scores, keep)
        found = backward_of(*tensors, index, pi)()
        error += sum(float((a - b).square().sum()) for a, b in zip(found, exact)) / DRAWS
    assert q.shape[-2] >= 1 / keep
    return error / size


def measured(arguments: argparse.Namespace) -> list[dict]:
    rows = []
    for context, batch_size in arguments.shapes:
        options = {
            "model": "gpt", "data": str(arguments.data), "tokenizer": "bpe:1024", "sketch": "none",
            "batch_size": batch_size, "device": "cpu", "lr": 1e-3,
            "model_options": {"dim": arguments.dim, "depth": 4, "context": context},
        }  # fmt: skip
        data = data_of(options)
        config = resolve(options, num_train=data.num_train)
        torch.manual_seed(0)
        model = data.build(config)
        optimizer = make_optimizer(model, config)
        batches = [b[0] for b in data.batches(config, torch.device("cpu"), 0, 1).train(0)]

        def step(batch=batches[0], model=model, data=data, optimizer=optimizer):
            optimizer.zero_grad()
            data.loss(model, batch).backward()
            optimizer.step()

        for batch in batches[: arguments.steps]:
            step(batch)
        found = recorded(model, lambda m, d=data, b=batches: d.loss(m, b[-1]), torch.nn.functional)
        layer = found[len(found) // 2]
        arms = {"exact": backward_of(*layer, None, layer[0]), "step": step}
        for keep in KEEPS:
            arms[f"keys {keep}"] = backward_of(*layer, *drawn(scores_of(*layer), keep))
        seconds = interleaved(arms, arguments.repeats, time.perf_counter)
        ms = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
        share = len(found) * ms["exact"] / ms["step"]
        for keep in KEEPS:
            ratio = statistics.median(
                a / b for a, b in zip(seconds[f"keys {keep}"], seconds["exact"])
            )
            variance = statistics.mean(relative_variance(t, keep) for t in found)
            rows.append({
                "context": context, "batch": batch_size, "keep": keep, "share": round(share, 3),
                "backward": round(ratio, 3), "step": round(1 - share * (1 - ratio), 3),
                "variance": round(variance, 4),
            })  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--steps", type=int, default=30, help="exact ones before the look")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("results/gpt/attention.json"))
    arguments = parser.parse_args()
    arguments.shapes = [(128, 16), (512, 4), (1024, 2)]
    torch.set_num_threads(arguments.threads)
    rows = measured(arguments)
    command = "python benchmarks/attention.py --data tinyshakespeare/input.txt"
    result = {
        "command": f"{command} --threads {arguments.threads}",
        "device": f"{platform.machine()}, AVX-512 VNNI: {not bs.products.why_slow()}",
        "torch": torch.__version__,
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
