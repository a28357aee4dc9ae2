"""Regions that keep saved tensors in a few bits: unbiased, smaller, and proven or refused."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import backsketch as bs
from backsketch import rounding
from backsketch.regions import low_precision as low
from backsketch.regions import noises, state_of
from backsketch.regions.structure import Coupled
from helpers import named_gradients
from mutations import halve_the_dither, one_rounding_for_both
from region_models import GroupedExperts, ViT, mlp


class Functional(nn.Module):
    """``function(x, *weights)`` with square weights of width ``d``."""

    def __init__(self, function: Callable[..., Tensor], weights: int = 1, d: int = 64) -> None:
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList(torch.randn(d, d) / d**0.5 for _ in range(weights))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *list(self.weights))  # PyTorch 2.10 cannot unpack the list itself


def rms_norm(x: Tensor) -> Tensor:
    """As ``transformers`` writes it out: quadratic in x, which two readers round apart."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def new_gelu(x: Tensor) -> Tensor:
    """GPT-2's, written out: its derivative is computed from x in the backward pass."""
    return 0.5 * x * (1.0 + torch.tanh(0.8 * (x + 0.044715 * torch.pow(x, 3.0))))


class Cube(torch.autograd.Function):
    """An activation with a backward pass of its own, as Bloom's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x * x * g


def turned(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """A gate on channels before positions, whose cotangent is viewed afterwards, as in Mamba."""
    gate = torch.sigmoid(x @ b).transpose(1, 2)
    return ((x @ a).transpose(1, 2) * gate).transpose(1, 2) @ a


def attention(x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Written out, for ``(batch, tokens, d)``."""
    q, k, v = x @ a, x @ b, x @ c
    return (q @ k.transpose(1, 2)).softmax(-1) @ v


def fused_attention(x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    q, k, v = F.layer_norm(x @ a, (64,)), x @ b, x @ c
    return F.scaled_dot_product_attention(q, k, v) @ a


def twice_gated(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """One gate for two layers: a single rounding of it would meet itself."""
    gate = torch.sigmoid(x @ a)
    return gate * ((gate * x) @ b)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)))


def dropped(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return F.dropout(F.dropout(x @ a, 0.3) @ b, 0.5)


class Normed(nn.Module):
    """A convolution under a norm of channels."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(4, 8, 3, padding=1), norm, nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.a(x)))


def with_loss(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return F.cross_entropy((x @ a) @ b, torch.arange(x.shape[0]) % 64)


PATTERNS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "product": (lambda: Functional(lambda x, a, b: (x @ a) @ b.t(), 2), (48, 64)),
    "activations": (lambda: Functional(lambda x, a, b: F.gelu(F.gelu(x @ a) @ b), 2), (48, 64)),
    "tanh": (lambda: mlp(64, 64, 64, 8), (48, 64)),
    "new gelu": (lambda: Functional(lambda x, a: new_gelu(x @ a)), (48, 64)),
    "own function": (lambda: Functional(lambda x, a: Cube.apply(x @ a)), (48, 64)),
    "swiglu": (lambda: Functional(lambda x, a, b: F.silu(x @ a) * (x @ b), 2), (48, 64)),
    "norm": (lambda: Functional(lambda x, a: F.layer_norm(x @ a, (64,))), (48, 64)),
    "rms norm written out": (lambda: Functional(lambda x, a: rms_norm(x @ a)), (48, 64)),
    "attention written out": (lambda: Functional(attention, 3), (4, 12, 64)),
    "fused attention": (lambda: Functional(fused_attention, 3), (4, 12, 64)),
    "convolutions": (Convolutions, (6, 4, 8, 8)),
    "cross entropy": (lambda: Functional(with_loss, 2), (48, 64)),
    "experts": (lambda: GroupedExperts(16), (90, 16)),
    "group norm": (lambda: Normed(nn.GroupNorm(8, 8)), (8, 4, 4, 4)),
    "batch norm": (lambda: Normed(nn.BatchNorm2d(8)), (2, 4, 1, 4)),
    "transposed gate": (lambda: Functional(turned, 2), (4, 12, 64)),
    "a gate used twice": (lambda: Functional(twice_gated, 2), (48, 64)),
}


SLOW = {"tanh", "new gelu", "experts", "batch norm"}
every_pattern = pytest.mark.parametrize(
    "name", [pytest.param(p, marks=[pytest.mark.slow] if p in SLOW else []) for p in PATTERNS]
)


def pattern(name: str, sketch: bs.Region) -> tuple[nn.Module, Tensor]:
    """A sketched module and its input."""
    build, shape = PATTERNS[name]
    model = build()
    bs.sketch_(model, sketch)
    return model, torch.randn(shape)


@every_pattern
def test_unbiased(name: str) -> None:
    model, x = pattern(name, bs.Region(keep=1.0, save="int4"))
    with bs.exact(model):
        expected = model(x)
    assert torch.equal(model(x), expected)
    model(x).square().mean().backward()
    assert state_of(model).status == "active", state_of(model).reason
    assert not state_of(model).note.startswith("0%"), state_of(model).note
    report = bs.testing.check_unbiased(model, x, draws=300)
    assert max(report.relative_variance.values()) > 1e-6


@pytest.mark.fast_cases("product", "activations", "norm", "attention written out", "experts")
@every_pattern
def test_half_a_dither_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = pattern(name, bs.Region(keep=1.0, save="int4"))
    halve_the_dither(monkeypatch)
    with pytest.raises(AssertionError, match="biased"):
        bs.testing.check_unbiased(model, x, draws=300)


@pytest.mark.fast_cases("norm", "group norm")
@pytest.mark.parametrize("name", ["norm", "group norm", "batch norm"])
def test_one_rounding_in_the_place_of_two_is_caught(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = pattern(name, bs.Region(keep=1.0, save="int4"))
    one_rounding_for_both(monkeypatch)
    with pytest.raises(AssertionError, match="biased"):
        bs.testing.check_unbiased(model, x, draws=600)


def test_noise_that_two_roundings_share_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """All roundings of a pass with one stream; the walk over the graph would refuse that."""
    key_of = rounding.key_of
    monkeypatch.setattr(rounding, "key_of", lambda seed, stream: key_of(seed, 0))
    model = Functional(lambda x, a, b, c: (x @ a) * (x @ b) * (x @ c), 3, 8)
    bs.sketch_(model, bs.Region(keep=1.0, save="int4"))
    with pytest.raises(AssertionError, match="biased"):
        bs.testing.check_unbiased(model, torch.randn(16, 8), draws=1000)


@pytest.mark.parametrize("save", ["int8", "int4"])
def test_with_products_in_8_bits(save: str) -> None:
    """Large linear layers keep the codes that the 8-bit product reads."""
    model, x = mlp(96, 96, 96, 96), torch.randn(512, 96)
    before = bs.saved_bytes(model, x).total
    bs.sketch_(model, bs.Region(keep=1.0, save=save, arithmetic="int8"))  # type: ignore[arg-type]
    model(x).square().mean().backward()
    assert "backward products in 8 bits" in state_of(model).note
    bs.testing.check_unbiased(model, x, draws=100)
    assert bs.saved_bytes(model, x).total < 0.75 * before


def test_what_a_functional_transformer_keeps() -> None:
    """The input of attention stays as it is; attention runs again, and the rest is rounded."""
    model, x = ViT(64, depth=2), torch.randn(16, 1, 8, 8)
    before = bs.saved_bytes(model, x).total
    for save, most in (("int8", 0.40), ("int4", 0.30)):
        bs.sketch_(model, bs.Region(keep=1.0, save=save))  # type: ignore[arg-type]
        model(x).sum().backward()
        assert bs.saved_bytes(model, x).total < most * before


def test_what_is_needed_as_it_is_stays_so() -> None:
    """A rounded copy of a tensor that another operator reads as it is would save nothing."""

    def both(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        h = x @ a
        return h @ b + F.logsigmoid(h)

    model, x = Functional(both, 2), torch.randn(12, 64)
    exact = named_gradients(model, model(x).sum())
    bs.sketch_(model, bs.Region(keep=1.0, save="int8"))
    found = named_gradients(model, model(x).sum())
    assert all(torch.allclose(found[n], g) for n, g in exact.items())
    assert "log_sigmoid_backward" in state_of(model).note


def test_norms_of_channels_last_images_with_an_activation_between_them() -> None:
    """The lower norm is exact; its kernel reads cotangent and input as if both had the input's format."""
    model = nn.Sequential(nn.GroupNorm(2, 4), nn.Tanh(), nn.GroupNorm(2, 4))
    x = torch.randn(3, 4, 6, 6).contiguous(memory_format=torch.channels_last)
    x.requires_grad_()  # where it has no gradient, PyTorch 2.13 itself dies in the norm
    cotangent = torch.randn(3, 4, 6, 6)

    def gradients() -> list[Tensor]:
        return torch.autograd.grad((model(x) * cotangent).sum(), [x, *model.parameters()])

    exact = gradients()
    bs.sketch_(model, bs.Region(keep=1.0, save="int8"))
    gradients()
    assert state_of(model).status == "active"
    for found, g in zip(gradients(), exact, strict=True):
        assert (found - g).norm() < 0.05 * g.norm()


def test_masks_of_dropouts_are_bits() -> None:
    """The gradients are those of the same masks, and a mask is an eighth of a byte an entry."""
    x = torch.randn(64, 64)
    models = [Functional(dropped, 2) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    found = []
    for model, sketched in zip(models, (False, True)):
        if sketched:
            bs.sketch_(model, bs.Region(keep=1.0, save="int8"))
        torch.manual_seed(3)
        y = model(x)
        found.append((y, *named_gradients(model, y.sum()).values()))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][2], found[1][2]) is False  # its input is rounded
    assert (found[0][2] - found[1][2]).norm() < 0.01 * found[0][2].norm()
    note = state_of(models[1]).note
    assert note.startswith("100% of the bytes it keeps rounded"), note
    assert bs.saved_bytes(models[1], x).total < 0.4 * bs.saved_bytes(models[0], x).total


def graph_of(function: Callable[[fx.Graph, fx.Node, fx.Node, fx.Node], fx.Node]) -> fx.Graph:
    """A backward graph of a cotangent and one rounded tensor."""
    graph = fx.Graph()
    x, g = graph.placeholder("primals_1"), graph.placeholder("tangents_1")
    packed = graph.call_function(low.pack_operator, (x, x, 0, 8, 64, False))
    codes, scales = (graph.call_function(operator.getitem, (packed, i)) for i in (0, 1))
    graph.output((function(graph, g, codes, scales),))
    return graph


def times(graph: fx.Graph, g: fx.Node, codes: fx.Node, scales: fx.Node) -> fx.Node:
    return graph.call_function(low.times_operator, (g, codes, scales, 8, 64))


def test_a_rounding_that_would_meet_itself_is_refused() -> None:
    noises.check_independent(graph_of(times))
    add = torch.ops.aten.add.Tensor

    def side_by_side(graph: fx.Graph, *args: fx.Node) -> fx.Node:
        return graph.call_function(add, (times(graph, *args), times(graph, *args)))

    noises.check_independent(graph_of(side_by_side))

    def squared(graph: fx.Graph, g: fx.Node, *packed: fx.Node) -> fx.Node:
        return times(graph, times(graph, g, *packed), *packed)

    with pytest.raises(Coupled, match="would multiply a rounding by itself"):
        noises.check_independent(graph_of(squared))

    def divided(graph: fx.Graph, g: fx.Node, *packed: fx.Node) -> fx.Node:
        restored = graph.call_function(low.restore_operator, (*packed, [4], 8))
        return graph.call_function(torch.ops.aten.div.Tensor, (g, restored))

    with pytest.raises(Coupled, match="not known to be linear in a rounded tensor"):
        noises.check_independent(graph_of(divided))


def test_two_roundings_with_the_same_random_numbers_are_refused() -> None:
    graph = fx.Graph()
    x = graph.placeholder("primals_1")
    for _ in range(2):
        graph.call_function(low.pack_operator, (x, x, 7, 8, 64, False))
    with pytest.raises(Coupled, match="random numbers of another rounding"):
        noises.check_independent(graph)


@pytest.mark.fast_cases("torch.bfloat16")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_types(dtype: torch.dtype) -> None:
    model, x = ViT(64, depth=1).to(dtype), torch.randn(8, 1, 8, 8, dtype=dtype)
    exact = named_gradients(model, model(x).square().sum())
    bs.sketch_(model, bs.Region(keep=1.0, save="int8"))
    found = named_gradients(model, model(x).square().sum())
    assert state_of(model).status == "active", state_of(model).reason
    for name, g in exact.items():
        assert found[name].dtype == dtype
        assert (found[name] - g).norm() < 0.1 * g.norm() + 1e-3, name


def test_what_reaches_the_gradients() -> None:
    """A NaN of the forward pass, and the same roundings in two backward passes of one forward pass."""
    model, x = mlp(64, 64, 8), torch.randn(12, 64)
    bs.sketch_(model, bs.Region(keep=1.0, save="int4"))
    loss, weights = model(x).sum(), list(model.parameters())
    first = torch.autograd.grad(loss, weights, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, weights)))
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    assert named_gradients(model, model(x).sum())["2.weight"].isnan().any()


def test_bad_combinations_are_refused() -> None:
    with pytest.raises(ValueError, match=r"needs mode='save'"):
        bs.Region(keep=1.0, save="int8", mode="recompute")
    with pytest.raises(ValueError, match="save"):
        bs.Region(keep=1.0, save="int2")  # type: ignore[arg-type]
    region = bs.Region(keep=1.0, save="int4")
    assert bs.parse(str(region)) == region


def test_a_batch_norm_in_a_checkpoint_inside_a_region_reads_its_statistics_again() -> None:
    """They have changed since the forward pass, so that it is a copy of them which is kept."""

    class Checkpointed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=False)

    norm = nn.BatchNorm1d(32)
    model = nn.Sequential(nn.Linear(32, 32), Checkpointed(norm), nn.Linear(32, 3))
    x = torch.randn(16, 32)
    exact = named_gradients(model, model(x).square().sum())
    bs.sketch_(model, bs.Region(keep=1.0, save="int8"))
    for _ in range(2):
        ours = named_gradients(model, model(x).square().sum())
    assert state_of(model).status == "active"
    for name in ("0.weight", "1.0.weight", "2.weight"):
        assert (ours[name] - exact[name]).norm() < 0.03 * exact[name].norm()
