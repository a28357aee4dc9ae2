"""The kernels for GPUs, in Triton's interpreter on the CPU: the same codes and products as their twin.

The interpreter is chosen by an environment variable before Triton is imported, so that the tests run in a process
of their own; the last test of this file starts it. Triton comes with PyTorch for CUDA and is large: where it is
missing these tests are skipped.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

import backsketch as bs
from backsketch import products
from backsketch.products import eager, gpu
from backsketch.products.numbers import FLOAT8, NUMBERS

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# The interpreter computes with NumPy, which warns where a NaN is made or cast.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
KEYS = ((1, 0xF0000002), (0xF0000003, 0xE0000004), (0x80000000, 6), (7, 0xFFFFFFFF))
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own")
every_kind = pytest.mark.parametrize("kind", NUMBERS)


def operands(n: int, j: int, o: int) -> list[Tensor]:
    """Cotangent with row scales over many decades and a row of zeros, input and weight."""
    generator = torch.Generator().manual_seed(n)
    g, x, w = (torch.randn(s, generator=generator) for s in ((n, o), (n, j), (o, j)))
    g *= (3 * torch.randn(n, 1, generator=generator)).exp()
    g[n // 2] = 0
    return [g, x, w]


def same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(0), b.nan_to_num(0))


def as_bytes(codes: Tensor, kind: str) -> Tensor:
    dtype = torch.float8_e4m3fn if NUMBERS[kind] is FLOAT8 else torch.int8
    return codes.to(dtype).view(torch.uint8)


@interpreted
@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_codes_by_row_are_those_of_the_twin_in_both_layouts(kind, dtype):
    g = operands(37, 1, 41)[0].to(dtype)
    g[3, 5] = torch.nan
    g[4, 6] = -torch.inf
    numbers, kernels = NUMBERS[kind], gpu.Kernels(kind)
    expected, scale = eager.round_by_rows(g.float(), KEYS[0], numbers)
    rate = numbers.scale(eager.magnitude(g.float(), 1))[1]
    codes, turned = kernels._round(g, rate, KEYS[0], wants=(True, True), by_row=True)
    live = scale[
        :, 0
    ].isfinite()  # what the codes of other rows are does not matter: their scale is NaN
    assert torch.equal(codes[:37, :41][live], as_bytes(expected, kind)[live])
    assert torch.equal(turned, codes.T)
    assert int(codes[37:].count_nonzero()) == 0
    assert int(codes[:, 41:].count_nonzero()) == 0


@interpreted
@every_kind
def test_codes_by_block_and_column_are_those_of_the_twin(kind):
    x = operands(261, 1, 19)[0]
    x[:, 2] = 0
    numbers, kernels = NUMBERS[kind], gpu.Kernels(kind)
    scale, rate = numbers.scale(kernels._largest(x, None))
    turned = kernels._round(x, rate, KEYS[1], wants=(False, True))[1]
    for number, block in enumerate(numbers.blocks(261)):
        codes, expected = eager.round_by_columns(x[block], KEYS[1], block.start, numbers)
        assert torch.equal(scale[number], expected)
        assert torch.equal(turned.T[block, :19][: len(codes)], as_bytes(codes, kind))


@interpreted
@every_kind
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 3, 7), (261, 35, 20), (3, 2, 2100)], ids=str)
def test_products_are_those_of_the_twin(kind, shape):
    g, x, w = operands(*shape)
    numbers, kernels = NUMBERS[kind], gpu.Kernels(kind)
    packed = kernels.pack(x, KEYS[2])
    assert all(map(same, packed, eager.pack(x, KEYS[2], numbers)))
    for own, kept in ((x, None), (None, packed)):
        fast = kernels.vjps(g, own, w, kept, KEYS, True)
        slow = eager.vjps(g, own, w, kept, KEYS, True, numbers)
        if kind == "int8":
            assert all(map(same, fast[:2], slow[:2]))
        for a, b in zip(fast, slow):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


@interpreted
@every_kind
def test_what_is_not_finite_reaches_the_gradients(kind):
    g, x, w = operands(40, 18, 20)
    g[5, 2], x[30, 4], w[0, 7] = torch.nan, torch.inf, -torch.inf
    fast = gpu.Kernels(kind).vjps(g, x, w, None, KEYS, True)
    slow = eager.vjps(g, x, w, None, KEYS, True, NUMBERS[kind])
    for a, b in zip(fast, slow):
        assert torch.equal(a.isnan(), b.isnan())
    assert bool(fast[0][5].isnan().all() and fast[0][:, 7].isnan().all())
    assert bool(fast[1][:, 4].isnan().all())


@interpreted
@every_kind
def test_the_self_test_notices_a_wrong_scale(kind, monkeypatch):
    assert gpu.agrees(gpu.Kernels(kind), "cpu")
    rescale = gpu.Kernels._rescale

    def wrong(self, product, column, *rest, **named):
        rescale(self, product, column * 1.01, *rest, **named)

    monkeypatch.setattr(gpu.Kernels, "_rescale", wrong)
    assert not gpu.agrees(gpu.Kernels(kind), "cpu")


@interpreted
@every_kind
def test_a_layer_runs_on_them(kind, monkeypatch):
    layer, x = nn.Linear(6, 5), torch.randn(9, 6)
    layer(x).sum().backward()
    exact, layer.weight.grad = layer.weight.grad, None
    monkeypatch.setattr(
        products, "_implementation", lambda g, numbers: (gpu.Kernels(numbers), torch.float32)
    )
    bs.sketch_(layer, bs.parse(kind))
    layer(x).sum().backward()
    error = (layer.weight.grad - exact).norm() / exact.norm()
    assert 0 < float(error) < 0.1


def test_without_a_gpu_nothing_of_triton_is_needed_and_the_report_says_what_is_known(monkeypatch):
    assert "NVIDIA GPUs only" in gpu.why_not(torch.device("meta"), "int8")
    assert gpu.kernels(torch.device("meta"), "int8") is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    gpu.why_not.cache_clear()
    if not torch.version.hip:
        assert "need Triton" in gpu.why_not(torch.device("cuda"), "int8")
        assert "need Triton" in products.why_slow("cuda", "int8")
    gpu.why_not.cache_clear()


# What each kernel is compiled with: arguments that are pointers, and constants; other arguments are integers.
COMPILED = {
    "round_to_codes": (
        {"x_at": "bf16", "rate_at": "fp32", "codes_at": "u8", "turned_at": "u8"},
        {"factor_at": None, "BY_ROW": True, "BLOCK": 256, "FLOATS": False, "HAS_FACTOR": False}
        | {"HAS_CODES": True, "HAS_TURNED": True, "ROWS": 32, "COLUMNS": 128},
    ),
    "largest_of_columns": (
        {"x_at": "fp32", "factor_at": "fp32", "out_at": "i32"},
        {"HAS_FACTOR": True, "ROWS": 256, "COLUMNS": 32},
    ),
    "rescale": (
        {"product_at": "i32", "column_at": "fp32", "row_at": "fp32", "out_at": "fp32"},
        {"HAS_ROW": True, "ADDS": True, "ROWS": 32, "COLUMNS": 128},
    ),
}


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("floats", [False, True])
@pytest.mark.parametrize("name", COMPILED)
def test_a_kernel_compiles_for_a_gpu_without_fused_multiply_adds(name, floats):
    """Which needs no GPU, but the compiler that Triton brings along."""
    triton = pytest.importorskip("triton", reason="Triton comes with PyTorch for CUDA")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from backsketch.products import triton_kernels

    pointers, constants = COMPILED[name]
    constants = constants | {"FLOATS": floats} if "FLOATS" in constants else constants
    kernel = getattr(triton_kernels, name)
    signature = {
        a: f"*{pointers[a]}" if a in pointers else "constexpr" if a in constants else "i32"
        for a in kernel.arg_names
    }
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants),
        target=GPUTarget("cuda", 90, 32),
        options={"enable_fp_fusion": False},
    )
    assert "fma." not in compiled.asm["ptx"]


@pytest.mark.skipif(INTERPRETED, reason="is this process")
def test_the_kernels_in_the_interpreter():
    pytest.importorskip(
        "triton", reason="Triton comes with PyTorch for CUDA and is not installed here"
    )
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-n", "0", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-2000:]
    assert " passed" in process.stdout
