"""The kernels for GPUs, in Triton's interpreter on the CPU: the same codes and products as their twin.

The interpreter is chosen by an environment variable before Triton is imported, so that the tests run in a process
of their own; the last test of this file starts it. Triton comes with PyTorch for CUDA and is large: where it is
missing these tests are skipped.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

import backsketch as bs
from backsketch import gpu as launches
from backsketch import products
from backsketch.products import eager, gpu
from backsketch.products.numbers import NUMBERS
from backsketch.rounding import eager as rounding
from backsketch.rounding import gpu as rounding_gpu
from backsketch.sampling import gpu as draws
from backsketch.sampling import inclusion_probabilities
from backsketch.sampling.design import systematic
from helpers import same

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# The interpreter computes with NumPy, which warns where a NaN is made or cast, or an infinity made.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered:RuntimeWarning")
KEYS = ((1, 0xF0000002), (0xF0000003, 0xE0000004), (0x80000000, 6), (7, 0xFFFFFFFF))
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own")
every_kind = pytest.mark.parametrize("kind", NUMBERS)


@pytest.fixture(autouse=True)
def _loops_with_new_numpy(monkeypatch):
    """Loops up to an argument: the interpreter casts an array of one entry, which NumPy 2.4 refuses."""
    if not INTERPRETED:
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)


def operands(n: int, j: int, o: int) -> list[Tensor]:
    """Cotangent with row scales over many decades and a row of zeros, input and weight."""
    generator = torch.Generator().manual_seed(n)
    g, x, w = (torch.randn(s, generator=generator) for s in ((n, o), (n, j), (o, j)))
    g *= (3 * torch.randn(n, 1, generator=generator)).exp()
    g[n // 2] = 0
    return [g, x, w]


def rows_of(codes: Tensor, n: int, k: int, kind: str) -> Tensor:
    """Codes by columns as those of ``(n, k)``; what they are filled up with is zero."""
    assert int(codes[k:].count_nonzero()) == int(codes[:, n:].count_nonzero()) == 0
    return NUMBERS[kind].from_byte(codes[:k, :n].T)


@interpreted
@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_codes_by_row_are_those_of_the_twin_in_both_layouts(kind, dtype):
    g = operands(37, 1, 141)[0].to(dtype)
    g[3, 5] = torch.nan
    g[4, 6] = -torch.inf
    g[5] *= 1e-36
    expected, scale = eager.round_by_rows(g.float(), KEYS[0], NUMBERS[kind])
    codes, turned, own_scale = gpu.Kernels(kind)._by_rows(g, KEYS[0], True, True)
    assert same(own_scale, scale[:, 0])
    assert torch.equal(turned, codes.T)
    live = own_scale.isfinite()  # what codes are whose scale is NaN does not matter
    assert torch.equal(rows_of(turned, 37, 141, kind)[live], expected[live])


@interpreted
@every_kind
@pytest.mark.parametrize("in_blocks", [True, False])
def test_codes_by_column_are_those_of_the_twin(kind, in_blocks):
    x = operands(261, 1, 19)[0]
    x[:, 2] = 0
    turned, scale = gpu.Kernels(kind)._by_columns(x, KEYS[1], in_blocks=in_blocks)
    codes = rows_of(turned, 261, 19, kind)
    blocks = NUMBERS[kind].blocks(261) if in_blocks else [slice(0, 261)]
    assert len(scale) == len(blocks)
    for number, block in enumerate(blocks):
        expected, own = eager.round_by_columns(x[block], KEYS[1], block.start, NUMBERS[kind])
        assert torch.equal(scale[number], own)
        assert torch.equal(codes[block], expected)


@interpreted
@every_kind
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 3, 7), (261, 35, 20), (3, 2, 2100)], ids=str)
def test_products_are_those_of_the_twin(kind, shape, monkeypatch):
    g, x, w = operands(*shape)
    numbers, kernels = NUMBERS[kind], gpu.Kernels(kind)
    packed = kernels.pack(x, KEYS[2])
    monkeypatch.setattr(eager, "is_by_columns", lambda device: True)
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
    by_columns = gpu.Kernels._by_columns

    def wrong(self, *arguments, **options):
        codes, scale = by_columns(self, *arguments, **options)
        return codes, scale * 1.01

    monkeypatch.setattr(gpu.Kernels, "_by_columns", wrong)
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


# Rounding -------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [64, 16])
@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("bits", [8, 4, 2, 1])
def test_packed_codes_are_those_of_the_twin(bits, twice, size, dtype):
    x = torch.randn(1001, generator=torch.Generator().manual_seed(bits)).to(dtype)
    x[3], x[200], x[320:384] = torch.nan, -torch.inf, 0.25
    x[500:564] = torch.finfo(dtype).max * torch.tensor([1, -1]).repeat(32)
    own = rounding_gpu.Kernels()
    packed = own.pack(x, KEYS[0], bits, size, twice)
    expected = rounding.pack(x.float(), KEYS[0], bits, size, twice)
    assert torch.equal(packed[0], expected[0])
    assert same(packed[1], expected[1])
    for which in (0, 1) if twice else (-1,):
        arguments = (1001, bits, size, which)
        assert same(own.restore(*packed, *arguments), rounding.restore(*expected, *arguments))
    if not twice:
        g = torch.randn(1001).to(dtype)
        ours, theirs = (
            run.times(g, *packed, bits, size).float() for run in (own, rounding)
        )  # the interpreter cuts off what bfloat16 does not hold
        last_digit = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0
        torch.testing.assert_close(ours, theirs, rtol=last_digit, atol=0, equal_nan=True)


@interpreted
@pytest.mark.parametrize("function", ["gelu", "silu"])
def test_packed_slopes_are_those_of_the_twin_but_for_their_last_digits(function):
    x = 3 * torch.randn(1000, generator=torch.Generator().manual_seed(0))
    own = rounding_gpu.Kernels().pack_slope(x, x, function, KEYS[0], 8, 64)
    twin = rounding.pack_slope(x, x, function, KEYS[0], 8, 64)
    a, b = (rounding.restore(*packed, 1000, 8, 64, -1) for packed in (own, twin))
    step = twin[1][:, 1].repeat_interleave(64)[:1000]
    assert bool(((a - b).abs() <= 1.01 * step).all())
    assert float((a != b).float().mean()) < 0.9


@interpreted
@pytest.mark.parametrize("outside", [0.0, 0.1])
def test_masks_are_those_of_the_twin(outside):
    x, g = (torch.randn(1300, generator=torch.Generator().manual_seed(i)) for i in range(2))
    x[7], g[9] = torch.nan, torch.inf
    own = rounding_gpu.Kernels()
    bits = own.mask(x, -0.5, 0.7)
    assert torch.equal(bits, rounding.mask(x, -0.5, 0.7))
    assert torch.equal(own.masked(g, bits, outside), rounding.masked(g, bits, outside))


@interpreted
@pytest.mark.parametrize("has_mean", [True, False])
@pytest.mark.parametrize("has_weight", [True, False])
def test_the_backward_pass_of_a_norm_is_that_of_the_twin(has_mean, has_weight):
    generator = torch.Generator().manual_seed(0)
    g, x = (torch.randn(11, 24, generator=generator) for _ in range(2))
    weight = torch.rand(24, generator=generator) if has_weight else None
    mean, rstd = x.mean(1) if has_mean else None, 1 / x.std(1)
    packed = rounding.pack(x.flatten(), KEYS[0], 4, 16, True)
    ours = rounding_gpu.Kernels().layer_norm(g, weight, mean, rstd, *packed, 4, 16)
    expected = rounding.layer_norm(g, weight, mean, rstd, *packed, 4, 16)
    for a, b in zip(ours, expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@interpreted
def test_the_self_test_of_rounding_notices_a_wrong_bit(monkeypatch):
    own = rounding_gpu.Kernels()
    assert rounding_gpu.agrees(own, "cpu")
    monkeypatch.setattr(rounding_gpu, "signed", lambda word: word & 0x7FFFFFFE)
    assert not rounding_gpu.agrees(own, "cpu")


def test_without_a_gpu_nothing_of_triton_is_needed_and_the_report_says_what_is_known(monkeypatch):
    assert "NVIDIA GPUs only" in gpu.why_not(torch.device("meta"), "int8")
    assert gpu.kernels(torch.device("meta"), "int8") is None
    monkeypatch.setattr(launches, "find_spec", lambda name: None)
    launches.why_not.cache_clear()
    if not torch.version.hip:
        assert "need Triton" in gpu.why_not(torch.device("cuda"), "int8")
        assert "need Triton" in products.why_slow("cuda", "int8")
    launches.why_not.cache_clear()


# What each kernel is compiled with: pointers (or floats, ""), and constants; other arguments are integers.
_TILE = {"ROWS": 128, "COLUMNS": 128, "DEPTH": 128, "GROUP": 8}
COMPILED = {
    "round_rows": (
        {"x_at": "bf16", "codes_at": "u8", "turned_at": "u8", "scale_at": "fp32"},
        {"FLOATS": False, "HAS_CODES": True, "HAS_TURNED": True, "ROWS": 32, "COLUMNS": 128},
    ),
    "round_blocks": (
        {"x_at": "bf16", "rows_at": "fp32", "turned_at": "u8", "scale_at": "fp32"},
        {"HAS_ROWS": True, "ROWS": 256, "COLUMNS": 32},
    ),
    "largest_of_columns": (
        {"x_at": "fp32", "rows_at": "fp32", "largest_at": "fp32", "out_at": "i32"},
        {"HAS_ROWS": True, "ROWS": 256, "COLUMNS": 32},
    ),
    "round_columns": (
        {"x_at": "fp32", "rows_at": "fp32", "largest_at": "fp32", "bits_at": "i32"}
        | {"turned_at": "u8", "scale_at": "fp32"},
        {"FLOATS": False, "HAS_ROWS": True, "ROWS": 256, "COLUMNS": 32},
    ),
    "product_of_rows": (
        {"a_at": "i8", "b_at": "i8", "row_at": "fp32", "column_at": "fp32", "out_at": "bf16"},
        {"PART": 2048, **_TILE},
    ),
    "product_of_blocks": (
        {"a_at": "i8", "b_at": "i8", "row_at": "fp32", "column_at": "fp32", "out_at": "fp32"},
        {"HAS_ROW": True, **_TILE, "DEPTH": 256},
    ),
    "pack": (
        {"x_at": "bf16", "codes_at": "u8", "scales_at": "fp32"},
        {"BITS": 4, "SIZE": 64, "TWICE": True, "SLOPE": 0, "GROUPS": 32},
    ),
    "restore": (
        {"codes_at": "u8", "scales_at": "fp32", "factor_at": "bf16", "out_at": "bf16"},
        {"HAS_FACTOR": True, "WHICH": -1, "BITS": 4, "SIZE": 64, "TWICE": False, "ENTRIES": 2048},
    ),
    "mask": ({"x_at": "bf16", "out_at": "u8", "low": "", "high": ""}, {"BLOCKS": 4}),
    "masked": (
        {"g_at": "bf16", "bits_at": "u8", "out_at": "bf16", "outside": ""},
        {"HAS_OUTSIDE": True, "ENTRIES": 2048},
    ),
    "layer_norm": (
        {"g_at": "fp32", "weight_at": "bf16", "mean_at": "fp32", "rstd_at": "fp32"}
        | {"codes_at": "u8", "scales_at": "fp32", "out_at": "fp32", "parts_at": "fp32"},
        {"HAS_WEIGHT": True, "HAS_MEAN": True, "BITS": 4, "SIZE": 64, "WIDTH": 1024},
    ),
    "rescale": (
        {"product_at": "fp32", "column_at": "fp32", "row_at": "fp32", "out_at": "bf16"},
        {"HAS_ROW": True, "ROWS": 32, "COLUMNS": 128},
    ),
}


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(
    ("name", "floats"),
    [
        (n, f)
        for n, (_, options) in COMPILED.items()
        for f in (False, True)[: 1 + ("FLOATS" in options)]
    ],
)
def test_a_kernel_compiles_for_a_gpu_without_fused_multiply_adds(name, floats):
    """Which needs no GPU, but the compiler that Triton brings along."""
    triton = pytest.importorskip("triton", reason="Triton comes with PyTorch for CUDA")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from backsketch.products import triton_kernels as of_products
    from backsketch.rounding import triton_kernels as of_rounding

    pointers, constants = COMPILED[name]
    constants = constants | {"FLOATS": floats} if floats else constants
    kernel = getattr(of_products if hasattr(of_products, name) else of_rounding, name)
    signature = {
        a: f"*{pointers[a]}"
        if pointers.get(a)
        else "fp32"
        if a in pointers
        else "constexpr"
        if a in constants
        else "i32"
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


# Draws ----------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (37, 300), (3, 5000)], ids=str)
def test_norms_of_rows_are_those_of_float64_at_any_magnitude(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    x, factors = torch.randn(shape, generator=generator), torch.rand(shape[1], generator=generator)
    x = (x * 10 ** torch.linspace(-30, 30, shape[0])[:, None]).to(dtype)
    for f in (None, factors):
        expected = (x.double() if f is None else x.double() * f).norm(dim=1)
        torch.testing.assert_close(draws.row_norms(x, f), expected, rtol=1e-5, atol=0)
    x[0, 0] = torch.nan
    assert bool(draws.row_norms(x)[0].isnan())
    x[0, 0] = torch.inf
    assert float(draws.row_norms(x, factors)[0]) == torch.inf


SCORES = {
    "of any size": lambda x: x,
    "heavy": lambda x: x**8,
    "equal": torch.ones_like,
    "few of them positive": lambda x: torch.where(x > 1.5, x, 0.0),
    "zero": torch.zeros_like,
    "not finite": lambda x: torch.where(x > 2, torch.inf, x),
}


@interpreted
@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize(
    ("n", "k", "floor"), [(5000, 700, 0.0), (130, 40, 0.1), (1, 1, 0.0), (40, 40, 0.0)]
)
def test_drawn_rows_are_those_of_the_definition(kind, n, k, floor):
    x = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)).abs()
    scores = SCORES[kind](x)
    pi = inclusion_probabilities(scores, k, floor)
    for u in (0.0001713, 0.6180339, 0.9991347):  # on no edge of equal scores
        indices, weights = draws.draw(scores, k, 1, 0, u, floor, None)
        expected = systematic(pi, k, u)
        assert torch.equal(indices, expected)
        torch.testing.assert_close(weights, torch.where(pi > 0, 1 / pi, 0.0)[expected])


@interpreted
@pytest.mark.parametrize("block", [1, 4])
def test_shuffled_draws_keep_the_probabilities_and_blocks_come_in_random_order(block):
    n, k = 24, 9
    scores = torch.arange(1.0, n + 1)
    pi = inclusion_probabilities(scores, k)
    count, together = torch.zeros(n, dtype=torch.float64), torch.zeros(n, n)
    for seed in range(40):
        indices, weights = draws.draw(scores, k, seed, 0, (seed * 0.61803) % 1, 0.0, block)
        assert bool((indices.diff() > 0).all())
        torch.testing.assert_close(weights.double(), 1 / pi[indices], rtol=1e-6, atol=0)
        count[indices] += 1
        together[indices[:, None], indices] += 1
    error = (pi * (1 - pi) / 40).sqrt()
    assert bool(((count / 40 - pi).abs() < 5 * error + 1e-9).all())
    # In the natural order the last two rows, whose probabilities add up to more than one, always have a neighbour.
    assert int((together > 0).sum()) > 0.6 * n * n


@interpreted
def test_the_self_test_of_draws_notices_a_wrong_point(monkeypatch):
    assert draws.agrees("cpu")
    draw = draws.draw
    monkeypatch.setattr(
        draws, "draw", lambda s, k, seed, stream, u, *rest: draw(s, k, seed, stream, u / 2, *rest)
    )
    assert not draws.agrees("cpu")
