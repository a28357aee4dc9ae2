"""The head and its cross-entropy in one: values, gradients at keep 1, unbiasedness, memory, edges."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import backsketch as bs
from backsketch.ops import linear_cross_entropy, logits
from mutations import drop_the_weights, halve_the_dither_of_products, shift_the_indices

ROWS, WIDTH, CLASSES = 13, 5, 11

FORMS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.2},
    "z-loss": {"z_loss": 0.05},
    "soft cap": {"soft_cap": 1.5},
    "all": {"label_smoothing": 0.1, "z_loss": 0.03, "soft_cap": 2.0},
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def reference(
    x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, *,
    ignore_index: int = -100, label_smoothing: float = 0.0, z_loss: float = 0.0,
    soft_cap: float | None = None, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """The obvious slow twin: all logits, PyTorch's own loss."""
    z = F.linear(x, weight, bias).flatten(0, -2)
    z = z if soft_cap is None else soft_cap * torch.tanh(z / soft_cap)
    flat = targets.flatten()
    losses = F.cross_entropy(
        z, flat, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none"
    )
    live = flat != ignore_index
    losses = losses + torch.where(live, z_loss * z.logsumexp(1).square(), 0.0)
    if reduction == "none":
        return losses.view(targets.shape)
    return losses.sum() / (live.sum() if reduction == "mean" else 1)


def case(dtype: torch.dtype = torch.float64, seed: int = 0, ignored: bool = True):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, WIDTH, generator=g, dtype=dtype) * torch.linspace(0.3, 2, ROWS)[:, None]
    weight = torch.randn(CLASSES, WIDTH, generator=g, dtype=dtype)
    bias = torch.randn(CLASSES, generator=g, dtype=dtype)
    targets = torch.randint(CLASSES, (ROWS,), generator=g)
    if ignored:
        targets[[2, 7]] = -100
    x = x.to(dtype)
    return [t.requires_grad_() for t in (x, weight, bias)], targets


def gradients(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, leaves))


# --------------------------------------------------------------------------------------------------
# Values and exact gradients
# --------------------------------------------------------------------------------------------------


@every_form
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("chunk_rows", [None, 4])
def test_value_and_gradients_at_keep_1_are_pytorchs(form, reduction, chunk_rows):
    (x, weight, bias), targets = case()
    options = {**form, "reduction": reduction}
    ours = linear_cross_entropy(x, weight, targets, bias, chunk_rows=chunk_rows, **options)
    theirs = reference(x, weight, targets, bias, **options)
    torch.testing.assert_close(ours, theirs)
    cotangent = torch.linspace(-1, 2, ours.numel(), dtype=ours.dtype).view(ours.shape)
    pairs = [gradients((loss * cotangent).sum(), [x, weight, bias]) for loss in (ours, theirs)]
    torch.testing.assert_close(*pairs)


@every_form
@pytest.mark.parametrize("keep", [0.1, 0.5])
def test_the_value_does_not_depend_on_keep(form, keep):
    (x, weight, bias), targets = case(torch.float32)
    ours = linear_cross_entropy(x, weight, targets, bias, keep=keep, **form)
    assert ours.item() == linear_cross_entropy(x, weight, targets, bias, **form).item()
    with torch.no_grad():
        assert ours.item() == linear_cross_entropy(x, weight, targets, bias, **form).item()


def test_leading_dimensions_no_bias_and_strides():
    x = torch.randn(3, 8, 4, dtype=torch.float64)[:, ::2].requires_grad_()
    weight = torch.randn(4, 9, dtype=torch.float64).T.requires_grad_()
    targets = torch.randint(9, (4, 3)).T
    ours, theirs = (f(x, weight, targets) for f in (linear_cross_entropy, reference))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(gradients(loss, [x, weight]) for loss in (ours, theirs)))
    assert linear_cross_entropy(x, weight, targets, reduction="none").shape == (3, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_as_good_as_pytorchs(dtype):
    (x, weight, bias), targets = case()
    exact = [
        reference(x, weight, targets, bias),
        *gradients(reference(x, weight, targets, bias), [x, weight]),
    ]
    low = [t.detach().to(dtype).requires_grad_() for t in (x, weight, bias)]
    errors = []
    for loss in (linear_cross_entropy, reference):
        value = loss(low[0], low[1], targets, low[2])
        found = [value, *gradients(value, low[:2])]
        errors.append(
            [float((a.detach().double() - b).abs().max().detach()) for a, b in zip(found, exact)]
        )
    assert all(ours <= 2 * theirs + 1e-7 for ours, theirs in zip(*errors))


def test_autocast_gives_pytorchs_values_and_saves_no_copy_of_the_weight():
    (x, weight, bias), targets = case(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_cross_entropy(x, weight, targets, bias)
        theirs = reference(x, weight, targets, bias)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs.float(), rtol=2e-3, atol=2e-3)
    found = gradients(ours, [x, weight, bias])
    assert [g.dtype for g in found] == [torch.float32] * 3
    torch.testing.assert_close(found, gradients(theirs, [x, weight, bias]), rtol=2e-2, atol=5e-3)


def test_confident_rows_keep_their_digits():
    x, weight = torch.tensor([[18.0], [20.0]]), torch.tensor([[1.0], [0.0]])
    scores = logits.head_losses(x, weight, None, torch.tensor([0, 0]), -100, 0.0, 0.0, 0.0, 0)[2]
    assert scores[0] / scores[1] == pytest.approx(math.exp(2), rel=0.1)


# --------------------------------------------------------------------------------------------------
# Unbiased
# --------------------------------------------------------------------------------------------------


class Head(nn.Module):
    """A head with an embedding below it, tied or not, as a module for ``check_unbiased``."""

    def __init__(self, tied: bool, keep: float, bias: bool = True, **form):
        super().__init__()
        self.embed = nn.Embedding(CLASSES, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES, bias=bias)
        if tied:
            self.head.weight = self.embed.weight
        self.keep, self.form = keep, form

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.mix(self.embed(tokens)) * torch.linspace(0.5, 2, tokens.shape[0])[:, None]
        return linear_cross_entropy(
            x, self.head.weight, targets, self.head.bias, keep=self.keep, **self.form
        )


class ExactHead(Head):
    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.mix(self.embed(tokens)) * torch.linspace(0.5, 2, tokens.shape[0])[:, None]
        form = {name: value for name, value in self.form.items() if name != "arithmetic"}
        return reference(x, self.head.weight, targets, self.head.bias, **form)


def check(head: Head, draws: int = 200) -> bs.testing.UnbiasedReport:
    plain = ExactHead(False, 1.0, head.head.bias is not None, **head.form)
    if head.head.weight is head.embed.weight:
        plain.head.weight = plain.embed.weight
    plain.load_state_dict(head.state_dict())
    _, targets = case()
    tokens = torch.arange(ROWS) % CLASSES
    return bs.testing.check_unbiased(head, tokens, targets, draws=draws, reference=plain)


UNBIASED = [
    *(pytest.param({"tied": tied, **form}, id=f"{name}{'-tied' * tied}")
      for (name, form), tied in itertools.product(FORMS.items(), [False, True])),
    pytest.param({"tied": True, "arithmetic": "int8"}, id="int8"),
    pytest.param({"tied": False, "arithmetic": "int8", "label_smoothing": 0.1}, id="int8-smoothing"),
    pytest.param({"tied": False, "reduction": "none"}, id="none"),
    pytest.param({"tied": False, "bias": False, "reduction": "sum"}, id="sum-no bias"),
]  # fmt: skip


@pytest.mark.fast_cases(
    "plain", "smoothing-tied", "z-loss", "all-tied", "int8", "none", "sum-no bias"
)
@pytest.mark.parametrize("options", UNBIASED)
def test_unbiased(options):
    report = check(Head(keep=0.3, **options))
    assert report.relative_variance["head.bias" if options.get("bias", True) else "mix.weight"] > 0


@pytest.mark.parametrize("mutation", [drop_the_weights, shift_the_indices])
@pytest.mark.parametrize("form", ["plain", "all"])
def test_a_wrong_draw_is_noticed(form, mutation, monkeypatch):
    mutation(monkeypatch)
    with pytest.raises(AssertionError, match="biased"):
        check(Head(True, 0.3, **FORMS[form]))


def test_eight_bits_alone_are_close_and_unbiased(monkeypatch):
    head = Head(False, 1.0, arithmetic="int8")
    report = check(head)
    assert 0 < report.relative_variance["head.weight"] < 1e-2
    halve_the_dither_of_products(monkeypatch)
    with pytest.raises(AssertionError, match="biased"):
        check(head, draws=200)


def test_zero_inputs_have_gradients_too():
    """Of the bias and of the input, although no row of x has a norm."""
    weight, bias = torch.randn(CLASSES, WIDTH), torch.randn(CLASSES, requires_grad=True)
    x, targets = torch.zeros(4, WIDTH, requires_grad=True), torch.arange(4)
    exact = gradients(reference(x, weight, targets, bias), [x, bias])
    total = [torch.zeros_like(g) for g in exact]
    for _ in range(600):
        found = gradients(linear_cross_entropy(x, weight, targets, bias, keep=0.5), [x, bias])
        total = [a + b / 600 for a, b in zip(total, found)]
    torch.testing.assert_close(total, exact, atol=0.05, rtol=0)


def test_the_scores_are_better_than_uniform_ones(monkeypatch):
    """Rows whose target is likely hardly matter: less variance than equal chances have."""
    torch.manual_seed(1)
    x = torch.randn(64, WIDTH)
    weight = (torch.randn(CLASSES, WIDTH) * 3).requires_grad_()
    targets = (x @ weight.detach().T).argmax(1)
    targets[::8] = 0
    exact = gradients(reference(x, weight, targets), [weight])[0]

    def variance() -> float:
        found = [
            gradients(linear_cross_entropy(x, weight, targets, keep=0.25), [weight])[0]
            for _ in range(200)
        ]
        return float(sum((g - exact).square().sum() for g in found))

    ours = variance()
    monkeypatch.setattr(
        logits, "draw", lambda scores, *a: bs.sampling.draw(torch.ones_like(scores), *a)
    )
    assert ours < 0.3 * variance()


# --------------------------------------------------------------------------------------------------
# What is saved
# --------------------------------------------------------------------------------------------------


class Saver(nn.Module):
    def __init__(self, classes: int, fused: bool):
        super().__init__()
        self.below, self.head, self.fused = nn.Linear(8, 8), nn.Linear(8, classes), fused

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        loss = linear_cross_entropy if self.fused else reference
        return loss(self.below(x), self.head.weight, targets, self.head.bias)


@pytest.mark.parametrize("autocast", [False, True])
def test_saved_bytes_do_not_depend_on_the_vocabulary(autocast):
    x, targets = torch.randn(32, 8), torch.randint(50, (32,))

    def saved(classes: int, fused: bool) -> int:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return bs.saved_bytes(Saver(classes, fused), x, targets).total

    assert saved(50, True) == saved(500, True)
    assert saved(500, True) < 0.05 * saved(500, False)


# --------------------------------------------------------------------------------------------------
# Edges
# --------------------------------------------------------------------------------------------------


def test_ignored_rows_do_not_count_and_are_never_drawn():
    (x, weight, bias), targets = case(ignored=False)
    targets[3:] = -100
    ours = linear_cross_entropy(x, weight, targets, bias, keep=0.34)
    grad = gradients(ours, [x])[0]
    rows = grad.abs().sum(1).nonzero().flatten()
    assert rows.numel() == 2  # of the three that count, a third is rounded up to two
    assert rows.max() < 3


def test_all_rows_ignored_and_no_rows():
    (x, weight, bias), targets = case()
    loss = linear_cross_entropy(x, weight, targets * 0 - 100, bias, reduction="sum", keep=0.5)
    assert loss.item() == 0
    assert all((g == 0).all() for g in gradients(loss, [x, weight, bias]))
    loss = linear_cross_entropy(x, weight, targets * 0 - 100, bias, keep=0.5)
    assert loss.isnan()
    assert all((g == 0).all() for g in gradients(loss, [x, weight, bias]))  # as PyTorch has it
    empty = linear_cross_entropy(x[:0], weight, targets[:0], bias, reduction="sum", keep=0.5)
    assert empty.item() == 0
    assert (gradients(empty, [weight])[0] == 0).all()


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_frozen_parts_get_no_gradient_and_the_others_theirs(frozen):
    leaves, targets = case()
    for i in frozen:
        leaves[i].requires_grad_(False)
    live = [leaf for leaf in leaves if leaf.requires_grad]
    x, weight, bias = leaves
    pairs = (
        gradients(f(x, weight, targets, bias), live) for f in (linear_cross_entropy, reference)
    )
    torch.testing.assert_close(*pairs)


@pytest.mark.parametrize("where", ["x", "weight", "cotangent"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nonfinite_numbers_reach_the_gradients(where, value):
    (x, weight, bias), targets = case(torch.float32)
    factor = torch.ones(ROWS)
    with torch.no_grad():
        {"x": x, "weight": weight, "cotangent": factor}[where].view(-1)[0] = value
    losses = linear_cross_entropy(x, weight, targets, bias, reduction="none", keep=0.2)
    found = gradients((losses * factor).sum(), [weight])[0]
    assert not found.isfinite().all()


def test_double_backward_is_refused():
    (x, weight, bias), targets = case()
    loss = linear_cross_entropy(x, weight, targets, bias, keep=0.5)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


def test_torch_func_grad_and_vmap():
    (x, weight, bias), targets = case()

    def loss(w: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return linear_cross_entropy(x, w, t, bias, reduction="sum")

    exact = gradients(reference(x, weight, targets, bias, reduction="sum"), [weight])[0]
    ours = torch.func.grad(loss)(weight.detach(), x.detach(), targets)
    torch.testing.assert_close(ours, exact)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0), randomness="different")(
        weight.detach(), x.detach()[:, None], targets[:, None]
    )
    torch.testing.assert_close(each.sum(0), exact)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.0}, "keep must lie"),
        ({"keep": 1.5}, "keep must lie"),
        ({"label_smoothing": -0.1}, "label_smoothing must lie"),
        ({"soft_cap": 0.0}, "soft_cap must be positive"),
        ({"reduction": "average"}, "reduction must be one of 'mean', 'sum', 'none'"),
        ({"arithmetic": "int4"}, "arithmetic must be one of"),
        ({"chunk_rows": 0}, "chunk_rows must be positive"),
        ({"targets": torch.zeros(3, dtype=torch.long)}, "targets must be whole numbers"),
        ({"targets": torch.zeros(ROWS)}, "targets must be whole numbers"),
        ({"weight": torch.zeros(4, WIDTH + 1)}, "x must be"),
        ({"bias": torch.zeros(CLASSES - 1)}, "x must be"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    (x, weight, bias), targets = case()
    arguments = {"x": x, "weight": weight, "targets": targets, "bias": bias, **options}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**arguments)


def test_an_impossible_target_is_an_error():
    (x, weight, bias), targets = case()
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        linear_cross_entropy(x, weight, targets + CLASSES, bias)


# --------------------------------------------------------------------------------------------------
# Compiled
# --------------------------------------------------------------------------------------------------


def compiling(test):
    """Warnings of PyTorch's compiler about PyTorch."""
    for text in ("torch.jit.script_method", "should not be instantiated"):
        test = pytest.mark.filterwarnings(f"ignore:.*{text}:DeprecationWarning")(test)
    return test


@compiling
@pytest.mark.fast_cases("aot_eager_decomp_partition")
@pytest.mark.parametrize("backend", ["aot_eager_decomp_partition", "inductor"])
def test_compiled_in_one_graph_without_recompiling(backend):
    torch._dynamo.reset()
    head = Head(True, 0.5, label_smoothing=0.1)
    run = torch.compile(head, fullgraph=True, backend=backend)
    _, targets = case()
    tokens = torch.arange(ROWS) % CLASSES
    total = torch.zeros(CLASSES, WIDTH)
    run(tokens, targets).backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(800):
            head.zero_grad()
            run(tokens, targets).backward()
            total += head.embed.weight.grad / 800
    plain = ExactHead(True, 1.0, label_smoothing=0.1)
    plain.head.weight = plain.embed.weight
    plain.load_state_dict(head.state_dict())
    plain(tokens, targets).backward()
    torch.testing.assert_close(total, plain.embed.weight.grad, atol=0.05, rtol=0)
    torch._dynamo.reset()


@compiling
def test_several_keeps_in_one_compiled_function():
    torch._dynamo.reset()
    heads = nn.ModuleList(Head(False, keep) for keep in (0.3, 0.5, 0.7))

    @torch.compile(backend="aot_eager_decomp_partition")
    def total(tokens: Tensor, targets: Tensor) -> Tensor:
        return sum(head(tokens, targets) for head in heads)

    _, targets = case()
    total(torch.arange(ROWS) % CLASSES, targets).backward()
    for head in heads:
        run = torch.compile(head, fullgraph=True, backend="aot_eager_decomp_partition")
        run(torch.arange(ROWS) % CLASSES, targets).backward()
    torch._dynamo.reset()
