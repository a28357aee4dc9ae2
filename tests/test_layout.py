"""Copies between the two memory formats of images, and what may ask for them."""

from __future__ import annotations

import pytest
import torch

from backsketch import layout
from backsketch.layout import channels_first, format_of, in_format, in_memory_order

SHAPES = [
    (2, 3, 4, 5), (3, 16, 16, 16), (2, 17, 31, 1), (1, 40, 7, 9), (64, 5, 1, 1), (2, 33, 300, 3), (0, 3, 4, 5),
    (2, 19, 5, 6, 7),
]  # fmt: skip
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("native", [True, False], ids=["compiled", "plain"])
def test_copies_hold_the_same_numbers_in_the_other_format(shape, dtype, native, monkeypatch):
    if not native:
        monkeypatch.setattr(layout, "_compiled", lambda: None)
    x = (100 * torch.rand(shape)).to(dtype)
    last = x.contiguous(memory_format=LAST[x.ndim])
    for threads in (1, 2):
        torch.set_num_threads(threads)
        to_last, to_first = in_format(x, LAST[x.ndim]), channels_first(last)
        assert torch.equal(to_last, x)
        assert torch.equal(to_first, x)
        assert to_first.is_contiguous()
        assert to_last.movedim(1, -1).is_contiguous()
    torch.set_num_threads(1)
    assert in_format(to_first, torch.contiguous_format).data_ptr() == to_first.data_ptr()


def test_the_compiled_copy_is_used_and_reads_what_it_should():
    if layout.SOURCE.library() is None:
        pytest.skip(layout.SOURCE.why_not())
    x = torch.randn(4, 8, 6, 6)
    assert layout._library(x) is not None
    assert layout._library(x.double()) is None
    with torch.device("meta"):
        assert layout._library(torch.empty(4, 8, 6, 6)) is None
    part = torch.randn(4, 8, 6, 12)[..., ::2]  # neither format
    assert torch.equal(channels_first(part), part)
    assert torch.equal(in_format(part, torch.channels_last), part)


def test_under_a_transform_and_a_compiler_nothing_is_read():
    x = torch.randn(5, 2, 3, 4, 6).contiguous(memory_format=torch.channels_last_3d)

    def both(t):
        return in_format(channels_first(t), torch.channels_last)

    assert torch.equal(torch.func.vmap(both)(x), x)
    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x[0]), x[0])


def test_memory_order_is_a_view():
    x = torch.randn(2, 3, 4, 5)
    assert in_memory_order(x, format_of(x)) is x
    last = x.contiguous(memory_format=torch.channels_last)
    ordered = in_memory_order(last, format_of(last))
    assert ordered.is_contiguous()
    assert ordered.data_ptr() == last.data_ptr()
    assert torch.equal(ordered.movedim(-1, 1), x)
