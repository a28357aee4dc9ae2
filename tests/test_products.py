"""8-bit products: bit for bit those of the twin, unbiased for hard operands, refused where they are wrong."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import backsketch as bs
from backsketch import products
from backsketch.products import convolution, eager, native
from backsketch.products.numbers import NUMBERS
from backsketch.sampling import next_seed
from backsketch.testing import Moments, _check_directions, _check_entries
from mutations import halve_the_dither_of_products

KEYS = ((1, 2), (3, 4), (5, 6), (7, 8))
SHAPES = [(5, 3, 7), (1, 1, 1), (300, 100, 70), (261, 64, 2100), (700, 33, 129), (513, 96, 50)]


@pytest.fixture(params=[True, False], ids=["tiles", "vectors"])
def kernels(request: pytest.FixtureRequest) -> Iterator[native.Kernels]:
    """The compiled kernels, in matrix registers where the processor has them, and in vectors."""
    compiled = native.library()
    if compiled is None:
        pytest.skip("no compiled kernels here")
    before = compiled.with_tiles
    if compiled.use_tiles(request.param) != request.param:
        pytest.skip("no matrix registers here")
    yield compiled
    compiled.use_tiles(before)


def operands(n: int, j: int, o: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Cotangent with row scales over many decades, input and weight."""
    generator = torch.Generator().manual_seed(n)
    g, x, w = (torch.randn(s, generator=generator) for s in ((n, o), (n, j), (o, j)))
    return [t.to(dtype) for t in (g * (3 * torch.randn(n, 1, generator=generator)).exp(), x, w)]


def equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(0), b.nan_to_num(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernels_agree_with_their_twin_bit_for_bit(shape, dtype, kernels):
    g, x, w = operands(*shape, dtype)
    wide = [t.float() for t in (g, x, w)]
    packed = kernels.pack(x, KEYS[2])
    assert all(map(equal, packed, eager.pack(wide[1], KEYS[2])))
    for own, kept in ((x, None), (None, packed)):
        fast = kernels.vjps(g, own, w, kept, KEYS, True)
        slow = eager.vjps(wide[0], None if own is None else wide[1], wide[2], kept, KEYS, True)
        assert equal(fast[0], slow[0])
        assert equal(fast[1], slow[1])
        torch.testing.assert_close(fast[2], slow[2], rtol=1e-5, atol=1e-5 * float(g.abs().max()))


def test_they_agree_on_what_is_not_finite_and_it_reaches_the_gradients(kernels):
    g, x, w = operands(300, 40, 30)
    g[3], g[280] = 0, 1e-38
    g[5, 2], x[270, 4], w[0, 7] = torch.nan, torch.inf, -torch.inf
    for own, kept in ((x, None), (None, kernels.pack(x, KEYS[2]))):
        fast, slow = (run.vjps(g, own, w, kept, KEYS, True) for run in (kernels, eager))
        assert equal(fast[0], slow[0])
        assert equal(fast[1], slow[1])
        assert fast[0][5].isnan().all()
        assert fast[0][:, 7].isnan().all()
        assert fast[1][:, 4].isnan().all()
        assert fast[2][2].isnan()


# Kernel, stride, padding, dilation, spatial size, groups; samples, channels in, channels out.
CONVOLUTIONS = [
    (((3, 3), (1, 1), (1, 1), (1, 1), (9, 7), 1), (5, 4, 6)),
    (((3, 3), (2, 2), (1, 1), (1, 1), (11, 8), 1), (40, 5, 9)),
    (((1, 1), (2, 2), (0, 0), (1, 1), (7, 8), 1), (5, 5, 9)),
    (((5, 3), (2, 3), (2, 0), (2, 1), (15, 14), 2), (5, 8, 12)),
    (((3, 3), (1, 1), (0, 0), (1, 1), (8, 8), 4), (1, 8, 8)),
    (((2, 2), (2, 2), (0, 0), (1, 1), (16, 16), 1), (3, 3, 70)),
    (((1, 1), (1, 1), (0, 0), (1, 1), (1, 36), 1), (20, 33, 20)),
    (((1, 1), (1, 1), (2, 2), (1, 1), (5, 5), 1), (2, 8, 8)),
    (((3, 3), (1, 1), (1, 1), (1, 1), (9, 7), 1), (5, 40, 70)),
    (((3, 2), (2, 3), (1, 1), (1, 2), (11, 8), 2), (6, 66, 72)),
    (((1, 1), (1, 1), (0, 0), (1, 1), (4, 4), 1), (70, 17, 48)),
]


def convolved(case, dtype: torch.dtype = torch.float32) -> tuple[products.Geometry, list[Tensor]]:
    """Geometry, and cotangent with scales over decades, input and weight."""
    geometry, (n, c, o) = products.Geometry(*case[0]), case[1]
    generator = torch.Generator().manual_seed(n)
    shapes = (
        (n, o, *geometry.outputs()),
        (n, c, *geometry.spatial),
        (o, c // geometry.groups, *geometry.kernel),
    )
    g, x, w = (torch.randn(shape, generator=generator) for shape in shapes)
    g *= (3 * torch.randn(n, 1, 1, 1, generator=generator)).exp()
    return geometry, [t.to(dtype) for t in (g, x, w)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_convolution_kernels_agree_with_their_twin_bit_for_bit(case, dtype, kernels):
    geometry, (g, x, w) = convolved(case, dtype)
    if dtype == torch.float32:
        g[0, 0], x[-1, 1, 0, 0] = 0, torch.inf
    wide = [t.float() for t in (g, x, w)]
    packed = kernels.pack_images(x, KEYS[2], geometry)
    assert all(map(equal, packed, convolution.pack(wide[1], KEYS[2], geometry)))
    slow = convolution.convolution_vjps(*wide, None, KEYS, geometry)
    for threads in (1, 2):
        with threads_of_torch(threads):
            for own, kept in ((x, None), (None, packed)):
                fast = kernels.convolution_vjps(g, own, w, kept, KEYS, geometry)
                assert equal(fast[0], slow[0])
                assert equal(fast[1], slow[1])
                only = kernels.convolution_vjps(g, own, None, kept, KEYS, geometry)
                assert only[0] is None
                assert equal(only[1], slow[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_convolutions_of_channels_last_have_the_same_bits(case, dtype, kernels):
    geometry, (g, x, w) = convolved(case, dtype)
    last_g, last_x = (t.contiguous(memory_format=torch.channels_last) for t in (g, x))
    plain, last = (
        kernels.convolution_vjps(*operands, w, None, KEYS, geometry)
        for operands in ((g, x), (last_g, last_x))
    )
    packed = kernels.pack_images(last_x, KEYS[2], geometry)
    assert all(map(equal, packed, kernels.pack_images(x, KEYS[2], geometry)))
    kept = kernels.convolution_vjps(last_g, None, w, packed, KEYS, geometry)
    assert last[0].stride() == kept[0].stride() == last_x.stride()
    assert all(map(equal, last, plain))
    assert all(map(equal, kept, plain))


@pytest.mark.parametrize("save", [False, True], ids=["fresh", "saved"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_one_tap_that_strides_reads_a_part_of_the_input(layout, save):
    """What is passed over gets the gradient zero, is not kept, and has no say in the scales."""
    layer = nn.Conv2d(5, 4, 1, (2, 3), bias=False)
    x = torch.randn(6, 5, 7, 8)
    x[:, :, 1::2] = 1e6
    x = x.contiguous(memory_format=layout).requires_grad_()
    exact = torch.autograd.grad(layer(x).square().sum(), (x, layer.weight))
    bs.sketch_(layer, bs.Int8(save=save))
    ours = torch.autograd.grad(layer(x).square().sum(), (x, layer.weight))
    assert ours[0].stride() == exact[0].stride()
    for a, b in zip(ours, exact):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.02 * float(b.abs().max()))
    assert torch.equal(ours[0] == 0, exact[0] == 0)
    if save:
        kept = 6 * 5 * 4 * 3
        assert kept <= bs.saved_bytes(layer, x).total < kept + 300


@pytest.mark.parametrize("stride", [(1, 1), (2, 3)], ids=str)
def test_one_tap_of_channels_last_is_a_product_of_matrices_over_positions(stride):
    geometry = products.Geometry((1, 1), stride, (0, 0), (1, 1), (7, 8))
    g, x = torch.randn(6, 5, *geometry.outputs()), torch.randn(6, 4, 7, 8)
    g, x = (t.contiguous(memory_format=torch.channels_last) for t in (g, x))
    weight, seed = torch.randn(5, 4, 1, 1), next_seed(g)
    read = x[..., :: stride[0], :: stride[1]]
    rows = [t.movedim(1, -1).flatten(0, -2) for t in (g, read)]
    below, at_weight, _ = products.vjps(*rows, weight.flatten(1), seed)
    ours = products.convolution_vjps(g, x, weight, geometry, seed)
    whole = torch.zeros_like(x)
    whole[..., :: stride[0], :: stride[1]] = below.view(*read.movedim(1, -1).shape).movedim(-1, 1)
    assert torch.equal(ours[0], whole)
    assert torch.equal(ours[1].flatten(1), at_weight)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("layer", "size"), [(nn.Conv2d, (6, 6)), (nn.Conv3d, (4, 6, 6))], ids=str)
def test_an_empty_batch_of_channels_last_has_zero_gradients(layer, size, stride):
    layer = layer(8, 16, 1, stride)
    bs.sketch_(layer, bs.Int8())
    form = torch.channels_last if len(size) == 2 else torch.channels_last_3d
    x = torch.randn(0, 8, *size).contiguous(memory_format=form).requires_grad_()
    layer(x).sum().backward()
    assert x.grad.shape == x.shape
    assert not layer.weight.grad.any()


@pytest.mark.parametrize("stride", [1, 2])
def test_what_saves_its_input_rounds_alike_where_the_weight_is_frozen(stride):
    """One closed form holds for both cases."""
    layer = nn.Conv2d(8, 16, 1, stride, bias=False)
    bs.sketch_(layer, bs.Int8(save=True))
    x = torch.randn(4, 8, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    errors = []
    exact = torch.autograd.grad(
        nn.functional.conv2d(x, layer.weight, None, stride).square().sum(), x
    )[0]
    for draws in range(2):
        layer.weight.requires_grad_(not draws)
        errors.append(
            sum(
                (torch.autograd.grad(layer(x).square().sum(), x)[0] - exact).square().sum()
                for _ in range(30)
            )
        )
    assert 0.8 < errors[0] / errors[1] < 1.25


@pytest.mark.parametrize("kernel_and_stride", [(1, 1), (1, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("last", [False, True])
def test_convolutions_under_vmap(kernel_and_stride, last):
    layer = nn.Conv2d(4, 6, *kernel_and_stride, bias=False)
    images = torch.randn(3, 2, 4, 7, 7)
    if last:
        images = images.movedim(2, -1).contiguous().movedim(-1, 2)
    weight = layer.weight.detach()
    bs.sketch_(layer, bs.Int8())

    def loss(weight: Tensor, x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight}, (x,)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0), randomness="different")
    ours = each(weight, images)
    with bs.exact(layer):
        exact = torch.stack([torch.func.grad(loss)(weight, x) for x in images])
    torch.testing.assert_close(ours, exact, rtol=0.1, atol=0.05 * float(exact.abs().max()))


EQUAL_COUNTS = (((5, 1), (2, 1), (2, 1), (1, 1), (8, 2), 1), (2, 3, 4))  # (8, 2) becomes (4, 4)


@pytest.mark.parametrize(
    ("numbers", "dtype"),
    [
        ("int8", torch.float32), ("int8", torch.bfloat16), ("int8", torch.float64),
        ("float8", torch.float32),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("case", [*CONVOLUTIONS, EQUAL_COUNTS], ids=str)
def test_layouts_have_the_same_products_and_the_strides_that_compilers_are_told(
    case, dtype, numbers
):
    geometry, tensors = convolved(case, dtype)
    seed = next_seed(tensors[0])

    def products_of(g: Tensor, x: Tensor, w: Tensor, seed: Tensor) -> list[Tensor | None]:
        packed = products.pack_images(x, geometry, seed, numbers=numbers)
        pairs = [
            products.convolution_vjps(g, own, weight, geometry, seed, numbers=numbers)
            for own, weight in ((x, w), (packed, w), (None, w), (x, None))
        ]
        return [*packed, *(gradient for pair in pairs for gradient in pair)]

    one_tap = {*geometry.kernel, geometry.groups} == {1} and not any(geometry.padding)
    compared = (0, 1, 4, 5) if one_tap else range(10)  # the others: products of matrices, below
    expected = products_of(*tensors, seed)
    last = [t.contiguous(memory_format=torch.channels_last) for t in tensors]
    for own in (tensors, last, [tensors[0], last[1], tensors[2]], [last[0], *tensors[1:]]):
        results = products_of(*own, seed)
        assert all(equal(results[i], expected[i]) for i in compared)
        with FakeTensorMode() as mode:
            told = products_of(*map(mode.from_tensor, own), mode.from_tensor(seed))
        for result, fake in zip(results, told):
            assert (result is None) == (fake is None)
            if result is not None:
                assert strides(result) == strides(fake)


def strides(tensor: Tensor) -> list[tuple[int, int]]:
    """Sizes and strides of the dimensions that have more than one entry."""
    return [pair for pair in zip(tensor.shape, tensor.stride()) if pair[0] > 1]


@contextmanager
def threads_of_torch(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


LAYERS = {
    "1x1": lambda: nn.Conv2d(4, 6, 1),
    "strided": lambda: nn.Conv2d(4, 6, 3, 2, padding=1),
    "1x1, strided": lambda: nn.Conv2d(4, 6, 1, 2),
    "channels last": lambda: nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last),
    "grouped": lambda: nn.Conv2d(4, 4, 3, groups=2),
}


@pytest.mark.parametrize("save", [False, True], ids=["fresh", "saved"])
@pytest.mark.parametrize("kind", LAYERS)
def test_convolutions_are_unbiased_and_a_wrong_dither_is_noticed(kind, save, monkeypatch):
    layer = LAYERS[kind]()
    x = torch.randn(3, 4, 6, 6) * torch.logspace(-3, 0, 3)[:, None, None, None]
    bs.sketch_(layer, bs.Int8(save=save))
    bs.testing.check_unbiased(layer, x, draws=200)
    halve_the_dither_of_products(monkeypatch)
    with pytest.raises(AssertionError, match="biased"):
        bs.testing.check_unbiased(layer, x, draws=200)


def test_the_input_of_a_convolution_is_kept_in_a_quarter_of_its_bytes():
    layer, x = nn.Conv2d(16, 16, 3), torch.randn(8, 16, 20, 20)
    bs.sketch_(layer, bs.Int8(save=True))
    assert bs.saved_bytes(layer, x).total < 0.26 * 4 * x.numel()


def test_a_line_is_a_plane_of_height_one_and_volumes_have_a_twin():
    generator = torch.Generator().manual_seed(0)
    for dims in (1, 3):
        geometry = products.Geometry(
            (3,) * dims, (2,) * dims, (1,) * dims, (1,) * dims, (7,) * dims
        )
        shapes = ((4, 6, *geometry.outputs()), (4, 5, *geometry.spatial), (6, 5, *geometry.kernel))
        g, x, w = (torch.randn(s, generator=generator) for s in shapes)
        estimates = products.convolution_vjps(g, x, w, geometry, next_seed(g))
        for estimate, exact in zip(
            estimates, (geometry.input_vjp(g, w), geometry.weight_vjp(g, x))
        ):
            assert estimate.shape == exact.shape
            assert 0 < float((estimate - exact).norm() / exact.norm()) < 0.05


DRAWS = {"int8": 500, "float8": 150}  # which take 0.3 and 2 ms each
HARD = ["six decades", "outlier", "zero rows", "one row", "float64", "bfloat16", "equal", "narrow"]


def hard(name: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    n = 1 if name == "one row" else 24
    g, x, w = (torch.randn(s, generator=generator) for s in ((n, 6), (n, 5), (6, 5)))
    if name == "six decades":
        g *= torch.logspace(-6, 0, n)[:, None]
    elif name == "outlier":
        g[3, 2] = 1e4
    elif name == "zero rows":
        g[::3] = 0
    elif name == "equal":  # every entry lies 0.3 steps above a level
        g[:], x[:], w[:] = 38.3 / 127, 38.3 / 127, 38.3 / 127
        g[:, 0], x[0], w[0] = 1.0, 1.0, 1.0
    dtype = getattr(torch, name) if name in ("float64", "bfloat16") else torch.float32
    return [t.to(dtype) for t in (g, x, w)]


def moments(
    g: Tensor, x: Tensor, w: Tensor, draws: int, save: bool = False, numbers: str = "int8"
) -> list[Moments]:
    wide = [t.double() for t in (g, x, w)]
    # What is rounded to bfloat16 at the end is rounded to nearest: not a bias of the products.
    size = 2.0**-8 if g.dtype == torch.bfloat16 else 0.0
    exact = wide[0] @ wide[2], wide[0].T @ wide[1]
    collected = [Moments(e, rounding=size * float(e.abs().max())) for e in exact]
    for _ in range(draws):
        seed = next_seed(g)
        packed = products.pack(x, next_seed(x), numbers=numbers) if save else x
        pair = products.vjps(g, packed, w, seed, numbers=numbers)
        for m, estimate in zip(collected, pair):
            m.add(estimate)
    return collected


def check(collected: list[Moments]) -> None:
    for name, m in zip(("grad_input", "grad_weight"), collected):
        _check_entries(name, m, 5.5)
        _check_directions(name, m, 5.5)


@pytest.mark.fast_cases(
    "fresh-int8", "saved-int8", "six decades-fresh", "equal-fresh", "outlier-saved"
)
@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("save", [False, True], ids=["fresh", "saved"])
@pytest.mark.parametrize("name", HARD)
def test_hard_operands_have_unbiased_products(name, save, numbers):
    check(moments(*hard(name), draws=DRAWS[numbers], save=save, numbers=numbers))


@pytest.mark.slow
@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("name", HARD)
def test_hard_operands_have_unbiased_products_over_eight_times_the_draws(name, numbers):
    check(moments(*hard(name), draws=8 * DRAWS[numbers], numbers=numbers))


@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("name", ["six decades", "equal", "outlier"])
def test_a_wrong_dither_is_noticed(name, numbers, monkeypatch):
    halve_the_dither_of_products(monkeypatch)
    with pytest.raises(AssertionError, match="biased"):
        check(moments(*hard(name), draws=DRAWS[numbers], numbers=numbers))


def test_blocks_of_rows_are_summed_and_long_contractions_split():
    g, x, w = operands(600, 8, 2300)
    g = g.clamp(-3, 3)
    below, at_weight, at_bias = products.vjps(g, x, w, next_seed(g), with_bias=True)
    for estimate, exact in ((below, g @ w), (at_weight, g.T @ x)):
        assert float((estimate - exact).norm() / exact.norm()) < 0.03
    torch.testing.assert_close(at_bias, g.sum(0), rtol=1e-4, atol=1e-4)


def test_the_input_is_kept_in_a_quarter_of_its_bytes():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    x = torch.randn(512, 64)
    exact = bs.saved_bytes(model, x).total
    bs.sketch_(model, bs.Int8(save=True))
    assert bs.saved_bytes(model, x).total < 0.27 * exact + 2 * 64 * 64 * 4


def test_kernels_that_compute_wrongly_are_not_used(monkeypatch):
    kernels = native.library()
    if kernels is None:
        pytest.skip("no compiled kernels here")
    assert native.agrees(kernels)
    monkeypatch.setattr(
        native.Kernels,
        "vjps",
        lambda *a: [None if t is None else t + 1 for t in eager.vjps(*a[1:])],
    )
    assert not native.agrees(kernels)


def test_matrix_registers_that_compute_wrongly_are_left_for_vectors(monkeypatch):
    found = native.library()
    if found is None or not found.with_tiles:
        pytest.skip("no matrix registers here")
    monkeypatch.setattr(native, "agrees", lambda kernels: not kernels.with_tiles)
    try:
        again = native.library.__wrapped__()
        assert again is not None
        assert not again.with_tiles
    finally:
        assert found.use_tiles(True)


def test_matrix_registers_are_left_as_they_were(kernels):
    """Other libraries multiply in them too, between calls and in other threads."""
    left, right = torch.randint(-127, 128, (2, 256, 256), dtype=torch.int8)
    half = torch.randn(256, 256).bfloat16()
    g, x, w = operands(300, 96, 130)
    before = torch._int_mm(left, right), half @ half, kernels.vjps(g, x, w, None, KEYS, True)
    with ThreadPoolExecutor(2) as pool:
        ours = [pool.submit(kernels.vjps, g, x, w, None, KEYS, True) for _ in range(20)]
        theirs = [pool.submit(torch._int_mm, left, right) for _ in range(20)]
        assert all(torch.equal(future.result(), before[0]) for future in theirs)
        assert all(all(map(equal, future.result(), before[2])) for future in ours)
    assert torch.equal(half @ half, before[1])


def test_the_report_says_where_no_gain_in_time_is_expected(monkeypatch):
    monkeypatch.setattr(products, "why_slow", lambda *_: "this processor is too old")
    report = bs.sketch_(nn.Linear(128, 128), bs.Int8())
    assert "expect no gain in time: this processor is too old" in str(report)


@pytest.mark.parametrize(
    ("layer", "sketch", "told"),
    [
        (nn.Linear(128, 128), bs.Int8(bs.Rows(keep=0.5)), True),
        (nn.Conv2d(32, 32, 3), bs.Int8(bs.Rows(keep=0.5)), True),
        (nn.Linear(128, 128), bs.Int8(), False),
        (nn.Linear(128, 128), bs.Int8(bs.StoredRows(keep=0.5)), False),  # for memory
        (bs.nn.LinearCrossEntropy(128, 1000), bs.Int8(bs.Rows(keep=0.5)), False),
    ],
)
def test_the_report_says_that_rows_inside_8_bits_gain_no_time(monkeypatch, layer, sketch, told):
    monkeypatch.setattr(products, "why_slow", lambda *_: "")
    assert ("int8 alone is faster" in str(bs.sketch_(layer, sketch))) == told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sketch": "rows"}, "must be another estimator"),
        ({"sketch": bs.Int8()}, "must be another estimator"),
        ({"save": 1}, "save must be True or False"),
        ({"sketch": bs.Quantized(bits=4), "save": True}, "a way of its own"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        bs.Int8(**arguments)


@pytest.mark.parametrize(
    "inner", [bs.Rows(keep=0.5), bs.Columns(keep=0.5), bs.Quantized(bits=4)], ids=str
)
def test_a_sketch_inside_stays_unbiased(inner):
    layer = nn.Linear(6, 5)
    bs.sketch_(layer, bs.Int8(sketch=inner))
    bs.testing.check_unbiased(layer, torch.randn(9, 6), draws=300)


def test_multihead_attention_is_unbiased():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    bs.sketch_(attention, bs.Int8())
    x = torch.randn(2, 3, 8)
    bs.testing.check_unbiased(attention, x, x, x, draws=200)
