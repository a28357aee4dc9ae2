"""A sketched model is the same model: forward values, parameters, hooks, copies, random streams."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import backsketch as bs
from backsketch.nn.swap import is_swapped, sketch_of
from backsketch.sampling import ROW_DESIGNS
from backsketch.torch_private import is_view
from cases import ESTIMATORS, FAMILIES
from helpers import Net, equal, gradients, images
from mutations import drop_the_weights, mutation_of

ROWS = bs.Rows(keep=0.5)
# Sketched in name, all rows in fact: the products go through our code and must equal autograd's.
ALL_ROWS = bs.Rows(keep=0.9999)
WEIGHT_ONLY = bs.Split(grad_weight=ROWS)


def check_same_layer(layer: nn.Module, *inputs: Tensor, **options: object) -> None:
    """Forward bit-identical in training mode, and the products right where all rows are kept."""
    twin = copy.deepcopy(layer)
    bs.sketch_(twin, ALL_ROWS)
    results = []
    for module in (layer, twin):
        leaves: dict[int, Tensor] = {}  # arguments that are one object stay one object
        arguments = []
        for x in inputs:
            if x.is_floating_point():
                x = leaves.setdefault(id(x), x.detach().clone().requires_grad_())
            arguments.append(x)
        torch.manual_seed(3)
        outputs = module(*arguments, **options)
        stream = torch.get_rng_state()
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        y = outputs[0]
        torch.manual_seed(4)
        wanted = [*leaves.values(), *module.parameters()]
        grads = torch.autograd.grad(y, wanted, torch.randn_like(y))
        results.append((outputs, stream, grads))
    (a, stream_a, exact), (b, stream_b, ours) = results
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert (x is None and y is None) or (torch.equal(x, y) and x.stride() == y.stride())
    assert torch.equal(stream_a, stream_b)
    for x, y in zip(exact, ours):
        torch.testing.assert_close(y, x, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------------
# Forward values, layer by layer
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 1, 3, 2)])
def test_linear(shape, bias):
    check_same_layer(nn.Linear(6, 4, bias=bias), torch.randn(*shape, 6))


CONVOLUTIONS = {
    "plain": {"kernel_size": 3},
    "no bias": {"kernel_size": 3, "bias": False},
    "strided": {"kernel_size": 3, "stride": 2},
    "uneven": {"kernel_size": (3, 2), "stride": (2, 1), "padding": (0, 1), "dilation": (1, 2)},
    "padded": {"kernel_size": 3, "padding": 2},
    "padded wider than needed": {"kernel_size": 1, "padding": 1},
    "dilated": {"kernel_size": 2, "dilation": 3},
    "same": {"kernel_size": 3, "padding": "same"},
    "same, odd total": {"kernel_size": 2, "padding": "same"},
    "same, odd total in one direction": {"kernel_size": (4, 3), "padding": "same"},
    "same, dilated": {"kernel_size": (2, 3), "padding": "same", "dilation": (3, 2)},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "valid, strided": {"kernel_size": 3, "padding": "valid", "stride": 2},
    "grouped": {"kernel_size": 3, "groups": 2},
    "grouped, strided, padded": {"kernel_size": 3, "groups": 2, "stride": 2, "padding": 1},
    "depthwise": {"kernel_size": 3, "groups": 4, "padding": 1},
    "pointwise": {"kernel_size": 1},
    "pointwise, strided": {"kernel_size": 1, "stride": 2},
    "pointwise, grouped": {"kernel_size": 1, "groups": 2},
    "whole image": {"kernel_size": (7, 6)},
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_conv2d(case, batched):
    x = torch.randn(*((3,) if batched else ()), 4, 7, 6)
    check_same_layer(nn.Conv2d(4, 8, **CONVOLUTIONS[case]), x)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("options", [
    {"padding": 1}, {"padding": (2, 1), "stride": 2}, {"padding": "same"},
    {"padding": "same", "dilation": (1, 2), "groups": 2}, {"padding": "valid"},
], ids=str)  # fmt: skip
@pytest.mark.filterwarnings(
    "ignore:Using padding=.same."
)  # once a process, wherever it comes first
def test_conv2d_padding_modes(mode, options):
    kernel = (2, 3) if options["padding"] == "same" else 3  # an odd total, too
    layer = nn.Conv2d(4, 8, kernel, padding_mode=mode, **options)
    check_same_layer(layer, torch.randn(3, 4, 7, 6))
    check_same_layer(layer, torch.randn(4, 7, 6))


def test_conv2d_in_channels_last():
    x = torch.randn(3, 4, 7, 6).to(memory_format=torch.channels_last)
    for kernel in (1, 3):
        layer = nn.Conv2d(4, 8, kernel)
        check_same_layer(layer, x)
        check_same_layer(layer.to(memory_format=torch.channels_last), x)


IMAGE_LAYERS = {
    **{name: lambda o=o: nn.Conv2d(4, 8, **o) for name, o in CONVOLUTIONS.items()},
    "transposed": lambda: nn.ConvTranspose2d(4, 8, 3, 2),
    "transposed, grouped": lambda: nn.ConvTranspose2d(4, 8, 3, 2, groups=2),
    "batch norm": lambda: nn.BatchNorm2d(4),
    "group norm": lambda: nn.GroupNorm(2, 4),
    "leaky relu": lambda: nn.LeakyReLU(0.1),
    "gelu": nn.GELU,
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("layer", IMAGE_LAYERS)
def test_the_gradient_of_channels_last_images_is_channels_last(layer):
    """Else the layers below are slower, and a batch norm there rounds a multiple of what it should."""
    module = IMAGE_LAYERS[layer]().to(memory_format=torch.channels_last)
    x = torch.randn(3, 4, 7, 6).to(memory_format=torch.channels_last).requires_grad_()
    cotangent = torch.randn_like(module(x))
    of_a_mean = cotangent[..., :1, :1].expand_as(cotangent)
    for sketch, g in itertools.product(ESTIMATORS, (cotangent, of_a_mean)):
        (exact,) = torch.autograd.grad(module(x), x, g)
        try:
            bs.sketch_(module, sketch)
        except ValueError:
            continue  # this sketch is not for this layer
        (ours,) = torch.autograd.grad(module(x), x, g)
        assert ours.stride() == exact.stride(), str(sketch)
        bs.restore_(module)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_it_is_so_in_one_compiled_graph_and_for_each_sample():
    layers = nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.GELU()
    model = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    bs.sketch_(model, {"*": bs.Quantized(bits=8)})
    x = torch.randn(3, 4, 5, 6).to(memory_format=torch.channels_last).requires_grad_()
    y = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    assert grad.stride() == x.stride()
    found = per_sample_gradients(model, x.detach()[:, None], "different")
    assert {g.shape[0] for g in found.values()} == {3}


L, S, N, E, H = 5, 7, 3, 8, 2
BOOL = torch.rand(L, S, generator=torch.Generator().manual_seed(1)) < 0.3
FLOAT = torch.randn(L, S, generator=torch.Generator().manual_seed(2))
CAUSAL = nn.Transformer.generate_square_subsequent_mask(L)
PADDING = torch.zeros(N, S, dtype=torch.bool)
PADDING[0, -3:] = PADDING[2, -1:] = True

# How the module is built; which of query, key, value are one tensor; what it is called with.
ATTENTION = {
    "self": ({}, "same", {}),
    "self, key and value apart": ({}, "key is not value", {}),
    "cross": ({}, "cross", {}),
    "all apart": ({}, "all apart", {}),
    "no bias": ({"bias": False}, "cross", {}),
    "batch first": ({"batch_first": True}, "same", {}),
    "batch first, cross": ({"batch_first": True}, "cross", {}),
    "batch first, all apart": ({"batch_first": True}, "all apart", {}),
    "own key and value sizes": ({"kdim": 4, "vdim": 6}, "sizes", {}),
    "own sizes, batch first": ({"kdim": 4, "vdim": 6, "batch_first": True}, "sizes", {}),
    "own sizes, no bias": ({"kdim": 4, "vdim": 6, "bias": False}, "sizes", {}),
    "bias_k": ({"add_bias_kv": True}, "cross", {}),
    "zero attention": ({"add_zero_attn": True}, "cross", {}),
    "bias_k and zero attention, masks": (
        {"add_bias_kv": True, "add_zero_attn": True},
        "cross",
        {"attn_mask": FLOAT, "key_padding_mask": PADDING * -2.0},
    ),
    "boolean mask": ({}, "cross", {"attn_mask": BOOL}),
    "float mask": ({}, "cross", {"attn_mask": FLOAT}),
    "mask of each head": (
        {},
        "cross",
        {"attn_mask": torch.stack([BOOL.roll(i, 1) for i in range(N * H)])},
    ),
    "float mask of each head": (
        {},
        "cross",
        {"attn_mask": torch.stack([FLOAT.roll(i, 1) for i in range(N * H)])},
    ),
    "padding": ({}, "cross", {"key_padding_mask": PADDING}),
    "float padding": ({}, "cross", {"key_padding_mask": PADDING * -2.0}),
    "both masks": ({}, "cross", {"key_padding_mask": PADDING, "attn_mask": BOOL}),
    "both masks, each head": (
        {"batch_first": True},
        "cross",
        {"key_padding_mask": PADDING * -2.0, "attn_mask": FLOAT.expand(N * H, L, S)},
    ),
    "causal": ({}, "same", {"attn_mask": CAUSAL, "is_causal": True}),
    "causal, boolean": ({}, "same", {"attn_mask": CAUSAL < 0, "is_causal": True}),
    "causal and padding": (
        {},
        "same",
        {"attn_mask": CAUSAL < 0, "is_causal": True, "key_padding_mask": PADDING[:, :L]},
    ),
    "weights of each head": ({}, "cross", {"average_attn_weights": False}),
    "dropout": ({"dropout": 0.4}, "cross", {}),
    "dropout, batch first, mask": (
        {"dropout": 0.4, "batch_first": True},
        "same",
        {"attn_mask": CAUSAL},
    ),
}


def attention_inputs(kind: str, batch_first: bool, batched: bool) -> tuple[Tensor, Tensor, Tensor]:
    def one(length: int, dim: int = E) -> Tensor:
        shape = (N, length) if batch_first else (length, N)
        return torch.randn(*(shape if batched else (length,)), dim)

    q = one(L)
    if kind == "same":
        return q, q, q
    if kind == "key is not value":
        return q, q, one(L)
    if kind == "cross":
        memory = one(S)
        return q, memory, memory
    if kind == "sizes":
        return q, one(S, 4), one(S, 6)
    return q, one(S), one(S)


@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no weights"])
@pytest.mark.parametrize("case", ATTENTION)
def test_attention(case, need_weights):
    built, kind, called = ATTENTION[case]
    module = nn.MultiheadAttention(E, H, **built)
    inputs = attention_inputs(kind, module.batch_first, batched=True)
    check_same_layer(module, *inputs, need_weights=need_weights, **called)


@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no weights"])
@pytest.mark.parametrize("built", [{}, {"batch_first": True}, {"add_bias_kv": True}], ids=str)
def test_attention_unbatched(built, need_weights):
    module = nn.MultiheadAttention(E, H, **built)
    inputs = attention_inputs("cross", module.batch_first, batched=False)
    for options in (
        {},
        {"attn_mask": BOOL, "key_padding_mask": PADDING[0]},
        {"attn_mask": FLOAT.expand(H, L, S)},
    ):
        check_same_layer(module, *inputs, need_weights=need_weights, **options)


WRONG_CALLS = {
    "is_causal without mask": {"is_causal": True},
    "integer mask": {"attn_mask": torch.zeros(L, S, dtype=torch.int64)},
    "mask of one row": {"attn_mask": FLOAT[:1]},
    "mask of one column": {"attn_mask": FLOAT[:, :1]},
    "mask of one head": {"attn_mask": FLOAT[None]},
    "mask of too many dimensions": {"attn_mask": FLOAT.expand(N, H, L, S)},
    "mask of one dimension": {"attn_mask": FLOAT[0]},
    "padding of one sample": {"key_padding_mask": PADDING[:1]},
    "padding the wrong way round": {"key_padding_mask": PADDING.T},
    "padding of three dimensions": {"key_padding_mask": PADDING[None]},
}


@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no weights"])
@pytest.mark.parametrize("case", WRONG_CALLS)
def test_what_attention_refuses_is_refused_when_sketched(case, need_weights):
    module = nn.MultiheadAttention(E, H)
    inputs = attention_inputs("cross", False, batched=True)
    for _ in range(2):
        with pytest.raises((RuntimeError, AssertionError)):
            module(*inputs, need_weights=need_weights, **WRONG_CALLS[case])
        bs.sketch_(module, ROWS)


def test_attention_refuses_inputs_of_the_wrong_size_when_sketched():
    module = nn.MultiheadAttention(E, H)
    q, k, v = attention_inputs("all apart", False, batched=True)
    for _ in range(2):
        shorter, of_one_sample, narrower = (
            (q, k[:-1], v),
            (q, k[:, :1], v[:, :1]),
            (q[..., :4], k, v),
        )
        for bad in (shorter, of_one_sample, narrower, (q[0], k, v), (q[None], k[None], v[None])):
            with pytest.raises((RuntimeError, AssertionError)):
                module(*bad)
        bs.sketch_(module, ROWS)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_the_whole_net_computes_the_same_values_for_every_estimator(estimator):
    model, x = Net(), images()
    y = model(x)
    bs.sketch_(model, estimator)
    assert torch.equal(model(x), y)


# --------------------------------------------------------------------------------------------------
# Where no gradient is trained on, the sketch is not there
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", FAMILIES, ids=str)
def test_eval_is_the_unconverted_model_gradients_included(estimator):
    model, x = Net().eval(), images()
    before, nodes = gradients(model, x), type(model(x).grad_fn)
    bs.sketch_(model, estimator)
    state = bs.get_rng_state()
    assert equal(gradients(model, x), before)
    assert type(model(x).grad_fn) is nodes
    assert bs.get_rng_state() == state
    model.train()
    assert not equal(gradients(model, x), before)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("estimator", FAMILIES, ids=str)
def test_no_grad_draws_and_saves_nothing(estimator, context):
    model, x = Net(), images()
    y = model(x)
    bs.sketch_(model, estimator)
    state = bs.get_rng_state()
    with context():
        z = model(x)
    assert torch.equal(y, z)
    assert not z.requires_grad
    assert bs.get_rng_state() == state


def test_a_frozen_model_on_a_constant_draws_nothing():
    model = Net().requires_grad_(False)
    bs.sketch_(model, bs.StoredRows(keep=0.5))
    state = bs.get_rng_state()
    assert not model(images()).requires_grad
    assert bs.get_rng_state() == state


@pytest.mark.parametrize("estimator", FAMILIES, ids=str)
def test_exact_gives_bit_identical_gradients_inside_the_block_only(estimator):
    model, x = Net(), images()
    before = gradients(model, x)
    bs.sketch_(model, estimator)
    with bs.exact(model):
        with bs.exact(model):
            assert equal(gradients(model, x), before)
        assert equal(gradients(model, x), before)
        y = model(x).square().sum()
    assert equal(list(torch.autograd.grad(y, list(model.parameters()))), before)
    assert not equal(gradients(model, x), before)


def test_exact_of_a_part_is_exact_there_and_an_exception_ends_it():
    model, x = Net(), images()
    plain = gradients(model, x)
    bs.sketch_(model, WEIGHT_ONLY)
    names = [name for name, _ in model.named_parameters()]
    head, stem = names.index("head.0.weight"), names.index("stem.weight")
    with bs.exact(model.head):
        inside = gradients(model, x)
    assert torch.equal(inside[head], plain[head])
    assert not torch.equal(inside[stem], plain[stem])
    with contextlib.suppress(ZeroDivisionError), bs.exact(model):
        raise ZeroDivisionError
    assert not torch.equal(gradients(model, x)[head], plain[head])


# --------------------------------------------------------------------------------------------------
# The object
# --------------------------------------------------------------------------------------------------


def test_parameters_keys_and_types_are_what_they_were():
    model = Net()
    modules = list(model.named_modules())
    types = [type(m) for _, m in modules]
    parameters = [(n, id(p)) for n, p in model.named_parameters()]
    state = model.state_dict()
    bs.sketch_(model, ROWS)
    assert [(n, id(m)) for n, m in model.named_modules()] == [(n, id(m)) for n, m in modules]
    assert all(isinstance(m, t) for (_, m), t in zip(modules, types))
    assert [(n, id(p)) for n, p in model.named_parameters()] == parameters
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values()))


def test_state_dicts_go_both_ways():
    plain, sketched = Net(), Net()
    bs.sketch_(sketched, ROWS)
    assert str(sketched.load_state_dict(plain.state_dict())) == "<All keys matched successfully>"
    other = Net()
    other.load_state_dict(sketched.state_dict())
    x = images()
    assert torch.equal(plain(x), sketched(x))
    assert torch.equal(plain(x), other(x))


@pytest.mark.parametrize("build", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_built_before_trains_the_sketched_model(build):
    model, x = Net(), images(16)
    target = torch.randn(16, 16, 3)
    optimizer = build(model.parameters(), lr=0.01)
    bs.sketch_(model, bs.Rows(keep=0.75))
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    bs.restore_(model)
    before = [p.clone() for p in model.parameters()]
    model(x).sum().backward()
    optimizer.step()
    assert not equal(before, list(model.parameters()))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 6)
        self.middle = nn.Linear(6, 6)
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.middle(self.embedding(tokens))))


def test_tied_weights_stay_tied_and_both_uses_reach_the_gradient():
    model, tokens = Tied(), torch.randint(10, (4, 5))
    bs.sketch_(model, ROWS)
    assert model.head.weight is model.embedding.weight
    assert len(list(model.parameters())) == 3
    bs.testing.check_unbiased(model, tokens, draws=400)
    model(tokens).sum().backward()
    bs.restore_(model)
    assert model.head.weight is model.embedding.weight


def test_tied_weights_with_a_wrong_weight_of_a_row_are_noticed(monkeypatch):
    model, tokens = Tied(), torch.randint(10, (4, 5))
    bs.sketch_(model, ROWS)
    drop_the_weights(monkeypatch)
    with pytest.raises(AssertionError, match="is biased"):
        bs.testing.check_unbiased(model, tokens, draws=400)


def test_hooks_stay_and_fire_once_with_the_same_arguments():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), torch.randn(6, 4)
    layer, calls = model[1], []
    layer.register_forward_pre_hook(lambda m, a: calls.append(("forward pre", m is layer, len(a))))
    layer.register_forward_hook(lambda m, a, y: calls.append(("forward", m is layer, y.shape)))
    layer.register_full_backward_pre_hook(lambda m, g: calls.append(("backward pre", len(g))))
    layer.register_full_backward_hook(lambda m, i, o: calls.append(("backward", i[0].shape)))
    layer.weight.register_hook(lambda g: calls.append(("weight", g.shape)))
    layer.weight.register_post_accumulate_grad_hook(lambda p: calls.append("accumulated"))
    model(x).sum().backward()
    plain = list(calls)
    assert len(plain) == 6
    calls.clear()
    bs.sketch_(model, ROWS)
    layer.register_forward_hook(lambda m, a, y: calls.append("registered while sketched"))
    model(x).sum().backward()
    assert calls.pop(2) == "registered while sketched"
    assert sorted(map(str, calls)) == sorted(map(str, plain))
    calls.clear()
    bs.restore_(model)
    model(x).sum().backward()
    assert "registered while sketched" in calls


def test_a_forward_hook_that_replaces_the_output_still_does():
    layer = nn.Linear(4, 4)
    bs.sketch_(layer, ROWS)
    layer.register_forward_hook(lambda m, a, y: y * 0 + 7)
    assert torch.equal(layer(torch.randn(3, 4)), torch.full((3, 4), 7.0))


# --------------------------------------------------------------------------------------------------
# Copies
# --------------------------------------------------------------------------------------------------


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_save(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": through_pickle,
    "old pickle": lambda m: pickle.loads(pickle.dumps(m, protocol=2)),
    "torch.save": through_save,
}


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_is_sketched_alike_and_apart(way, estimator):
    model, x = Net(), images()
    bs.sketch_(model, {"head": estimator, "": ROWS})
    twin = COPIES[way](model)
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    assert [sketch_of(m) for m in twin.modules()] == [sketch_of(m) for m in model.modules()]
    bs.seed(5)
    expected = gradients(model, x)
    bs.seed(5)
    assert equal(gradients(twin, x), expected)
    bs.restore_(twin)
    assert type(twin.stem) is nn.Conv2d
    assert is_swapped(model.stem)


def test_a_shallow_copy_keeps_the_sketch_and_shares_the_weights():
    layer = nn.Linear(4, 4)
    bs.sketch_(layer, ROWS)
    twin = copy.copy(layer)
    assert type(twin) is type(layer)
    assert twin.weight is layer.weight
    bs.restore_(twin)
    assert is_swapped(layer)


def test_a_pickle_opens_in_a_fresh_process_that_never_imported_backsketch(tmp_path):
    model = nn.Sequential(nn.Linear(6, 4), nn.MultiheadAttention(4, 2), nn.Conv2d(1, 2, 3))
    bs.sketch_(model, {"0": bs.Quantized(bits=4), "": ROWS})
    torch.save(model, tmp_path / "model.pt")
    script = (
        "import sys, torch; assert 'backsketch' not in sys.modules\n"
        "model = torch.load(sys.argv[1], weights_only=False)\n"
        "model[0](torch.randn(8, 6)).sum().backward(); print(model[0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "model.pt")],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "sketch=quantized:bits=4" in done.stdout


def test_weights_only_loading_of_a_state_dict_needs_nothing_of_backsketch():
    model = Net()
    bs.sketch_(model, ROWS)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    Net().load_state_dict(torch.load(buffer, weights_only=True))


def test_an_average_of_weights_follows_a_sketched_model():
    model, x = Net(), images()
    bs.sketch_(model, ROWS)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    assert torch.equal(average(x), model(x))
    first = [p.detach().clone() for p in model.parameters()]
    average.update_parameters(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    average.update_parameters(model)
    for start, p in zip(first, average.module.parameters()):
        torch.testing.assert_close(p, start + 0.5)
    assert list(average.module.state_dict()) == list(Net().state_dict())


# --------------------------------------------------------------------------------------------------
# Random streams
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_the_users_random_streams_are_neither_read_nor_advanced(estimator):
    model, x = Net(), images()
    bs.sketch_(model, estimator)

    def streams() -> tuple[object, ...]:
        return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())  # noqa: NPY002

    before = streams()
    first = gradients(model, x)
    assert streams() == before
    torch.manual_seed(123)
    np.random.seed(123)  # noqa: NPY002  the global stream is what is tested
    random.seed(123)
    bs.seed(0)
    assert equal(gradients(model, x), first)


def test_dropout_masks_are_those_of_the_unconverted_model():
    model = nn.Sequential(nn.Linear(6, 32), nn.Dropout(0.5), nn.Linear(32, 32), nn.Dropout(0.5))
    x = torch.randn(8, 6)

    def run() -> tuple[Tensor, Tensor]:
        torch.manual_seed(9)
        first = model(x)
        first.sum().backward()
        return first, model(x)

    plain = run()
    bs.sketch_(model, bs.StoredRows(keep=0.5))
    assert equal(list(run()), list(plain))


# --------------------------------------------------------------------------------------------------
# Autograd around a layer
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build", [lambda: nn.Linear(4, 4), lambda: nn.Conv2d(2, 4, 3)], ids=["linear", "conv"]
)
@pytest.mark.parametrize("estimator", FAMILIES, ids=str)
def test_double_backward_is_a_clear_error(estimator, build):
    layer = build()
    x = torch.randn(8, 4) if isinstance(layer, nn.Linear) else images(8)
    x.requires_grad_()
    bs.sketch_(layer, estimator)
    (g,) = torch.autograd.grad(torch.tanh(layer(x)).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"does not support double backward.*bs\.exact"):
        g.square().sum().backward()


def test_double_backward_through_a_whole_net_is_a_clear_error():
    model, x = Net(), images().requires_grad_()
    bs.sketch_(model, ROWS)
    (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(g.square().sum(), list(model.parameters()), allow_unused=True)


def test_double_backward_works_inside_exact():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    x = torch.randn(8, 4, requires_grad=True)

    def penalty() -> list[Tensor]:
        (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        loss = g.square().sum()
        return list(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)[:3])

    plain = penalty()
    bs.sketch_(model, ROWS)
    with bs.exact(model):
        assert equal(penalty(), plain)


def test_the_graph_may_be_walked_twice_and_each_walk_draws_anew():
    layer, x = nn.Linear(6, 6), torch.randn(16, 6)
    bs.sketch_(layer, ROWS)
    y = layer(x).square().sum()
    first, second = (torch.autograd.grad(y, layer.weight, retain_graph=True)[0] for _ in range(2))
    assert not torch.equal(first, second)
    bs.sketch_(layer, bs.StoredRows(keep=0.5))
    y = layer(x).square().sum()
    first, second = (torch.autograd.grad(y, layer.weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)  # drawn once, in the forward pass


def test_a_graph_walked_twice_without_retain_is_pytorchs_error():
    layer = nn.Linear(4, 4)
    bs.sketch_(layer, ROWS)
    y = layer(torch.randn(8, 4)).sum()
    y.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward()


def per_sample_gradients(model: nn.Module, x: Tensor, randomness: str) -> dict[str, Tensor]:
    parameters = {n: p.detach() for n, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (sample,)).square().sum()

    return torch.func.vmap(torch.func.grad(loss), (None, 0), randomness=randomness)(parameters, x)


def check_per_sample(estimator: bs.Estimator | bs.Mask, draws: int = 225) -> None:
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(3, 6, 4)
    exact = per_sample_gradients(model, x, "error")["0.weight"]
    bs.sketch_(model, {"0": estimator})
    drawn = [per_sample_gradients(model, x, "different")["0.weight"] for _ in range(draws)]
    stacked = torch.stack(drawn).double()
    error = stacked.std(0) / draws**0.5
    assert bool(((stacked.mean(0) - exact).abs() < 5.5 * error + 1e-4).all()), "is biased"
    assert bool((stacked.var(0).flatten(1).amax(1) > 0).all())  # it is sketched, sample by sample


@pytest.mark.fast_cases("rows:keep=0.5", "quantized:bits=2")
@pytest.mark.parametrize("estimator", FAMILIES, ids=str)
def test_per_sample_gradients_are_unbiased_for_each_sample(estimator):
    check_per_sample(estimator)


@pytest.mark.fast_cases("shuffled")
@pytest.mark.parametrize("design", ROW_DESIGNS)
def test_masks_are_unbiased_for_each_sample(design):
    check_per_sample(bs.Mask(keep=0.5, design=design))


def test_a_mask_without_its_weights_is_noticed_in_per_sample_gradients(monkeypatch):
    drop_the_weights(monkeypatch)
    with pytest.raises(AssertionError, match="is biased"):
        check_per_sample(bs.Mask(keep=0.5))


@pytest.mark.fast_cases("rows:keep=0.5", "quantized:bits=2")
@pytest.mark.parametrize("estimator", FAMILIES, ids=str)
def test_a_mutation_is_noticed_in_per_sample_gradients(estimator, monkeypatch):
    mutation_of(estimator)(monkeypatch)
    with pytest.raises(AssertionError, match="is biased"):
        check_per_sample(estimator)


@pytest.mark.parametrize("rules", [ROWS, bs.Mask(keep=0.5)], ids=str)
def test_per_sample_gradients_need_vmap_to_allow_randomness(rules):
    model = nn.Sequential(nn.Linear(4, 5))
    bs.sketch_(model, rules)
    with pytest.raises(RuntimeError, match="randomness"):
        per_sample_gradients(model, torch.randn(3, 6, 4), "error")


def test_per_sample_draws_are_independent_or_shared_as_vmap_says():
    model, x = nn.Linear(4, 4), torch.randn(6, 4).expand(3, 6, 4)
    bs.sketch_(model, ROWS)
    same = per_sample_gradients(model, x, "same")["weight"]
    assert torch.equal(same[0], same[1])
    assert torch.equal(same[0], same[2])
    different = per_sample_gradients(model, x, "different")["weight"]
    assert not torch.equal(different[0], different[1])


@pytest.mark.parametrize("estimator", FAMILIES, ids=str)
def test_functional_grad_is_what_backward_is(estimator):
    model, x = Net(), images()
    bs.sketch_(model, estimator)
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    bs.seed(1)
    ours = torch.func.grad(
        lambda p: torch.func.functional_call(model, p, (x,)).square().sum()
    )(parameters)  # fmt: skip
    bs.seed(1)
    # The same draws; sums may be taken in another order.
    torch.testing.assert_close(list(ours.values()), gradients(model, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sketch", [bs.Int8(), bs.Rows(keep=0.5)], ids=str)
def test_gradients_of_inputs_are_no_views_so_that_autograd_adds_them_in_place(sketch):
    images = torch.randn(4, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    for layer, x in (
        (nn.Linear(8, 16), torch.randn(4, 5, 8)),
        (nn.Conv2d(8, 16, 1), images),
        (nn.Conv2d(8, 16, 1, 2), images),
        (nn.Conv2d(8, 16, 3), images),
    ):
        x = x.clone(memory_format=torch.preserve_format).requires_grad_()
        bs.sketch_(layer, sketch)
        assert not is_view(torch.autograd.grad(layer(x).sum(), x)[0])


@pytest.mark.parametrize("estimator", FAMILIES, ids=str)
def test_an_activation_in_place_after_a_layer_is_fine(estimator):
    def build(inplace: bool) -> nn.Module:
        first, second = nn.ReLU(inplace), nn.ReLU(inplace)
        return nn.Sequential(
            nn.Conv2d(2, 4, 3), first, nn.Flatten(), nn.Linear(64, 8), second
        )  # fmt: skip

    plain, inplace = build(False), build(True)
    inplace.load_state_dict(plain.state_dict())
    x, results = images(), []
    for model in (plain, inplace):
        bs.sketch_(model, estimator)
        bs.seed(0)
        results.append(gradients(model, x))
    assert equal(*results)


SAVES_THE_INPUT = [e for e in FAMILIES if not e.saves_memory]


@pytest.mark.parametrize("build", [
    lambda: nn.Linear(6, 4), lambda: nn.Conv2d(2, 4, 3), lambda: nn.Conv2d(2, 4, 1)
], ids=["linear", "conv", "pointwise"])  # fmt: skip
@pytest.mark.parametrize("estimator", SAVES_THE_INPUT, ids=str)
def test_changing_a_saved_input_in_place_is_autograds_error(estimator, build):
    layer = build()
    bs.sketch_(layer, estimator)
    x = torch.randn(8, 6) if isinstance(layer, nn.Linear) else images()
    y = layer(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("estimator", [e for e in FAMILIES if e.saves_memory], ids=str)
def test_changing_an_input_that_was_not_saved_does_no_harm(estimator):
    layer, x = nn.Linear(6, 4), torch.randn(8, 6)
    bs.sketch_(layer, estimator)
    bs.seed(0)
    expected = gradients(layer, x)
    bs.seed(0)
    y = layer(x)
    x.add_(1)
    assert equal(list(torch.autograd.grad(y.square().sum(), list(layer.parameters()))), expected)


@pytest.mark.parametrize("estimator", FAMILIES, ids=str)
def test_changing_the_weight_before_the_backward_is_autograds_error(estimator):
    layer, x = nn.Linear(6, 4), torch.randn(8, 6, requires_grad=True)
    bs.sketch_(layer, estimator)
    y = layer(x)
    with torch.no_grad():
        layer.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
