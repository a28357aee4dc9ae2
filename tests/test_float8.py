"""8-bit floats: the numbers of the format and no others, unbiased between them, multiplied rightly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import backsketch as bs
from backsketch import products
from backsketch.products import eager, gpu, numbers
from backsketch.products.numbers import FLOAT8
from backsketch.sampling import next_seed
from cases import linear
from mutations import halve_the_dither_of_products

KEY = (11, 12)


def every_number() -> Tensor:
    """The finite non-negative numbers of the format, in order."""
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)
    return codes.to(torch.float32)


def rounded(values: Tensor, draws: int, key: tuple[int, int] = KEY) -> Tensor:
    """``(draws, values)`` in units of the scale, which is one: each row begins with the largest number."""
    first = torch.full((draws, 1), 448.0)
    codes, scale = eager.round_by_rows(torch.cat([first, values.expand(draws, -1)], 1), key, FLOAT8)
    assert bool((scale == 1).all())
    return codes[:, 1:]


@pytest.mark.parametrize("sign", [1, -1])
def test_the_numbers_of_the_format_stay_what_they_are(sign):
    values = sign * every_number()
    assert torch.equal(rounded(values, 3), values.expand(3, -1))


def test_what_lies_between_becomes_one_of_its_two_neighbours_in_the_right_proportion():
    table = every_number()
    lower, upper = table[:-1], table[1:]
    values = lower + 0.3 * (upper - lower)  # 0.3 Δ above each number, subnormal ones included
    draws = 2000
    for v in (values, -values):
        codes = rounded(v, draws)
        up = codes.abs() == upper
        assert bool((up | (codes.abs() == lower)).all())
        assert bool((codes.sign() * v.sign() >= 0).all())
        share = up.double().mean(0)
        assert float((share - 0.3).abs().max()) < 5 * (0.21 / draws) ** 0.5
        assert float(share.mean()) == pytest.approx(0.3, abs=5 * (0.21 / draws / 126) ** 0.5)


def test_half_of_the_dither_is_noticed_there(monkeypatch):
    halve_the_dither_of_products(monkeypatch)
    with pytest.raises(AssertionError):
        test_what_lies_between_becomes_one_of_its_two_neighbours_in_the_right_proportion()


@pytest.mark.parametrize("size", [1e-38, 1e-30, 3e-7, 1.0, 448.0, 449.0, 511.9, 3e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_largest_entry_lies_at_the_end_of_the_range_and_never_beyond(size, dtype):
    x = torch.tensor([[size, -size / 3, size / 100]], dtype=dtype)
    scale, rate = FLOAT8.scale(x.abs().amax(1, keepdim=True))
    mantissa, _ = torch.frexp(scale)
    assert float(mantissa) == 0.5  # a power of two
    assert float(scale * rate) == 1
    assert float(x.abs().max() / scale) <= 448
    if size > 1e-30:
        assert float(x.abs().max() / scale) > 224
    codes, _ = eager.round_by_rows(x, KEY, FLOAT8)
    assert torch.equal(codes, codes.float().to(torch.float8_e4m3fn).to(dtype))


def test_zero_rows_stay_zero_and_what_is_not_finite_reaches_the_gradients():
    g, x, w = torch.randn(9, 6), torch.randn(9, 5), torch.randn(6, 5)
    g[2] = 0
    below, at_weight, _ = products.vjps(g, x, w, next_seed(g), numbers="float8")
    assert float(below[2].abs().max()) == 0
    assert bool(below.isfinite().all() and at_weight.isfinite().all())
    for bad in (torch.nan, torch.inf, -torch.inf):
        broken = g.clone()
        broken[4, 1] = bad
        below, at_weight, at_bias = products.vjps(
            broken, x, w, next_seed(g), with_bias=True, numbers="float8"
        )
        assert bool(below[4].isnan().all())
        assert not bool(below[3].isnan().any())
        assert bool(at_weight.isnan().any())
        assert not bool(at_bias[1].isfinite())
        packed = products.pack(
            x * torch.where(broken.sum(1) == broken.sum(1), 1, torch.nan)[:, None],
            next_seed(x),
            numbers="float8",
        )
        assert bool(
            products.vjps(broken, packed, w, next_seed(g), numbers="float8")[1].isnan().any()
        )


def test_kept_codes_are_bytes_and_read_back_as_what_they_were():
    x = torch.randn(300, 70)
    packed = codes, stats = products.pack(x, next_seed(x), numbers="float8")
    assert codes.dtype == torch.uint8
    assert codes.shape == (300, 80)
    assert stats.shape == (1, 2, 70)
    back = products.unpack(packed, 300, "float8")
    assert back.shape == x.shape
    assert float(((back - x).abs() / x.abs()).median()) < 2**-3
    assert torch.equal((back / stats[0, 0]).to(torch.float8_e4m3fn).float() * stats[0, 0], back)


def test_the_library_computes_the_same_product():
    """The path of a GPU, by PyTorch's implementation for the CPU."""
    g, x = torch.randn(37, 21), torch.randn(21, 50)
    a, _ = eager.round_by_rows(g, KEY, FLOAT8)
    b, _ = eager.round_by_columns(x, KEY, numbers=FLOAT8)
    torch.testing.assert_close(
        numbers.padded_product(a, b), FLOAT8.product(a, b, torch.float32), rtol=1e-5, atol=1e-2
    )


def test_a_device_that_multiplies_wrongly_is_not_used(monkeypatch):
    assert numbers.multiplies_floats("cpu")
    right = numbers.padded_product
    monkeypatch.setattr(numbers, "padded_product", lambda a, b: right(a, b) + 64)
    assert not numbers.multiplies_floats("cpu")
    monkeypatch.setattr(numbers, "padded_product", right)
    with monkeypatch.context() as patch:
        patch.delattr(torch, "_scaled_mm")
        assert not numbers.multiplies_floats("cpu")

    def refuses(a: Tensor, b: Tensor) -> Tensor:
        raise RuntimeError("not built for this device")

    monkeypatch.setattr(numbers, "padded_product", refuses)
    assert not numbers.multiplies_floats("cpu")


def test_a_backward_pass_inside_autocast_multiplies_in_float32():
    g, x, w = torch.randn(9, 6), torch.randn(9, 5), torch.randn(6, 5)
    seed = next_seed(g)
    plain = products.vjps(g, x, w, seed, numbers="float8")
    with torch.autocast("cpu", torch.bfloat16):
        inside = products.vjps(g, x, w, seed, numbers="float8")
    for a, b in zip(plain[:2], inside[:2]):
        assert torch.equal(a, b)


def test_e4m3_has_less_variance_than_e5m2_for_a_cotangent():
    """Why the cotangent has three bits of mantissa: in the closed form, per entry, for all but negligible ones."""
    x = torch.logspace(-6, 0, 4001, dtype=torch.float64) * 448
    fine = FLOAT8.spacing(x)
    coarse = 2.0 ** ((x * 128).log2().floor() - 2) / 128  # e5m2, whose largest number is 128 * 448
    assert bool((fine <= coarse)[x > 2e-5 * 448].all())
    assert float((fine / coarse)[x > 1e-3 * 448].max()) == 0.5


def test_outliers_cost_less_than_among_integers_and_even_groups_more():
    layer = linear((64,), 32, 32)
    even = [e.input_variance(layer.op, layer.g, layer.weight) for e in (bs.Int8(), bs.Float8())]
    assert float(even[0]) < float(even[1])
    g = layer.g.clone()
    g[:, 0] *= 300
    rough = [e.input_variance(layer.op, g, layer.weight) for e in (bs.Int8(), bs.Float8())]
    assert float(rough[0]) > 0  # the column of outliers is itself rounded, coarsely by both
    small = layer.weight.clone()
    small[0] = 0
    rough = [e.input_variance(layer.op, g, small) for e in (bs.Int8(), bs.Float8())]
    assert float(rough[0]) > 3 * float(rough[1])


@pytest.mark.parametrize("text", ["float8", "float8:save=true", "float8:sketch=(rows:keep=0.5)"])
def test_text_forms(text):
    assert str(bs.parse(text)) == text
    assert isinstance(bs.parse(text), bs.Float8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sketch": "rows"}, "Float8: sketch must be another estimator"),
        ({"sketch": bs.Int8()}, "Float8: sketch must be another estimator"),
        ({"save": 1}, "Float8: save must be True or False"),
        ({"sketch": bs.Quantized(bits=4), "save": True}, "Float8: .* a way of its own"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        bs.Float8(**arguments)


def test_the_report_says_that_the_device_has_no_such_products():
    report = bs.sketch_(nn.Linear(128, 128), bs.Float8())
    assert "expect no gain in time: this device has no products of 8-bit floats" in str(report)


def test_on_a_gpu_that_has_them_the_report_says_that_nothing_was_measured(monkeypatch):
    monkeypatch.setattr(products, "has_float8_product", lambda device: True)
    monkeypatch.setattr(gpu, "why_not", lambda *_: "")
    assert "lose against bfloat16" in products.why_slow("cuda", "float8")


def test_a_sketch_inside_stays_unbiased():
    layer = nn.Linear(6, 5)
    bs.sketch_(layer, bs.Float8(sketch=bs.Rows(keep=0.5)))
    bs.testing.check_unbiased(layer, torch.randn(9, 6), draws=300)
