"""The variance ledger: the martingale over sites, closed forms beside measurements, nothing left behind."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import backsketch as bs
from backsketch import sampling
from backsketch.models import build
from backsketch.planning.measure.passes import passes
from helpers import monte_carlo


class Residual(nn.Module):
    """``x + down(relu(up(x)))``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


def plain() -> nn.Module:
    sizes = [6, 16, 16, 16]
    layers = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(sizes)]
    return nn.Sequential(*layers, nn.Linear(16, 3))


def residual() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), Residual(12), Residual(12), nn.Linear(12, 3))


def batches(count=2, size=16):
    generator = torch.Generator().manual_seed(5)
    return [
        (
            torch.randn(size, 6, generator=generator),
            torch.randint(3, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


NETWORKS = {"plain": plain, "residual": residual}
RULES = {
    "elements": bs.Elements(keep=0.6),
    "columns": bs.Columns(keep=0.5),
    "rows": bs.Rows(keep=0.4, design="independent"),
    "stored": {"0*": bs.StoredRows(keep=0.5), "*": bs.Columns(keep=0.6)},
    "mask and rows": {"": bs.Mask(keep=0.6), "re:[0-9].*": bs.Rows(keep=0.4)},
}


@pytest.mark.fast_cases("mask and rows-residual")
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("rules", RULES)
def test_the_joint_column_adds_up_to_the_total(network, rules):
    model = NETWORKS[network]()
    bs.sketch_(model, RULES[rules])
    data = batches()
    ledger = bs.variance(model, data, loss_fn, draws=30)
    assert abs(ledger.cross) <= 4 * ledger.cross_error + 1e-6 * ledger.total
    # And the total is what training sees: other draws, from the ordinary stream.
    sgd = ledger.sgd_variance
    ordinary, _ = monte_carlo(model, data, loss_fn, draws=60)
    error = 1.3 * ledger.total_error / sgd  # of both together
    assert abs(ordinary - ledger.extra_variance) < 4 * error


@pytest.mark.fast_cases("residual")
@pytest.mark.parametrize("network", NETWORKS)
def test_fresh_draws_in_place_of_shared_ones_break_it(network, monkeypatch):
    """The mutation: a pass no longer repeats the draws of the pass before it."""
    model = NETWORKS[network]()
    bs.sketch_(model, bs.Elements(keep=0.6))
    restart, passes_so_far = sampling.Keys.restart, iter(range(10**9))
    monkeypatch.setattr(
        sampling.Keys, "restart", lambda self, *name: restart(self, *name, next(passes_so_far))
    )
    ledger = bs.variance(model, batches(), loss_fn, draws=30)
    assert ledger.cross < -4 * ledger.cross_error


def test_where_sites_compound_isolated_sums_to_less_and_where_rows_nest_to_more():
    model = plain()
    bs.sketch_(model, bs.Elements(keep=0.5))
    ledger = bs.variance(model, batches(), loss_fn, draws=30)
    assert ledger.sum_isolated < 0.8 * ledger.sum_joint
    assert ledger.sites[-1].compounding > 1.5
    assert [site.growth for site in ledger.sites] == sorted(site.growth for site in ledger.sites)
    # Rows that the first site drops are zero, and never drawn below: nested sampling, one site's noise.
    bs.sketch_(model, bs.Rows(keep=0.5))
    nested = bs.variance(model, batches(), loss_fn, draws=30)
    assert nested.sum_isolated > 1.5 * nested.sum_joint
    # grad_weight alone leaves every cotangent exact.
    bs.sketch_(model, bs.Split(grad_weight=bs.Rows(keep=0.5)))
    split = bs.variance(model, batches(), loss_fn, draws=10)
    assert split.sum_isolated == pytest.approx(split.sum_joint, rel=1e-6)
    assert [site.growth for site in split.sites] == pytest.approx([1.0] * 4)


@pytest.mark.fast_cases("rows:keep=0.4")
@pytest.mark.parametrize(
    "sketch",
    [
        bs.Elements(keep=0.5),
        bs.Columns(keep=0.5),
        bs.Rows(keep=0.4),
        bs.StoredRows(keep=0.5),
        bs.LowRank(keep=0.6),
        bs.Projection(keep=0.5),
        bs.Quantized(bits=2),
    ],
    ids=str,
)
def test_the_closed_forms_beside_the_measurement(sketch):
    model = plain()
    bs.sketch_(model, sketch)
    ledger = bs.variance(model, batches(), loss_fn, draws=50)
    tiny = 1e-6 * ledger.total
    for site in ledger.sites:
        isolated, joint = 5 * site.isolated_error + tiny, 5 * site.joint_error + tiny
        assert site.injected_weight == pytest.approx(site.predicted_weight, abs=isolated)
        assert site.injected == pytest.approx(site.predicted, rel=0.25, abs=1e-6 * site.energy)
        assert site.joint == pytest.approx(site.predicted_joint, abs=joint)
    assert ledger.predicted_multiplier == pytest.approx(ledger.multiplier, rel=0.1)


@pytest.mark.parametrize("width", [16, 40])
def test_a_weight_that_is_held_transposed_has_the_closed_forms_of_a_linear_layer(width):
    kind = pytest.importorskip("transformers.pytorch_utils").Conv1D
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, width), nn.Linear(width, 4))
    turned = copy.deepcopy(linear)
    turned[2] = kind(width, 16)
    with torch.no_grad():
        turned[2].weight.copy_(linear[2].weight.T)
        turned[2].bias.copy_(linear[2].bias)
    data, found = [torch.randn(12, 8) for _ in range(3)], []
    for model in (linear, turned):
        bs.seed(0)
        bs.sketch_(model, {"2": bs.Rows(keep=0.5)})
        found.append(bs.variance(model, data, lambda model, x: model(x).square().sum()).sites[0])
    for field in (
        "predicted",
        "predicted_weight",
        "injected",
        "injected_weight",
        "predicted_joint",
    ):
        ours, theirs = (getattr(site, field) for site in found)
        assert ours == pytest.approx(theirs, rel=1e-4), field
        assert theirs > 0


def test_a_convolution_has_its_closed_form_too():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 1), nn.Flatten()
    )
    model.append(nn.Linear(6 * 36, 3))
    bs.sketch_(model, {"4": None, "*": bs.Rows(keep=0.5, design="independent")})
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(8, 1, 6, 6, generator=generator), torch.arange(8) % 3) for _ in range(2)]
    ledger = bs.variance(model, data, loss_fn, draws=80)
    assert [site.name for site in ledger.sites] == ["2", "0"]
    for site in ledger.sites:
        assert site.injected_weight == pytest.approx(site.predicted_weight, rel=0.15)


def trained(name: str, shape, seed=0) -> tuple[nn.Module, list]:
    """A reference model after a few steps on random images with learnable labels."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(10, *shape, generator=generator)
    options = {"mlp": {"widths": [64, 64]}, "vit": {"dim": 32, "depth": 2, "heads": 2}}[name]
    model = build(name, shape, 10, **options)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)

    def batch():
        y = torch.randint(10, (32,), generator=generator)
        return centres[y] + 2 * torch.randn(32, *shape, generator=generator), y

    for _ in range(40):
        loss = loss_fn(model, batch())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model, [batch() for _ in range(4)]


@pytest.mark.fast_cases("rows:keep=0.5-mlp")
@pytest.mark.parametrize(("name", "shape"), [("mlp", (1, 8, 8)), ("vit", (3, 16, 16))])
@pytest.mark.parametrize(
    "sketch", ["rows:keep=0.5", "columns:keep=0.5", "split:grad_weight=(rows:keep=0.25)"]
)
def test_v_is_predicted_within_15_percent(name, shape, sketch):
    model, data = trained(name, shape)
    bs.sketch_(model, bs.parse(sketch))
    ledger = bs.variance(model, data, loss_fn, draws=4)
    assert ledger.predicted_multiplier == pytest.approx(ledger.multiplier, rel=0.15)
    omega = ledger.predicted_multiplier - 1
    assert omega == pytest.approx(ledger.extra_variance, rel=0.15)


def test_regions_and_masks_are_sites_and_checked_first():
    model = residual()
    rules = {
        "": bs.Mask(keep=0.7),
        "1": bs.Region(keep=0.5, mode="recompute"),
        "2": bs.Region(keep=0.5),
    }
    bs.sketch_(model, rules)
    ledger = bs.variance(model, batches(), loss_fn, draws=40)
    assert [site.name for site in ledger.sites] == ["", "2", "1"]
    assert not ledger.left_out
    assert all(site.isolated > 0 for site in ledger.sites)
    assert abs(ledger.cross) <= 4 * ledger.cross_error + 1e-6 * ledger.total
    for site in ledger.sites:
        assert site.injected == pytest.approx(site.predicted, rel=0.2)


def test_a_refused_region_is_left_out_with_its_reason():
    model = nn.Sequential(nn.Linear(6, 8), nn.Softmax(dim=0), nn.Linear(8, 3))
    bs.sketch_(model, {"1": bs.Region(keep=0.5), "2": bs.Rows(keep=0.5)})
    ledger = bs.variance(model, batches(), loss_fn, draws=2)
    assert [site.name for site in ledger.sites] == ["2"]
    assert "1" in ledger.left_out
    assert "left out: 1" in str(ledger)


def snapshot(model):
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    state = {name: t.clone() for name, t in model.state_dict().items()}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    attributes = [sorted(m.__dict__) for m in model.modules()]
    return grads, state, [m.training for m in model.modules()], hooks, attributes


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(fails):
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    bs.sketch_(model, bs.Rows(keep=0.5))
    loss_fn(model, batches()[0]).backward()
    model.eval()
    model[0].train()
    data = batches(3)
    if fails:
        data[2] = (data[2][0] * math.nan, data[2][1])
    before, torch_state, sketch_state = snapshot(model), torch.get_rng_state(), bs.get_rng_state()
    with pytest.raises(ValueError, match="batch 2 is nan") if fails else nullcontext():
        first = bs.variance(model, iter(data), loss_fn, draws=2)
        assert str(first) == str(bs.variance(model, data, loss_fn, draws=2))
    after = snapshot(model)
    torch.testing.assert_close(after[:2], before[:2], rtol=0, atol=0)
    assert after[2:] == before[2:]
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert bs.get_rng_state() == sketch_state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": plain()}, "no sketched sites"),
        ({"batches": []}, "batches is empty"),
        ({"draws": 1}, "draws or more"),
        ({"loss_fn": lambda m, b: m(b[0])}, "scalar"),
        ({"loss_fn": lambda m, b: loss_fn(m, b) * math.inf}, "batch 0 is inf"),
        ({"loss_fn": lambda m, b: loss_fn(m, b).detach()}, "has no gradient"),
        ({"loss_fn": lambda m, b: m[0](b[0]).sum()}, "none of the sketched"),
    ],
)
def test_bad_input_is_named(change, message):
    model = plain()
    bs.sketch_(model, {"3": bs.Rows(keep=0.5)})
    arguments = {"model": model, "batches": batches(), "loss_fn": loss_fn, "draws": 2, **change}
    with pytest.raises(ValueError, match=message):
        bs.variance(**arguments)


def test_a_ledger_survives_json_and_prints_and_plots(tmp_path):
    model = plain()
    bs.sketch_(model, bs.Columns(keep=0.5))
    ledger = bs.variance(model, batches(), loss_fn, draws=3)
    ledger.save(tmp_path / "ledger.json")
    again = bs.Ledger.load(tmp_path / "ledger.json")
    assert again.to_dict() == ledger.to_dict()
    assert str(again) == str(ledger)
    for said in ("joint", "predicted", "noise scale", "columns:keep=0.5", "2.0"):
        assert said in str(ledger)
    pytest.importorskip("matplotlib")
    figure = ledger.plot()
    figure.savefig(tmp_path / "ledger.png")
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["3", "2.0", "1.0", "0.0"]
    with pytest.raises(ValueError, match="not a variance ledger"):
        bs.Ledger.from_dict({"sites": []})


def test_a_single_batch_has_no_sgd_variance():
    model = plain()
    bs.sketch_(model, bs.Columns(keep=0.5))
    ledger = bs.variance(model, batches(1), loss_fn, draws=2)
    assert ledger.sgd_variance is ledger.noise_scale is ledger.multiplier is None
    assert "absolute" in str(ledger)


def test_keyed_draws_do_not_depend_on_which_other_sites_are_active():
    model = plain()
    bs.sketch_(model, bs.Elements(keep=0.5))
    with passes(copy.deepcopy(model), loss_fn) as run:
        batch = batches()[0]
        top = max(p.index for p in run.sites)
        names = list(run.parameters)
        one = run.gradient(batch, 0, [top])
        both = run.gradient(batch, 0, [top, 0])
        other = run.gradient(batch, 0, [top], draw=1)
    last = names.index("3.weight")
    assert torch.equal(one[last], both[last])
    assert not torch.equal(one[last], other[last])
    assert not torch.equal(one[0], both[0])


def test_the_compiled_model_is_measured_as_the_module_inside():
    model = plain()
    bs.sketch_(model, bs.Columns(keep=0.5))
    wrapped = torch.compile(model, backend="eager")
    direct = bs.variance(model, batches(), loss_fn, draws=2)
    assert str(bs.variance(wrapped, batches(), loss_fn, draws=2)) == str(direct)
