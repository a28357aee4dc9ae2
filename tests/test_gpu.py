"""The library on a GPU: values, unbiased gradients, kernels, memory, and nothing that waits for the device.

Skipped where there is no GPU. With ``BACKSKETCH_TEST_DEVICE=cpu`` what does not need one runs on the CPU, to try
the tests themselves; ``BACKSKETCH_TEST_DRAWS`` is the number of draws of a statistical test.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import backsketch as bs
from backsketch import products
from backsketch.memory import peak_of
from backsketch.nn.swap import is_swapped
from backsketch.products import gpu
from backsketch.products.numbers import NUMBERS
from backsketch.regions import runner, share
from backsketch.rounding import Rounding
from backsketch.rounding import gpu as rounding_gpu
from cases import ADAPTED, ESTIMATORS, FAMILIES, WITHOUT_8_BITS
from chain_cases import ROUNDED, made
from helpers import Called, same
from mutations import drop_the_weights
from region_models import Block, mlp

DEVICE = torch.device(os.environ.get("BACKSKETCH_TEST_DEVICE", "cuda"))
DRAWS = int(os.environ.get("BACKSKETCH_TEST_DRAWS", "2000"))
IS_CUDA = DEVICE.type == "cuda"

if IS_CUDA and not torch.cuda.is_available():
    pytest.skip("no GPU; BACKSKETCH_TEST_DEVICE=cpu tries the tests", allow_module_level=True)

# Read when CUDA starts: repeatable products, none in TF32. Processes that compile would be 12 times 16.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

# PyTorch warns of what it has no deterministic kernel for, of its compiler, of prototypes: shown, no error.
pytestmark = [
    pytest.mark.filterwarnings("default::UserWarning"),
    pytest.mark.filterwarnings("default::DeprecationWarning"),
]
needs_gpu = pytest.mark.skipif(not IS_CUDA, reason="needs a GPU")
every_family = pytest.mark.parametrize("estimator", FAMILIES, ids=str)
every_kind_of_number = pytest.mark.parametrize("numbers", NUMBERS)


@pytest.fixture(autouse=True)
def _repeatable() -> Iterator[None]:
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.conv.fp32_precision
    cudnn.deterministic, cudnn.conv.fp32_precision = True, "ieee"
    yield
    cudnn.deterministic, cudnn.conv.fp32_precision = before


@contextmanager
def deterministic() -> Iterator[None]:
    """PyTorch's deterministic kernels, where there are any."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def adapted(kind: type[nn.Module]) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A layer of a kind and its inputs, on the device."""
    build, inputs = ADAPTED[kind]
    return build().to(DEVICE), tuple(x.to(DEVICE) for x in inputs())


def values(module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """The output of a training forward pass."""
    with deterministic():
        return module(*(x.clone().requires_grad_(x.is_floating_point()) for x in inputs))


def sketched(module: nn.Module, inputs: tuple[Tensor, ...], rules: Any) -> nn.Module:
    """The module with its sketches at work; its forward values are those that it had, bit for bit."""
    expected = values(module, inputs)
    report = bs.sketch_(module, rules)
    for _ in range(2):  # the first pass of a region is exact, and verifies what it captured
        y = values(module, inputs)
        assert y.dtype == expected.dtype
        assert torch.equal(y, expected)
        y.sum().backward()
    module.zero_grad()
    states = [site.state for site in report.sites if getattr(site, "state", None) is not None]
    assert all(s.status == "active" for s in states), [(s.status, s.reason) for s in states]
    return module


def check(module: nn.Module, inputs: tuple[Tensor, ...], rules: Any, draws: int = DRAWS) -> None:
    """The same values, and unbiased gradients that something was sketched in."""
    sketched(module, inputs, rules)
    report = bs.testing.check_unbiased(module, *inputs, draws=draws)
    assert max(report.relative_variance.values()) > 1e-6


# Compiled models, which take longest, come first.
BACKEND = "inductor" if IS_CUDA else "aot_eager_decomp_partition"


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def check_compiled(model: nn.Module, x: Tensor, **options: Any) -> None:
    plain = bs.restore_(copy.deepcopy(model))
    tested = Called(model, torch.compile(model, backend=BACKEND, **options))
    for _ in range(2):
        tested(x.clone().requires_grad_()).sum().backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        bs.testing.check_unbiased(tested, x, draws=DRAWS // 4, reference=Called(plain))


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_region_in_a_compiled_model_is_unbiased():
    model, x, rules = submodule("region, save")
    bs.sketch_(model, rules)
    check_compiled(model, x)


@pytest.mark.usefixtures("_fresh_compiler")
@every_family
def test_a_compiled_model_is_unbiased(estimator):
    model = nn.Sequential(nn.Linear(24, 20), nn.Tanh(), nn.Linear(20, 6)).to(DEVICE)
    bs.sketch_(model, estimator)
    check_compiled(model, torch.randn(40, 24).to(DEVICE), fullgraph=True)


# Kernels --------------------------------------------------------------------------------------------

SHAPES = [(1, 1, 1), (5, 3, 7), (37, 41, 19), (261, 35, 20), (3, 2, 2100), (513, 257, 129)]


def operands(n: int, j: int, o: int, dtype: torch.dtype) -> list[Tensor]:
    """Cotangent with row scales over many decades and a row of zeros, input and weight."""
    generator = torch.Generator().manual_seed(n)
    g, x, w = (torch.randn(s, generator=generator) for s in ((n, o), (n, j), (o, j)))
    g *= (3 * torch.randn(n, 1, generator=generator)).exp()
    g[n // 2] = 0
    return [t.to(DEVICE, dtype) for t in (g, x, w)]


def twins(
    numbers: str, monkeypatch: pytest.MonkeyPatch, run: Callable[[], tuple[Tensor, ...]]
) -> list[tuple[Tensor, Tensor]]:
    """What ``run`` returns by the kernels, and by plain PyTorch on the same device."""
    assert gpu.why_not(DEVICE, numbers) == ""
    fast = run()
    monkeypatch.setattr(gpu, "kernels", lambda device, numbers: None)
    return list(zip(fast, run()))


@needs_gpu
@every_kind_of_number
def test_the_kernels_compile_and_pass_their_self_test(numbers):
    assert gpu.agrees(gpu.Kernels(numbers), DEVICE)  # the error itself, not its name
    assert gpu.why_not(DEVICE, numbers) == ""


@needs_gpu
@every_kind_of_number
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("save", [False, True], ids=["fresh", "saved"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_those_of_the_twin(numbers, dtype, save, shape, monkeypatch):
    (g, x, w), seed = operands(*shape, dtype), torch.tensor(11)

    def run() -> tuple[Tensor, ...]:
        kept = products.pack(x, seed, 9, numbers) if save else x
        found = products.vjps(g, kept, w, seed, with_bias=True, numbers=numbers)
        return (*found, *kept) if save else found

    pairs = twins(numbers, monkeypatch, run)
    assert all(same(a, b) for a, b in pairs[3:])
    if numbers == "int8":
        assert all(same(a, b) for a, b in pairs[:2])
    tolerance = 1e-5 if dtype == torch.float32 else 2.0**-7
    for a, b in pairs[:3]:
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


@needs_gpu
@every_kind_of_number
def test_what_is_not_finite_reaches_the_gradients(numbers, monkeypatch):
    g, x, w = operands(40, 18, 20, torch.float32)
    g[5, 2], x[30, 4], w[0, 7] = torch.nan, torch.inf, -torch.inf
    seed = torch.tensor(11)
    pairs = twins(numbers, monkeypatch, lambda: products.vjps(g, x, w, seed, numbers=numbers)[:2])
    for a, b in pairs:
        assert torch.equal(a.isnan(), b.isnan())
    below, at_weight = (a for a, _ in pairs)
    assert bool(below[5].isnan().all() and below[:, 7].isnan().all())
    assert bool(at_weight[:, 4].isnan().all())


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_roundings_are_those_of_the_twin(bits, twice, dtype, monkeypatch):
    rounding, seed = Rounding(bits, 64), torch.tensor(11)
    x = operands(261, 35, 20, dtype)[0]

    def run() -> list[Tensor]:
        packed = rounding.pack(x, seed, twice=twice)
        restored = [
            rounding.restore(packed, x.shape, x, which) for which in ((0, 1) if twice else (-1,))
        ]
        return [*packed, *restored, *(() if twice else (rounding.times(x, packed),))]

    assert rounding_gpu.agrees(rounding_gpu.Kernels(), DEVICE)  # the error itself, if there is one
    assert rounding_gpu.kernels(x.device) is not None
    fast = run()
    monkeypatch.setattr(rounding_gpu, "kernels", lambda device: None)
    *kept, last = zip(fast, run(), strict=True)
    assert all(same(a, b) for a, b in kept)
    torch.testing.assert_close(*last, rtol=torch.finfo(last[0].dtype).eps, atol=0)


@pytest.mark.parametrize("estimator", [bs.Int8(), bs.Int8(save=True), bs.Float8()], ids=str)
def test_a_layer_of_many_blocks_is_unbiased(estimator):
    """Rows beyond a block of 256, no dimension a multiple of 16."""
    layer, x = nn.Linear(35, 67).to(DEVICE), torch.randn(300, 35).to(DEVICE)
    check(layer, (x,), estimator, DRAWS // 4)


# Layers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_every_estimator_is_unbiased_at_a_linear_layer(estimator):
    check(*adapted(nn.Linear), estimator)


PAIRS = [
    pytest.param(kind, e, id=f"{kind.__name__}-{e}")
    for kind in ADAPTED
    for e in FAMILIES
    if kind is not nn.Linear and not (kind in WITHOUT_8_BITS and isinstance(e, bs.Int8 | bs.Float8))
]


@pytest.mark.parametrize(("kind", "estimator"), PAIRS)
def test_every_family_is_unbiased_at_every_kind_of_layer(kind, estimator):
    check(*adapted(kind), {"re:.*": estimator})


def test_a_wrong_weight_is_noticed(monkeypatch):
    layer, inputs = adapted(nn.Linear)
    bs.sketch_(layer, bs.Rows(keep=0.5))
    drop_the_weights(monkeypatch)
    with pytest.raises(AssertionError, match="is biased"):
        bs.testing.check_unbiased(layer, *inputs, draws=150)


# bfloat16 -------------------------------------------------------------------------------------------


class Autocast(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            return self.inner(x)


@every_family
@pytest.mark.parametrize("how", ["module", "autocast"])
@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv2d])
def test_gradients_in_bfloat16_are_unbiased_within_rounding(kind, how, estimator):
    module, (x,) = adapted(kind)
    module, x = (Autocast(module), x) if how == "autocast" else (module.bfloat16(), x.bfloat16())
    sketched(module, (x,), estimator)
    random = False
    for name, m in bs.testing.gradient_moments(module, x, draws=DRAWS // 4).items():
        error = (m.second / m.draws).sqrt() / m.draws**0.5
        rounding = 4 * 2**-8 * float(m.exact.abs().max()) + 1e-6
        assert bool(((m.mean - m.exact).abs() < 5.5 * error + rounding).all()), f"{name} is biased"
        random |= bool(m.variance > 1e-6 * m.exact.square().sum())
    assert random


# Regions, masks, and what keeps few bits ------------------------------------------------------------


def batch_norm_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip


def token_net() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 3))


TOKENS, IMAGES = (8, 4, 16), (6, 2, 6, 6)
SUBMODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, Any]]] = {
    "region, save": (lambda: Block(16, 2), TOKENS, {"": bs.Region(0.5)}),
    "region, recompute": (lambda: Block(16, 2), TOKENS, {"": bs.Region(0.5, mode="recompute")}),
    "region of tokens": (
        lambda: Block(16, 2),
        TOKENS,
        {"attn": bs.Region(0.5), "mlp": bs.Region(0.5, row_dims=2, mode="recompute")},
    ),
    "region, int8 kept": (lambda: Block(16, 2), TOKENS, {"": bs.Region(0.5, save="int8")}),
    "region, int4 kept": (lambda: Block(16, 2), TOKENS, {"": bs.Region(1.0, save="int4")}),
    "region, int8": (lambda: Block(16, 2), TOKENS, {"": bs.Region(0.5, arithmetic="int8")}),
    "batch norm, int8": (batch_norm_net, IMAGES, {"": bs.Region(1.0, arithmetic="int8")}),
    "batch norm, int4 kept": (batch_norm_net, IMAGES, {"": bs.Region(1.0, save="int4")}),
    "mask": (lambda: mlp(16, 12, 3), (10, 16), {"": bs.Mask(0.4)}),
    "mask of tokens": (lambda: mlp(16, 12, 3), TOKENS, {"0": bs.Mask(0.4, row_dims=2)}),
    "mask above a region": (
        lambda: nn.Sequential(Block(16, 2), nn.Linear(16, 3)),
        TOKENS,
        {"": bs.Mask(0.5), "0": bs.Region(0.5)},
    ),
    "layers, norms, activations": (token_net, TOKENS, {"*": bs.Quantized(bits=2)}),
    "images": (batch_norm_net, IMAGES, {"*": bs.Quantized(bits=4)}),
}
every_submodule = pytest.mark.parametrize("name", SUBMODULES)


@pytest.fixture
def _products_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small products of a region are rounded, too, in graphs that no other test has captured."""
    monkeypatch.setattr(share, "_LEAST_WORK", 0)
    monkeypatch.setattr(share, "_LEAST_WIDTH", 0)
    monkeypatch.setattr(runner, "_RUNNERS", {})


def submodule(name: str) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    build, shape, rules = SUBMODULES[name]
    return build().to(DEVICE), torch.randn(shape).to(DEVICE), rules


@pytest.mark.usefixtures("_products_of_any_size")
@every_submodule
def test_submodules_are_unbiased(name):
    model, x, rules = submodule(name)
    check(model, (x,), rules, DRAWS // 2)


@pytest.mark.parametrize("name", ROUNDED)
def test_layers_without_products_that_keep_two_bits_are_unbiased(name):
    module, x = made(name)
    check(module.to(DEVICE), (x.to(DEVICE),), bs.Quantized(bits=2, group_size=8), DRAWS // 2)


# Waiting for the device -----------------------------------------------------------------------------


@contextmanager
def no_waiting() -> Iterator[None]:
    """An operation that waits for the device is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_that_steps_do_not_wait(model: nn.Module, x: Tensor, rules: Any) -> None:
    if rules is not None:
        bs.sketch_(model, rules)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, foreach=True)
    x.requires_grad_()

    def step() -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):
        step()
    if IS_CUDA:
        with no_waiting():
            step()
    else:
        step()


LARGER = {
    "Linear": (lambda: nn.Linear(96, 64), (128, 96)),
    "Conv2d": (lambda: nn.Conv2d(8, 16, 3, padding=1), (16, 8, 10, 10)),
}


@pytest.mark.parametrize("estimator", [None, *FAMILIES], ids=str)
@pytest.mark.parametrize("kind", LARGER)
def test_a_step_of_a_layer_does_not_wait_for_the_device(kind, estimator):
    build, shape = LARGER[kind]
    check_that_steps_do_not_wait(build().to(DEVICE), torch.randn(shape).to(DEVICE), estimator)


@pytest.mark.usefixtures("_products_of_any_size")
@every_submodule
def test_a_step_of_a_submodule_does_not_wait_for_the_device(name):
    check_that_steps_do_not_wait(*submodule(name))


@needs_gpu
def test_waiting_is_noticed():
    with pytest.raises(RuntimeError, match="synchroniz"), no_waiting():
        torch.ones(3, device=DEVICE).sum().item()


# Memory and planning --------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", [bs.Quantized(bits=4), bs.Int8(save=True)], ids=str)
def test_less_is_kept_and_the_peak_is_lower(estimator):
    layers = [m for _ in range(6) for m in (nn.Linear(256, 256), nn.GELU())]
    model, x = nn.Sequential(*layers).to(DEVICE), torch.randn(4096, 256).to(DEVICE)
    found = []
    for rules in (None, estimator):
        if rules is not None:
            bs.sketch_(model, rules)
        model(x)
        peak = peak_of(lambda: model(x), DEVICE) if IS_CUDA else 0
        found.append((bs.saved_bytes(model, x).total, peak))
    (exact, exact_peak), (ours, our_peak) = found
    assert ours < 0.75 * exact
    assert our_peak < 0.9 * exact_peak or not IS_CUDA


def net() -> nn.Module:
    widths = nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    return nn.Sequential(*widths).to(DEVICE)


def batch_of(step: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(128, 64, generator=torch.Generator().manual_seed(step))
    return x.to(DEVICE), x[:, :10].argmax(1).to(DEVICE)


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def nothing() -> None:
    pass


def train(
    model: nn.Module,
    steps: int,
    before: Callable[[], None] = nothing,
    after: Callable[[], None] = nothing,
) -> list[float]:
    """Losses of a training that calls something before each forward and after each backward pass."""
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    for step in range(steps):
        before()
        loss = loss_of(model, batch_of(step))
        loss.backward()
        after()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def test_a_profile_gives_a_report_and_a_plan():
    model = net()
    profile = bs.profile(model, [batch_of(i) for i in range(4)], loss_of, progress=False)
    assert "0" in str(profile)
    plan = profile.plan(max_extra_variance=10.0)
    print(profile, plan, sep="\n\n")
    assert not any(map(is_swapped, model.modules()))
    memory = profile.plan("memory")
    bs.sketch_(model, memory)
    loss_of(model, batch_of(0)).backward()


def test_a_controller_steers_a_training():
    model = net()
    bs.sketch_(model, bs.Rows(keep=0.5))
    with bs.Controller(model, 0.1, interval=5) as control:
        losses = train(model, 30, after=control.step)
        assert control.extra_variance > 0
    print(control)
    assert losses[-1] < losses[0]


def test_a_training_in_one_option():
    model = net()
    with bs.Auto(model, [batch_of(-1), batch_of(-2)], loss_of, total_steps=200) as auto:
        losses = train(model, 200, before=auto.step)
        print(auto)
    assert losses[-1] < losses[0]
