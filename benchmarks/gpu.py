"""On an NVIDIA GPU: 8-bit products, their rounding, whole linear layers, a ViT-B and a language model of d 768.

    python benchmarks/gpu.py products
    python benchmarks/gpu.py layers
    python benchmarks/gpu.py launches
    python benchmarks/gpu.py models --model vit

Each writes ``results/gpu/NAME.json``, in which the device is named. Times are medians over interleaved rounds, by
the device's own events; ratios are to the exact arm of the same round. A step is forward and backward pass.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import backsketch as bs
from backsketch.models import gpt, vit
from backsketch.products import gpu
from backsketch.regions import RegionModule, state_of
from backsketch.torch_private import float8_matmul, scaled_float8_matmul

OUT = Path(__file__).resolve().parents[1] / "results" / "gpu"
DEVICE = torch.device("cuda")
KEYS = ((1, 2), (3, 4), (5, 6), (7, 8))
SHAPES = ((4096, 1024, 4096), (8192, 4096, 4096), (12608, 768, 3072))  # rows, in, out
LAYER_ARMS = (
    "exact", "int8", "float8", "int8:save=true", "float8:save=true", "rows:keep=0.5", "quantized:bits=4",
    "int8:sketch=(rows:keep=0.5)", "float8:sketch=(rows:keep=0.5)",
)  # fmt: skip
MODEL_ARMS = (
    "exact", "exact, compiled", "checkpointing",
    "int8", "int8:save=true", "float8", "quantized:bits=4", "rows:keep=0.5",
    "region:keep=0.5,mode=recompute", "region:keep=0.5,mode=save", "region:keep=0.25,mode=recompute",
    "region:keep=0.25,mode=save", "region:keep=0.5,save=int8,arithmetic=int8", "region:keep=1.0,save=int8",
)  # fmt: skip

LAUNCH_ARMS = (
    "exact", "region:keep=0.5,mode=recompute", "region:keep=0.5,mode=save", "region:keep=1.0,save=int8",
    "rows:keep=0.5", "quantized:bits=4",
)  # fmt: skip

# Time -----------------------------------------------------------------------------------------------


def elapsed(work: Callable[[], Any]) -> float:
    """Milliseconds of one call on the device, launches included."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def interleaved(arms: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each arm in each round."""
    for work in arms.values():
        for _ in range(3):
            work()
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, work in arms.items():
            times[name].append(elapsed(work))
    return times


def summary(times: dict[str, list[float]], base: str = "exact") -> dict[str, dict[str, float]]:
    """Median milliseconds, and the median of the ratios to an arm."""
    return {
        name: {
            "ms": round(statistics.median(own), 4),
            "over_exact": round(statistics.median(a / b for a, b in zip(own, times[base])), 3),
        }
        for name, own in times.items()
    }


# Products and rounding ------------------------------------------------------------------------------


def products(rounds: int) -> dict[str, Any]:
    """Products of matrices that are ready, and what it takes to make the 8-bit ones."""
    return {
        "products": [_products_of(*shape, rounds) for shape in SHAPES],
        "rounding": _rounding(rounds),
        "sums_of_floats": _error_of_sums(),
    }


def _products_of(n: int, j: int, o: int, rounds: int) -> dict[str, Any]:
    g, w = torch.randn(n, o, device=DEVICE), torch.randn(o, j, device=DEVICE)
    half, narrow = g.bfloat16(), w.bfloat16()
    a, b = (torch.randint(0, 256, s, device=DEVICE, dtype=torch.uint8) for s in ((n, o), (j, o)))
    c, d = (torch.randint(0, 256, s, device=DEVICE, dtype=torch.uint8) for s in ((o, n), (j, n)))
    x, y = ((t & 0xBF).view(torch.float8_e4m3fn) for t in (a, b))  # finite ones
    row, column = torch.rand(n, device=DEVICE), torch.rand(j, device=DEVICE)
    of_blocks = torch.rand(-(-n // gpu.BLOCK), j, device=DEVICE)
    int8, like = gpu.Kernels("int8"), g.bfloat16()
    work = {
        "bfloat16": lambda: half @ narrow,
        "float32": lambda: g @ w,
        "tf32": lambda: _with_tf32(g, w),
        "integers, library": lambda: torch._int_mm(a.view(torch.int8), b.view(torch.int8).T),
        "integers, scaled (grad_input)": lambda: int8._product(a, b, row, column, like),
        "integers, scaled by blocks (grad_weight)": lambda: int8._sum(c, d, None, of_blocks, like),
        "8-bit floats": lambda: float8_matmul(x, y.T),
        "8-bit floats, scaled": lambda: scaled_float8_matmul(x, y.T, row, column),
    }
    times = {name: statistics.median(own) for name, own in interleaved(work, rounds).items()}
    work_of_one = 2 * n * j * o * 1e-9
    return {
        "rows, in, out": [n, j, o],
        "ms": {name: round(ms, 4) for name, ms in times.items()},
        "teraflops": {name: round(work_of_one / ms, 1) for name, ms in times.items()},
    }


def _with_tf32(a: Tensor, b: Tensor) -> Tensor:
    with precision("high"):
        return a @ b


@contextmanager
def precision(name: str) -> Iterator[None]:
    """How float32 matrices are multiplied: ``highest``, or ``high`` for TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    yield
    torch.set_float32_matmul_precision(before)


def _rounding(rounds: int) -> dict[str, Any]:
    """Gigabytes a second that rounding reads and writes, and those of a copy."""
    n, k = 12608, 3072
    x = torch.randn(n, k, device=DEVICE, dtype=torch.bfloat16)
    other = torch.empty_like(x)
    int8, float8 = gpu.Kernels("int8"), gpu.Kernels("float8")
    scale = torch.rand(n, device=DEVICE)
    work = {
        "copy": (lambda: other.copy_(x), 4),
        "by rows, both layouts": (lambda: int8._by_rows(x, KEYS[0], True, True), 4),
        "by rows, one layout": (lambda: int8._by_rows(x, KEYS[0], True, False), 3),
        "by columns of blocks": (lambda: int8._by_columns(x, KEYS[0], in_blocks=True, rows=scale), 3),
        "by columns": (lambda: int8._by_columns(x, KEYS[0], in_blocks=False), 5),
        "floats by rows, both layouts": (lambda: float8._by_rows(x, KEYS[0], True, True), 4),
        "floats by columns": (lambda: float8._by_columns(x, KEYS[0], in_blocks=True, rows=scale), 5),
    }  # fmt: skip
    times = interleaved({name: run for name, (run, _) in work.items()}, rounds)
    medians = {name: statistics.median(own) for name, own in times.items()}
    return {
        "rows, columns": [n, k],
        "ms": {name: round(ms, 4) for name, ms in medians.items()},
        "gigabytes_a_second": {
            name: round(n * k * size / medians[name] * 1e-6) for name, (_, size) in work.items()
        },
    }


def _error_of_sums() -> dict[str, float]:
    """Error of a product of 8-bit floats over its size: how it scatters, and its mean along the result."""
    a, b = (torch.randn(1024, 8192, device=DEVICE).mul(16).to(torch.float8_e4m3fn) for _ in "ab")
    exact, found = a.double() @ b.double().T, float8_matmul(a, b.T)
    assert found is not None
    error = found.double() - exact
    return {
        "error": float(error.norm() / exact.norm()),
        "along_the_result": float((error * exact).sum() / exact.square().sum()),
    }


# Layers ---------------------------------------------------------------------------------------------


def layers(rounds: int) -> dict[str, Any]:
    """Steps of one linear layer, eager; in bfloat16 also compiled."""
    rows = []
    for shape in SHAPES:
        for dtype, name in ((torch.bfloat16, "bfloat16"), (torch.float32, "tf32")):
            with precision("high"):
                times = summary(
                    interleaved({a: _layer(*shape, dtype, a) for a in LAYER_ARMS}, rounds)
                )
            rows.append({"rows, in, out": list(shape), "dtype": name, "arms": times})
    compiled = {a: _layer(*SHAPES[1], torch.bfloat16, a, compiled=True) for a in LAYER_ARMS[:3]}
    rows.append(
        {
            "rows, in, out": list(SHAPES[1]),
            "dtype": "bfloat16, compiled",
            "arms": summary(interleaved(compiled, rounds)),
        }
    )
    return {"layers": rows}


def _layer(
    n: int, j: int, o: int, dtype: torch.dtype, arm: str, compiled: bool = False
) -> Callable[[], None]:
    layer = nn.Linear(j, o, device=DEVICE, dtype=dtype)
    x = torch.randn(n, j, device=DEVICE, dtype=dtype, requires_grad=True)
    g = torch.randn(n, o, device=DEVICE, dtype=dtype)
    if arm != "exact":
        bs.sketch_(layer, bs.parse(arm))
    call: Any = torch.compile(layer, fullgraph=True) if compiled else layer

    def step() -> None:
        layer.zero_grad()
        x.grad = None
        call(x).backward(g)

    return step


# Models ---------------------------------------------------------------------------------------------


def models(
    name: str, rounds: int, arms: list[str], write: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Steps of a whole model in bfloat16, each arm in turns with exact; bytes that they save, and the peak.

    The peak is that of the device above what stays. What there is so far goes to ``write`` after each arm.
    """
    rows: dict[str, dict[str, Any]] = {}
    content = {"model": DESCRIPTIONS[name], "arms": rows}
    exact = _model(name, "exact")
    for arm in arms:
        try:
            model, inputs, step = exact if arm == "exact" else _model(name, arm)
            for _ in range(3):
                step()
            saved = bs.saved_bytes(model, *inputs).total
            rows[arm] = {"saved_mib": _mebibytes(saved), "peak_mib": _mebibytes(_peak(step))}
            times = summary(interleaved({"exact": exact[2], arm: step}, rounds))
            rows[arm] |= {**times[arm], "note": _note(model)}
        except Exception as error:  # what does not run is a result
            rows[arm] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        print(arm, rows[arm], flush=True)
        write(content)
    return content


def _mebibytes(size: int) -> float:
    return round(size / 2**20, 1)


def launches(write: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Where a step waits: for the host, which launches kernels, or for the device, which runs them."""
    rows: dict[str, dict[str, Any]] = {}
    content = {"model": "two blocks of a ViT, d 768, 256 tokens, batch 64, bfloat16", "arms": rows}
    for arm in LAUNCH_ARMS:
        torch.manual_seed(0)
        model = vit((3, 32, 32), 1000, patch=2, dim=768, depth=2, heads=12)
        model.to(DEVICE, torch.bfloat16)
        x = torch.randn(64, 3, 32, 32, device=DEVICE, dtype=torch.bfloat16)
        if arm != "exact":
            rules = {"blocks": bs.parse(arm)} if arm.startswith("region") else bs.parse(arm)
            bs.sketch_(model, rules)
        rows[arm] = _launches_of(model, x)
        print(arm, rows[arm], flush=True)
        write(content)
    return content


def _launches_of(model: nn.Module, x: Tensor, steps: int = 10) -> dict[str, Any]:
    def step() -> None:
        model.zero_grad()
        y = model(x)
        y.backward(torch.ones_like(y))

    for _ in range(5):
        step()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(steps):
        step()
    host = time.perf_counter() - began
    torch.cuda.synchronize()
    wall = time.perf_counter() - began
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as run:
        for _ in range(3):
            step()
        torch.cuda.synchronize()
    kernels = [e for e in run.key_averages() if e.device_type == DeviceType.CUDA]
    return {
        "host_ms": round(1e3 * host / steps, 2),
        "wall_ms": round(1e3 * wall / steps, 2),
        "device_ms": round(sum(e.self_device_time_total for e in kernels) / 3e3, 2),
        "kernels": round(sum(e.count for e in kernels) / 3),
    }


DESCRIPTIONS = {
    "vit": "ViT-B: d 768, 12 blocks, 12 heads, 196 tokens, batch 64, bfloat16",
    "gpt": "language model: d 768, 12 blocks, 12 heads, context 1,024, batch 8, vocabulary 32,768, bfloat16",
}


def _model(name: str, arm: str) -> tuple[nn.Module, tuple[Tensor, ...], Callable[[], None]]:
    torch.manual_seed(0)
    text = arm.removesuffix(", compiled")
    if name == "vit":
        model: Any = vit((3, 224, 224), 1000, patch=16, dim=768, depth=12, heads=12)
        x = torch.randn(64, 3, 224, 224, device=DEVICE, dtype=torch.bfloat16)
        labels = torch.randint(1000, (64,), device=DEVICE)
    else:
        model = gpt(32768, context=1024, dim=768, depth=12, heads=12)
        x = torch.randint(32768, (8, 1024), device=DEVICE)
        labels = torch.randint(32768, (8 * 1024,), device=DEVICE)
    model.to(DEVICE, torch.bfloat16).train()
    if text == "checkpointing":
        for block in model.blocks:
            _checkpoint(block)
    elif text.startswith("region"):
        # The loss mixes nothing: the blocks, whose rows are independent, are one region.
        bs.sketch_(model, {"blocks": bs.parse(text)})
    elif text != "exact":
        bs.sketch_(model, bs.parse(text))
    call = torch.compile(model) if arm != text else model  # "exact, compiled"

    def step() -> None:
        model.zero_grad()
        F.cross_entropy(call(x).flatten(0, -2), labels).backward()

    return model, (x,), step


def _checkpoint(block: nn.Module) -> None:
    forward = block.forward
    block.forward = lambda x: checkpoint(forward, x, use_reentrant=False)  # type: ignore[method-assign]


def _peak(step: Callable[[], None]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _note(model: nn.Module) -> str:
    """What the regions of the model say of themselves."""
    return "; ".join(state_of(m).note for m in model.modules() if isinstance(m, RegionModule))


# --------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["products", "layers", "launches", "models"])
    parser.add_argument("--model", choices=list(DESCRIPTIONS), default="vit")
    parser.add_argument("--arms", nargs="*", default=list(MODEL_ARMS))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_float32_matmul_precision("highest")
    name = options.model if options.what == "models" else options.what
    command = f"python benchmarks/gpu.py {options.what}"
    head = {
        "command": command + (f" --model {name}" if options.what == "models" else ""),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
    }

    def write(content: dict[str, Any]) -> None:
        options.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**head, **content}, indent=1)
        (options.out / f"{name}.json").write_text(text + "\n")

    run: dict[str, Callable[[], dict[str, Any]]] = {
        "products": lambda: products(options.rounds),
        "layers": lambda: layers(options.rounds),
        "launches": lambda: launches(write),
        "models": lambda: models(name, options.rounds, options.arms, write),
    }
    content = run[options.what]()
    write(content)
    print(json.dumps({**head, **content}, indent=1))


if __name__ == "__main__":
    main()
