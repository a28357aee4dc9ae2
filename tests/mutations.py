"""Deliberate errors. A statistical test that does not notice one of these proves nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

import backsketch as bs
from backsketch.products import eager as int8
from backsketch.products import native as int8_native
from backsketch.rounding import eager, native
from backsketch.sampling import next_seed, operators

Mutation = Callable[[pytest.MonkeyPatch], None]


def drop_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Horvitz-Thompson weights of one: what is kept is not divided by its inclusion probability."""
    draw = operators._draw

    def wrong(*arguments: Any) -> tuple[Tensor, Tensor]:
        indices, weights = draw(*arguments)
        return indices, weights * 0 + 1

    monkeypatch.setattr(operators, "_draw", wrong)


def shift_the_indices(monkeypatch: pytest.MonkeyPatch) -> None:
    """The neighbour of each drawn row is taken, with the weight of the drawn one."""
    draw = operators._draw

    def wrong(scores: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        indices, weights = draw(scores, *arguments)
        return (indices + 1) % scores.shape[0], weights

    monkeypatch.setattr(operators, "_draw", wrong)


def redraw_the_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each use of a seed draws anew, as a partitioner that recomputes a draw in the backward would."""
    signs = operators._signs

    def wrong(like: Tensor, rows: int, columns: int, seed: Tensor, stream: int) -> Tensor:
        return signs(like, rows, columns, next_seed(like, seed), stream)

    monkeypatch.setattr(operators, "_signs", wrong)


def halve_the_uniforms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uniforms on half the unit interval: masks keep too much, roundings go down."""
    uniform = operators._uniform
    monkeypatch.setattr(operators, "_uniform", lambda *a: uniform(*a) / 2)


def halve_the_dither(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for stochastic rounding, whose uniforms come from a hash: more is rounded down."""
    bits = eager._sixteen_bits
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(eager, "_sixteen_bits", lambda *a: tuple(u >> 1 for u in bits(*a)))


def round_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """No dither at all."""
    bits = eager._sixteen_bits
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(eager, "_sixteen_bits", lambda *a: tuple(u * 0 + 32768 for u in bits(*a)))


def one_rounding_for_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two roundings of a pair are the same one, as a plain quantizer would have it."""
    bits = eager._sixteen_bits
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(eager, "_sixteen_bits", lambda *a: (u := bits(*a)[0], u.clone()))


def halve_the_dither_of_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uniforms on half the unit interval in 8-bit products: more is rounded down."""
    dither = int8.dither
    monkeypatch.setattr(int8_native, "library", lambda: None)
    monkeypatch.setattr(int8, "dither", lambda *a: dither(*a) >> 1)


# What breaks each kind of estimator. tests/test_registry.py fails where one has no row here.
MUTATIONS: dict[type[bs.Estimator], Mutation] = {
    bs.Elements: halve_the_uniforms,
    bs.Rows: drop_the_weights,
    bs.Columns: drop_the_weights,
    bs.Int8: halve_the_dither_of_products,
    bs.Float8: halve_the_dither_of_products,
    bs.LowRank: drop_the_weights,
    bs.StoredRows: drop_the_weights,
    bs.Projection: redraw_the_signs,
    bs.Quantized: halve_the_dither,
    bs.Split: drop_the_weights,
}


def mutation_of(estimator: bs.Estimator) -> Mutation:
    """An error that breaks the unbiasedness of this estimator."""
    return MUTATIONS[type(estimator)]
