"""The language model: shapes, causality, tying, generation, and sketches on its layers, branches and head."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import backsketch as bs
from backsketch import models
from backsketch.nn import LinearCrossEntropy
from mutations import drop_the_weights


def small(**options) -> models.GPT:
    sizes = {"context": 8, "dim": 16, "depth": 2, "heads": 2, **options}
    return models.gpt(11, **sizes)


def tokens(batch: int = 3, length: int = 8) -> torch.Tensor:
    return torch.randint(11, (batch, length))


@pytest.mark.parametrize("tied", [True, False])
def test_logits_and_loss_and_every_parameter_learns(tied):
    model, batch, targets = small(tied=tied), tokens(), tokens()
    logits = model(batch)
    assert logits.shape == (3, 8, 11)
    loss = model(batch, targets)
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert (model.head.weight is model.embed.weight) == tied


def test_no_token_sees_a_later_one():
    model, batch = small(), tokens()
    changed = batch.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 11
    torch.testing.assert_close(model(batch)[:, :5], model(changed)[:, :5])
    assert not torch.allclose(model(batch)[:, 5:], model(changed)[:, 5:])


def test_shorter_sequences_and_none_too_long():
    model, batch = small(), tokens()
    torch.testing.assert_close(model(batch[:, :3]), model(batch)[:, :3])
    with pytest.raises(ValueError, match="9 tokens are longer than the context of 8"):
        model(tokens(1, 9))


def test_initial_loss_is_that_of_guessing():
    model = models.gpt(512, dim=64, depth=4)
    batch = torch.randint(512, (4, 128))
    assert model(batch, batch.roll(1)).item() == pytest.approx(
        torch.tensor(512.0).log().item(), abs=0.1
    )


def test_generated_text_continues_and_repeats_with_its_generator():
    model, start = small().eval(), tokens(2, 3)
    draw = [
        model.generate(start, 12, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)
    ]
    assert draw[0].shape == (2, 15)
    assert torch.equal(draw[0][:, :3], start)
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 30, "heads": 4}, "not a multiple of the 4 heads"),
        ({"context": 0}, "must be positive"),
        ({"heads": 0}, "must be positive"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        models.gpt(11, **options)


# --------------------------------------------------------------------------------------------------
# Sketches
# --------------------------------------------------------------------------------------------------


def test_layer_sketches_reach_every_linear_layer():
    report = bs.sketch_(small(), bs.Rows(keep=0.5))
    assert len(report.sketched) == 2 * 4 + 1


@pytest.mark.parametrize(
    "rules",
    [
        {"head": bs.Rows(keep=0.3)},
        bs.Rows(keep=0.5),
        pytest.param({"head": bs.Columns(keep=0.5)}, marks=pytest.mark.slow),
        pytest.param({"head": bs.Rows(keep=0.4, scores="l2")}, marks=pytest.mark.slow),
        {"head": bs.Int8(sketch=bs.Rows(keep=0.5))},
        bs.Int8(),
        {"blocks.*.mlp": bs.Region(keep=0.5, row_dims=2)},
        pytest.param({"blocks.*.attn": bs.Region(keep=0.5)}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_gradients_of_the_loss_are_unbiased(rules):
    model, batch, targets = small(depth=1), tokens(4, 6), tokens(4, 6)
    targets[0, :2] = -100
    bs.sketch_(model, rules)
    bs.testing.check_unbiased(model, batch, targets, draws=120)


def test_a_head_without_weights_is_noticed(monkeypatch):
    model = small(depth=1)
    bs.sketch_(model, {"head": bs.Rows(keep=0.3)})
    drop_the_weights(monkeypatch)
    with pytest.raises(AssertionError, match="biased"):
        bs.testing.check_unbiased(model, tokens(4, 6), tokens(4, 6), draws=120)


def test_a_sketched_head_stores_no_logits_and_is_exact_where_it_should_be():
    model, batch, targets = models.gpt(4000, dim=16, depth=1, context=8), tokens(), tokens()
    plain = copy.deepcopy(model)
    bs.sketch_(model, {"head": bs.Rows(keep=0.25)})
    saved = [bs.saved_bytes(m, batch, targets).under("head") for m in (plain, model)]
    assert saved[1] < 0.05 * saved[0]
    assert torch.equal(model(batch), plain(batch))
    torch.testing.assert_close(model(batch, targets), plain(batch, targets))
    with bs.exact(model):
        assert torch.equal(model(batch, targets), plain(batch, targets))
    bs.restore_(model)
    assert type(model.head) is LinearCrossEntropy


def test_its_weights_load_into_a_plain_linear_head():
    head = LinearCrossEntropy(4, 7)
    plain = nn.Linear(4, 7)
    plain.load_state_dict(head.state_dict())
    x = torch.randn(2, 3, 4)
    assert torch.equal(head(x), plain(x))
    targets = torch.randint(7, (2, 3))
    bs.sketch_(head, bs.Rows(keep=0.5))
    head(x).sum().backward()  # without targets it is a sketched linear layer
    head(x, targets).backward()
